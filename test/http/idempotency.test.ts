import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { expireAnswers } from '../../src/http/idempotency.ts';
import { type Answer, startServer, type TestServer } from '../support/server.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';
import { makeAgent, makeTask, unique } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
});

const send = (key: string, path: string, body?: unknown, call = user.call) =>
  call('POST', path, body, { 'idempotency-key': key });
const tasksOf = async (skill: string) => (await user.call('GET', `/tasks?skill_name=${skill}`)).body.total as number;

describe('a call with an Idempotency-Key', () => {
  test('happens once, and is answered with the first answer, whatever the order of the fields', async () => {
    const [key, skill] = [randomUUID(), unique('skill')];
    const first = await send(key, '/tasks', { skill_name: skill, params: { a: 1, b: [2] }, priority: 'high' });
    const second = await send(key, '/tasks', { priority: 'high', params: { b: [2], a: 1 }, skill_name: skill });
    expect(first.status).toBe(201);
    expect(first.headers.get('idempotency-replayed')).toBe(null);
    expect(second).toMatchObject({ status: 201, body: first.body });
    expect(second.headers.get('idempotency-replayed')).toBe('true');
    for (const header of ['location', 'etag']) expect(second.headers.get(header)).toBe(first.headers.get(header));
    expect(await tasksOf(skill)).toBe(1);
  });

  test('is refused for another body, and for another thing', async () => {
    const key = randomUUID();
    const [one, other] = [await makeTask(user.call), await makeTask(user.call)];
    expect((await send(key, `/tasks/${one.id}/run`)).status).toBe(202);
    expect((await send(key, `/tasks/${one.id}/run`)).headers.get('idempotency-replayed')).toBe('true');
    for (const answer of [
      await send(key, `/tasks/${other.id}/run`),
      await send(key, `/tasks/${one.id}/run`, { params: { x: 1 } }),
    ]) {
      expect(answer).toMatchObject({ status: 409, body: { detail: expect.stringMatching(/another request/) } });
    }
  });

  test('works for everything that creates or triggers', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call)];
    for (const [path, body] of [
      ['/projects', { name: 'once' }],
      ['/agents', { name: unique('agent') }],
      ['/agents/activity', { agent_id: agent.id, task_id: task.id, status: 'success' }],
      ['/tasks/bulk', { action: 'pause', ids: [task.id] }],
    ] as const) {
      const key = randomUUID();
      const first = await send(key, path, body);
      const second = await send(key, path, body);
      expect(second.status, path).toBe(first.status);
      expect(second.headers.get('idempotency-replayed'), path).toBe('true');
      expect(second.body.id ?? second.body.execution_id, path).toBe(first.body.id ?? first.body.execution_id);
    }
    expect((await user.call('GET', '/projects')).body.total).toBe(1);
    expect((await user.call('GET', `/executions?task_id=${task.id}`)).body.total).toBe(1);
  });

  test('is the caller’s own: another user’s is another', async () => {
    const [key, skill] = [randomUUID(), unique('skill')];
    const other = await server.newUser();
    const mine = await send(key, '/tasks', { skill_name: skill });
    const theirs = await send(key, '/tasks', { skill_name: skill }, other.call);
    expect(theirs).toMatchObject({ status: 201, body: { user_id: other.id } });
    expect(theirs.body.id).not.toBe(mine.body.id);
  });

  test('that failed may be tried again as something else', async () => {
    const [key, skill] = [randomUUID(), unique('skill')];
    expect((await send(key, '/tasks', { skill_name: skill, agent_id: 999_999 })).status).toBe(400);
    expect((await send(key, '/tasks', { skill_name: skill })).status).toBe(201);
  });

  test('whose answer holds a secret is not kept, and says so when it comes again', async () => {
    const key = randomUUID();
    const first = await send(key, '/auth/api-keys', { name: 'ci' });
    expect(first.status).toBe(201);
    const second = await send(key, '/auth/api-keys', { name: 'ci' });
    expect(second).toMatchObject({ status: 409, body: { detail: expect.stringMatching(/already created/) } });
    expect((await user.call('GET', '/auth/api-keys')).body.total).toBe(1);
    const { rows } = await server.db.query({ text: 'select * from idempotency_keys where key = $1', values: [key] });
    expect(rows).toHaveLength(1);
    expect(JSON.stringify(rows)).not.toContain(first.body.key);
  });

  test('twenty at once on two servers: one happens, and the others get its answer or are told to wait', async () => {
    const second = await startServer({ databaseUrl: server.databaseUrl });
    try {
      const [key, skill] = [randomUUID(), unique('skill')];
      const answers = await Promise.all(
        Array.from({ length: 20 }, (_, i) =>
          send(key, '/tasks', { skill_name: skill }, i % 2 ? user.call : second.as(user.token)),
        ),
      );
      const made = answers.filter(({ status }) => status === 201);
      expect(new Set(made.map(({ body }) => body.id)).size).toBe(1);
      expect(made.filter(({ headers }) => !headers.has('idempotency-replayed'))).toHaveLength(1);
      for (const { status, headers } of answers.filter((answer) => !made.includes(answer))) {
        expect(status).toBe(409);
        expect(headers.get('retry-after')).toBe('1');
      }
      expect(await tasksOf(skill)).toBe(1);
    } finally {
      await second.stop();
    }
  });

  test.each(['', ' ', 'x'.repeat(256), 'a b', 'schlüssel'])('needs a key that can be one: %#', async (key) => {
    const headers = { 'idempotency-key': Buffer.from(key).toString('latin1') };
    const answer = await user.call('POST', '/tasks', { skill_name: 'x' }, headers);
    expect(answer.status).toBe(400);
    expect(answer.body.errors[0].path).toBe('headers.idempotency-key');
  });

  test.each(['x'.repeat(255), '!', '~', `';drop/**/table/**/tasks;--$1\\"{}%00\\u0000`, '__proto__', 'null'])(
    'may have any key of visible ASCII: %j',
    async (key) => {
      const skill = unique('skill');
      const first = await send(key, '/tasks', { skill_name: skill });
      const second = await send(key, '/tasks', { skill_name: skill });
      expect(first.status).toBe(201);
      expect(second).toMatchObject({ status: 201, body: first.body });
      expect(second.headers.get('idempotency-replayed')).toBe('true');
    },
  );

  test('is one of its route: the same key at another route is another', async () => {
    const key = randomUUID();
    expect((await send(key, '/projects', { name: 'one' })).status).toBe(201);
    const agent = await send(key, '/agents', { name: unique('agent') });
    expect(agent.status).toBe(201);
    expect(agent.headers.get('idempotency-replayed')).toBe(null);
  });

  test('is remembered by a server that starts after the one that answered is gone', async () => {
    const [key, skill] = [randomUUID(), unique('skill')];
    const before = await startServer({ databaseUrl: server.databaseUrl });
    let first: Answer;
    try {
      first = await send(key, '/tasks', { skill_name: skill }, before.as(user.token));
      expect(first.status).toBe(201);
    } finally {
      await before.stop();
    }
    const after = await startServer({ databaseUrl: server.databaseUrl });
    try {
      const second = await send(key, '/tasks', { skill_name: skill }, after.as(user.token));
      expect(second).toMatchObject({ status: 201, body: first.body });
      expect(second.headers.get('idempotency-replayed')).toBe('true');
      expect(await tasksOf(skill)).toBe(1);
    } finally {
      await after.stop();
    }
  });

  test('is offered by every route that creates or triggers, as the API document tells', async () => {
    const { body: document } = await server.as(undefined)('GET', '//openapi.json');
    for (const path of [
      '/auth/api-keys',
      '/projects',
      '/tasks',
      '/tasks/{id}/run',
      '/tasks/bulk',
      '/agents',
      '/agents/activity',
    ]) {
      const parameters = document.paths[`/api/v1${path}`].post.parameters as { name: string; in: string }[];
      expect(parameters, path).toContainEqual(expect.objectContaining({ name: 'idempotency-key', in: 'header' }));
    }
  });

  test('is forgotten after a day', async () => {
    const [key, skill] = [randomUUID(), unique('skill')];
    await send(key, '/tasks', { skill_name: skill });
    const age = () =>
      server.db.query({
        text: `update idempotency_keys set created_at = now() - interval '25 hours' where key = $1`,
        values: [key],
      });
    await age();
    expect((await send(key, '/tasks', { skill_name: skill })).headers.get('idempotency-replayed')).toBe(null);
    expect(await tasksOf(skill)).toBe(2);
    await age();
    expect(await expireAnswers(server.db, 100)).toBe(1);
    expect(await expireAnswers(server.db, 100)).toBe(0);
  });
});

test('sixty creates through a network that loses the answers to commits: each happens once', async () => {
  const proxy = await createTcpProxy(server.databaseUrl);
  const behind = await startServer({ databaseUrl: proxy.url });
  try {
    proxy.resetCommits(0.2);
    const skill = unique('skill');
    const call = behind.as(user.token);
    let retries = 0;
    await Promise.all(
      Array.from({ length: 60 }, async (_, i) => {
        const key = `${skill}-${i}`;
        let answer: Answer;
        do {
          answer = await send(key, '/tasks', { skill_name: skill, name: `task ${i}` }, call);
          if (answer.status !== 201) {
            retries += 1;
            expect([409, 503]).toContain(answer.status);
          }
        } while (answer.status !== 201);
      }),
    );
    expect(retries).toBeGreaterThan(0);
    proxy.resetCommits(0);
    const { rows } = await server.db.query<{ n: number; names: number; audited: number }>({
      text: `select count(*)::int as n, count(distinct name)::int as names,
        (select count(*)::int from audit_log where entity_type = 'task' and operation = 'CREATE'
          and changed_fields->'skill_name'->>'new' = $1) as audited
        from tasks where skill_name = $1`,
      values: [skill],
    });
    expect(rows[0]).toEqual({ n: 60, names: 60, audited: 60 });
  } finally {
    proxy.resetCommits(0);
    await behind.stop();
    proxy.close();
  }
});
