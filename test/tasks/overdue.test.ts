import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { openStream } from '../realtime/support.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask, unique, until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

const rows = async <T extends object>(text: string, values: unknown[] = []): Promise<T[]> =>
  (await server.db.query<T & Record<string, unknown>>({ text, values })).rows;
/** Says when a task is overdue, in seconds from now. */
const overdueIn = (taskId: number, seconds: number) =>
  rows(`update tasks set overdue_at = now() + $2 * interval '1 second' where id = $1`, [taskId, seconds]);
const get = async (taskId: number) => (await user.call('GET', `/tasks/${taskId}`)).body;
const overdue = async (taskId: number) =>
  until(
    () => get(taskId),
    (task) => task.overdue_since !== null,
  );
const eventsOf = (taskId: number) =>
  rows<{ data: string; topic: string; user_id: number }>(
    `select data, topic, user_id from events where task_id = $1 and type = 'task_overdue'`,
    [taskId],
  );

describe('a task that does not succeed in time', () => {
  test('is overdue once, since then, and told of live and in the audit log, as done by nobody', async () => {
    const task = await makeTask(user.call, { name: unique('vital'), expect_success_within_seconds: 3_600 });
    const stream = await openStream(`${server.url}/api/v1/events?topics=tasks`, user.token);
    try {
      await stream.event(({ type }) => type === 'ack');
      await overdueIn(task.id, 1);
      const { data } = await stream.event(({ type }) => type === 'task_overdue');
      const marked = await get(task.id);
      expect(Date.parse(marked.overdue_since)).toBeGreaterThan(Date.parse(task.created_at));
      expect(data).toEqual({
        task_id: task.id,
        project_id: null,
        title: task.name,
        skill_name: task.skill_name,
        expect_success_within_seconds: 3_600,
        last_success_at: null,
        overdue_since: marked.overdue_since,
      });
      const { entries } = (await user.call('GET', `/audit?entity_type=task&entity_id=${task.id}&operation=UPDATE`))
        .body;
      expect(entries).toMatchObject([
        { user_id: null, changed_fields: { overdue_since: { old: null, new: marked.overdue_since } } },
      ]);
    } finally {
      stream.close();
    }
    // The loop comes round every second for others: it tells of this one no more.
    const other = await makeTask(user.call);
    await overdueIn(other.id, 0);
    await overdue(other.id);
    await server.feedCaughtUp();
    expect(await eventsOf(task.id)).toHaveLength(1);
  });

  test('is overdue so long after it was made, without anybody doing anything', async () => {
    const task = await makeTask(user.call, { expect_success_within_seconds: 1 });
    const { overdue_since } = await overdue(task.id);
    // One of the two is rounded, the other cut, to whole milliseconds.
    expect([999, 1_000]).toContain(Date.parse(overdue_since) - Date.parse(task.created_at));
  });

  test('before its time is not overdue, nor while it is paused', async () => {
    const later = await makeTask(user.call);
    const paused = await makeTask(user.call, { schedule_cron: '0 0 1 1 *' });
    await user.call('POST', `/tasks/${paused.id}/pause`);
    await overdueIn(later.id, 3_600);
    await overdueIn(paused.id, 0);
    const now = await makeTask(user.call);
    await overdueIn(now.id, 0);
    await overdue(now.id);
    await until(
      () => rows(`select from tasks where id = $1 and overdue_at is not null`, [paused.id]),
      (left) => left.length === 0,
    );
    for (const { id } of [later, paused]) {
      expect((await get(id)).overdue_since).toBeNull();
      expect(await eventsOf(id)).toEqual([]);
    }
  });

  test('is told of once though several processes look, however many there are', async () => {
    const second = await startServer({ databaseUrl: server.databaseUrl });
    try {
      const skill = unique('many');
      const { call, id } = await server.newUser();
      await makeTask(call, { skill_name: skill });
      await rows(
        `insert into tasks (user_id, skill_name, overdue_at) select $1, $2, now() from generate_series(1, 1200)`,
        [id, skill],
      );
      await until(
        () => rows(`select from tasks where skill_name = $1 and overdue_since is not null`, [skill]),
        (marked) => marked.length === 1_200,
      );
      const [told] = await until(
        () =>
          rows<{ n: number; tasks: number }>(
            `select count(*)::int as n, count(distinct task_id)::int as tasks from events where user_id = $1 and type = 'task_overdue'`,
            [id],
          ),
        ([row]) => (row?.n ?? 0) >= 1_200,
      );
      expect(told).toEqual({ n: 1_200, tasks: 1_200 });
    } finally {
      await second.stop();
    }
  });
});

describe('GET /tasks?overdue', () => {
  test('lists those that are, or those that are not, of the caller', async () => {
    const { call } = await server.newUser();
    const [late, fine] = [await makeTask(call), await makeTask(call)];
    await rows(`update tasks set overdue_since = now() where id = $1`, [late.id]);
    const list = async (query: string, by = call) => {
      const { status, body } = await by('GET', `/tasks?${query}`);
      expect(status, JSON.stringify(body)).toBe(200);
      return body.tasks.map(({ id }: { id: number }) => id);
    };
    expect(await list('overdue=true')).toEqual([late.id]);
    expect(await list('overdue=false')).toEqual([fine.id]);
    expect(await list('overdue=true', (await server.newUser()).call)).toEqual([]);
    await call('DELETE', `/tasks/${late.id}`);
    expect(await list('overdue=true')).toEqual([]);
    expect((await call('GET', '/tasks?overdue=yes')).status).toBe(400);
  });
});

test('/health counts them and is well all the same', async () => {
  const health = async () => (await server.as(undefined)('GET', '//health')).body;
  const count = async () =>
    (
      await rows<{ n: number }>(
        `select count(*)::int as n from tasks where overdue_since is not null and status <> 'deleted'`,
      )
    )[0]?.n;
  const before = (await count()) ?? 0;
  const task = await makeTask(user.call);
  await overdueIn(task.id, 0);
  await overdue(task.id);
  const body = await until(health, ({ overdue_tasks }) => overdue_tasks === before + 1);
  expect(body).toMatchObject({ status: 'healthy', checks: { overdue_tasks: { status: 'ok' } } });
  await user.call('DELETE', `/tasks/${task.id}`);
  await until(health, ({ overdue_tasks }) => overdue_tasks === before);
});
