import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

// The memory without a Memory MCP server: Postgres alone. What servers add, and what their faults do, is in remote.test.ts.

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { MEMORY_CAPTURE: 'executions,activity,tasks' } });
});
afterAll(() => server?.stop());

const note = (content: string, more: Record<string, unknown> = {}) => ({ content, intent: 'analysis', ...more });

describe('store', () => {
  test('answers the memory with who, when, project and why', async () => {
    const { call, id } = await server.newUser();
    const project = (await call('POST', '/projects', { name: 'Website' })).body;
    const task = await makeTask(call, { name: 'Check links', project_id: project.id });
    const agent = await makeAgent(call, { type: 'researcher', capabilities: ['web'] });
    const { status, body } = await call('POST', '/memory/store', {
      content: 'Two links of the front page were dead.\nThey are mended.',
      intent: 'bugfix',
      agent_id: agent.id,
      task_id: task.id,
      metadata: { links: 2 },
    });
    expect(status).toBe(201);
    expect(body).toMatchObject({
      storage: 'postgresql_fallback',
      status: 'success',
      metadata: {
        who: { user_id: id, agent_id: agent.id, agent_category: 'researcher', capabilities: ['web'] },
        project: { project_id: project.id, project_name: 'Website', task_id: task.id, task_name: 'Check links' },
        why: { intent: 'bugfix', description: 'Two links of the front page were dead.' },
        kind: 'note',
        extra: { links: 2 },
      },
    });
    const { when } = body.metadata;
    expect(new Date(when.iso).getTime()).toBeGreaterThan(Date.now() - 60_000);
    expect(when.unix).toBe(Math.floor(Date.parse(when.iso) / 1000));
    expect(when.readable).toMatch(/UTC$/);
  });

  test.each([
    ['a blank content', { content: ' \n' }, 'body.content'],
    ['an unknown intent', { intent: 'fun' }, 'body.intent'],
    ['metadata of more than 8 KiB', { metadata: { x: 'y'.repeat(9_000) } }, 'body.metadata'],
    ['a content of more than 32,768 characters', { content: 'x'.repeat(32_769) }, 'body.content'],
  ])('refuses %s and names the field', async (_what, fields, path) => {
    const { call } = await server.newUser();
    const { status, body } = await call('POST', '/memory/store', { ...note('x'), ...fields });
    expect(status).toBe(400);
    expect(body.errors[0].path).toBe(path);
  });

  test('refuses tasks, projects and agents of others', async () => {
    const one = await server.newUser();
    const other = await server.newUser();
    const task = await makeTask(one.call);
    const agent = await makeAgent(one.call);
    const project = (await one.call('POST', '/projects', { name: unique('project') })).body;
    for (const fields of [{ task_id: task.id }, { agent_id: agent.id }, { project_id: project.id }]) {
      expect((await other.call('POST', '/memory/store', note('mine now', fields))).status).toBe(403);
    }
    const { rows } = await server.db.query<{ n: number }>({
      text: `select count(*)::int as n from memories where user_id = $1`,
      values: [other.id],
    });
    expect(rows[0]?.n).toBe(0);
  });

  test('with an Idempotency-Key writes one memory', async () => {
    const { call, id } = await server.newUser();
    const send = () =>
      call('POST', '/memory/store', note('once', { metadata: { a: 1 } }), { 'idempotency-key': 'one' });
    const first = await send();
    const second = await send();
    expect(second.body.memory_id).toBe(first.body.memory_id);
    const audit = await call('GET', `/audit?entity_type=memory&entity_id=${first.body.memory_id}`);
    expect(audit.body.entries).toMatchObject([
      { operation: 'CREATE', changed_fields: { content: { old: null, new: 'once' }, metadata: { new: { a: 1 } } } },
    ]);
    const { rows } = await server.db.query<{ n: number }>({
      text: `select count(*)::int as n from memories where user_id = $1`,
      values: [id],
    });
    expect(rows[0]?.n).toBe(1);
  });
});

describe('search', () => {
  test('finds by words, in any of their forms, best first, and never what is of others', async () => {
    const one = await server.newUser();
    const other = await server.newUser();
    const texts = [
      'The breaker opens after three failures in a row.',
      'Failures of the printer are nobody’s fault.',
      'Lunch was good.',
    ];
    for (const text of texts) await one.call('POST', '/memory/store', note(text));
    await other.call('POST', '/memory/store', note('The breaker opens after three failures, says somebody else.'));
    const { status, body } = await one.call('POST', '/memory/search', { query: 'breakers failure' });
    expect(status).toBe(200);
    expect(body.results.map(({ content }: { content: string }) => content)).toEqual(texts.slice(0, 2));
    const [first, second] = body.results;
    expect(first.score).toBeGreaterThan(second.score);
    expect(first.score).toBeLessThanOrEqual(1);
    expect(body).toMatchObject({ source: 'postgresql', degraded: false });
    const admin = await server.admin('POST', '/memory/search', { query: 'breaker failures row somebody' });
    expect(admin.body.results.length).toBeGreaterThanOrEqual(2);
  });

  test('finds what was mistyped, and nothing for words that are not there', async () => {
    const { call } = await server.newUser();
    await call('POST', '/memory/store', note('The opossum guards the gateway.'));
    const typo = await call('POST', '/memory/search', { query: 'oposum gateay' });
    expect(typo.body.results).toHaveLength(1);
    const none = await call('POST', '/memory/search', { query: 'zeppelin' });
    expect(none.body.results).toEqual([]);
    const stop = await call('POST', '/memory/search', { query: 'the and of' });
    expect(stop.status).toBe(200);
  });

  test('honours project, task, intent, limit and min_score', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call);
    await call('POST', '/memory/store', note('needle one', { task_id: task.id }));
    await call('POST', '/memory/store', { content: 'needle two', intent: 'testing' });
    const search = async (more: object) =>
      (await call('POST', '/memory/search', { query: 'needle', ...more })).body.results.map(
        ({ content }: { content: string }) => content,
      );
    expect(await search({})).toHaveLength(2);
    expect(await search({ task_id: task.id })).toEqual(['needle one']);
    expect(await search({ intent: 'testing' })).toEqual(['needle two']);
    expect(await search({ limit: 1 })).toHaveLength(1);
    expect(await search({ query: 'needle absent words here', min_score: 0.9 })).toEqual([]);
  });

  test.each(['a & b | !c', "o'reilly \\ ''", '<->:*()', '"quoted" text', 'http://a/b?c=d&e'])(
    'takes %s as words and no more',
    async (query) => {
      const { call } = await server.newUser();
      await call('POST', '/memory/store', note(`about ${query} and more`));
      expect((await call('POST', '/memory/search', { query })).status).toBe(200);
    },
  );
});

describe('what Muster remembers by itself', () => {
  const remembered = (call: TestServer['admin'], task: number, kind: string) =>
    until(
      async () =>
        (await call('GET', `/tasks/${task}/history`)).body.memories.filter(
          ({ metadata }: { metadata: { kind: string } }) => metadata.kind === kind,
        ),
      (found) => found.length > 0,
    );

  test('each run that ended, once, with the end of its output', async () => {
    const { call } = await server.newUser();
    const agent = await makeAgent(call);
    const task = await makeTask(call, { skill_name: unique('crawl'), params: { intent: 'research' }, max_attempts: 1 });
    await call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne([task.skill_name]);
    await complete(call, run, { status: 'success', output: `${'.'.repeat(5_000)}found 7 pages` });
    const [memory, ...more] = await remembered(call, task.id, 'execution');
    expect(more).toEqual([]);
    expect(memory.content).toMatch(/: success in .*found 7 pages$/s);
    expect(memory.content.length).toBeLessThan(3_000);
    expect(memory.metadata).toMatchObject({
      who: { agent_id: agent.id },
      project: { task_id: task.id, execution_id: run.execution_id },
      why: { intent: 'research' },
      extra: { outcome: 'success' },
    });
  });

  test('what an agent reports of its own accord', async () => {
    const { call } = await server.newUser();
    const agent = await makeAgent(call);
    const task = await makeTask(call);
    const report = { agent_id: agent.id, task_id: task.id, status: 'failed', error: 'no paper' };
    const { body } = await call('POST', '/agents/activity', report);
    expect(body.stored_in_memory_mcp).toBe(false);
    const found = await remembered(call, task.id, 'activity');
    expect(found).toHaveLength(1);
    expect(found[0].content).toContain('no paper');
  });

  test('changes of tasks', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call, { schedule_cron: '0 3 * * *' });
    await call('POST', `/tasks/${task.id}/pause`);
    const found = await until(
      () => remembered(call, task.id, 'task_change'),
      (all) => all.length === 2,
    );
    expect(found[0].content).toContain('from pending to disabled');
  });
});

test('a project tells what is remembered of it, to its owner', async () => {
  const { call } = await server.newUser();
  const project = (await call('POST', '/projects', { name: unique('project') })).body;
  const agent = await makeAgent(call);
  const about = { project_id: project.id };
  await call('POST', '/memory/store', note('one', { ...about, agent_id: agent.id }));
  await call('POST', '/memory/store', note('two', about));
  await call('POST', '/memory/store', { ...note('three', about), intent: 'testing' });
  const { status, body } = await call('GET', `/projects/${project.id}/memory`);
  expect(status).toBe(200);
  expect(body).toMatchObject({
    total: 3,
    by_intent: [
      { intent: 'analysis', count: 2 },
      { intent: 'testing', count: 1 },
    ],
    by_week: [{ count: 3 }],
  });
  expect(body.by_agent).toContainEqual(expect.objectContaining({ agent_id: agent.id, count: 1 }));
  expect(body.latest.map(({ content }: { content: string }) => content)).toEqual(['three', 'two', 'one']);
  const stranger = await server.newUser();
  expect((await stranger.call('GET', `/projects/${project.id}/memory`)).status).toBe(403);
});

test('the history of a task holds its runs, its memories and what is like it', async () => {
  const { call } = await server.newUser();
  const task = await makeTask(call, { name: 'Weekly inventory of warehouse' });
  const like = await makeTask(call, { name: 'Monthly inventory' });
  await call('POST', '/memory/store', note('inventory of the warehouse took an hour', { task_id: like.id }));
  await call('POST', '/memory/store', note('counted twice', { task_id: task.id }));
  const { status, body } = await call('GET', `/tasks/${task.id}/history?related=true`);
  expect(status).toBe(200);
  expect(body).toMatchObject({ source: 'postgresql_fallback', degraded: false, age_seconds: 0, executions: [] });
  expect(body.memories.map(({ content }: { content: string }) => content)).toContain('counted twice');
  expect(body.related_memories.map(({ content }: { content: string }) => content)).toContain(
    'inventory of the warehouse took an hour',
  );
  expect(body.related_tasks.map(({ id }: { id: number }) => id)).toContain(like.id);
});

test('without a server, /memory/health and /health say disabled, which is healthy', async () => {
  const { call } = await server.newUser();
  expect((await call('GET', '/memory/health')).body).toMatchObject({
    status: 'disabled',
    breaker_state: null,
    backlog: 0,
  });
  expect((await call('GET', '//health')).body).toMatchObject({ status: 'healthy', memory_mcp: 'disabled' });
});
