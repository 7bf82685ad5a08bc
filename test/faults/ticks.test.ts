import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { startFleet } from '../support/fleet.ts';
import { checkHistory, openDatabase } from '../support/history.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { startTicking } from '../support/ticking.ts';

const LARGE = process.env['FAULTS'] === 'all';
const TASKS = LARGE ? 500 : 100;

let database: TestDatabase;
let folder: string;
beforeAll(async () => {
  folder = await newFolder();
  database = await createTestDatabase();
});
afterEach(endPrograms);
afterAll(async () => {
  await database?.drop();
  await removeFolder(folder);
});

test('four schedulers, of which some hang for a while and come back: every tick fires once', {
  timeout: 240_000,
}, async () => {
  const fleet = await startFleet({ databaseUrl: database.url, folder, size: 4 });
  const look = openDatabase(database.url);
  const ticking = await startTicking(fleet, look.rows, TASKS);
  const hang = async (place: number, seconds: number) => {
    fleet.servers[place]?.child.kill('SIGSTOP');
    await ticking.pass(seconds);
    fleet.servers[place]?.child.kill('SIGCONT');
  };
  await ticking.pass(2);
  // Longer than Postgres waits for a transaction of somebody who says nothing: what it had in hand is taken from it.
  const hanging = Promise.all([hang(1, 12), hang(2, 3)]);
  await ticking.pass(4);
  await hang(3, 4);
  await hanging;
  // What comes back must not repeat what it was about to do.
  await ticking.pass(LARGE ? 12 : 3);
  const ticks = await ticking.finish();
  expect(ticks).toBeGreaterThan(TASKS * 15);
  await checkHistory({ database: look, history: ticking.history, servers: fleet.all, folder });
  await look.close();
});
