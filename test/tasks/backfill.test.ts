import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { spreadOffsetMs } from '../../src/schedule/recurrence.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
});

const DAY = 86_400_000;
const TODAY = Math.floor(Date.now() / DAY) * DAY;
/** Midnight so many days ago. */
const midnight = (daysAgo: number) => new Date(TODAY - daysAgo * DAY).toISOString();
/** An hour that is half a day away: nothing fires by itself. */
const HOUR = (new Date().getUTCHours() + 12) % 24;
/** The tick of a day, so many days ago. */
const tick = (daysAgo: number) => new Date(TODAY - daysAgo * DAY + HOUR * 3_600_000).toISOString();
const daily = { schedule_cron: `0 ${HOUR} * * *` };

const rows = async <T extends object>(text: string, values: unknown[] = []): Promise<T[]> =>
  (await server.db.query<T & Record<string, unknown>>({ text, values })).rows;
const makeDaily = (fields: Record<string, unknown> = {}) =>
  makeTask(user.call, { ...daily, skill_name: unique('daily'), ...fields });
const backfill = (taskId: number, body: Record<string, unknown>, headers = {}, call = user.call) =>
  call('POST', `/tasks/${taskId}/backfill`, body, headers);
const runsOf = (taskId: number) =>
  rows<{ id: number; trigger: string; scheduled_for: Date; available: boolean; occurrence_id: number }>(
    `select id, trigger, scheduled_for, available_at is not null as available, occurrence_id
     from executions where task_id = $1 order by id`,
    [taskId],
  );
const ticksOf = (taskId: number) =>
  rows<{ id: number; scheduled_for: Date; verdict: string; cause: string | null }>(
    'select id, scheduled_for, verdict, cause from occurrences where task_id = $1 order by scheduled_for',
    [taskId],
  );

/** A tick that had its verdict, and a run of it in some status. */
async function past(taskId: number, at: string, verdict: string, status?: string): Promise<number | undefined> {
  const [occurrence] = await rows<{ id: number }>(
    `insert into occurrences (task_id, user_id, scheduled_for, verdict) values ($1, $2, $3, $4) returning id`,
    [taskId, user.id, at, verdict],
  );
  if (status === undefined) return undefined;
  const [run] = await rows<{ id: number }>(
    `insert into executions (task_id, user_id, trigger, occurrence_id, scheduled_for, skill_name, params, priority,
       timeout_seconds, status, created_at, ended_at, available_at)
     select id, user_id, 'schedule', $2, $3::timestamptz, skill_name, '{}', 1, 60, $4, $3::timestamptz,
       case when $4 = 'queued' then null else $3::timestamptz end, now() from tasks where id = $1 returning id`,
    [taskId, occurrence?.id, at, status],
  );
  return run?.id;
}

describe('POST /tasks/{id}/backfill', () => {
  test('queues a run for each tick that has none which is open or succeeded, once', async () => {
    const task = await makeDaily();
    const succeeded = await past(task.id, tick(5), 'fired', 'success');
    await past(task.id, tick(4), 'skipped_overlap');
    await past(task.id, tick(3), 'fired', 'failed');
    const open = await past(task.id, tick(2), 'late', 'queued');
    const answer = await backfill(task.id, { from: midnight(6), to: midnight(0) });
    expect(answer).toMatchObject({
      status: 202,
      body: {
        task_id: task.id,
        dry_run: false,
        matched: 6,
        created: 4,
        skipped: 2,
        from: midnight(6),
        to: midnight(0),
      },
    });
    const results = answer.body.runs as { scheduled_for: string; execution_id: number; result: string }[];
    expect(results.map(({ scheduled_for, result }) => [scheduled_for, result])).toEqual([
      [tick(6), 'created'],
      [tick(5), 'exists'],
      [tick(4), 'created'],
      [tick(3), 'created'],
      [tick(2), 'exists'],
      [tick(1), 'created'],
    ]);
    expect([results[1]?.execution_id, results[4]?.execution_id]).toEqual([succeeded, open]);
    const made = (await runsOf(task.id)).filter(({ trigger }) => trigger === 'backfill');
    expect(made.map(({ id, scheduled_for }) => [id, scheduled_for.toISOString()])).toEqual(
      results
        .filter(({ result }) => result === 'created')
        .map(({ execution_id, scheduled_for }) => [execution_id, scheduled_for]),
    );
    // What had its verdict keeps it; what had none says why it has one now; each run knows its tick.
    const ticks = await ticksOf(task.id);
    expect(ticks.map(({ verdict, cause }) => [verdict, cause])).toEqual([
      ['late', 'backfill'],
      ['fired', null],
      ['skipped_overlap', null],
      ['fired', null],
      ['late', null],
      ['late', 'backfill'],
    ]);
    for (const run of made) {
      expect(ticks.find(({ id }) => id === run.occurrence_id)?.scheduled_for).toEqual(run.scheduled_for);
    }
    const again = await backfill(task.id, { from: midnight(6), to: midnight(0) });
    expect(again.body).toMatchObject({ matched: 6, created: 0, skipped: 6 });
    expect(await runsOf(task.id)).toHaveLength(7);
  });

  test('writes an audit entry and an event for each run, and tells of nothing in a dry run', async () => {
    const task = await makeDaily();
    const window = { from: midnight(3), to: midnight(0) };
    const dry = await backfill(task.id, { ...window, dry_run: true });
    expect(dry).toMatchObject({ status: 200, body: { dry_run: true, matched: 3, created: 3 } });
    expect(dry.body.runs).toEqual([3, 2, 1].map((days) => ({ scheduled_for: tick(days), result: 'created' })));
    expect([await runsOf(task.id), await ticksOf(task.id)]).toEqual([[], []]);

    const { runs } = (await backfill(task.id, window)).body;
    await server.feedCaughtUp();
    const told = await rows<{ id: string }>(
      `select data::jsonb ->> 'execution_id' as id from events
       where task_id = $1 and data::jsonb ->> 'execution_status' = 'queued' order by event_id`,
      [task.id],
    );
    expect(told.map(({ id }) => Number(id))).toEqual(runs.map((run: { execution_id: number }) => run.execution_id));
    const noted = await rows<{ data: string }>(
      `select data from events where task_id = $1 and type = 'task_occurrences'`,
      [task.id],
    );
    expect(noted.map(({ data }) => JSON.parse(data))).toMatchObject([
      {
        counts: { late: 3 },
        occurrences: runs.map((run: object) => ({
          execution_id: (run as { execution_id: number }).execution_id,
          cause: 'backfill',
        })),
      },
    ]);
    for (const { execution_id, scheduled_for } of runs) {
      const { entries } = (await user.call('GET', `/audit?entity_type=execution&entity_id=${execution_id}`)).body;
      expect(entries).toMatchObject([
        {
          user_id: user.id,
          operation: 'CREATE',
          changed_fields: { trigger: { new: 'backfill' }, scheduled_for: { new: scheduled_for } },
        },
      ]);
    }
  });

  test('offers the runs one after the other, oldest first, with the params of the task or those given', async () => {
    const task = await makeDaily({ params: { who: 'team' } });
    const agent = await makeAgent(user.call);
    await backfill(task.id, { from: midnight(3), to: midnight(0) });
    expect((await runsOf(task.id)).map(({ available }) => available)).toEqual([true, false, false]);
    for (const days of [3, 2, 1]) {
      const [run, ...more] = await agent.claim({ max: 10, wait_ms: 20_000 });
      expect(more).toEqual([]);
      expect(run).toMatchObject({ scheduled_for: tick(days), params: { who: 'team' } });
      if (run) await complete(user.call, run);
    }
    expect(await agent.claim({ max: 10 })).toEqual([]);
    // Behind what is open, all of it waits.
    await user.call('POST', `/tasks/${task.id}/run`);
    await backfill(task.id, { from: midnight(5), to: midnight(3), params: { who: 'board' } });
    expect((await runsOf(task.id)).slice(-2).map(({ available }) => available)).toEqual([false, false]);
    await complete(user.call, await agent.claimOne());
    expect(await agent.claimOne()).toMatchObject({ scheduled_for: tick(5), params: { who: 'board' } });
  });

  test('with overlap_policy allow offers them all at once; a paused task’s too', async () => {
    const task = await makeTask(user.call, { ...daily, overlap_policy: 'allow' });
    await user.call('POST', `/tasks/${task.id}/pause`);
    const agent = await makeAgent(user.call);
    await backfill(task.id, { from: midnight(4), to: midnight(0) });
    expect(await agent.claim({ max: 10, wait_ms: 20_000 })).toHaveLength(4);
    expect((await user.call('GET', `/tasks/${task.id}`)).body.status).toBe('disabled');
  });

  test('counts a retry that succeeded, and not what was run by hand', async () => {
    const task = await makeDaily({ max_attempts: 2, retry_backoff_seconds: 0 });
    const agent = await makeAgent(user.call);
    const window = { from: midnight(1), to: midnight(0) };
    await backfill(task.id, window);
    await complete(user.call, await agent.claimOne(), { status: 'failed' });
    await complete(user.call, await agent.claimOne());
    expect((await backfill(task.id, window)).body).toMatchObject({ created: 0, skipped: 1 });
    const manual = await makeDaily();
    const { id } = (await user.call('POST', `/tasks/${manual.id}/run`)).body;
    await rows('update executions set scheduled_for = $2 where id = $1', [id, tick(1)]);
    expect((await backfill(manual.id, window)).body).toMatchObject({ created: 1, skipped: 0 });
  });

  test('by two at the same moment makes each run once', async () => {
    const task = await makeDaily();
    const window = { from: midnight(20), to: midnight(0) };
    const answers = await Promise.all(Array.from({ length: 4 }, () => backfill(task.id, window)));
    expect(answers.map(({ body }) => body.created).toSorted((a, b) => a - b)).toEqual([0, 0, 0, 20]);
    expect(await runsOf(task.id)).toHaveLength(20);
  });

  test('is answered once for an Idempotency-Key', async () => {
    const task = await makeDaily();
    const headers = { 'idempotency-key': unique('backfill') };
    const first = await backfill(task.id, { from: midnight(2), to: midnight(0) }, headers);
    const second = await backfill(task.id, { from: midnight(2), to: midnight(0) }, headers);
    expect(second).toMatchObject({ status: 202, body: first.body });
    expect((await backfill(task.id, { from: midnight(3), to: midnight(0) }, headers)).status).toBe(409);
    expect(await runsOf(task.id)).toHaveLength(2);
  });

  test('keeps the scheduler from firing a tick again that was made up for', async () => {
    const task = await makeTask(user.call, {
      ...daily,
      misfire_policy: 'fire_all',
      overlap_policy: 'queue_all',
    });
    await backfill(task.id, { from: midnight(2), to: midnight(0) });
    await rows(
      `with moved as (update tasks set next_run_at = $2 where id = $1 returning 1)
       select pg_notify('muster', '{"from":"test","rings":[["schedule",null]]}') from moved`,
      [task.id, tick(2)],
    );
    await until(
      () => user.call('GET', `/tasks/${task.id}`),
      ({ body }) => Date.parse(body.next_run_at) > Date.now(),
    );
    const times = (await runsOf(task.id)).map(({ scheduled_for }) => scheduled_for.getTime());
    expect(new Set(times).size).toBe(times.length);
  });

  test('leaves a tick to the scheduler that its spread has run later than now', async () => {
    const task = await makeTask(user.call, { schedule_cron: '* * * * *', spread_seconds: 86_400 });
    const lag = spreadOffsetMs(String(task.id), 86_400);
    const to = Date.now() - 1_000;
    const window = { from: new Date(to - lag - 600_000).toISOString(), to: new Date(to).toISOString(), dry_run: true };
    const { runs, matched } = (await backfill(task.id, window)).body;
    expect([10, 11]).toContain(matched);
    expect(Date.parse(runs.at(-1).scheduled_for) + lag).toBeLessThanOrEqual(Date.now());
  });

  test('of a one-off is about its one time', async () => {
    const at = new Date(Date.now() + 300).toISOString();
    const task = await makeTask(user.call, { run_at: at });
    await until(
      () => ticksOf(task.id),
      (ticks) => ticks.length === 1,
    );
    const window = { from: midnight(0), to: new Date(Date.parse(at) + 1).toISOString() };
    expect((await backfill(task.id, window)).body).toMatchObject({
      matched: 1,
      created: 0,
      runs: [{ result: 'exists' }],
    });
    expect((await backfill(task.id, { from: midnight(2), to: midnight(1) })).body).toMatchObject({
      matched: 0,
      runs: [],
    });
  });

  test('refuses what it cannot do, and says why', async () => {
    const task = await makeDaily();
    const minutely = await makeTask(user.call, { schedule_cron: '* * * * *', ends_at: '2099-01-01T00:00:00Z' });
    const many = await backfill(minutely.id, { from: midnight(3), to: midnight(0) });
    expect(many).toMatchObject({ status: 400, body: { errors: [{ path: 'body.to' }] } });
    expect(many.body.detail).toMatch(/4320 ticks; at most 1000/);
    expect((await backfill(minutely.id, { from: midnight(20_000), to: midnight(0) })).status).toBe(400);
    for (const [body, field] of [
      [{ from: midnight(1), to: midnight(-1) }, 'to'],
      [{ from: midnight(1), to: midnight(1) }, 'to'],
      [{ from: midnight(1) }, 'to'],
      [{ from: 'yesterday', to: midnight(0) }, 'from'],
    ] as const) {
      expect(await backfill(task.id, body)).toMatchObject({
        status: 400,
        body: { errors: [{ path: `body.${field}` }] },
      });
    }
    const window = { from: midnight(1), to: midnight(0) };
    const onDemand = await makeTask(user.call);
    expect(await backfill(onDemand.id, window)).toMatchObject({ status: 409, body: { detail: /on demand/ } });
    expect((await backfill(task.id, window, {}, (await server.newUser()).call)).status).toBe(403);
    await user.call('DELETE', `/tasks/${task.id}`);
    expect((await backfill(task.id, window)).status).toBe(404);
    expect(await runsOf(task.id)).toEqual([]);
  });
});
