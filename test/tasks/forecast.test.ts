import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { spreadOffsetMs } from '../../src/schedule/recurrence.ts';
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

const DAY = 86_400_000;
/** The midnight that begins a window far enough ahead for nothing to fire in this test. */
const midnight = Math.floor(Date.now() / DAY) * DAY + 3 * DAY;
const at = (hours: number) => new Date(midnight + hours * 3_600_000).toISOString();
const day = `from=${at(0)}&to=${at(24)}`;
const rows = (text: string, values: unknown[] = []) => server.db.query({ text, values });
async function forecast(query = day, call = user.call) {
  const { status, body } = await call('GET', `/forecast?${query}`);
  expect(status, JSON.stringify(body)).toBe(200);
  return body;
}
/** Runs of a task that took so long, newest first, made by SQL. */
const ran = (taskId: number, seconds: number[], days = 1, status = 'success') =>
  rows(
    `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds, status,
       created_at, started_at, ended_at)
     select t.id, t.user_id, 'manual', now(), t.skill_name, '{}', 1, 60, $4, now() - ($3 * interval '1 day') - n * interval '1 second',
       now() - interval '1 day', now() - interval '1 day' + s * interval '1 second'
     from tasks t, unnest($2::float8[]) with ordinality u(s, n) where t.id = $1`,
    [taskId, seconds, days, status],
  );

describe('GET /forecast', () => {
  test('says of each minute how much starts and runs, what is over capacity, and which to shift by how much', async () => {
    const herd: number[] = [];
    for (let i = 0; i < 3; i++) {
      const task = await makeTask(user.call, { schedule_cron: '0 3 * * *', name: `herd ${i}` });
      await ran(task.id, [90]);
      herd.push(task.id);
    }
    const late = await makeTask(user.call, { run_at: at(5), skill_name: unique('once') });
    const body = await forecast(`${day}&capacity=2`);
    expect(body).toMatchObject({
      from: at(0),
      to: at(24),
      truncated: false,
      capacity: 2,
      capacity_from: 'given',
      peak: 3,
      minutes_over_capacity: 2,
      collisions: 1,
      collision_minutes: [{ minute: at(3), tasks: 3, task_ids: herd }],
      proposals: [
        { task_id: herd[1], shift_seconds: 60, peak_after: 3 },
        { task_id: herd[2], shift_seconds: 120, peak_after: 2 },
      ],
      after: { peak: 2, minutes_over_capacity: 0, collisions: 0 },
      stuck_task_ids: [],
      proposals_complete: true,
    });
    expect(body.minutes).toEqual([
      { minute: at(3), starts: 3, running: 3 },
      { minute: new Date(midnight + 3 * 3_600_000 + 60_000).toISOString(), starts: 0, running: 3 },
      { minute: at(5), starts: 1, running: 1 },
    ]);
    expect(body.tasks).toHaveLength(4);
    expect(body.tasks.find(({ task_id }: { task_id: number }) => task_id === herd[0])).toEqual({
      task_id: herd[0],
      title: 'herd 0',
      skill_name: expect.any(String),
      starts: 1,
      duration_ms: 90_000,
      duration_from: 'task',
      n: 1,
    });
    expect(body.tasks.find(({ task_id }: { task_id: number }) => task_id === late.id)).toMatchObject({ starts: 1 });
  });

  test('takes how long runs take from the task, else from its skill, else a minute, and says which', async () => {
    const skill = unique('skill');
    const fields = { schedule_cron: '0 3 * * *', skill_name: skill };
    const known = await makeTask(user.call, fields);
    // Of a hundred, 95 took no longer than 95 s; what is old, was cancelled or is another's does not count.
    await ran(
      known.id,
      Array.from({ length: 100 }, (_, i) => i + 1),
    );
    await ran(known.id, Array(50).fill(1_000), 31);
    await ran(known.id, Array(50).fill(1_000), 1, 'cancelled');
    const other = await server.newUser();
    await ran((await makeTask(other.call, fields)).id, [3_000]);
    const alike = await makeTask(user.call, fields);
    const short = await makeTask(user.call, { ...fields, timeout_seconds: 7 });
    const unknown = await makeTask(user.call, { schedule_cron: '0 3 * * *' });
    const { tasks } = await forecast();
    const of = (id: number) => tasks.find(({ task_id }: { task_id: number }) => task_id === id);
    expect(of(known.id)).toMatchObject({ duration_ms: 95_000, duration_from: 'task', n: 100 });
    expect(of(alike.id)).toMatchObject({ duration_ms: 95_000, duration_from: 'skill', n: 100 });
    expect(of(short.id)).toMatchObject({ duration_ms: 7_000, duration_from: 'skill' });
    expect(of(unknown.id)).toMatchObject({ duration_ms: 60_000, duration_from: 'default', n: 0 });
  });

  test('takes the capacity from the live agents, null when there is none', async () => {
    await makeTask(user.call, { schedule_cron: '0 3 * * *' });
    expect(await forecast()).toMatchObject({ capacity: null, capacity_from: 'agents', minutes_over_capacity: 0 });
    const [first, second, third] = [
      await makeAgent(user.call, { max_concurrency: 3 }),
      await makeAgent(user.call, { max_concurrency: 4 }),
      await makeAgent(user.call, { max_concurrency: 8 }),
    ];
    await makeAgent((await server.newUser()).call, { max_concurrency: 50 });
    expect((await forecast()).capacity).toBe(15);
    await user.call('POST', `/agents/${second.id}/drain`);
    await user.call('DELETE', `/agents/${third.id}`);
    expect((await forecast()).capacity).toBe(3);
    await rows(`update agents set status = 'offline' where id = $1`, [first.id]);
    expect((await forecast()).capacity).toBeNull();
  });

  test('knows zones, spread, bounds, limits and overlap; and neither paused nor foreign tasks', async () => {
    const zone = await makeTask(user.call, { schedule_cron: '0 9 * * *', timezone: 'Asia/Tokyo' });
    const spread = await makeTask(user.call, { schedule_cron: '0 3 * * *', spread_seconds: 7_200 });
    await makeTask(user.call, { schedule_cron: '0 4 * * *', ends_at: at(4) });
    await makeTask(user.call, { schedule_cron: '0 6 * * *', starts_at: at(24) });
    const limited = await makeTask(user.call, { schedule_cron: '*/10 * * * *', starts_at: at(12), max_runs: 2 });
    const paused = await makeTask(user.call, { schedule_cron: '0 3 * * *' });
    await user.call('POST', `/tasks/${paused.id}/pause`);
    await makeTask((await server.newUser()).call, { schedule_cron: '0 3 * * *' });
    const offset = spreadOffsetMs(String(spread.id), 7_200);
    const minute = (ms: number) => new Date(Math.floor(ms / 60_000) * 60_000).toISOString();
    const { minutes, tasks } = await forecast();
    expect(
      minutes.filter(({ starts }: { starts: number }) => starts > 0).map((one: { minute: string }) => one.minute),
    ).toEqual([at(0), minute(midnight + 3 * 3_600_000 + offset), at(12), minute(midnight + 12 * 3_600_000 + 600_000)]);
    const starts = Object.fromEntries(
      tasks.map((task: { task_id: number; starts: number }) => [task.task_id, task.starts]),
    );
    expect(starts).toMatchObject({ [zone.id]: 1, [spread.id]: 1, [limited.id]: 2 });
    expect(starts[paused.id]).toBeUndefined();

    const { call } = await server.newUser();
    const fields = { schedule_cron: '0 * * * *', skill_name: unique('long') };
    const skip = await makeTask(call, fields);
    await ran(skip.id, [4 * 3_600 - 1]);
    expect((await forecast(day, call)).peak).toBe(1);
    await call('PUT', `/tasks/${skip.id}`, { overlap_policy: 'allow' });
    await rows(`update executions set ended_at = started_at + interval '3500 seconds' where task_id = $1`, [skip.id]);
    expect((await forecast(day, call)).peak).toBe(1);
    await rows(`update executions set ended_at = started_at + interval '9000 seconds' where task_id = $1`, [skip.id]);
    await call('PUT', `/tasks/${skip.id}`, { timeout_seconds: 100_000 });
    expect((await forecast(day, call)).peak).toBe(3);
  });

  test('ends where there is too much to look at, and says so', async () => {
    for (let i = 0; i < 2; i++) await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const body = await forecast('');
    expect(body.truncated).toBe(true);
    const looked = Date.parse(body.to) - Date.parse(body.from);
    expect(looked % 60_000).toBe(0);
    // 25,000 seconds of two starts a second, in whole minutes.
    expect(looked).toBe(416 * 60_000);
    expect(body.tasks.map(({ starts }: { starts: number }) => starts)).toEqual([24_960, 24_960]);
    expect(body.collision_minutes).toHaveLength(417);
    for (const { id } of (await user.call('GET', '/tasks')).body.tasks) await user.call('DELETE', `/tasks/${id}`);
  });

  test('looks at the tasks of a project, and lets admins look at those of others', async () => {
    const project = (await user.call('POST', '/projects', { name: unique('p') })).body.id;
    const task = await makeTask(user.call, { schedule_cron: '0 3 * * *', project_id: project });
    await makeTask(user.call, { schedule_cron: '0 3 * * *' });
    expect((await forecast(`${day}&project_id=${project}`)).tasks).toMatchObject([{ task_id: task.id }]);
    expect((await forecast(`${day}&user_id=${user.id}`, server.admin)).tasks).toHaveLength(2);
    const stranger = await server.newUser();
    expect((await stranger.call('GET', `/forecast?user_id=${user.id}`)).status).toBe(403);
    expect((await forecast(`${day}&project_id=${project}`, stranger.call)).tasks).toEqual([]);
  });

  test('is of the next day unless asked otherwise, never of the past, of a week at most', async () => {
    const body = await forecast('');
    expect(Date.parse(body.to) - Date.parse(body.from)).toBe(DAY);
    expect(body).toMatchObject({ peak: 0, minutes: [], tasks: [], proposals: [] });
    const past = await forecast(`from=2026-01-01T00:00:00Z&to=${at(0)}`);
    expect(Date.parse(past.from)).toBeGreaterThan(Date.parse('2026-01-02T00:00:00Z'));
    for (const query of [
      `from=${at(0)}&to=${at(0)}`,
      `from=${at(0)}&to=${at(24 * 7 + 1)}`,
      'to=2026-01-01T00:00:00Z',
    ]) {
      expect(await user.call('GET', `/forecast?${query}`)).toMatchObject({
        status: 400,
        body: { errors: [{ path: 'query.to' }] },
      });
    }
    expect((await user.call('GET', '/forecast?capacity=0')).status).toBe(400);
  });
});
