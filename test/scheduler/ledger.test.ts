import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { spreadOffsetMs } from '../../src/schedule/recurrence.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

// Every tick of a schedule has one verdict, and why: what ran, what did not, and what stands for what.

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

interface Occurrence {
  scheduled_for: string;
  verdict: string;
  cause: string | null;
  detail: string;
  ticks: number;
  until: string | null;
  covered_by: string | null;
  blocked_by: number | null;
  execution_id: number | null;
}

/** A task's ticks, oldest first. */
const ledger = async (taskId: number): Promise<Occurrence[]> =>
  (await user.call('GET', `/tasks/${taskId}/occurrences?sort_order=asc&limit=100`)).body.occurrences;
const get = async (taskId: number) => (await user.call('GET', `/tasks/${taskId}`)).body;
/** Changes a task's columns behind Muster's back, as if that much time had passed, and wakes the scheduler. */
const set = (taskId: number, columns: string) =>
  server.db.query({
    text: `with moved as (update tasks set ${columns} where id = $1 returning 1)
      select pg_notify('muster', '{"from":"test","rings":[["schedule",null]]}') from moved`,
    values: [taskId],
  });
const count = (ticks: readonly Occurrence[], verdict: string) =>
  ticks.filter((tick) => tick.verdict === verdict).reduce((sum, tick) => sum + tick.ticks, 0);
/** The events about a task, of one type, in their order. */
const told = async (taskId: number, type: string) =>
  (
    await server.db.query<{ data: string }>({
      text: 'select data from events where task_id = $1 and type = $2 order by event_id',
      values: [taskId, type],
    })
  ).rows.map(({ data }) => JSON.parse(data));

const MINUTELY = { schedule_cron: '* * * * *' };
const week = `next_run_at = date_trunc('minute', now()) - interval '7 days'`;

describe('after downtime', () => {
  test('of a week, a task of every minute runs once, late, and the rest is recorded in bulk', async () => {
    const task = await makeTask(user.call, MINUTELY);
    await set(task.id, week);
    const ticks = await until(
      () => ledger(task.id),
      (found) => found.length > 0,
    );
    const [stretch] = ticks;
    const ran = ticks.filter(({ execution_id }) => execution_id !== null);
    expect(ran).toHaveLength(1);
    expect(stretch).toMatchObject({ verdict: 'coalesced', cause: 'downtime', covered_by: ran[0]?.scheduled_for });
    expect(stretch?.ticks).toBeGreaterThan(10_000);
    expect(ticks.length).toBeLessThan(30);
    // Every minute of the week is answered for, once.
    const all = ticks.reduce((sum, tick) => sum + tick.ticks, 0);
    const first = Date.parse(stretch?.scheduled_for ?? '');
    expect(all).toBe((Date.parse(ticks.at(-1)?.scheduled_for ?? '') - first) / 60_000 + 1);
    expect(stretch?.until).toBe(ticks[1]?.scheduled_for);
    expect(Date.parse((await get(task.id)).next_run_at)).toBeGreaterThan(Date.parse(ran[0]?.scheduled_for ?? ''));
    const [event] = await until(
      () => told(task.id, 'task_occurrences'),
      (events) => events.length > 0,
    );
    expect(event.counts.coalesced).toBe(count(ticks, 'coalesced'));
  });

  test('of a week, five hundred such tasks are answered for in one go', async () => {
    const skill = unique('week');
    const ids: number[] = [];
    for (let i = 0; i < 500; i += 50) {
      const made = await Promise.all(
        Array.from({ length: 50 }, () => makeTask(user.call, { ...MINUTELY, skill_name: skill })),
      );
      ids.push(...made.map(({ id }) => id));
    }
    await server.db.query({
      text: `with moved as (update tasks set ${week} where id = any($1::bigint[]) returning 1)
        select pg_notify('muster', '{"from":"test","rings":[["schedule",null]]}') from moved limit 1`,
      values: [ids],
    });
    const { rows } = await until(
      () =>
        server.db.query<{ tasks: number; runs: number; rows: number }>({
          text: `select count(distinct o.task_id)::int as tasks, count(*)::int as rows,
            (select count(*)::int from executions where task_id = any($1::bigint[])) as runs
            from occurrences o where o.task_id = any($1::bigint[])`,
          values: [ids],
        }),
      ({ rows: [row] }) => row?.tasks === 500,
    );
    expect(rows[0]?.runs).toBe(500);
    expect(rows[0]?.rows).toBeLessThan(500 * 30);
  });

  test('skip leaves what is later than max_lateness_seconds, and runs what is not', async () => {
    const strict = await makeTask(user.call, {
      schedule_cron: '0 0 1 1 *',
      misfire_policy: 'skip',
      max_lateness_seconds: 600,
    });
    const lenient = await makeTask(user.call, {
      schedule_cron: '0 0 1 1 *',
      misfire_policy: 'skip',
      max_lateness_seconds: 3_600,
    });
    for (const { id } of [strict, lenient]) await set(id, `next_run_at = now() - interval '20 minutes'`);
    const verdict = async (id: number) =>
      (
        await until(
          () => ledger(id),
          (found) => found.length > 0,
        )
      )[0];
    expect(await verdict(strict.id)).toMatchObject({
      verdict: 'skipped_misfire',
      cause: 'downtime',
      execution_id: null,
    });
    expect(await verdict(lenient.id)).toMatchObject({ verdict: 'late', cause: 'delay' });
    expect((await verdict(lenient.id))?.execution_id).not.toBeNull();
    expect((await verdict(lenient.id))?.detail).toMatch(/late/);
  });

  test('fire_all runs a hundred of what was missed, and says why not the others', async () => {
    const task = await makeTask(user.call, { ...MINUTELY, misfire_policy: 'fire_all', overlap_policy: 'allow' });
    await set(task.id, `next_run_at = date_trunc('minute', now()) - interval '150 minutes'`);
    const { rows } = await until(
      () =>
        server.db.query<{ verdict: string; cause: string | null; ticks: number }>({
          text: `select verdict, cause, sum(ticks)::int as ticks from occurrences where task_id = $1 group by 1, 2`,
          values: [task.id],
        }),
      (found) => found.rows.length > 0,
    );
    const caught = rows.filter(({ verdict }) => verdict === 'late').reduce((sum, { ticks }) => sum + ticks, 0);
    expect(caught).toBeGreaterThanOrEqual(100);
    expect(caught).toBeLessThanOrEqual(101);
    expect(rows.find(({ verdict }) => verdict === 'skipped_misfire')?.ticks).toBeGreaterThanOrEqual(49);
  });
});

describe('a pause', () => {
  test('is answered for tick by tick while it lasts', async () => {
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    await user.call('POST', `/tasks/${task.id}/pause`);
    const ticks = await until(
      () => ledger(task.id),
      (found) => count(found, 'paused') >= 2,
    );
    expect(ticks.at(-1)).toMatchObject({ verdict: 'paused', cause: 'manual', execution_id: null });
    expect((await get(task.id)).pause_reason).toBe('manual');
    await until(
      () => told(task.id, 'task_occurrences'),
      (events) => events.some(({ counts }) => counts.paused > 0),
    );
    const resumed = (await user.call('POST', `/tasks/${task.id}/resume`)).body;
    expect(resumed).toMatchObject({ status: 'pending', pause_reason: null, pause_until: null });
    // No tick between the pause and the next run is without a verdict.
    const all = await until(
      () => ledger(task.id),
      (found) => found.some(({ verdict }) => verdict === 'fired' || verdict === 'late'),
    );
    const span = (Date.parse(all.at(-1)?.scheduled_for ?? '') - Date.parse(all[0]?.scheduled_for ?? '')) / 1_000 + 1;
    expect(all.reduce((sum, tick) => sum + tick.ticks, 0)).toBe(span);
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  test('of a year is one stretch and its newest ticks', async () => {
    const task = await makeTask(user.call, MINUTELY);
    await user.call('POST', `/tasks/${task.id}/pause`);
    await set(task.id, `quiet_at = date_trunc('minute', now()) - interval '365 days'`);
    const ticks = await until(
      () => ledger(task.id),
      (found) => found.length > 0,
    );
    expect(ticks[0]).toMatchObject({ verdict: 'paused', cause: 'manual' });
    expect(count(ticks, 'paused')).toBeGreaterThanOrEqual(365 * 1440);
    expect(ticks.length).toBeLessThan(30);
  });

  test('until a time ends by itself, and what came due after it runs', async () => {
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const end = new Date(Date.now() + 1_500).toISOString();
    const paused = await user.call('POST', `/tasks/${task.id}/pause`, { until: end });
    expect(paused.body).toMatchObject({ status: 'disabled', pause_until: end, next_run_at: null });
    const agent = await makeAgent(user.call);
    const run = await agent.claimOne([task.skill_name]);
    expect(Date.parse(run.scheduled_for)).toBeGreaterThanOrEqual(Date.parse(end));
    expect(await get(task.id)).toMatchObject({ status: 'running', pause_until: null, pause_reason: null });
    for (const { scheduled_for, verdict } of await ledger(task.id)) {
      expect(verdict === 'paused', scheduled_for).toBe(scheduled_for < end);
    }
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  test('is answered for by the schedule that it had when that is changed meanwhile', async () => {
    const task = await makeTask(user.call, MINUTELY);
    await user.call('POST', `/tasks/${task.id}/pause`);
    await server.db.query({
      text: `update tasks set quiet_at = date_trunc('minute', now()) - interval '3 minutes' where id = $1`,
      values: [task.id],
    });
    expect((await user.call('PUT', `/tasks/${task.id}`, { schedule_cron: '0 0 1 1 *' })).status).toBe(200);
    expect(count(await ledger(task.id), 'paused')).toBeGreaterThanOrEqual(3);
  });

  test('gets a new end, and refuses one that has passed', async () => {
    const task = await makeTask(user.call, MINUTELY);
    const at = (ms: number) => new Date(Date.now() + ms).toISOString();
    const later = at(7_200_000);
    await user.call('POST', `/tasks/${task.id}/pause`, { until: at(3_600_000) });
    expect((await user.call('POST', `/tasks/${task.id}/pause`, { until: later })).body.pause_until).toBe(later);
    expect((await user.call('POST', `/tasks/${task.id}/pause`)).body.pause_until).toBeNull();
    const refused = await user.call('POST', `/tasks/${task.id}/pause`, { until: at(-1_000) });
    expect(refused).toMatchObject({ status: 400, body: { errors: [{ path: 'body.until' }] } });
  });

  test('of a one-off with an end: it runs when the pause is over', async () => {
    const task = await makeTask(user.call, { run_at: new Date(Date.now() + 500).toISOString() });
    await user.call('POST', `/tasks/${task.id}/pause`, { until: new Date(Date.now() + 1_200).toISOString() });
    const agent = await makeAgent(user.call);
    const run = await agent.claimOne([task.skill_name]);
    expect(run.scheduled_for).toBe(task.run_at);
    expect(await ledger(task.id)).toHaveLength(1);
  });
});

describe('clock changes', () => {
  test('a time that is left out is noted where dst_gap is skip', async () => {
    const task = await makeTask(user.call, {
      schedule_cron: '30 2 * * *',
      timezone: 'Europe/Berlin',
      dst_gap: 'skip',
    });
    const { rows } = await server.db.query<{ quiet_at: Date }>({
      text: 'select quiet_at from tasks where id = $1',
      values: [task.id],
    });
    // The last Sunday of March at 02:30, which would be 03:30 of summer time.
    expect(rows[0]?.quiet_at.toISOString()).toMatch(/-03-\d\dT01:30:00\.000Z$/);
    await set(task.id, `quiet_at = '2026-03-29T01:30:00Z'`);
    const ticks = await until(
      () => ledger(task.id),
      (found) => found.length > 0,
    );
    expect(ticks).toMatchObject([
      { scheduled_for: '2026-03-29T01:30:00.000Z', verdict: 'dst_gap', cause: 'clock_change', execution_id: null },
    ]);
    const after = await server.db.query<{ quiet_at: Date }>({
      text: 'select quiet_at from tasks where id = $1',
      values: [task.id],
    });
    expect(after.rows[0]?.quiet_at).toEqual(rows[0]?.quiet_at);
    // Shifted, it is a tick as any other, and nothing is noted.
    const shifted = await user.call('PUT', `/tasks/${task.id}`, { dst_gap: 'shift' });
    expect(shifted.status).toBe(200);
    const { rows: none } = await server.db.query({
      text: 'select quiet_at from tasks where id = $1',
      values: [task.id],
    });
    expect(none[0]?.['quiet_at']).toBeNull();
  });
});

describe('bounds and limits', () => {
  test('max_runs: the task has ended after so many ticks', async () => {
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *', max_runs: 2, overlap_policy: 'allow' });
    const agent = await makeAgent(user.call);
    for (let i = 0; i < 2; i++) await complete(user.call, await agent.claimOne([task.skill_name]));
    expect(
      await until(
        () => get(task.id),
        ({ status }) => status === 'completed',
      ),
    ).toMatchObject({ fired_count: 2, next_run_at: null });
    expect((await ledger(task.id)).filter(({ execution_id }) => execution_id !== null)).toHaveLength(2);
    const refused = await user.call('PUT', `/tasks/${task.id}`, { timezone: 'Europe/Rome' });
    expect(refused).toMatchObject({ status: 400, body: { errors: [{ path: 'body.max_runs' }] } });
    const again = await user.call('PUT', `/tasks/${task.id}`, { max_runs: 3 });
    expect(again.body).toMatchObject({ status: 'pending' });
    expect((await agent.claimOne([task.skill_name])).task_id).toBe(task.id);
  });

  test('starts_at and ends_at hold, and what leaves no tick is refused', async () => {
    const starts_at = '2099-03-01T00:30:00.000Z';
    const task = await makeTask(user.call, { schedule_cron: '0 * * * *', starts_at, ends_at: '2099-03-01T03:00:00Z' });
    expect(task.next_run_at).toBe('2099-03-01T01:00:00.000Z');
    const { runs } = (await user.call('GET', `/tasks/${task.id}/preview`)).body;
    expect(runs.map(({ scheduled_for }: { scheduled_for: string }) => scheduled_for)).toEqual([
      '2099-03-01T01:00:00.000Z',
      '2099-03-01T02:00:00.000Z',
    ]);
    const refuse = async (fields: object, path: string) =>
      expect(await user.call('PUT', `/tasks/${task.id}`, fields)).toMatchObject({
        status: 400,
        body: { errors: [{ path }] },
      });
    await refuse({ ends_at: starts_at }, 'body.ends_at');
    await refuse({ ends_at: '2099-03-01T00:45:00Z' }, 'body.ends_at');
    await refuse({ starts_at: '2099-03-01T02:30:00Z' }, 'body.starts_at');
  });

  test('@every ticks in elapsed time, with a phase', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@every 90m/15m', starts_at: '2099-01-01T00:00:00Z' });
    const at = Date.parse(task.next_run_at);
    expect(at % (90 * 60_000)).toBe(15 * 60_000);
    const { runs } = (await user.call('GET', `/tasks/${task.id}/preview?count=3`)).body;
    expect(runs.map((run: { scheduled_for: string }) => Date.parse(run.scheduled_for) - at)).toEqual([
      0, 5_400_000, 10_800_000,
    ]);
    const bad = await user.call('POST', '/tasks', { skill_name: 'x', schedule_cron: '@every soon' });
    expect(bad).toMatchObject({ status: 400, body: { errors: [{ path: 'body.schedule_cron' }] } });
  });
});

describe('spread', () => {
  test('runs each task later by its own place, always the same, and keeps the nominal time', async () => {
    const spread = { schedule_cron: '0 * * * *', spread_seconds: 600 };
    const made = await Promise.all(Array.from({ length: 20 }, () => makeTask(user.call, spread)));
    const offsets = made.map(({ id, next_run_at }) => {
      const offset = Date.parse(next_run_at) % 3_600_000;
      expect(offset).toBe(spreadOffsetMs(String(id), 600));
      return offset;
    });
    expect(new Set(offsets).size).toBeGreaterThan(15);
    const [task] = made;
    const { runs } = (await user.call('GET', `/tasks/${task.id}/preview?count=2`)).body;
    expect(runs[0].effective_at).toBe(task.next_run_at);
    for (const { scheduled_for, effective_at } of runs) {
      expect(Date.parse(scheduled_for) % 3_600_000).toBe(0);
      expect(Date.parse(effective_at) - Date.parse(scheduled_for)).toBe(offsets[0]);
    }
    await set(task.id, `next_run_at = date_trunc('hour', now()) - interval '1 hour' + ${offsets[0]} * interval '1 ms'`);
    const ticks = await until(
      () => ledger(task.id),
      (found) => found.length > 0,
    );
    for (const { scheduled_for } of ticks) expect(Date.parse(scheduled_for) % 3_600_000).toBe(0);
    expect((Date.parse((await get(task.id)).next_run_at) - (offsets[0] ?? 0)) % 3_600_000).toBe(0);
  });

  test('a new task owes no tick from before it was made, though its place in the spread lies after', async () => {
    const task = await makeTask(user.call, { ...MINUTELY, spread_seconds: 86_400 });
    const { runs } = (await user.call('GET', `/tasks/${task.id}/preview?count=1`)).body;
    expect(runs[0].effective_at).toBe(task.next_run_at);
    expect(Date.parse(runs[0].scheduled_for)).toBeGreaterThan(Date.parse(task.created_at));
  });

  test('another spread moves the next tick and makes it no other', async () => {
    const task = await makeTask(user.call, { schedule_cron: '0 0 * * *' });
    const { body } = await user.call('PUT', `/tasks/${task.id}`, { spread_seconds: 86_400 });
    expect(Date.parse(body.next_run_at) - Date.parse(task.next_run_at)).toBe(spreadOffsetMs(String(task.id), 86_400));
    const back = await user.call('PUT', `/tasks/${task.id}`, { spread_seconds: 0 });
    expect(back.body.next_run_at).toBe(task.next_run_at);
  });
});

test('overlap is recorded with the run that is in the way', async () => {
  const agent = await makeAgent(user.call);
  const task = await makeTask(user.call, { schedule_cron: '0 0 1 1 *', overlap_policy: 'queue_one' });
  const { body: first } = await user.call('POST', `/tasks/${task.id}/run`);
  await agent.claimOne([task.skill_name]);
  for (const hours of [3, 2, 1]) {
    const before = (await ledger(task.id)).length;
    await set(task.id, `next_run_at = date_trunc('second', now()) - interval '${hours} seconds'`);
    await until(
      () => ledger(task.id),
      (found) => found.length > before,
    );
  }
  expect(await ledger(task.id)).toMatchObject([
    { verdict: 'fired', blocked_by: first.id },
    { verdict: 'skipped_overlap', cause: 'queue_full', blocked_by: first.id },
    { verdict: 'skipped_overlap', cause: 'queue_full', blocked_by: first.id },
  ]);
});
