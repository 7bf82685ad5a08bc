import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, until } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

const rowsOf = async <T extends object>(text: string, values: unknown[]): Promise<T[]> =>
  (await server.db.query<T & Record<string, unknown>>({ text, values })).rows;

const occurrencesOf = (taskId: number) =>
  rowsOf<{ scheduled_for: Date; verdict: string; blocked_by: number | null }>(
    'select scheduled_for, verdict, blocked_by from occurrences where task_id = $1 order by scheduled_for',
    [taskId],
  );
const runsOf = (taskId: number) =>
  rowsOf<{ id: number; status: string; scheduled_for: Date; available_at: Date | null; cancel_requested: boolean }>(
    'select id, status, scheduled_for, available_at, cancel_requested from executions where task_id = $1 order by id',
    [taskId],
  );
/** Makes a task's next tick lie `seconds` in the past, as if nobody had been there to fire it, and wakes the scheduler. */
const missed = (taskId: number, seconds: number) =>
  rowsOf(
    `with moved as (
       update tasks set next_run_at = date_trunc('minute', now()) - $2 * interval '1 second' where id = $1 returning 1
     ) select pg_notify('muster', '{"from":"test","rings":[["schedule",null]]}') from moved`,
    [taskId, seconds],
  );

describe('the scheduler', () => {
  test('fires a one-off at its time, once, and then has nothing further to run', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const at = new Date(Date.now() + 700).toISOString();
    const task = await makeTask(user.call, { run_at: at });
    expect(task.next_run_at).toBe(at);
    const run = await agent.claimOne();
    expect(run).toMatchObject({ task_id: task.id, scheduled_for: at });
    const [row] = await runsOf(task.id);
    expect(
      (
        await rowsOf<{ early: boolean }>('select created_at < $1 as early from executions where id = $2', [at, row?.id])
      )[0],
    ).toEqual({ early: false });
    await complete(user.call, run);
    expect((await user.call('GET', `/tasks/${task.id}`)).body).toMatchObject({
      status: 'completed',
      next_run_at: null,
    });
    expect(await occurrencesOf(task.id)).toMatchObject([{ verdict: 'fired' }]);
  });

  test('fires a cron task at every tick and moves to the next', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const ticks: number[] = [];
    for (let i = 0; i < 3; i++) {
      const run = await agent.claimOne();
      ticks.push(Date.parse(run.scheduled_for));
      await complete(user.call, run);
    }
    expect(ticks.map((tick, i) => tick - (ticks[0] ?? 0) - i * 1000)).toEqual([0, 0, 0]);
    const paused = await user.call('POST', `/tasks/${task.id}/pause`);
    expect(paused.body).toMatchObject({ status: 'disabled', next_run_at: null });
    const before = (await runsOf(task.id)).length;
    await server.db.query({ text: 'select pg_sleep(1.5)' });
    expect((await runsOf(task.id)).length).toBe(before);
  });

  test('a task that comes up earlier than the next one wakes it', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    await makeTask(user.call, { run_at: new Date(Date.now() + 4_500).toISOString(), skill_name: 'later' });
    const soon = await makeTask(user.call, { run_at: new Date(Date.now() + 300).toISOString(), skill_name: 'soon' });
    const run = await agent.claimOne();
    expect(run.task_id).toBe(soon.id);
  });
});

describe('overlap', () => {
  test('skip: a tick that finds a run unfinished is recorded with that run, and not run', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const ticks = await until(
      () => occurrencesOf(task.id),
      (rows) => rows.length >= 3,
    );
    const [run, ...more] = await runsOf(task.id);
    expect(more).toEqual([]);
    expect(ticks[0]).toMatchObject({ verdict: 'fired' });
    expect(ticks.slice(1).every((tick) => tick.verdict === 'skipped_overlap' && tick.blocked_by === run?.id)).toBe(
      true,
    );
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  test('queue_one: one run waits until the unfinished one has ended', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *', overlap_policy: 'queue_one' });
    const first = await agent.claimOne();
    await until(
      () => occurrencesOf(task.id),
      (rows) => rows.length >= 4,
    );
    const runs = await runsOf(task.id);
    expect(runs.map((run) => [run.status, run.available_at === null])).toEqual([
      ['running', false],
      ['queued', true],
    ]);
    expect(await agent.claim()).toEqual([]);
    await complete(user.call, first);
    const second = await agent.claimOne();
    expect(second.execution_id).toBe(runs[1]?.id);
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  test('queue_all: every run waits its turn, oldest first', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *', overlap_policy: 'queue_all' });
    const first = await agent.claimOne();
    await until(
      () => runsOf(task.id),
      (rows) => rows.length >= 3,
    );
    await user.call('POST', `/tasks/${task.id}/pause`);
    const runs = await runsOf(task.id);
    await complete(user.call, first);
    const second = await agent.claimOne();
    expect(second.execution_id).toBe(runs[1]?.id);
    expect(await agent.claim()).toEqual([]);
    await complete(user.call, second);
    expect((await agent.claimOne()).execution_id).toBe(runs[2]?.id);
  });

  test('cancel_previous: the unfinished run is asked to stop, and the new one follows it', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *', overlap_policy: 'cancel_previous' });
    const first = await agent.claimOne();
    await until(
      () => runsOf(task.id),
      (rows) => rows.some((row) => row.id === first.execution_id && row.cancel_requested) && rows.length >= 2,
    );
    await user.call('POST', `/tasks/${task.id}/pause`);
    await complete(user.call, first, { status: 'failed' });
    const runs = await runsOf(task.id);
    expect(runs[0]?.status).toBe('cancelled');
    expect((await agent.claimOne()).execution_id).toBe(runs.at(-1)?.id);
    expect(runs.slice(1, -1).every((run) => run.status === 'cancelled')).toBe(true);
  });

  test('allow: runs go side by side', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *', overlap_policy: 'allow' });
    const first = await agent.claimOne();
    const second = await agent.claimOne();
    expect(second.execution_id).not.toBe(first.execution_id);
    expect(second.task_id).toBe(task.id);
    await user.call('DELETE', `/tasks/${task.id}`);
  });
});

describe('misfire', () => {
  test('fire_last runs the latest missed tick and records the others as coalesced', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { schedule_cron: '* * * * *', misfire_policy: 'fire_last' });
    await missed(task.id, 600);
    const ticks = await until(
      () => occurrencesOf(task.id),
      (rows) => rows.length > 0,
    );
    expect(await runsOf(task.id)).toHaveLength(1);
    expect(ticks.slice(0, -1).every((tick) => tick.verdict === 'coalesced')).toBe(true);
    expect(['fired', 'late']).toContain(ticks.at(-1)?.verdict);
    expect(ticks.length).toBeGreaterThanOrEqual(10);
    const { body } = await user.call('GET', `/tasks/${task.id}`);
    expect(Date.parse(body.next_run_at)).toBeGreaterThan(Date.now() - 1_000);
  });

  test('skip leaves missed ticks missed', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { schedule_cron: '0 0 1 1 *', misfire_policy: 'skip' });
    // A tick of a yearly task may be an hour late.
    await missed(task.id, 2 * 3_600);
    const ticks = await until(
      () => occurrencesOf(task.id),
      (rows) => rows.length > 0,
    );
    expect(ticks).toMatchObject([{ verdict: 'skipped_misfire' }]);
    expect(await runsOf(task.id)).toEqual([]);
  });

  test('fire_all runs every missed tick, oldest first', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, {
      schedule_cron: '* * * * *',
      misfire_policy: 'fire_all',
      overlap_policy: 'queue_all',
    });
    await missed(task.id, 300);
    const runs = await until(
      () => runsOf(task.id),
      (rows) => rows.length >= 5,
    );
    const times = runs.map((run) => run.scheduled_for.getTime());
    expect(times).toEqual(times.toSorted((a, b) => a - b));
  });
});
