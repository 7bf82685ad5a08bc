import { once } from 'node:events';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import WebSocket from 'ws';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder, startProgram, startServerProcess } from '../support/processes.ts';
import { caller, startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

const SECRET = 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa';
let database: TestDatabase;
let server: TestServer;
let folder: string;
beforeAll(async () => {
  folder = await newFolder();
  database = await createTestDatabase();
  server = await startServer({ env: { LEASE_SECONDS: '2', JWT_SECRET: SECRET }, databaseUrl: database.url });
});
afterEach(endPrograms);
afterAll(async () => {
  await endPrograms();
  await server?.stop();
  await database?.drop();
  await removeFolder(folder);
});

const another = () =>
  startServerProcess({
    folder,
    env: { DATABASE_URL: database.url, JWT_SECRET: SECRET, LEASE_SECONDS: '2', LOG_LEVEL: 'warn' },
  });

describe('several processes on one database', () => {
  test('lose and repeat nothing of what writers with Idempotency-Keys send while they are killed', {
    timeout: 180_000,
  }, async () => {
    const user = await server.newUser();
    const skill = unique('skill');
    const processes = [await another(), await another()];
    const WRITERS = 20;
    const KILLS = 6;
    let stop = false;
    let lost = 0;
    const acknowledged = new Map<string, number>();
    const write = async (writer: number) => {
      for (let n = 0; !stop; n++) {
        const key = `${skill}-${writer}-${n}`;
        for (let turn = writer; !acknowledged.has(key); turn++) {
          const { url } = processes[turn % processes.length] ?? { url: '' };
          const answer = await caller(url, user.token)(
            'POST',
            '/tasks',
            { skill_name: skill, name: key },
            { 'idempotency-key': key },
          ).catch(() => undefined);
          if (answer?.status === 201) acknowledged.set(key, answer.body.id);
          else lost += 1;
        }
      }
    };
    const writers = Promise.all(Array.from({ length: WRITERS }, (_, i) => write(i)));
    for (let kill = 0; kill < KILLS; kill++) {
      const before = acknowledged.size;
      await until(
        async () => acknowledged.size,
        (size) => size >= before + 100,
      );
      const place = kill % processes.length;
      processes[place]?.child.kill('SIGKILL');
      processes[place] = await another();
    }
    stop = true;
    await writers;
    expect(lost).toBeGreaterThan(0);
    const { rows } = await server.db.query<{ id: number; name: string; audited: number; told: number }>({
      text: `
        select t.id, t.name,
          (select count(*)::int from audit_log a where a.entity_type = 'task' and a.entity_id = t.id) as audited,
          (select count(*)::int from events e where e.task_id = t.id) +
            (select count(*)::int from event_outbox e where e.task_id = t.id) as told
        from tasks t where t.skill_name = $1`,
      values: [skill],
    });
    expect(new Map(rows.map(({ name, id }) => [name, id]))).toEqual(acknowledged);
    expect(rows).toHaveLength(acknowledged.size);
    expect(rows.every(({ audited, told }) => audited === 1 && told === 1)).toBe(true);
  });

  test('fire every tick once and miss none, also when one of them is killed', { timeout: 60_000 }, async () => {
    const [second, third] = [await another(), await another()];
    const user = await server.newUser();
    const tasks = await Promise.all(
      Array.from({ length: 30 }, () => makeTask(user.call, { schedule_cron: '* * * * * *', overlap_policy: 'allow' })),
    );
    const ticks = async () =>
      (
        await server.db.query<{ task_id: number; times: Date[]; verdicts: string[]; runs: number }>({
          text: `
            select o.task_id, array_agg(o.scheduled_for order by o.scheduled_for) as times,
              array_agg(distinct o.verdict) as verdicts,
              (select count(*)::int from executions e where e.task_id = o.task_id) as runs
            from occurrences o where o.user_id = $1 group by o.task_id`,
          values: [user.id],
        })
      ).rows;
    await until(ticks, (rows) => rows.length === tasks.length && rows.every((row) => row.times.length >= 3));
    second.child.kill('SIGKILL');
    await until(ticks, (rows) => rows.every((row) => row.times.length >= 7), 30);
    for (const task of tasks) await user.call('POST', `/tasks/${task.id}/pause`);
    for (const row of await ticks()) {
      const gaps = row.times.slice(1).map((time, i) => time.getTime() - (row.times[i]?.getTime() ?? 0));
      expect(gaps.every((gap) => gap === 1_000)).toBe(true);
      expect(row.verdicts).toEqual(['fired']);
      expect(row.runs).toBe(row.times.length);
    }
    third.child.kill('SIGTERM');
    expect(await third.exited).toBe(0);
  });

  test('give every run to one agent only, wherever it asks', async () => {
    const second = await another();
    const user = await server.newUser();
    const skill = unique('skill');
    const calls = [user.call, caller(second.url, user.token)];
    const runs = 60;
    const claimed: number[] = [];
    const agents = await Promise.all(Array.from({ length: 8 }, (_, i) => makeAgent(calls[i % 2] ?? user.call)));
    const claiming = agents.map(async (agent) => {
      while (claimed.length < runs) {
        for (const run of await agent.claim({ max: 3, wait_ms: 200, skills: [skill] })) {
          claimed.push(run.execution_id);
          expect((await complete(user.call, run)).status).toBe(200);
        }
      }
    });
    for (let i = 0; i < runs; i++) {
      const task = await makeTask(user.call, { skill_name: skill, max_attempts: 1 });
      await calls[i % 2]?.('POST', `/tasks/${task.id}/run`);
    }
    await Promise.all(claiming);
    expect(claimed).toHaveLength(runs);
    expect(new Set(claimed).size).toBe(runs);
  });

  test('serve the same events in the same order, whichever writes and whichever is asked', async () => {
    const second = await another();
    const call = server.as(server.adminKey);
    const cursor = Number((await call('GET', '/tasks')).headers.get('x-event-cursor'));
    const watch = startProgram('src/runner/watch.ts', {
      folder,
      env: { MUSTER_SERVER: second.url, MUSTER_KEY: server.adminKey },
      args: ['--json', '--topics', 'tasks'],
    });
    await watch.saying(/"type":"ack"/);
    const ids: number[] = [];
    for (let i = 0; i < 10; i++) ids.push((await makeTask(call)).id);
    await until(
      async () =>
        watch
          .out()
          .split('\n')
          .filter((line) => line.includes('task_status_update')).length,
      (count) => count >= 10,
    );
    const seen = watch
      .out()
      .split('\n')
      .filter((line) => line.includes('task_status_update'))
      .map((line) => JSON.parse(line));
    expect(seen.map(({ data }) => data.task_id).filter((id) => ids.includes(id))).toEqual(ids);
    const places = seen.map(({ event_id }) => event_id);
    expect(places).toEqual(places.toSorted((a, b) => a - b));
    expect(places[0]).toBeGreaterThan(cursor);
    watch.child.kill('SIGINT');
    expect(await watch.exited).toBe(0);
  });
});

describe('an agent that is killed in the middle of a run', () => {
  test('loses it when its lease ends; another one does it, and there is one result', async () => {
    const skill = unique('skill');
    const task = await makeTask(server.admin, { skill_name: skill });
    const env = { MUSTER_SERVER: server.url, MUSTER_KEY: server.adminKey };
    const start = (name: string, command: string) =>
      startProgram('src/runner/agent.ts', { folder, env, args: ['--name', name, '--skill', skill, '--exec', command] });
    const doomed = start(unique('doomed'), 'sleep 5');
    await server.admin('POST', `/tasks/${task.id}/run`);
    await doomed.saying(/claimed/);
    doomed.child.kill('SIGKILL');
    await doomed.exited;
    const heir = start(unique('heir'), 'echo done');
    await heir.saying(/finished/);
    const { executions } = (await server.admin('GET', `/executions?task_id=${task.id}&sort_order=asc`)).body;
    expect(
      executions.map((run: { status: string; cause: string | null; attempt: number }) => [
        run.attempt,
        run.status,
        run.cause,
      ]),
    ).toEqual([
      [1, 'failed', 'lease_lost'],
      [2, 'success', null],
    ]);
    heir.child.kill('SIGTERM');
    expect(await heir.exited).toBe(0);
  });
});

describe('secrets', () => {
  test('stand in no log line, audit entry or event, however they came', async () => {
    // Tests' Postgres asks for no password, so that any is good.
    const url = new URL(database.url);
    url.password = 'canary-postgres-90210';
    const traced = await startServerProcess({
      folder,
      env: { DATABASE_URL: url.href, JWT_SECRET: SECRET, LOG_LEVEL: 'trace' },
    });
    const call = (method: string, path: string, body?: unknown, credential?: string) =>
      fetch(`${traced.url}${path}`, {
        method,
        headers: {
          ...(credential ? { authorization: `Bearer ${credential}` } : {}),
          ...(body ? { 'content-type': 'application/json' } : {}),
        },
        ...(body ? { body: JSON.stringify(body) } : {}),
      }).then(async (response) => ({ status: response.status, text: await response.text() }));
    const email = `${unique('secret')}@example.com`;
    const password = 'canary-password-81726';
    const registered = await call('POST', '/api/v1/auth/register', { email, password });
    expect(registered.status).toBe(201);
    await call('POST', '/api/v1/auth/register', { email, password, role: password });
    await call('POST', '/api/v1/auth/login', { email, password: `${password}-wrong` });
    const tokens = JSON.parse((await call('POST', '/api/v1/auth/login', { email, password })).text);
    const key = JSON.parse((await call('POST', '/api/v1/auth/api-keys', { name: 'x' }, tokens.access_token)).text).key;
    await call('GET', '/api/v1/tasks', undefined, key);
    await call('GET', `/ws?token=${tokens.access_token}`);
    await call('GET', `/ws?token=canary-token-5551212`);
    for (const credential of [tokens.access_token, key]) {
      const socket = new WebSocket(`${traced.url.replace('http', 'ws')}/ws?token=${credential}`);
      await once(socket, 'message');
      socket.send(JSON.stringify({ action: 'canary-message', token: credential }));
      await once(socket, 'message');
      socket.close();
    }
    const refused = new WebSocket(`${traced.url.replace('http', 'ws')}/ws`, ['bearer', 'canary-protocol-777']);
    await once(refused, 'error');
    // Bodies that cannot be read, and ones of the wrong shape, are told of without what stood in them.
    const bad = await fetch(`${traced.url}/api/v1/auth/login`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: `{"email":"a@example.com","password":"canary-broken-31415`,
    });
    expect(bad.status).toBe(400);
    expect(await bad.text()).not.toContain('canary');
    const strange = await call('POST', '/api/v1/auth/login', { email, password: ['canary-shape-27182'] });
    expect(strange.status).toBe(400);
    expect(strange.text).not.toContain('canary');
    await call('GET', '/api/v1/tasks', undefined, 'canary-bearer-424242');
    await call('POST', '/api/v1/auth/refresh', { refresh_token: tokens.refresh_token });
    await call('POST', '/api/v1/auth/refresh', { refresh_token: tokens.refresh_token });
    const agent = await makeAgent(server.admin);
    await call('POST', `/api/v1/agents/${agent.id}/claim`, {}, key);
    traced.child.kill('SIGTERM');
    expect(await traced.exited).toBe(0);

    const canaries = [
      password,
      tokens.access_token,
      tokens.refresh_token,
      key,
      SECRET,
      'canary-token',
      'canary-bearer',
      'canary-protocol',
      'canary-broken',
      'canary-shape',
      'canary-postgres',
    ];
    const { rows: audit } = await server.db.query({ text: 'select to_jsonb(a) as entry from audit_log a' });
    const { rows: events } = await server.db.query({
      text: 'select data from events union all select data from event_outbox',
    });
    for (const canary of canaries) {
      expect(traced.out() + traced.err()).not.toContain(canary);
      expect(JSON.stringify([audit, events])).not.toContain(canary);
    }
    expect(traced.out()).toContain('token=[redacted]');
  });
});
