import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { type Crew, startCrew } from '../support/crew.ts';
import { startFleet } from '../support/fleet.ts';
import { checkHistory, openDatabase, STUCK } from '../support/history.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { askForRuns, expectDoneOnce, rage, stormSeconds } from '../support/storm.ts';
import { unique, until } from '../support/work.ts';

const RUNS = Number(process.env['FAULTS_RUNS'] ?? 300);

let database: TestDatabase;
let folder: string;
let crew: Crew | undefined;
beforeAll(async () => {
  folder = await newFolder();
  database = await createTestDatabase();
});
afterEach(async () => {
  await crew?.stop();
  await endPrograms();
});
afterAll(async () => {
  await database?.drop();
  await removeFolder(folder);
});

test('agents and servers are killed all the time: every run is done once, and no late report changes anything', {
  timeout: (60 + stormSeconds(RUNS)) * 1_000,
}, async () => {
  const fleet = await startFleet({ databaseUrl: database.url, folder, size: 2 });
  const look = openDatabase(database.url);
  const skill = unique('storm');
  const history = await askForRuns(fleet, { count: RUNS, skill, stallEvery: Math.ceil(RUNS / 20) });
  crew = startCrew({ size: 6, urls: fleet.urls, key: fleet.user.key, skill, name: skill, folder });
  const raging = rage(crew, look.rows, history);

  // Each server dies once, when a third and two thirds are done.
  for (const place of [0, 1]) {
    await until(
      async () => crew?.taken ?? 0,
      (taken) => taken >= (RUNS * (place + 1)) / 3,
      stormSeconds(RUNS),
    );
    await fleet.replace(place);
  }
  const { late, woken } = await raging;
  expect(await look.rows(STUCK)).toEqual([]);
  expect(crew.kills).toBeGreaterThan(RUNS / 10);
  expect(woken).toBeGreaterThan(0);
  expect(late).toBeGreaterThan(0);
  await expectDoneOnce(look.rows, history);
  // An attempt is lost with its lease, and in no other way.
  const lost = await look.rows(
    `select cause, count(*)::int as n from executions where status <> 'success' group by cause`,
  );
  expect(lost).toEqual([{ cause: 'lease_lost', n: expect.any(Number) }]);
  await checkHistory({ database: look, history, reports: crew.reports.values(), servers: fleet.all, folder });
  await look.close();
  console.log(`${RUNS} runs, ${lost[0].n} lost, ${crew.kills} kills, ${woken} stops, ${late} late reports refused`);
});
