import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { PRIORITIES, TASK_STATUSES } from '../../src/db/schema.ts';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique } from '../support/work.ts';
import { expectProblem, makeProject } from './traces.ts';

interface ListedTask {
  id: number;
  user_id: number;
  name: string | null;
  skill_name: string;
  status: string;
  priority: (typeof PRIORITIES)[number];
  created_at: string;
  updated_at: string;
  next_run_at: string | null;
}

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

async function list(call: Caller, query: Record<string, string | number> = {}) {
  const search = new URLSearchParams(
    Object.entries(query).map(([key, value]): [string, string] => [key, String(value)]),
  );
  const answer = await call('GET', `/tasks?${search}`);
  expect(answer.status, JSON.stringify(answer.body)).toBe(200);
  return answer.body as {
    tasks: ListedTask[];
    total: number | null;
    limit: number;
    offset: number;
    has_more: boolean;
    next_cursor: string | null;
  };
}

/** Every page of a list, by its cursors; `between` is done after each page. */
async function walk(call: Caller, query: Record<string, string | number>, between?: () => Promise<unknown>) {
  const found: ListedTask[] = [];
  for (let cursor: string | null | undefined; cursor !== null; ) {
    const page: Awaited<ReturnType<typeof list>> = await list(call, { ...query, ...(cursor ? { cursor } : {}) });
    expect(page.has_more).toBe(page.next_cursor !== null);
    expect(page.tasks.length).toBeLessThanOrEqual(page.limit);
    if (page.has_more) expect(page.tasks).toHaveLength(page.limit);
    found.push(...page.tasks);
    cursor = page.next_cursor;
    await between?.();
  }
  return found;
}

/** A user with `count` tasks whose sort keys are few, so that many are equal, some deleted. */
async function userWithTasks(count: number) {
  const user = await server.newUser();
  const day = (year: number, n: number) => new Date(Date.UTC(year, 0, 1 + n)).toISOString();
  const rows = Array.from({ length: count }, (_, i) => {
    const status = TASK_STATUSES[(i * 7) % TASK_STATUSES.length];
    const hasNext = (status === 'pending' || status === 'running') && i % 3 > 0;
    return {
      user_id: user.id,
      skill_name: `skill-${i % 4}`,
      status,
      priority: (i * 5) % PRIORITIES.length,
      next_run_at: hasNext ? day(2100, i % 5) : null,
      created_at: day(2020, (i * 11) % 6),
      updated_at: day(2021, i % 3),
    };
  });
  await server.db.query({
    text: `insert into tasks (user_id, skill_name, status, priority, next_run_at, created_at, updated_at)
      select * from jsonb_to_recordset($1) as r(user_id bigint, skill_name text, status text, priority smallint,
        next_run_at timestamptz, created_at timestamptz, updated_at timestamptz)`,
    values: [JSON.stringify(rows)],
  });
  const all = await walk(user.call, { limit: 100 });
  expect(all).toHaveLength(rows.filter(({ status }) => status !== 'deleted').length);
  return { ...user, all };
}

const KEYS: Record<string, (task: ListedTask) => string | number> = {
  created_at: (task) => task.created_at,
  updated_at: (task) => task.updated_at,
  // None comes after every time.
  next_run_at: (task) => task.next_run_at ?? '~',
  status: (task) => task.status,
  priority: (task) => PRIORITIES.indexOf(task.priority),
};

function sorted(tasks: ListedTask[], by: string, order: string): number[] {
  const key = KEYS[by] ?? (() => 0);
  const ascending = [...tasks].sort((a, b) => {
    const [ka, kb] = [key(a), key(b)];
    return ka < kb ? -1 : ka > kb ? 1 : a.id - b.id;
  });
  return (order === 'asc' ? ascending : ascending.reverse()).map(({ id }) => id);
}

describe('GET /tasks in every order', () => {
  const orders = Object.keys(KEYS).flatMap((by) => ['asc', 'desc'].map((order) => [by, order] as const));

  test.each(orders)('by %s %s: pages of any size, by cursor or offset, make up the whole', async (by, order) => {
    const user = await userWithTasks(40);
    const expected = sorted(user.all, by, order);
    await fc.assert(
      fc.asyncProperty(fc.integer({ min: 1, max: 45 }), async (limit) => {
        const query = { sort_by: by, sort_order: order, limit };
        expect((await walk(user.call, query)).map(({ id }) => id)).toEqual(expected);
        const byOffset: number[] = [];
        for (let offset = 0; offset <= expected.length; offset += limit) {
          const page = await list(user.call, { ...query, offset });
          expect(page).toMatchObject({ total: expected.length, limit, offset });
          expect(page.has_more).toBe(offset + limit < expected.length);
          byOffset.push(...page.tasks.map(({ id }) => id));
        }
        expect(byOffset).toEqual(expected);
      }),
      { numRuns: 6, examples: [[1], [39], [40]] },
    );
  });

  test('with filters, a cursor goes on with the filtered list', async () => {
    const user = await userWithTasks(40);
    for (const query of [{ status: 'pending' }, { skill_name: 'skill-2' }, { status: 'pending', search: 'SKILL-2' }]) {
      const whole = user.all.filter(
        (task) =>
          (!query.status || task.status === query.status) &&
          (!query.skill_name || task.skill_name === query.skill_name) &&
          (!query.search || task.skill_name.includes(query.search.toLowerCase())),
      );
      expect(whole.length).toBeGreaterThan(1);
      const found = await walk(user.call, { ...query, limit: 2, sort_by: 'priority', sort_order: 'asc' });
      expect(found.map(({ id }) => id)).toEqual(sorted(whole, 'priority', 'asc'));
      expect((await list(user.call, { ...query, limit: 1 })).total).toBe(whole.length);
    }
  });

  test('what is made or deleted between pages makes no other task come twice or not at all', async () => {
    const user = await userWithTasks(30);
    const expected = user.all.map(({ id }) => id);
    const found = await walk(user.call, { limit: 4 }, async () => {
      const { id } = await makeTask(user.call);
      await makeTask(user.call);
      await user.call('DELETE', `/tasks/${id}`);
    });
    expect(found.map(({ id }) => id)).toEqual(expected);
  });

  test('newest first unless asked otherwise', async () => {
    const user = await server.newUser();
    const ids: number[] = [];
    for (let i = 0; i < 3; i++) ids.unshift((await makeTask(user.call)).id);
    const answer = await list(user.call);
    expect(answer.tasks.map(({ id }) => id)).toEqual(ids);
    expect(answer).toMatchObject({ total: 3, limit: 20, offset: 0, has_more: false, next_cursor: null });
  });

  test('without a total when that is not wanted', async () => {
    const user = await server.newUser();
    await makeTask(user.call);
    expect(await list(user.call, { total: 'false' })).toMatchObject({ total: null, has_more: false });
    expect((await list(user.call, { total: 'true' })).total).toBe(1);
  });
});

describe('GET /tasks filters', () => {
  const ids = (answer: { tasks: ListedTask[] }) => answer.tasks.map(({ id }) => id).sort((a, b) => a - b);

  test('by project, agent, skill and status', async () => {
    const user = await server.newUser();
    const project = await makeProject(server, user.id);
    const agent = await makeAgent(user.call);
    const skill_name = unique('skill');
    const [inProject, pinned, skilled, paused] = [
      await makeTask(user.call, { project_id: project }),
      await makeTask(user.call, { agent_id: agent.id }),
      await makeTask(user.call, { skill_name }),
      await makeTask(user.call),
    ];
    await user.call('POST', `/tasks/${paused.id}/pause`);
    expect(ids(await list(user.call, { project_id: project }))).toEqual([inProject.id]);
    expect(ids(await list(user.call, { agent_id: agent.id }))).toEqual([pinned.id]);
    expect(ids(await list(user.call, { skill_name }))).toEqual([skilled.id]);
    expect(ids(await list(user.call, { status: 'disabled' }))).toEqual([paused.id]);
    expect(ids(await list(user.call, { status: 'disabled', skill_name }))).toEqual([]);
    expect(ids(await list(user.call, { project_id: 987_654_321 }))).toEqual([]);
  });

  test('by the next time: from the first instant to before the second', async () => {
    const user = await server.newUser();
    const at = (n: number) => `2100-01-0${n}T00:00:00.000Z`;
    const tasks: { id: number }[] = [];
    for (const n of [1, 2, 3]) tasks.push(await makeTask(user.call, { run_at: at(n) }));
    await makeTask(user.call);
    const [first, second, third] = tasks.map(({ id }) => id);
    expect(ids(await list(user.call, { next_run_from: at(2) }))).toEqual([second, third]);
    expect(ids(await list(user.call, { next_run_to: at(2) }))).toEqual([first]);
    expect(ids(await list(user.call, { next_run_from: at(1), next_run_to: at(3) }))).toEqual([first, second]);
    expect(ids(await list(user.call, { next_run_from: '2100-01-02T01:00:00+01:00' }))).toEqual([second, third]);
  });

  test('by a part of name or skill, in any case, and literally', async () => {
    const user = await server.newUser();
    const names = ['100% done', '100 done', 'a_b', 'axb', 'back\\slash', 'Größe'];
    const byName = new Map<string, number>();
    for (const name of names) byName.set(name, (await makeTask(user.call, { name, skill_name: 'plain' })).id);
    const skilled = await makeTask(user.call, { skill_name: 'Deploy_Site' });
    const found = async (search: string) => ids(await list(user.call, { search }));
    expect(await found('100%')).toEqual([byName.get('100% done')]);
    expect(await found('A_B')).toEqual([byName.get('a_b')]);
    expect(await found('\\')).toEqual([byName.get('back\\slash')]);
    expect(await found('GRÖSSE')).toEqual([]);
    expect(await found('größ')).toEqual([byName.get('Größe')]);
    expect(await found('deploy_s')).toEqual([skilled.id]);
    expect(await found('%')).toEqual([byName.get('100% done')]);
    expect(await found('_')).toEqual([byName.get('a_b'), skilled.id]);
    expect(await found("'; drop table tasks; --")).toEqual([]);
    expect(await found('')).toHaveLength(7);
  });

  test('never shows a deleted task', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { name: 'gone' });
    await user.call('DELETE', `/tasks/${task.id}`);
    for (const call of [user.call, server.admin]) {
      for (const query of [{}, { search: 'gone' }, { sort_by: 'status' }]) {
        expect(ids(await list(call, { ...query, limit: 100 }))).not.toContain(task.id);
      }
    }
    expect((await list(user.call)).total).toBe(0);
    const message = expectProblem(await user.call('GET', '/tasks?status=deleted'), 400, 'query.status');
    for (const status of TASK_STATUSES) expect(message).toContain(status);
  });
});

describe('GET /tasks refuses', () => {
  test.each([
    ['limit=0', 'limit'],
    ['limit=101', 'limit'],
    ['limit=-1', 'limit'],
    ['limit=NaN', 'limit'],
    ['limit=1e1', 'limit'],
    ['limit=0x10', 'limit'],
    ['limit=%D9%A1', 'limit'],
    ['limit=', 'limit'],
    ['limit=1&limit=2', 'limit'],
    ['offset=-1', 'offset'],
    ['offset=99999999999999999999', 'offset'],
    ['offset=1.5', 'offset'],
    ['offset=0&cursor=abc', 'cursor'],
    ['cursor=abc', 'cursor'],
    ['cursor=', 'cursor'],
    [`cursor=${'a'.repeat(513)}`, 'cursor'],
    ['cursor=%00', 'cursor'],
    ['total=yes', 'total'],
    ['sort_by=name', 'sort_by'],
    ['sort_by=id;drop', 'sort_by'],
    ['sort_by=-created_at', 'sort_by'],
    ['sort_order=up', 'sort_order'],
    ['status=done', 'status'],
    ['status=', 'status'],
    ['skill_name=a%20b', 'skill_name'],
    ['project_id=0', 'project_id'],
    ['project_id=01', 'project_id'],
    ['project_id=%201', 'project_id'],
    ['project_id=9007199254740992', 'project_id'],
    ['agent_id=abc', 'agent_id'],
    ['next_run_from=today', 'next_run_from'],
    ['next_run_to=2100-01-01', 'next_run_to'],
    ['next_run_to=%2B010000-01-01T00:00:00Z', 'next_run_to'],
    [`search=${'a'.repeat(256)}`, 'search'],
    ['search=%00', 'search'],
    ['user_id=1', 'user_id'],
    ['page=2', 'page'],
  ])('%s', async (query, field) => {
    expectProblem(await server.admin('GET', `/tasks?${query}`), 400, `query.${field}`);
  });

  test('a cursor of another list, order, filter or user', async () => {
    const user = await userWithTasks(10);
    const stranger = await userWithTasks(10);
    const cursor = (await list(user.call, { limit: 2 })).next_cursor ?? '';
    expect(cursor).not.toBe('');
    for (const [call, query] of [
      [user.call, 'sort_order=asc'],
      [user.call, 'sort_by=priority'],
      [user.call, 'status=pending'],
      [stranger.call, ''],
      [server.admin, ''],
    ] as const) {
      expectProblem(await call('GET', `/tasks?limit=2&cursor=${cursor}&${query}`), 400, 'query.cursor');
    }
  });

  test('a cursor that was tampered with, never with a fault of ours', async () => {
    const user = await userWithTasks(10);
    for (const sort_by of Object.keys(KEYS)) {
      const cursor = (await list(user.call, { limit: 2, sort_by })).next_cursor ?? '';
      const [scope] = JSON.parse(Buffer.from(cursor, 'base64url').toString()) as [string];
      for (const forged of [
        [scope, 'nonsense', 1],
        [scope, '\0', 1],
        [scope, '\ud800', 1],
        [scope, '2100-13-45 99:99:99+00', 1],
        [scope, '99999', 1],
        [scope, '9'.repeat(30), 1],
        [scope, 'infinity', 2 ** 53],
        [scope, 'infinity', -1],
        [scope, 'infinity', '1; drop table tasks'],
        [scope],
        scope,
        null,
      ]) {
        const text = Buffer.from(JSON.stringify(forged)).toString('base64url');
        const answer = await user.call('GET', `/tasks?limit=2&sort_by=${sort_by}&cursor=${text}`);
        expect([200, 400], `${sort_by} ${JSON.stringify(forged)}`).toContain(answer.status);
      }
    }
  });
});

describe('GET /tasks/{id}', () => {
  test('shows the latest runs, newest first, as many as asked for', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call);
    const runs: number[] = [];
    for (let i = 0; i < 3; i++) runs.unshift((await user.call('POST', `/tasks/${task.id}/run`)).body.id);
    for (const run of await agent.claim({ max: 3 })) {
      await complete(user.call, run, { status: 'success', output: `out ${run.execution_id}` });
    }
    const shown = async (query = '') => {
      const { body } = await user.call('GET', `/tasks/${task.id}${query}`);
      return body.executions as { id: number; status: string; output_preview: string }[];
    };
    expect((await shown()).map(({ id }) => id)).toEqual(runs);
    expect((await shown('?history_limit=2')).map(({ id }) => id)).toEqual(runs.slice(0, 2));
    expect(await shown('?history_limit=0')).toEqual([]);
    expect((await shown('?history_limit=500'))[0]).toMatchObject({
      status: 'success',
      output_preview: `out ${runs[0]}`,
    });
  });

  test('shows 50 runs unless asked otherwise', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    await server.db.query({
      text: `insert into executions (task_id, user_id, trigger, scheduled_for, status, ended_at, skill_name, params, priority,
          timeout_seconds)
        select $1, $2, 'manual', now(), 'success', now(), 's', '{}', 1, 60 from generate_series(1, 60)`,
      values: [task.id, user.id],
    });
    expect((await user.call('GET', `/tasks/${task.id}`)).body.executions).toHaveLength(50);
    expect((await user.call('GET', `/tasks/${task.id}?history_limit=60`)).body.executions).toHaveLength(60);
  });

  test.each(['history_limit=501', 'history_limit=-1', 'history_limit=all', 'history_limit='])(
    'refuses %s',
    async (query) => {
      const task = await makeTask(server.admin);
      expectProblem(await server.admin('GET', `/tasks/${task.id}?${query}`), 400, 'query.history_limit');
    },
  );

  test.each([
    '0',
    '-1',
    '1e3',
    '0x1',
    '%201',
    '%D9%A1',
    '1.0',
    '01',
    '9007199254740992',
    '9007199254740993',
    'abc',
    '%00',
    '1,2',
  ])('refuses the id %s, in every call', async (id) => {
    for (const [method, path] of [
      ['GET', ''],
      ['PUT', ''],
      ['DELETE', ''],
      ['POST', '/run'],
      ['POST', '/pause'],
      ['POST', '/resume'],
      ['GET', '/preview'],
    ] as const) {
      const body = method === 'PUT' ? { name: 'a' } : undefined;
      expectProblem(await server.admin(method, `/tasks/${id}${path}`, body), 400, 'path.id');
    }
  });

  test('answers 404 for one that never was', async () => {
    expectProblem(await server.admin('GET', '/tasks/9007199254740991'), 404);
  });
});

test('the largest lists stay small, whatever the tasks hold, and tell what they leave out', async () => {
  const user = await server.newUser();
  const project = (await user.call('POST', '/projects', { name: 'large' })).body;
  const params = { a: 'x'.repeat(65_000) };
  const { id } = await makeTask(user.call, { params, project_id: project.id });
  await server.db.query({
    text: `insert into tasks (user_id, project_id, skill_name, params)
      select $1, $2, 's', $3::jsonb from generate_series(1, 100)`,
    values: [user.id, project.id, JSON.stringify(params)],
  });
  await server.db.query({
    text: `insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields)
      select $1, $1, 'UPDATE', 'task', $2, jsonb_build_object('params', jsonb_build_object('old', $3::jsonb, 'new', $3::jsonb))
      from generate_series(1, 100)`,
    values: [user.id, id, JSON.stringify(params)],
  });
  for (const path of ['/tasks?limit=100', `/projects/${project.id}?tasks_limit=100`]) {
    const { body } = await user.call('GET', path);
    expect(body.tasks).toHaveLength(100);
    expect(JSON.stringify(body).length, path).toBeLessThan(4 * 1_048_576);
    expect(body.tasks[0].params).toBeNull();
  }
  const { body: audit } = await user.call('GET', '/audit?limit=100');
  expect(audit.entries).toHaveLength(100);
  expect(JSON.stringify(audit).length).toBeLessThan(4 * 1_048_576);
  expect(audit.entries[0].changed_fields).toEqual({ params: { old: null, new: null, omitted: true } });
  expect((await user.call('GET', `/tasks/${id}`)).body.params).toEqual(params);
});
