import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Crew, startCrew } from '../support/crew.ts';
import { createClock, haveFaketime } from '../support/faketime.ts';
import { startFleet } from '../support/fleet.ts';
import { checkHistory, newHistory, openDatabase } from '../support/history.ts';
import { ownPostgres } from '../support/own-postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { unique, until } from '../support/work.ts';

let folder: string;
let crew: Crew | undefined;
let closers: (() => Promise<unknown>)[];
beforeEach(async () => {
  folder = await newFolder();
  closers = [];
});
afterEach(async () => {
  await crew?.stop();
  await endPrograms();
  for (const close of closers.reverse()) await close();
  await removeFolder(folder);
});

describe.skipIf(!haveFaketime())('a clock that is wrong', () => {
  test('of Postgres itself, an hour ahead and back: every tick has one verdict, and everything goes on', {
    timeout: 180_000,
  }, async () => {
    const postgres = await ownPostgres(folder);
    closers.push(postgres.close);
    const clock = createClock(folder, 'clock');
    await postgres.end('SIGINT');
    await postgres.start(clock.env);
    const fleet = await startFleet({ databaseUrl: postgres.url, folder, size: 2 });
    const look = openDatabase(postgres.url);
    closers.push(look.close);
    const history = newHistory();
    const skill = unique('skill');
    const make = async (fields: object) => {
      const name = unique('task');
      history.attempted.add(name);
      const { status, body } = await fleet.call()('POST', '/tasks', { name, skill_name: skill, ...fields });
      expect(status).toBe(201);
      history.tasks.set(name, body.id);
      return body as { id: number; next_run_at: string };
    };
    const ask = async (params: object) => {
      const { id } = await make({ params });
      expect((await fleet.call()('POST', `/tasks/${id}/run`)).status).toBe(202);
      return id;
    };
    const runsOf = async (id: number) => (await fleet.call()('GET', `/executions?task_id=${id}`)).body.executions;
    const done = async (id: number) =>
      until(
        () => runsOf(id),
        (runs) => runs[0]?.status === 'success',
        40,
      );
    /** No agent takes these: it is their ticks that count. */
    const ticks = (every: string, misfire: string) =>
      make({ skill_name: 'none', schedule_cron: every, misfire_policy: misfire, overlap_policy: 'allow' });
    const ticking = new Map(
      await Promise.all(
        ['fire_last', 'fire_all', 'skip'].flatMap((misfire) =>
          (
            [
              ['*/5 * * * * *', 5],
              ['* * * * *', 60],
            ] as const
          ).map(async ([every, seconds]) => [await ticks(every, misfire), seconds] as const),
        ),
      ),
    );
    const lastTick = async () =>
      (await look.rows('select coalesce(max(id), 0) as id from occurrences'))[0].id as number;
    /** Waits until every one of them that ticks at least so often has answered for a tick since the one of that id. */
    const answered = (seconds: number, since: number) => {
      const ids = [...ticking].flatMap(([{ id }, every]) => (every <= seconds ? [id] : []));
      return until(
        () =>
          look.rows('select distinct task_id from occurrences where id > $1 and task_id = any($2::bigint[])', [
            since,
            ids,
          ]),
        (tasks) => tasks.length === ids.length,
        60,
      );
    };
    crew = startCrew({ size: 2, urls: fleet.urls, key: fleet.user.key, skill, name: skill, folder, max: 1 });
    await done(await ask({}));

    let before = await lastTick();
    clock.set('+1h');
    await answered(60, before);
    await done(await ask({}));
    const held = await ask({ beats: 8 });
    await until(
      () => runsOf(held),
      ([run]) => run.status === 'running',
    );

    clock.set('+0');
    await done(held);
    for (const { duration_ms: took } of await runsOf(held)) expect(took).toBeGreaterThanOrEqual(0);
    await done(await ask({}));
    // New schedules go by the time that it is now.
    const { id: once } = await make({ run_at: new Date(Date.now() + 1_000).toISOString() });
    await done(once);

    // Now it is really as late as it was before: what was answered for then is not done again.
    before = await lastTick();
    clock.set('+1h');
    await answered(5, before);
    await done(await ask({}));
    await crew.stop();

    for (const [{ id, next_run_at: first }, seconds] of ticking) {
      await fleet.call()('POST', `/tasks/${id}/pause`);
      const [{ times, runs, fired }] = await look.rows(
        `select array_agg(at order by at) as times,
          count(*) filter (where verdict in ('fired', 'late'))::int as fired,
          (select count(*)::int from executions where task_id = $1) as runs
        from (
          select verdict, scheduled_for + n * $2::int * interval '1 second' as at
          from occurrences cross join generate_series(0, ticks - 1) n where task_id = $1
        ) each_tick`,
        [id, seconds],
      );
      expect(times.map((time: Date, i: number) => time.getTime() - Date.parse(first) - i * seconds * 1_000)).toEqual(
        times.map(() => 0),
      );
      expect(times.length).toBeGreaterThanOrEqual(3_600 / seconds);
      expect(runs).toBe(fired);
      await fleet.call()('DELETE', `/tasks/${id}`);
    }
    await checkHistory({
      database: look,
      history,
      reports: crew.reports.values(),
      servers: fleet.all,
      folder: join(folder, 'server'),
    });
  });
});
