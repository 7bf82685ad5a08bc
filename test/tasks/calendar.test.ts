import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
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

interface Entry {
  task_id: number;
  start_time: string;
  status: string;
  title: string;
  note?: string;
}
const window = async (from: string, to: string, more = '', call = user.call) => {
  const { status, body } = await call('GET', `/calendar?from=${from}&to=${to}${more}`);
  expect(status).toBe(200);
  return body as { entries: Entry[]; truncated: boolean };
};
const times = ({ entries }: { entries: Entry[] }) => entries.map(({ start_time }) => start_time.replace('.000Z', 'Z'));
const inDays = (days: number) => new Date(Date.now() + days * 86_400_000).toISOString();

describe('GET /calendar', () => {
  // Berlin: 28 March 2027 02:00 → 03:00, 31 October 2027 03:00 → 02:00. New York: 14 March, 7 November 2027.
  // Lord Howe: 3 October 2027 02:00 → 02:30, 4 April 2027 02:00 → 01:30.
  test.each([
    [
      'Europe/Berlin',
      '30 2 * * *',
      '2027-03-27',
      '2027-03-30',
      ['2027-03-27T01:30:00Z', '2027-03-28T01:30:00Z', '2027-03-29T00:30:00Z'],
    ],
    [
      'Europe/Berlin',
      '30 2 * * *',
      '2027-10-30',
      '2027-11-02',
      ['2027-10-30T00:30:00Z', '2027-10-31T00:30:00Z', '2027-11-01T01:30:00Z'],
    ],
    [
      'America/New_York',
      '30 2 * * *',
      '2027-03-13',
      '2027-03-16',
      ['2027-03-13T07:30:00Z', '2027-03-14T07:30:00Z', '2027-03-15T06:30:00Z'],
    ],
    [
      'America/New_York',
      '30 1 * * *',
      '2027-11-06',
      '2027-11-09',
      ['2027-11-06T05:30:00Z', '2027-11-07T05:30:00Z', '2027-11-08T06:30:00Z'],
    ],
    [
      'Australia/Lord_Howe',
      '15 2 * * *',
      '2027-10-01',
      '2027-10-04',
      ['2027-10-01T15:45:00Z', '2027-10-02T15:45:00Z', '2027-10-03T15:15:00Z'],
    ],
    [
      'Australia/Lord_Howe',
      '45 1 * * *',
      '2027-04-02',
      '2027-04-05',
      ['2027-04-02T14:45:00Z', '2027-04-03T14:45:00Z', '2027-04-04T15:15:00Z'],
    ],
  ])('is right across the clock changes: %s, %s from %s', async (timezone, schedule_cron, from, to, expected) => {
    await makeTask(user.call, { schedule_cron, timezone });
    expect(times(await window(`${from}T00:00:00Z`, `${to}T00:00:00Z`))).toEqual(expected);
  });

  test('has recurring and one-off tasks of all schedules, soonest first; none that are paused, deleted or of others', async () => {
    const day = inDays(40).slice(0, 10);
    const daily = await makeTask(user.call, { name: 'daily', schedule_cron: '0 9 * * *' });
    const hourly = await makeTask(user.call, { schedule_cron: '30 */8 * * *' });
    const once = await makeTask(user.call, { run_at: `${day}T09:00:00Z` });
    await makeTask(user.call);
    const [paused, deleted] = [
      await makeTask(user.call, { schedule_cron: '0 9 * * *' }),
      await makeTask(user.call, { schedule_cron: '0 9 * * *' }),
    ];
    await user.call('POST', `/tasks/${paused.id}/pause`);
    await user.call('DELETE', `/tasks/${deleted.id}`);
    await makeTask((await server.newUser()).call, { schedule_cron: '0 9 * * *' });
    const { entries, truncated } = await window(`${day}T00:00:00Z`, `${inDays(41).slice(0, 10)}T00:00:00Z`);
    expect(truncated).toBe(false);
    expect(entries.map(({ task_id, start_time }) => [task_id, start_time.slice(11, 16)])).toEqual([
      [hourly.id, '00:30'],
      [hourly.id, '08:30'],
      [daily.id, '09:00'],
      [once.id, '09:00'],
      [hourly.id, '16:30'],
    ]);
    expect(entries[2]).toMatchObject({
      title: 'daily',
      status: 'planned',
      timezone: 'UTC',
      schedule_cron: '0 9 * * *',
    });
  });

  test('has of the past what became of each tick', async () => {
    const task = await makeTask(user.call, { schedule_cron: '* * * * *' });
    await server.db.query({
      text: `insert into occurrences (task_id, user_id, scheduled_for, verdict) values
        ($1, $2, date_trunc('minute', now()) - interval '3 hours', 'fired'),
        ($1, $2, date_trunc('minute', now()) - interval '2 hours', 'skipped_overlap')`,
      values: [task.id, user.id],
    });
    const { entries } = await window(inDays(-1), inDays(-0.05));
    expect(entries.map(({ status }) => status)).toEqual(['fired', 'skipped_overlap']);
    const across = await window(inDays(-1), inDays(0.01));
    expect(across.entries.map(({ status }) => status)).toContain('planned');
    expect(times(across)).toEqual(times(across).toSorted());
  });

  test('is filtered by project and skill', async () => {
    const { body: project } = await user.call('POST', '/projects', { name: 'p' });
    const inside = await makeTask(user.call, { schedule_cron: '0 9 * * *', project_id: project.id });
    const other = await makeTask(user.call, { schedule_cron: '0 9 * * *' });
    const ids = async (query: string) =>
      new Set((await window(inDays(1), inDays(3), query)).entries.map(({ task_id }) => task_id));
    expect(await ids(`&project_id=${project.id}`)).toEqual(new Set([inside.id]));
    expect(await ids(`&skill_name=${other.skill_name}`)).toEqual(new Set([other.id]));
  });

  test('ends at 5,000 entries, and those are the soonest', async () => {
    await makeTask(user.call, { schedule_cron: '* * * * *' });
    const daily = await makeTask(user.call, { schedule_cron: '0 0 * * *' });
    const from = `${inDays(2).slice(0, 10)}T00:00:00Z`;
    const { entries, truncated } = await window(from, inDays(30));
    expect(truncated).toBe(true);
    expect(entries).toHaveLength(5_000);
    expect(entries.filter(({ task_id }) => task_id === daily.id)).toHaveLength(4);
    expect(Date.parse(entries.at(-1)?.start_time ?? '')).toBe(Date.parse(from) + 4_995 * 60_000);
  });

  test('a thousand tasks over 93 days are answered, and others meanwhile', async () => {
    await server.db.query({
      text: `insert into tasks (user_id, skill_name, schedule_cron, timezone, next_run_at)
        select $1, 's', (i % 60) || ' ' || (i / 60) || ' * * *', (array['Europe/Rome', 'Asia/Kathmandu', 'UTC'])[1 + i % 3],
          now() + interval '1 day' from generate_series(0, 999) i`,
      values: [user.id],
    });
    let answered = 0;
    let done = false;
    const probing = (async () => {
      while (!done) {
        expect((await fetch(`${server.url}/health/live`)).status).toBe(200);
        answered += 1;
      }
    })();
    const { truncated } = await window(inDays(0.1), inDays(93));
    done = true;
    await probing;
    expect(truncated).toBe(true);
    expect(answered).toBeGreaterThan(0);
  });

  test.each([
    ['', 'query.from'],
    [`from=${inDays(0)}`, 'query.to'],
    [`from=${inDays(1)}&to=${inDays(0)}`, 'query.to'],
    [`from=${inDays(0)}&to=${inDays(94)}`, 'query.to'],
    [`from=yesterday&to=${inDays(1)}`, 'query.from'],
    [`from=${inDays(0)}&to=${inDays(1)}&limit=5`, 'query.limit'],
  ])('refuses %s', async (query, path) => {
    const answer = await user.call('GET', `/calendar?${query}`);
    expect(answer.status).toBe(400);
    expect(answer.body.errors[0].path).toBe(path);
  });

  test('of another user is for admins', async () => {
    const task = await makeTask(user.call, { schedule_cron: '0 9 * * *' });
    const stranger = await server.newUser();
    const query = `/calendar?from=${inDays(1)}&to=${inDays(2)}&user_id=${user.id}`;
    expect((await stranger.call('GET', query)).status).toBe(403);
    const { body } = await server.admin('GET', query);
    expect(body.entries.map(({ task_id }: Entry) => task_id)).toEqual([task.id]);
  });
});

describe('GET /tasks/{id}/occurrences', () => {
  test('tells of every tick, with the run that it started, page by page', async () => {
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const run = await agent.claimOne([task.skill_name]);
    await user.call('POST', `/tasks/${task.id}/pause`);
    const { body } = await user.call('GET', `/tasks/${task.id}/occurrences?limit=100&sort_order=asc`);
    expect(body.occurrences[0]).toMatchObject({
      task_id: task.id,
      verdict: 'fired',
      scheduled_for: run.scheduled_for,
      execution_id: run.execution_id,
    });
    await server.db.query({
      text: `insert into occurrences (task_id, user_id, scheduled_for, verdict)
        select $1, $2, now() - i * interval '1 day', 'coalesced' from generate_series(1, 5) i`,
      values: [task.id, user.id],
    });
    const seen: number[] = [];
    let cursor = '';
    do {
      const page = (await user.call('GET', `/tasks/${task.id}/occurrences?verdict=coalesced&limit=2${cursor}`)).body;
      seen.push(...page.occurrences.map(({ id }: { id: number }) => id));
      cursor = page.next_cursor ? `&cursor=${page.next_cursor}` : '';
    } while (cursor);
    expect(seen).toHaveLength(5);
    expect(new Set(seen).size).toBe(5);
    const between = `from=${inDays(-3.5)}&to=${inDays(-1.5)}`;
    expect((await user.call('GET', `/tasks/${task.id}/occurrences?${between}`)).body.total).toBe(2);
    expect((await user.call('GET', `/tasks/${task.id}/occurrences?verdict=lost`)).status).toBe(400);
    const stranger = await server.newUser();
    expect((await stranger.call('GET', `/tasks/${task.id}/occurrences`)).status).toBe(403);
  });
});

describe('POST /tasks/bulk', () => {
  const bulk = async (body: object) => {
    const answer = await user.call('POST', '/tasks/bulk', body);
    expect(answer.status).toBe(200);
    return answer.body;
  };
  const status = async (id: number) => (await user.call('GET', `/tasks/${id}`)).body.status;

  test('does one thing to each that it can be done to, and says what became of the others', async () => {
    const [a, b, gone] = [await makeTask(user.call), await makeTask(user.call), await makeTask(user.call)];
    const theirs = await makeTask((await server.newUser()).call);
    await user.call('DELETE', `/tasks/${gone.id}`);
    await user.call('POST', `/tasks/${b.id}/pause`);
    const ids = [b.id, a.id, gone.id, theirs.id, 99_999_999];
    const wish = { action: 'pause', ids };
    const expected = { matched: 5, changed: 1, remaining: 0 };
    const results = [
      { task_id: a.id, result: 'changed' },
      { task_id: b.id, result: 'unchanged' },
      { task_id: gone.id, result: 'not_found' },
      { task_id: theirs.id, result: 'forbidden' },
      { task_id: 99_999_999, result: 'not_found' },
    ];
    expect(await bulk({ ...wish, dry_run: true })).toEqual({ action: 'pause', dry_run: true, ...expected, results });
    expect(await status(a.id)).toBe('pending');
    expect(await bulk(wish)).toEqual({ action: 'pause', dry_run: false, ...expected, results });
    expect(await status(a.id)).toBe('disabled');
    expect((await bulk({ action: 'resume', ids: [a.id, b.id] })).changed).toBe(2);
    expect(await status(b.id)).toBe('pending');
    expect((await server.admin('GET', `/tasks/${theirs.id}`)).body.status).toBe('pending');
  });

  test('runs, cancels and deletes', async () => {
    const agent = await makeAgent(user.call);
    const tasks = [await makeTask(user.call), await makeTask(user.call)];
    const ids = tasks.map(({ id }) => id);
    const run = await bulk({ action: 'run', ids, params: { x: 1 } });
    const [first, second] = run.results.map(({ execution_id }: { execution_id: number }) => execution_id);
    const taken = await agent.claimOne([tasks[0]?.skill_name]);
    expect(taken).toMatchObject({ execution_id: first, params: { x: 1 } });
    expect((await bulk({ action: 'cancel', ids, dry_run: true })).changed).toBe(2);
    expect((await bulk({ action: 'cancel', ids })).changed).toBe(2);
    expect((await user.call('GET', `/executions/${second}`)).body.status).toBe('cancelled');
    expect((await user.call('GET', `/executions/${first}`)).body).toMatchObject({
      status: 'running',
      cancel_requested: true,
    });
    expect((await bulk({ action: 'delete', ids })).changed).toBe(2);
    for (const id of ids) expect((await user.call('GET', `/tasks/${id}`)).status).toBe(404);
    const ended = await makeTask(user.call);
    await server.db.query({ text: `update tasks set status = 'completed' where id = $1`, values: [ended.id] });
    expect((await bulk({ action: 'pause', ids: [ended.id] })).results[0]).toMatchObject({
      result: 'conflict',
      detail: expect.stringMatching(/no further run/),
    });
  });

  test('takes a filter, a thousand at a time', async () => {
    const skill = unique('skill');
    await server.db.query({
      text: `insert into tasks (user_id, skill_name) select $1, $2 from generate_series(1, 1010)`,
      values: [user.id, skill],
    });
    const wish = { action: 'pause', filter: { skill_name: skill, status: 'pending' } };
    expect(await bulk({ ...wish, dry_run: true })).toMatchObject({ matched: 1_010, changed: 1_000, remaining: 10 });
    expect(await bulk(wish)).toMatchObject({ matched: 1_010, changed: 1_000, remaining: 10 });
    expect(await bulk(wish)).toMatchObject({ matched: 10, changed: 10, remaining: 0 });
    const stranger = await server.newUser();
    const answer = await stranger.call('POST', '/tasks/bulk', { action: 'delete', filter: { skill_name: skill } });
    expect(answer.body).toMatchObject({ matched: 0, changed: 0, results: [] });
  });

  test('two at once over the same tasks both get through', async () => {
    const tasks = await Promise.all(Array.from({ length: 30 }, () => makeTask(user.call)));
    const ids = tasks.map(({ id }) => id);
    const [one, other] = await Promise.all([
      bulk({ action: 'pause', ids }),
      bulk({ action: 'pause', ids: ids.toReversed() }),
    ]);
    expect(one.changed + other.changed).toBe(30);
  });

  test.each([
    [{ action: 'pause' }, 'body.ids'],
    [{ action: 'pause', ids: [1], filter: { search: 'x' } }, 'body.ids'],
    [{ action: 'pause', ids: [] }, 'body.ids'],
    [{ action: 'pause', ids: [1, 1] }, 'body.ids'],
    [{ action: 'pause', filter: {} }, 'body.filter'],
    [{ action: 'pause', filter: { user_id: 1 } }, 'body.filter.user_id'],
    [{ action: 'explode', ids: [1] }, 'body.action'],
    [{ action: 'pause', ids: [1], params: {} }, 'body.params'],
    [{ action: 'pause', ids: Array.from({ length: 1_001 }, (_, i) => i + 1) }, 'body.ids'],
  ])('refuses what is not clear: %#', async (body, path) => {
    const answer = await user.call('POST', '/tasks/bulk', body);
    expect(answer.status).toBe(400);
    expect(answer.body.errors.map((error: { path: string }) => error.path)).toContain(path);
  });
});
