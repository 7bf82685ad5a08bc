import { copyFile } from 'node:fs/promises';
import { request } from 'node:https';
import { join, resolve } from 'node:path';
import type { TLSSocket } from 'node:tls';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import WebSocket from 'ws';
import { openSocket } from '../realtime/support.ts';
import {
  endPrograms,
  newFolder,
  processesIn,
  removeFolder,
  startProgram,
  startServerProcess,
} from '../support/processes.ts';
import { caller } from '../support/server.ts';
import { makeTask, until } from '../support/work.ts';

let folder: string;
beforeEach(async () => {
  folder = await newFolder();
});
afterEach(async () => {
  await endPrograms();
  await removeFolder(folder);
});

const CERTS = resolve(import.meta.dirname, '../support/tls');

/** The processes that answer: whoever asks often meets all of them. */
async function pids(url: string): Promise<Set<number>> {
  const answers = await Promise.all(
    Array.from(
      { length: 20 },
      async () =>
        // Each on a connection of its own: those of one go to one process.
        (await caller(url, undefined)('GET', '//ws/health', undefined, { connection: 'close' })).body.workers,
    ),
  );
  return new Set(answers.flat().map(({ pid }: { pid: number }) => pid));
}

describe('WORKERS=2', () => {
  test('serves from two processes, starts one anew that dies, and stops in order', { timeout: 90_000 }, async () => {
    const server = await startServerProcess({ folder, env: { WORKERS: '2' } });
    const before = await until(
      () => pids(server.url),
      ({ size }) => size === 2,
    );
    expect(before.has(server.child.pid ?? 0)).toBe(false);
    const call = caller(server.url, server.key);
    const [a, b] = [
      openSocket(`${server.url}/ws?token=${server.key}`),
      openSocket(`${server.url}/ws?token=${server.key}`),
    ];
    await Promise.all([a.ack, b.ack]);
    const task = await makeTask(call);
    for (const socket of [a, b]) await socket.frame(({ data }) => data['task_id'] === task.id);

    const [victim = 0] = before;
    process.kill(victim, 'SIGKILL');
    // What is handed to a dead worker before the primary has noticed is lost: Node waits for its answer for ever.
    await server.saying(/a worker died/);
    const after = await until(
      () => pids(server.url).catch(() => new Set<number>()),
      (now) => now.size === 2 && !now.has(victim),
      40,
    );
    expect(after.has(victim)).toBe(false);
    expect((await call('GET', '/tasks')).body.total).toBe(1);
    const [one, other] = [
      openSocket(`${server.url}/ws?token=${server.key}`),
      openSocket(`${server.url}/ws?token=${server.key}`),
    ];
    await Promise.all([one.ack, other.ack]);

    server.child.kill('SIGTERM');
    expect(await server.exited).toBe(0);
    expect(await one.closed).toMatchObject({ code: 1001 });
    await until(
      () => processesIn(folder),
      (left) => left.length === 0,
    );
  });

  test('SIGHUP replaces all processes without a failed request, and no socket misses an event', {
    timeout: 120_000,
  }, async () => {
    const server = await startServerProcess({ folder, env: { WORKERS: '2' } });
    const before = await until(
      () => pids(server.url),
      ({ size }) => size === 2,
    );
    const call = caller(server.url, server.key);
    const seen: number[] = [];
    let last = Number((await call('GET', '/tasks?total=false')).headers.get('x-event-cursor'));
    let over = false;
    const follow = async () => {
      while (!over) {
        const socket = openSocket(`${server.url}/ws?token=${server.key}&topics=tasks&last_event_id=${last}`);
        socket.socket.on('message', (data) => {
          const frame = JSON.parse(String(data)) as { event_id?: number; data: { task_id?: number } };
          if (frame.event_id === undefined) return;
          last = Math.max(last, frame.event_id);
          if (frame.data.task_id !== undefined) seen.push(frame.data.task_id);
        });
        if (over) socket.socket.terminate();
        else await Promise.race([socket.closed, until(async () => over, Boolean, 100)]);
        socket.socket.terminate();
      }
    };
    const following = follow();
    const made: number[] = [];
    const failed: unknown[] = [];
    let writing = true;
    const writers = Array.from({ length: 4 }, async () => {
      while (writing) {
        const { status, body } = await call('POST', '/tasks', { skill_name: 'x' }).catch((error: Error) => ({
          status: 0,
          body: String(error.cause ?? error),
        }));
        if (status === 201) made.push(body.id);
        else failed.push({ status, body });
      }
    });
    server.child.kill('SIGHUP');
    await until(
      () => pids(server.url).catch(() => before),
      (now) => now.size === 2 && [...now].every((pid) => !before.has(pid)),
      60,
    );
    writing = false;
    await Promise.all(writers);
    expect(failed).toEqual([]);
    expect(made.length).toBeGreaterThan(10);
    await until(
      async () => new Set(seen),
      (ids) => made.every((id) => ids.has(id)),
      60,
    );
    // Each once and in order: what was seen before the move does not come again.
    expect(seen).toEqual([...new Set(seen)]);
    over = true;
    await following;
    server.child.kill('SIGTERM');
    expect(await server.exited).toBe(0);
  });

  test('no process outlives a primary that is killed', { timeout: 60_000 }, async () => {
    const server = await startServerProcess({ folder, env: { WORKERS: '2' } });
    await until(
      () => pids(server.url),
      ({ size }) => size === 2,
    );
    server.child.kill('SIGKILL');
    await server.exited;
    await until(
      () => processesIn(folder),
      (left) => left.length === 0,
      30,
    );
  });

  test('a setting that workers cannot start with is said once, and nothing is left running', async () => {
    const server = startProgram('src/main.ts', { folder, env: { WORKERS: '2', PORT: '0', HOST: '203.0.113.7' } });
    expect(await server.exited).toBe(1);
    expect(server.err()).toMatch(/HOST|workers could not start/);
    expect(await processesIn(folder)).toEqual([]);
  });
});

test.each(['0', '-1', 'two', '1.5'])('WORKERS=%s is refused', async (workers) => {
  const server = startProgram('src/main.ts', { folder, env: { WORKERS: workers } });
  expect(await server.exited).toBe(1);
  expect(server.err()).toMatch(/^WORKERS must be /);
});

describe('TLS', () => {
  /** The name on the certificate that a new connection is shown. */
  const shown = (url: string) =>
    new Promise<string>((done, fail) => {
      const asked = request(`${url}/health/live`, { rejectUnauthorized: false, agent: false }, (answer) => {
        answer.resume();
        done(String((answer.socket as TLSSocket).getPeerCertificate().subject.CN));
      });
      asked.on('error', fail);
      asked.end();
    });
  const use = async (name: string) => {
    await copyFile(join(CERTS, `${name}-cert.pem`), join(folder, 'cert.pem'));
    await copyFile(join(CERTS, `${name}-key.pem`), join(folder, 'key.pem'));
  };
  const files = () => ({ TLS_CERT_FILE: join(folder, 'cert.pem'), TLS_KEY_FILE: join(folder, 'key.pem') });

  test.each(['1', '2'])(
    'serves https and wss, and takes a new certificate at SIGHUP (WORKERS=%s)',
    { timeout: 60_000 },
    async (workers) => {
      await use('first');
      const server = await startServerProcess({ folder, env: { ...files(), WORKERS: workers } }).catch(
        async () => undefined,
      );
      if (!server) throw new Error('It did not start.');
      expect(server.url).toMatch(/^https:/);
      expect(await shown(server.url)).toBe('first.test');
      const socket = new WebSocket(`${server.url.replace('https', 'wss')}/ws?token=${server.key}`, {
        rejectUnauthorized: false,
      });
      await new Promise((done, fail) => socket.once('message', done).once('error', fail));
      await use('second');
      server.child.kill('SIGHUP');
      await until(
        () => shown(server.url).catch(() => ''),
        (name) => name === 'second.test',
      );
      if (workers === '1') {
        expect(socket.readyState).toBe(WebSocket.OPEN);
        await copyFile(join(CERTS, 'first-cert.pem'), join(folder, 'cert.pem'));
        server.child.kill('SIGHUP');
        await server.saying(/the old one stays/);
        expect(await shown(server.url)).toBe('second.test');
      }
      socket.terminate();
      server.child.kill('SIGTERM');
      expect(await server.exited).toBe(0);
    },
  );

  test('files that are not there or do not match are said, and one alone is refused', async () => {
    await use('first');
    await copyFile(join(CERTS, 'second-key.pem'), join(folder, 'key.pem'));
    for (const [env, said] of [
      [files(), /^TLS_CERT_FILE and TLS_KEY_FILE must be the PEM files/],
      [{ ...files(), TLS_KEY_FILE: join(folder, 'none.pem') }, /^TLS_KEY_FILE cannot be read \(ENOENT\)/],
      [{ TLS_CERT_FILE: join(folder, 'cert.pem') }, /must be set together/],
    ] as const) {
      const server = startProgram('src/main.ts', { folder, env: { PORT: '0', ...env } });
      expect(await server.exited).toBe(1);
      expect(server.err()).toMatch(said);
    }
  });
});
