import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Crew, startCrew } from '../support/crew.ts';
import { createClock, haveFaketime } from '../support/faketime.ts';
import { startFleet } from '../support/fleet.ts';
import { checkHistory, openDatabase } from '../support/history.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { startTicking } from '../support/ticking.ts';
import { unique, until } from '../support/work.ts';

const HOUR_MS = 3_600_000;

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
  test('on one of two servers: ticks fire on time and once, and leases hold', { timeout: 180_000 }, async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const clock = createClock(folder, 'clock');
    const fleet = await startFleet({
      databaseUrl: database.url,
      folder,
      size: 2,
      // Long enough for an agent that gets little of the machine, and nothing beside the jumps.
      env: { LEASE_SECONDS: '10' },
      envOf: (place) => (place === 1 ? clock.env : {}),
    });
    const look = openDatabase(database.url);
    closers.push(look.close);
    const ticking = await startTicking(fleet, look.rows, 30);
    // A run whose agent talks to the server with the wrong clock alone, and holds its lease all the time.
    const skill = unique('held');
    const name = unique('held');
    const { body: task } = await fleet.call()('POST', '/tasks', { name, skill_name: skill, params: { beats: 40 } });
    ticking.history.attempted.add(name);
    ticking.history.tasks.set(name, task.id);
    await fleet.call()('POST', `/tasks/${task.id}/run`);
    crew = startCrew({ size: 1, urls: fleet.urls.slice(1), key: fleet.user.key, skill, name: skill, folder });
    await until(
      async () => crew?.claims.size,
      (claims) => claims === 1,
    );

    const wrongBy = async () =>
      Date.parse((await fleet.call(1)('GET', '/tasks?limit=1')).headers.get('date') ?? '') - Date.now();
    for (const [offset, hours] of [
      ['+1h', 1],
      ['-1h', -1],
      ['+1d', 24],
      ['-1d', -24],
      ['+0', 0],
    ] as const) {
      clock.set(offset);
      await until(wrongBy, (ms) => Math.abs(ms - hours * HOUR_MS) < 60_000);
      await ticking.pass(2);
    }
    await ticking.finish();
    const held = await until(
      async () => (await fleet.call()('GET', `/executions?task_id=${task.id}`)).body.executions,
      ([run]) => run.status !== 'running',
      40,
    );
    expect(held).toMatchObject([{ attempt: 1, status: 'success' }]);
    expect(held[0].duration_ms).toBeGreaterThan(5_000);
    expect(held[0].duration_ms).toBeLessThan(HOUR_MS / 2);
    await crew.stop();
    await checkHistory({
      database: look,
      history: ticking.history,
      reports: crew.reports.values(),
      servers: fleet.all,
      folder,
    });
  });
});
