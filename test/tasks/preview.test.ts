import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { previewSchedule } from '../../src/tasks/preview.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask } from '../support/work.ts';
import { expectProblem, tracesOf } from './traces.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

interface Run {
  scheduled_for: string;
  effective_at: string;
  note?: string;
}

async function preview(body: Record<string, unknown>): Promise<Run[]> {
  const answer = await user.call('POST', '/tasks/preview', body);
  expect(answer.status, JSON.stringify(answer.body)).toBe(200);
  return answer.body.runs;
}
const times = (runs: Run[]) => runs.map((run) => run.effective_at);

describe('POST /tasks/preview', () => {
  // Made by hand from the dates of the clock changes. The clocks of Rome go 02:00 → 03:00 on 28 March 2027 and 03:00 → 02:00 on
  // 31 October; those of New York 02:00 → 03:00 on 14 March; those of Lord Howe half an hour, 02:00 → 02:30 on 3 October.
  test.each([
    [
      'gap, shifted',
      'Europe/Rome',
      '30 2 * * *',
      '2027-03-26T12:00:00Z',
      {},
      ['03-27T01:30', '03-28T01:30', '03-29T00:30'],
    ],
    [
      'gap, skipped',
      'Europe/Rome',
      '30 2 * * *',
      '2027-03-26T12:00:00Z',
      { dst_gap: 'skip' },
      ['03-27T01:30', '03-29T00:30', '03-30T00:30'],
    ],
    [
      'fold, first',
      'Europe/Rome',
      '30 2 * * *',
      '2027-10-30T12:00:00Z',
      {},
      ['10-31T00:30', '11-01T01:30', '11-02T01:30'],
    ],
    [
      'fold, both',
      'Europe/Rome',
      '30 2 * * *',
      '2027-10-30T12:00:00Z',
      { dst_fold: 'both' },
      ['10-31T00:30', '10-31T01:30', '11-01T01:30'],
    ],
    [
      'gap of every hour',
      'America/New_York',
      '30 * * * *',
      '2027-03-14T05:45:00Z',
      {},
      ['03-14T06:30', '03-14T07:30', '03-14T08:30'],
    ],
    [
      'gap of half an hour',
      'Australia/Lord_Howe',
      '15 2 * * *',
      '2027-10-01T20:00:00Z',
      {},
      ['10-02T15:45', '10-03T15:15', '10-04T15:15'],
    ],
    [
      'no clock changes',
      'UTC',
      '30 2 * * *',
      '2027-03-27T12:00:00Z',
      {},
      ['03-28T02:30', '03-29T02:30', '03-30T02:30'],
    ],
  ])('%s in %s', async (_what, timezone, schedule_cron, from, policy, expected) => {
    const runs = await preview({ schedule_cron, timezone, from, count: 3, ...policy });
    expect(times(runs)).toEqual(expected.map((time) => `2027-${time}:00.000Z`));
    expect(runs.map((run) => run.scheduled_for)).toEqual(times(runs));
  });

  test('says what a clock change does, and nothing where none is', async () => {
    const gap = await preview({
      schedule_cron: '30 2 * * *',
      timezone: 'Europe/Rome',
      from: '2027-03-26T12:00:00Z',
      count: 3,
    });
    expect(gap.map((run) => run.note)).toEqual([
      undefined,
      expect.stringMatching(/02:30 does not exist.*03:30/),
      undefined,
    ]);
    const fold = await preview({
      schedule_cron: '30 2 * * *',
      timezone: 'Europe/Rome',
      from: '2027-10-30T12:00:00Z',
      count: 3,
      dst_fold: 'both',
    });
    expect(fold.map((run) => run.note)).toEqual([
      expect.stringMatching(/first time/),
      expect.stringMatching(/second time/),
      undefined,
    ]);
  });

  test('shows ten times from now unless asked otherwise', async () => {
    const runs = await preview({ schedule_cron: '@hourly' });
    expect(runs).toHaveLength(10);
    const first = Date.parse(runs[0]?.scheduled_for ?? '');
    expect(first).toBeGreaterThan(Date.now() - 60_000);
    expect(first).toBeLessThanOrEqual(Date.now() + 3_660_000);
    expect(times(runs)).toEqual(runs.map((_, i) => new Date(first + i * 3_600_000).toISOString()));
  });

  test('starts after `from`, not at it', async () => {
    const from = '2027-01-01T00:00:00Z';
    expect(times(await preview({ schedule_cron: '0 0 * * *', from, count: 1 }))).toEqual(['2027-01-02T00:00:00.000Z']);
    expect(times(await preview({ schedule_cron: '0 0 * * *', from: '2026-12-31T23:59:59.999Z', count: 1 }))).toEqual([
      '2027-01-01T00:00:00.000Z',
    ]);
  });

  test('ends with the calendar', async () => {
    const runs = await preview({ schedule_cron: '@daily', from: '9999-12-27T12:00:00Z', count: 100 });
    expect(runs.length).toBeLessThan(5);
    for (const time of times(runs)) expect(time).toMatch(/^9999-/);
  });

  test('lets others have their turn between one time and the next', async () => {
    let turns = 0;
    let next = setImmediate(function turn() {
      turns += 1;
      next = setImmediate(turn);
    });
    const schedule = { schedule_cron: '0 0 * 2 1#5', timezone: 'Europe/Rome', count: 20 };
    expect(await previewSchedule(schedule, new Date('2027-01-01T00:00:00Z'))).toHaveLength(20);
    clearImmediate(next);
    expect(turns).toBeGreaterThanOrEqual(19);
  });

  test('takes an API key that may only read', async () => {
    const key = await user.call('POST', '/auth/api-keys', { name: 'reader', scopes: ['read'] });
    const answer = await server.as(key.body.key)('POST', '/tasks/preview', { schedule_cron: '@daily' });
    expect(answer.status).toBe(200);
  });

  test.each([
    [{}, 'body.schedule_cron'],
    [{ schedule_cron: '' }, 'body.schedule_cron'],
    [{ schedule_cron: null }, 'body.schedule_cron'],
    [{ schedule_cron: '61 * * * *' }, 'body.schedule_cron'],
    [{ schedule_cron: '0 0 30 2 *' }, 'body.schedule_cron'],
    [{ schedule_cron: '@daily', timezone: 'Mars/X' }, 'body.timezone'],
    [{ schedule_cron: '@daily', timezone: null }, 'body.timezone'],
    [{ schedule_cron: '@daily', count: 0 }, 'body.count'],
    [{ schedule_cron: '@daily', count: 101 }, 'body.count'],
    [{ schedule_cron: '@daily', count: '5' }, 'body.count'],
    [{ schedule_cron: '@daily', from: 'now' }, 'body.from'],
    [{ schedule_cron: '@daily', from: '1969-12-31T23:59:59Z' }, 'body.from'],
    [{ schedule_cron: '@daily', dst_gap: 'both' }, 'body.dst_gap'],
    [{ schedule_cron: '@daily', dst_fold: 'skip' }, 'body.dst_fold'],
    [{ schedule_cron: '@daily', run_at: '2999-01-01T00:00:00Z' }, 'body.run_at'],
  ])('refuses %j', async (body, path) => {
    expectProblem(await user.call('POST', '/tasks/preview', body), 400, path);
  });
});

describe('GET /tasks/{id}/preview', () => {
  const ofTask = async (id: number, query = '') => {
    const answer = await user.call('GET', `/tasks/${id}/preview${query}`);
    expect(answer.status, JSON.stringify(answer.body)).toBe(200);
    return answer.body.runs as Run[];
  };

  test('shows the next times of a schedule, the first of them the next run', async () => {
    const task = await makeTask(user.call, { schedule_cron: '0 12 15 7 *', timezone: 'Europe/Rome' });
    const runs = await ofTask(task.id);
    expect(runs).toHaveLength(10);
    expect(times(runs)[0]).toBe(task.next_run_at);
    expect(await ofTask(task.id, '?count=3')).toEqual(runs.slice(0, 3));
    const from = encodeURIComponent(runs[4]?.scheduled_for ?? '');
    expect((await ofTask(task.id, `?from=${from}&count=5`))[0]).toEqual(runs[5]);
  });

  test('is the same for a paused task, and changes nothing', async () => {
    const task = await makeTask(user.call, { schedule_cron: '0 12 15 7 *' });
    const runs = await ofTask(task.id);
    await user.call('POST', `/tasks/${task.id}/pause`);
    const before = await tracesOf(server, task.id);
    expect(await ofTask(task.id)).toEqual(runs);
    expect(await tracesOf(server, task.id)).toEqual(before);
  });

  test('shows the one time of a one-off unless it is over, and none of a task on demand', async () => {
    const run_at = '2999-01-01T00:00:00.000Z';
    const once = await makeTask(user.call, { run_at });
    expect(await ofTask(once.id)).toEqual([{ scheduled_for: run_at, effective_at: run_at }]);
    expect(await ofTask(once.id, `?from=${run_at}`)).toEqual([]);
    expect(await ofTask((await makeTask(user.call)).id)).toEqual([]);
  });

  test.each([
    ['count=0', 'count'],
    ['count=101', 'count'],
    ['count=ten', 'count'],
    ['from=today', 'from'],
    ['to=2999-01-01T00:00:00Z', 'to'],
  ])('refuses %s', async (query, field) => {
    const task = await makeTask(user.call, { schedule_cron: '@daily' });
    expectProblem(await user.call('GET', `/tasks/${task.id}/preview?${query}`), 400, `query.${field}`);
  });
});
