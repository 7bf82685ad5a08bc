import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let agent: Awaited<ReturnType<typeof makeAgent>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
  agent = await makeAgent(user.call);
});

const rows = async <T extends object>(text: string, values: unknown[] = []): Promise<T[]> =>
  (await server.db.query<T & Record<string, unknown>>({ text, values })).rows;
const get = async (id: number) => (await user.call('GET', `/executions/${id}`)).body;
const replay = (id: number, body?: unknown, headers = {}) =>
  user.call('POST', `/executions/${id}/replay`, body, headers);
const bulk = (body: Record<string, unknown>, call = user.call) => call('POST', '/executions/bulk', body);

/** A run of a task that has ended so. */
async function ended(taskId: number, status = 'failed'): Promise<number> {
  await user.call('POST', `/tasks/${taskId}/run`);
  const run = await agent.claimOne();
  await complete(user.call, run, { status });
  return run.execution_id;
}
/** Runs of a task, made by SQL. */
const make = async (taskId: number, count: number, status: string) =>
  (
    await rows<{ id: number }>(
      `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds,
         status, ended_at, available_at)
       select id, user_id, 'manual', now(), skill_name, params, 1, 60, $2, case when $2 = 'queued' then null else now() end, now()
       from tasks, generate_series(1, $3) where id = $1 returning id`,
      [taskId, status, count],
    )
  ).map(({ id }) => id);

describe('POST /executions/{id}/replay', () => {
  test('runs an ended run again as it was, whatever its task has become', async () => {
    const task = await makeTask(user.call, { params: { who: 'team' }, max_attempts: 1, priority: 'high' });
    const original = await ended(task.id);
    const before = await get(original);
    await user.call('PUT', `/tasks/${task.id}`, { params: { who: 'board' }, skill_name: 'other', priority: 'low' });
    const answer = await replay(original);
    expect(answer).toMatchObject({
      status: 202,
      body: {
        trigger: 'replay',
        replay_of: original,
        status: 'queued',
        attempt: 1,
        retry_of: null,
        skill_name: task.skill_name,
        params: { who: 'team' },
        scheduled_for: before.scheduled_for,
      },
    });
    expect(answer.headers.get('location')).toBe(`/api/v1/executions/${answer.body.id}`);
    const run = await agent.claimOne([task.skill_name]);
    expect(run).toMatchObject({ execution_id: answer.body.id, params: { who: 'team' } });
    await complete(user.call, run);
    expect(await get(answer.body.id)).toMatchObject({ status: 'success', replay_of: original });
    expect(await get(original)).toEqual(before);
  });

  test('takes other params, happens once for an Idempotency-Key, and is in the audit log', async () => {
    const task = await makeTask(user.call, { params: { who: 'team' }, max_attempts: 1 });
    const original = await ended(task.id, 'success');
    const headers = { 'idempotency-key': unique('replay') };
    const first = await replay(original, { params: { who: 'me' } }, headers);
    const second = await replay(original, { params: { who: 'me' } }, headers);
    expect(second.body).toEqual(first.body);
    expect(first.body.params).toEqual({ who: 'me' });
    expect(await rows('select from executions where replay_of = $1', [original])).toHaveLength(1);
    const { entries } = (await user.call('GET', `/audit?entity_type=execution&entity_id=${first.body.id}`)).body;
    expect(entries).toMatchObject([
      {
        user_id: user.id,
        changed_fields: { replay_of: { new: original }, trigger: { new: 'replay' }, params: { new: { who: 'me' } } },
      },
    ]);
    await server.feedCaughtUp();
    const told = await rows(
      `select from events where task_id = $1 and data::jsonb @> jsonb_build_object('execution_id', $2::bigint, 'execution_status', 'queued')`,
      [task.id, first.body.id],
    );
    expect(told).toHaveLength(1);
  });

  test('does not wait for other runs, and is retried as its task says', async () => {
    const task = await makeTask(user.call, { max_attempts: 2, retry_backoff_seconds: 0 });
    await user.call('POST', `/tasks/${task.id}/run`);
    const first = await agent.claimOne();
    await complete(user.call, first, { status: 'success' });
    await user.call('POST', `/tasks/${task.id}/run`);
    await agent.claimOne();
    const { body } = await replay(first.execution_id);
    const run = await agent.claimOne();
    expect(run.execution_id).toBe(body.id);
    await complete(user.call, run, { status: 'failed' });
    expect(await agent.claimOne()).toMatchObject({ attempt: 2 });
  });

  test('is refused for a run that has not ended, for a deleted task, and for who may not', async () => {
    const task = await makeTask(user.call, { max_attempts: 1 });
    const queued = (await user.call('POST', `/tasks/${task.id}/run`)).body.id;
    expect(await replay(queued)).toMatchObject({ status: 409, body: { detail: /has not ended \(queued\)/ } });
    const run = await agent.claimOne();
    expect((await replay(queued)).status).toBe(409);
    await complete(user.call, run);
    const stranger = await server.newUser();
    expect((await stranger.call('POST', `/executions/${queued}/replay`)).status).toBe(403);
    expect((await replay(999_999_999)).status).toBe(404);
    expect((await replay(queued, { params: 7 })).status).toBe(400);
    await user.call('DELETE', `/tasks/${task.id}`);
    expect(await replay(queued)).toMatchObject({ status: 409, body: { detail: /was deleted/ } });
  });
});

describe('POST /executions/bulk', () => {
  test('replays what a filter lets through, in steps, and counts it before', async () => {
    const task = await makeTask(user.call);
    const other = await makeTask(user.call);
    const failed = await make(task.id, 1_100, 'failed');
    await make(task.id, 3, 'success');
    await make(task.id, 2, 'queued');
    await make(other.id, 4, 'failed');
    const filter = { task_id: task.id, status: 'failed' };
    const dry = await bulk({ action: 'replay', filter, dry_run: true });
    expect(dry).toMatchObject({ status: 200, body: { matched: 1_100, changed: 1_000, remaining: 100, dry_run: true } });
    expect(await rows('select from executions where replay_of is not null and task_id = $1', [task.id])).toEqual([]);

    const first = (await bulk({ action: 'replay', filter })).body;
    expect(first).toMatchObject({ matched: 1_100, changed: 1_000, remaining: 100 });
    expect(first.results).toHaveLength(1_000);
    const after_id = first.results.at(-1).execution_id;
    const second = (await bulk({ action: 'replay', filter: { ...filter, after_id } })).body;
    expect(second).toMatchObject({ matched: 100, changed: 100, remaining: 0 });
    const made = await rows<{ id: number; replay_of: number }>(
      `select id, replay_of from executions where task_id = $1 and trigger = 'replay' order by replay_of`,
      [task.id],
    );
    expect(made.map(({ replay_of }) => replay_of)).toEqual(failed.toSorted((a, b) => a - b));
    expect([...first.results, ...second.results].map(({ new_execution_id }) => new_execution_id)).toEqual(
      made.map(({ id }) => id),
    );
  });

  test('cancels what is queued and asks what runs to stop, and the next one gets its turn', async () => {
    const task = await makeTask(user.call, { max_attempts: 1 });
    await user.call('POST', `/tasks/${task.id}/run`);
    const running = await agent.claimOne();
    const queued = await make(task.id, 3, 'queued');
    const [waiting] = await make(task.id, 1, 'queued');
    await rows('update executions set available_at = null where id = $1', [waiting]);
    const done = await make(task.id, 1, 'success');
    const ids = [...queued, running.execution_id, ...done];
    const answer = (await bulk({ action: 'cancel', ids })).body;
    expect(answer).toMatchObject({ matched: 5, changed: 4, remaining: 0 });
    const of = new Map(answer.results.map((one: { execution_id: number }) => [one.execution_id, one]));
    for (const id of queued) {
      expect(of.get(id)).toMatchObject({ result: 'changed' });
      expect(await get(id)).toMatchObject({ status: 'cancelled', cause: 'cancelled' });
    }
    expect(await get(running.execution_id)).toMatchObject({ status: 'running', cancel_requested: true });
    expect(of.get(done[0])).toMatchObject({ result: 'conflict', detail: /nothing to cancel/ });
    expect((await bulk({ action: 'cancel', ids })).body).toMatchObject({ changed: 0 });
    await complete(user.call, running, { status: 'failed' });
    expect((await agent.claimOne()).execution_id).toBe(waiting);
  });

  test('knows each filter', async () => {
    const project = (await user.call('POST', '/projects', { name: unique('p') })).body.id;
    const inside = await makeTask(user.call, { project_id: project, skill_name: unique('inside') });
    const outside = await makeTask(user.call, { max_attempts: 1 });
    const taken = await ended(outside.id);
    const [a] = await make(inside.id, 1, 'queued');
    const [b] = await make(outside.id, 1, 'queued');
    await rows(`update executions set created_at = '2026-01-01T00:00:00Z' where id = $1`, [b]);
    const matched = async (action: string, filter: Record<string, unknown>) =>
      (await bulk({ action, filter, dry_run: true })).body.results.map(
        (run: { execution_id: number }) => run.execution_id,
      );
    expect(await matched('cancel', { project_id: project })).toEqual([a]);
    expect(await matched('cancel', { skill_name: inside.skill_name })).toEqual([a]);
    expect(await matched('cancel', { task_id: outside.id, to: '2026-01-02T00:00:00Z' })).toEqual([b]);
    expect(await matched('cancel', { from: '2026-01-02T00:00:00Z' })).toEqual([a]);
    expect(await matched('replay', { agent_id: agent.id })).toEqual([taken]);
    expect(await matched('cancel', { agent_id: agent.id })).toEqual([]);
    expect(await matched('cancel', { status: 'success' })).toEqual([]);
  });

  test('touches nothing of others, and says of each what became of it', async () => {
    const task = await makeTask(user.call);
    const [mine] = await make(task.id, 1, 'queued');
    const stranger = await server.newUser();
    const named = await bulk({ action: 'cancel', ids: [mine, 999_999_999] }, stranger.call);
    expect(named.body).toMatchObject({
      changed: 0,
      results: [
        { execution_id: mine, result: 'forbidden' },
        { execution_id: 999_999_999, result: 'not_found' },
      ],
    });
    expect((await bulk({ action: 'cancel', filter: { task_id: task.id } }, stranger.call)).body.matched).toBe(0);
    expect((await get(mine ?? 0)).status).toBe('queued');
    expect((await bulk({ action: 'replay', ids: [mine] })).body.results).toMatchObject([{ result: 'conflict' }]);
  });

  test('refuses what it cannot make sense of', async () => {
    for (const [body, path] of [
      [{ action: 'cancel' }, 'body.ids'],
      [{ action: 'cancel', ids: [1], filter: { status: 'queued' } }, 'body.ids'],
      [{ action: 'cancel', ids: [1, 1] }, 'body.ids'],
      [{ action: 'cancel', filter: {} }, 'body.filter'],
      [{ action: 'replay', filter: { after_id: 7 } }, 'body.filter'],
      [{ action: 'delete', ids: [1] }, 'body.action'],
      [{ action: 'cancel', filter: { task_id: 1, sort: 'x' } }, 'body.filter.sort'],
    ] as const) {
      expect(await bulk(body)).toMatchObject({ status: 400, body: { errors: [{ path }] } });
    }
  });
});
