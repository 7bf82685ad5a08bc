import { type ChildProcess, spawn } from 'node:child_process';
import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { freePort } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask, unique, until } from '../support/work.ts';

// The agent works in a folder of its own, from which tsx is not found by its name.
const TSX = pathToFileURL(createRequire(import.meta.url).resolve('tsx')).href;
const AGENT = resolve(import.meta.dirname, '../../src/runner/agent.ts');
let server: TestServer;
let folder: string;
const started: ChildProcess[] = [];

beforeAll(async () => {
  server = await startServer({ env: { LEASE_SECONDS: '3' } });
  folder = await mkdtemp(join(tmpdir(), 'muster-runner-'));
});
afterAll(async () => {
  await server?.stop();
  await rm(folder, { recursive: true, force: true });
});
afterEach(async () => {
  for (const child of started.splice(0)) {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL');
      await new Promise((done) => child.once('exit', done));
    }
  }
});

/** The agent as people start it, from its source. */
function agent(args: string[], env: Record<string, string> = {}) {
  const child = spawn(process.execPath, ['--import', TSX, AGENT, ...args], {
    cwd: folder,
    env: {
      PATH: process.env['PATH'],
      MUSTER_SERVER: server.url,
      MUSTER_KEY: server.adminKey,
      ...env,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  started.push(child);
  let out = '';
  let err = '';
  child.stdout.on('data', (chunk) => {
    out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    err += chunk;
  });
  const exited = new Promise<number | string>((done) =>
    child.once('exit', (code, signal) => done(code ?? signal ?? '')),
  );
  return {
    child,
    exited,
    said: () => out,
    complained: () => err,
    saying: (text: string | RegExp) =>
      until(
        async () => out + err,
        (all) => (typeof text === 'string' ? all.includes(text) : text.test(all)),
      ),
  };
}

async function script(text: string): Promise<string> {
  const file = join(folder, `${unique('script')}.sh`);
  await writeFile(file, `#!/bin/sh\n${text}\n`);
  await chmod(file, 0o755);
  return file;
}

const execution = async (id: number) => (await server.admin('GET', `/executions/${id}`)).body;
const ended = (id: number) =>
  until(
    () => execution(id),
    (run) => !['queued', 'running'].includes(run.status),
  );
const runNow = async (skill: string, fields: Record<string, unknown> = {}) => {
  const task = await makeTask(server.admin, { skill_name: skill, max_attempts: 1, ...fields });
  return (await server.admin('POST', `/tasks/${task.id}/run`)).body.id as number;
};
const alive = (pid: number) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

describe('the agent', () => {
  test('runs the command with the params on standard input and in its environment, and reports what it printed', async () => {
    const skill = unique('skill');
    const command = await script(
      'cat; echo; echo "$MUSTER_PARAM_CITY_NAME|$MUSTER_PARAM_N|$MUSTER_SKILL|$MUSTER_ATTEMPT|${MUSTER_KEY:-no key}"; echo "::progress 40 halfway"; echo warn >&2; sleep 1.5; echo "last €"',
    );
    const runner = agent(['--skill', skill, '--exec', command]);
    const id = await runNow(skill, { params: { 'city.name': "Köln'; rm -rf /", n: 3, nested: { a: [1] } } });
    const halfway = await until(
      () => execution(id),
      (run) => run.progress?.percent === 40,
    );
    expect(halfway.progress.message).toMatch(/halfway|warn/);
    const run = await ended(id);
    expect(run.status).toBe('success');
    const [params = ''] = run.output_text.split('\n');
    expect(JSON.parse(params)).toEqual({ 'city.name': "Köln'; rm -rf /", n: 3, nested: { a: [1] } });
    expect(run.output_text).toContain(`Köln'; rm -rf /|3|${skill}|1|no key`);
    expect(run.output_text).toContain('last €');
    await runner.saying(`finished run ${id}`);
  });

  test('a failing command is a failed run with its exit code and the end of its errors', async () => {
    const skill = unique('skill');
    agent(['--skill', skill, '--exec', await script('echo out; echo "no such report" >&2; exit 3')]);
    const run = await ended(await runNow(skill));
    expect(run).toMatchObject({ status: 'failed', cause: 'agent_failed' });
    expect(run.error_text).toBe('exit code 3\nno such report');
    expect(run.output_text).toContain('out');
  });

  test('output that is binary, endless or without newlines is kept at its end, as text', async () => {
    const skill = unique('skill');
    agent([
      '--skill',
      skill,
      '--exec',
      await script(`printf 'a\\000b\\377'; head -c 3000000 /dev/zero | tr '\\0' x; printf end`),
    ]);
    const run = await ended(await runNow(skill));
    expect(run.status).toBe('success');
    expect(Buffer.byteLength(run.output_text)).toBeLessThanOrEqual(1_048_576);
    expect(run.output_text.endsWith('xend')).toBe(true);
  });

  test('a cancel ends the whole process group', async () => {
    const skill = unique('skill');
    const pids = join(folder, unique('pids'));
    agent([
      '--grace',
      '1',
      '--skill',
      skill,
      '--exec',
      await script(`trap '' TERM; sleep 300 & echo "$$ $!" > ${pids}; wait; sleep 300`),
    ]);
    const id = await runNow(skill);
    const text = await until(
      () => readFile(pids, 'utf8').catch(() => ''),
      (content) => content.includes('\n'),
    );
    expect((await server.admin('POST', `/executions/${id}/cancel`)).body.cancel_requested).toBe(true);
    expect((await ended(id)).status).toBe('cancelled');
    const group = text.trim().split(' ').map(Number);
    await until(
      async () => group.filter(alive),
      (left) => left.length === 0,
    );
  });

  test('a run that takes too long is ended and counts as a timeout', async () => {
    const skill = unique('skill');
    agent(['--grace', '0', '--skill', skill, '--exec', 'echo started; sleep 300']);
    const run = await ended(await runNow(skill, { timeout_seconds: 1 }));
    expect(run).toMatchObject({ status: 'timeout', cause: 'run_timeout' });
    expect(run.error_text).toMatch(/timed out after 1 s/);
    expect(run.output_text).toContain('started');
  });

  test('runs several skills side by side, as many at once as --concurrency says, and no other skill', async () => {
    const [a, b, other] = [unique('a'), unique('b'), unique('other')];
    const notMine = await runNow(other);
    agent(['--concurrency', '2', '--skill', a, '--exec', 'sleep 1; echo A', '--skill', b, '--exec', 'sleep 1; echo B']);
    const [first, second] = [await runNow(a), await runNow(b)];
    await until(
      async () => [(await execution(first)).status, (await execution(second)).status],
      (states) => states.every((status) => status === 'running'),
    );
    expect([(await ended(first)).output_text, (await ended(second)).output_text]).toEqual(['A\n', 'B\n']);
    expect((await execution(notMine)).status).toBe('queued');
    await server.admin('POST', `/executions/${notMine}/cancel`);
  });

  test('a run that was lost is stopped and not reported', async () => {
    const skill = unique('skill');
    const marker = join(folder, unique('marker'));
    const runner = agent(['--grace', '0', '--skill', skill, '--exec', `sleep 8; touch ${marker}`]);
    const id = await runNow(skill);
    await until(
      () => execution(id),
      (run) => run.status === 'running',
    );
    await server.db.query({
      text: 'update executions set lease_token = gen_random_uuid() where id = $1',
      values: [id],
    });
    await runner.saying(`lost run ${id}`);
    await expect(readFile(marker)).rejects.toThrow();
  });

  test('SIGTERM lets what runs finish, takes nothing new, says goodbye and exits 0', async () => {
    const skill = unique('skill');
    const runner = agent(['--name', skill, '--skill', skill, '--exec', 'sleep 2; echo finished']);
    const id = await runNow(skill);
    await runner.saying('claimed');
    runner.child.kill('SIGTERM');
    const later = await runNow(skill);
    expect(await runner.exited).toBe(0);
    expect(await execution(id)).toMatchObject({ status: 'success', output_text: 'finished\n' });
    expect((await execution(later)).status).toBe('queued');
    const { rows } = await server.db.query({ text: 'select status from agents where name = $1', values: [skill] });
    expect(rows).toEqual([{ status: 'offline' }]);
    await server.admin('POST', `/executions/${later}/cancel`);
  });

  test('a second SIGTERM stops what runs and reports it', async () => {
    const skill = unique('skill');
    const runner = agent(['--grace', '0', '--skill', skill, '--exec', 'sleep 300']);
    const id = await runNow(skill);
    await runner.saying('claimed');
    runner.child.kill('SIGTERM');
    await runner.saying('draining');
    // At once it would pass for an echo, as npm sends it.
    runner.child.kill('SIGTERM');
    await new Promise((done) => setTimeout(done, 1_100));
    expect(await execution(id)).toMatchObject({ status: 'running' });
    runner.child.kill('SIGTERM');
    expect(await runner.exited).toBe(0);
    expect(await execution(id)).toMatchObject({ status: 'failed' });
  });
});

describe('the agent and its server', () => {
  let database: TestDatabase;
  beforeAll(async () => {
    database = await createTestDatabase();
  });
  afterAll(() => database?.drop());

  test('waits for a server that is not there yet, and survives one that restarts during a run', async () => {
    const port = await freePort();
    const env = { PORT: String(port), LEASE_SECONDS: '30' };
    const skill = unique('skill');
    // The key is one that the server will know: made by a server on the same database that has gone by then.
    const before = await startServer({ env, databaseUrl: database.url });
    const key = (await before.admin('POST', '/auth/api-keys', { name: 'agent' })).body.key as string;
    await before.stop();

    const runner = agent(['--skill', skill, '--exec', 'sleep 4; echo survived'], {
      MUSTER_SERVER: `http://127.0.0.1:${port}`,
      MUSTER_KEY: key,
    });
    await runner.saying('waiting for the server');
    const first = await startServer({ env, databaseUrl: database.url });
    await runner.saying('registered');
    const call = first.as(key);
    const task = await makeTask(call, { skill_name: skill });
    const { body: run } = await call('POST', `/tasks/${task.id}/run`);
    await runner.saying('claimed');
    await first.stop();
    await new Promise((done) => setTimeout(done, 500));
    const second = await startServer({ env, databaseUrl: database.url });
    try {
      const result = await until(
        () => second.as(key)('GET', `/executions/${run.id}`),
        (answer) => answer.body.status !== 'running',
      );
      expect(result.body).toMatchObject({ status: 'success', output_text: 'survived\n', attempt: 1 });
    } finally {
      await second.stop();
    }
  });

  test('says in a sentence that its key is refused, and exits 1', async () => {
    const runner = agent(['--skill', 'x', '--exec', 'true'], { MUSTER_KEY: 'muster_wrong' });
    expect(await runner.exited).toBe(1);
    expect(runner.complained()).toMatch(/^The server refuses this agent: The API key is not valid/);
  });

  test.each([
    [[], /Say what to run/],
    [['--skill', 'x'], /--skill x needs an --exec behind it\./],
    [['--exec', 'true'], /--exec needs a --skill before it\./],
    [['--skill', 'a b', '--exec', 'true'], /--skill must be letters/],
    [['--skill', 'x', '--exec', 'true', '--server', 'ftp://x'], /--server must be a URL/],
    [['--skill', 'x', '--exec', 'true', '--concurrency', '0'], /--concurrency must be a whole number from 1 to 100\./],
    [['--skill', 'x', '--exec', 'true', '--nope'], /Unknown option '--nope'.*--help/],
  ])('misuse %j gets a sentence and exit code 2', async (args, sentence) => {
    const runner = agent(args);
    expect(await runner.exited).toBe(2);
    expect(runner.complained()).toMatch(sentence);
    expect(runner.complained().trim().split('\n')).toHaveLength(1);
  });

  test('without a key it says how to get one', async () => {
    const runner = agent(['--skill', 'x', '--exec', 'true'], { MUSTER_KEY: '', DATA_DIR: 'nowhere' });
    expect(await runner.exited).toBe(2);
    expect(runner.complained()).toMatch(/No key: give --key or MUSTER_KEY/);
  });
});
