import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
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

async function makeProject(call: Caller, fields: object = {}) {
  const { status, body } = await call('POST', '/projects', { name: unique('project'), ...fields });
  expect(status).toBe(201);
  return body;
}
const get = async (path: string) => (await user.call('GET', path)).body;
const names = (body: { projects: { name: string }[] }) => body.projects.map(({ name }) => name);

async function auditOf(type: string, id: number) {
  const { rows } = await server.db.query({
    text: 'select operation, changed_fields from audit_log where entity_type = $1 and entity_id = $2 order by id',
    values: [type, id],
  });
  return rows as { operation: string; changed_fields: Record<string, { old: unknown; new: unknown }> }[];
}

describe('a project', () => {
  test('is created, read, changed and deleted', async () => {
    const made = await user.call('POST', '/projects', { name: '  Website ', description: 'All of it' });
    expect(made).toMatchObject({
      status: 201,
      body: {
        name: 'Website',
        description: 'All of it',
        status: 'active',
        tasks_count: 0,
        version: 1,
        user_id: user.id,
      },
    });
    const { id } = made.body;
    expect(made.headers.get('location')).toBe(`/api/v1/projects/${id}`);
    const got = await user.call('GET', `/projects/${id}`);
    expect(got.body).toMatchObject({ id, tasks: [], tasks_has_more: false, tasks_next_cursor: null });
    expect(got.headers.get('etag')).toBe('"1"');
    const put = await user.call('PUT', `/projects/${id}`, { description: null }, { 'if-match': '"1"' });
    expect(put).toMatchObject({ status: 200, body: { description: null, version: 2 } });
    expect((await user.call('PUT', `/projects/${id}`, { name: 'X' }, { 'if-match': '"1"' })).status).toBe(412);
    expect((await user.call('DELETE', `/projects/${id}`, undefined, { 'if-match': '"1"' })).status).toBe(412);
    expect((await user.call('DELETE', `/projects/${id}`)).status).toBe(204);
    for (const [method, path, body] of [
      ['GET', ''],
      ['PUT', '', { name: 'x' }],
      ['DELETE', ''],
      ['POST', '/archive'],
      ['POST', '/restore'],
    ] as const) {
      expect((await user.call(method, `/projects/${id}${path}`, body)).status).toBe(404);
    }
    expect((await auditOf('project', id)).map(({ operation }) => operation)).toEqual(['CREATE', 'UPDATE', 'DELETE']);
    expect((await auditOf('project', id))[1]?.changed_fields).toEqual({ description: { old: 'All of it', new: null } });
  });

  test('that is changed into what it is stays as it is', async () => {
    const { id, name } = await makeProject(user.call);
    expect((await user.call('PUT', `/projects/${id}`, { name, status: 'active' })).body.version).toBe(1);
    expect((await user.call('POST', `/projects/${id}/restore`)).body.version).toBe(1);
    expect(await auditOf('project', id)).toHaveLength(1);
  });

  test.each([
    [{}, 'body.name'],
    [{ name: '' }, 'body.name'],
    [{ name: '   ' }, 'body.name'],
    [{ name: 'x'.repeat(256) }, 'body.name'],
    [{ name: 7 }, 'body.name'],
    [{ name: 'x', description: 'x'.repeat(2_001) }, 'body.description'],
    [{ name: 'x', tasks_count: 7 }, 'body.tasks_count'],
    [{ name: 'x', user_id: 1 }, 'body.user_id'],
    [{ name: 'x', status: 'deleted' }, 'body.status'],
  ])('is refused, naming the field: %#', async (body, path) => {
    const answer = await user.call('POST', '/projects', body);
    expect(answer.status).toBe(400);
    expect(answer.body.errors.map((error: { path: string }) => error.path)).toContain(path);
  });

  test.each([
    [{}, 'body'],
    [{ status: 'deleted' }, 'body.status'],
    [{ name: null }, 'body.name'],
    [{ version: 7 }, 'body.version'],
  ])('is not changed by %j', async (body, path) => {
    const { id } = await makeProject(user.call);
    const answer = await user.call('PUT', `/projects/${id}`, body);
    expect(answer.status).toBe(400);
    expect(answer.body.errors[0].path).toBe(path);
  });

  test('of somebody else can be neither seen nor changed, and an admin may', async () => {
    const { id } = await makeProject(user.call);
    const stranger = await server.newUser();
    for (const [method, path, body] of [
      ['GET', ''],
      ['PUT', '', { name: 'mine' }],
      ['DELETE', ''],
      ['POST', '/archive'],
      ['POST', '/restore'],
    ] as const) {
      expect((await stranger.call(method, `/projects/${id}${path}`, body)).status).toBe(403);
    }
    expect((await stranger.call('GET', '/projects')).body).toMatchObject({ projects: [], total: 0 });
    expect((await server.admin('PUT', `/projects/${id}`, { name: 'by an admin' })).status).toBe(200);
    expect((await get(`/projects/${id}`)).name).toBe('by an admin');
  });
});

describe('a list of projects', () => {
  test('is sorted by each order both ways, and paged without holes or repeats', async () => {
    for (const name of ['b', 'd', 'a', 'c', 'a']) await makeProject(user.call, { name });
    expect(names(await get('/projects'))).toEqual(['a', 'c', 'a', 'd', 'b']);
    expect(names(await get('/projects?sort_by=name'))).toEqual(['a', 'a', 'b', 'c', 'd']);
    expect(names(await get('/projects?sort_by=-name'))).toEqual(['d', 'c', 'b', 'a', 'a']);
    for (const sort of ['created_at', '-created_at', 'name', '-name', 'tasks_count', '-tasks_count', 'updated_at']) {
      const whole = await get(`/projects?sort_by=${sort}`);
      const ids: number[] = [];
      let cursor = '';
      do {
        const page = await get(`/projects?sort_by=${sort}&limit=2${cursor && `&cursor=${cursor}`}`);
        expect(page.total).toBe(5);
        ids.push(...page.projects.map((project: { id: number }) => project.id));
        cursor = page.next_cursor ?? '';
      } while (cursor);
      expect(ids).toEqual(whole.projects.map((project: { id: number }) => project.id));
    }
    expect((await user.call('GET', '/projects?sort_by=user_id')).status).toBe(400);
  });

  test('is searched in name and description, by letters that mean something to SQL too', async () => {
    await makeProject(user.call, { name: 'Shop front', description: 'Where 100% of it is_sold' });
    await makeProject(user.call, { name: 'Backend', description: String.raw`C:\shop` });
    await makeProject(user.call, { name: 'Other' });
    const found = async (text: string) => names(await get(`/projects?sort_by=name&search=${encodeURIComponent(text)}`));
    expect(await found('SHOP')).toEqual(['Backend', 'Shop front']);
    expect(await found('0%')).toEqual(['Shop front']);
    expect(await found('s_s')).toEqual(['Shop front']);
    expect(await found(String.raw`:\s`)).toEqual(['Backend']);
    expect(await found('sh')).toEqual(['Backend', 'Shop front']);
    expect(await found('ho')).toEqual([]);
    expect(await found("'; drop table projects; --")).toEqual([]);
    expect((await user.call('GET', '/projects?search=')).status).toBe(400);
  });

  test('is filtered by status', async () => {
    await makeProject(user.call, { name: 'active' });
    const { id } = await makeProject(user.call, { name: 'archived' });
    await user.call('POST', `/projects/${id}/archive`);
    expect(names(await get('/projects?status=archived'))).toEqual(['archived']);
    expect(names(await get('/projects?status=active'))).toEqual(['active']);
    expect((await user.call('GET', '/projects?status=deleted')).status).toBe(400);
  });
});

describe('tasks of a project', () => {
  test('come with it, page by page', async () => {
    const { id } = await makeProject(user.call);
    const made: number[] = [];
    for (let i = 0; i < 5; i++) made.unshift((await makeTask(user.call, { project_id: id })).id);
    await makeTask(user.call);
    const seen: number[] = [];
    let cursor = '';
    do {
      const page = await get(`/projects/${id}?tasks_limit=2${cursor && `&tasks_cursor=${cursor}`}`);
      expect(page.tasks_count).toBe(5);
      seen.push(...page.tasks.map((task: { id: number }) => task.id));
      cursor = page.tasks_next_cursor ?? '';
    } while (cursor);
    expect(seen).toEqual(made);
    const { id: other } = await makeProject(user.call);
    const { tasks_next_cursor: theirs } = await get(`/projects/${id}?tasks_limit=2`);
    expect((await user.call('GET', `/projects/${other}?tasks_cursor=${theirs}`)).status).toBe(400);
  });

  test('are counted truly while twenty at once make, move and delete them', async () => {
    const [a, b] = [await makeProject(user.call), await makeProject(user.call)];
    await Promise.all(
      Array.from({ length: 20 }, async (_, i) => {
        const task = await makeTask(user.call, { project_id: (i % 2 ? a : b).id });
        if (i % 3 === 0) await user.call('PUT', `/tasks/${task.id}`, { project_id: (i % 2 ? b : a).id });
        if (i % 4 === 0) await user.call('DELETE', `/tasks/${task.id}`);
      }),
    );
    for (const { id } of [a, b]) {
      const { rows } = await server.db.query<{ n: number }>({
        text: `select count(*)::int as n from tasks where project_id = $1 and status <> 'deleted'`,
        values: [id],
      });
      expect((await get(`/projects/${id}`)).tasks_count).toBe(rows[0]?.n);
    }
  });

  test('go with it, and what is queued of them; what runs may finish', async () => {
    const { id } = await makeProject(user.call);
    const skill = unique('skill');
    const [running, queued] = [
      await makeTask(user.call, { project_id: id, skill_name: skill }),
      await makeTask(user.call, { project_id: id, schedule_cron: '0 0 1 1 *' }),
    ];
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${running.id}/run`);
    const run = await agent.claimOne([skill]);
    const { body: waiting } = await user.call('POST', `/tasks/${queued.id}/run`);
    expect((await user.call('DELETE', `/projects/${id}`)).status).toBe(204);
    for (const task of [running, queued]) {
      expect((await user.call('GET', `/tasks/${task.id}`)).status).toBe(404);
      expect((await auditOf('task', task.id)).at(-1)?.operation).toBe('DELETE');
    }
    expect((await get(`/executions/${waiting.id}`)).status).toBe('cancelled');
    const report = { lease_token: run.lease_token, status: 'success' };
    expect((await user.call('POST', `/executions/${run.execution_id}/complete`, report)).status).toBe(200);
    const { rows } = await server.db.query<{ status: string; next_run_at: Date | null; tasks_count: number }>({
      text: 'select t.status, t.next_run_at, p.tasks_count from tasks t join projects p on p.id = t.project_id where p.id = $1',
      values: [id],
    });
    expect(rows).toEqual(Array(2).fill({ status: 'deleted', next_run_at: null, tasks_count: 0 }));
  });

  test('more than a thousand go at once', async () => {
    const { id } = await makeProject(user.call);
    await server.db.query({
      text: `insert into tasks (user_id, project_id, skill_name) select $1, $2, 's' from generate_series(1, 2100)`,
      values: [user.id, id],
    });
    expect((await user.call('DELETE', `/projects/${id}`)).status).toBe(204);
    const { rows } = await server.db.query({
      text: `select t.status, count(*)::int as n, count(a.id)::int as audited from tasks t
        left join audit_log a on a.entity_type = 'task' and a.entity_id = t.id and a.operation = 'DELETE'
        where project_id = $1 group by 1`,
      values: [id],
    });
    expect(rows).toEqual([{ status: 'deleted', n: 2_100, audited: 2_100 }]);
  });

  test('pause while it is archived, and go on when it is restored, but for those touched by hand', async () => {
    const { id } = await makeProject(user.call);
    const scheduled = () => makeTask(user.call, { project_id: id, schedule_cron: '0 0 1 1 *' });
    const [plain, paused, resumed, pausedSince] = [
      await scheduled(),
      await scheduled(),
      await scheduled(),
      await scheduled(),
    ];
    const onDemand = await makeTask(user.call, { project_id: id });
    await user.call('POST', `/tasks/${paused.id}/pause`);
    const archived = await user.call('POST', `/projects/${id}/archive`);
    expect(archived).toMatchObject({ status: 200, body: { status: 'archived', version: 2 } });
    const status = async ({ id: task }: { id: number }) => (await get(`/tasks/${task}`)).status;
    for (const task of [plain, paused, resumed, pausedSince]) expect(await status(task)).toBe('disabled');
    expect(await status(onDemand)).toBe('pending');
    const refused = await user.call('POST', '/tasks', { skill_name: 'x', project_id: id });
    expect(refused).toMatchObject({ status: 400, body: { errors: [{ path: 'body.project_id' }] } });

    await user.call('POST', `/tasks/${resumed.id}/resume`);
    await user.call('POST', `/tasks/${resumed.id}/pause`);
    await user.call('POST', `/tasks/${pausedSince.id}/pause`);
    const restored = await user.call('PUT', `/projects/${id}`, { status: 'active' });
    expect(restored.body.status).toBe('active');
    expect(await get(`/tasks/${plain.id}`)).toMatchObject({ status: 'pending', next_run_at: plain.next_run_at });
    for (const task of [paused, resumed, pausedSince]) expect(await status(task)).toBe('disabled');
    expect((await auditOf('task', plain.id)).map(({ operation }) => operation)).toEqual(['CREATE', 'UPDATE', 'UPDATE']);
  });
});
