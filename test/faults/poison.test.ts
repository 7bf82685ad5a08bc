import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { type Crew, startCrew } from '../support/crew.ts';
import { type Fleet, startFleet } from '../support/fleet.ts';
import { checkHistory, newHistory, openDatabase, STUCK } from '../support/history.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { unique, until } from '../support/work.ts';

let database: TestDatabase;
let folder: string;
let fleet: Fleet;
let crew: Crew | undefined;
beforeAll(async () => {
  folder = await newFolder();
  database = await createTestDatabase();
  fleet = await startFleet({ databaseUrl: database.url, folder, size: 1 });
});
afterEach(async () => {
  await crew?.stop();
  await endPrograms();
});
afterAll(async () => {
  await database?.drop();
  await removeFolder(folder);
});

test('runs that kill or hang every agent that takes them end by themselves, and the others are done', {
  timeout: 120_000,
}, async () => {
  const look = openDatabase(database.url);
  const history = newHistory();
  const skill = unique('poison');
  const make = async (kind: string, fields: object) => {
    const name = unique(kind);
    history.attempted.add(name);
    const task = await fleet.call()('POST', '/tasks', { name, skill_name: skill, ...fields });
    expect(task.status).toBe(201);
    history.tasks.set(name, task.body.id);
    expect((await fleet.call()('POST', `/tasks/${task.body.id}/run`)).status).toBe(202);
    return task.body.id as number;
  };
  const poisoned = [
    await make('poison', { params: { poison: true }, max_attempts: 3, priority: 'critical' }),
    await make('poison', { params: { poison: true }, max_attempts: 2 }),
    await make('poison', { params: { poison: true }, max_attempts: 1 }),
  ];
  const hanging = await make('hang', { params: { hang: true }, max_attempts: 1, timeout_seconds: 1, priority: 'high' });
  const good = await Promise.all(Array.from({ length: 30 }, () => make('good', { max_attempts: 10 })));

  crew = startCrew({ size: 3, urls: fleet.urls, key: fleet.user.key, skill, name: skill, folder, max: 1 });
  await until(
    async () => {
      // At no moment is anything at work for longer than it may.
      expect(await look.rows(STUCK)).toEqual([]);
      return (await look.rows(`select count(*)::int as open from executions where status in ('queued', 'running')`))[0];
    },
    ({ open }) => open === 0,
    90,
  );
  await crew.stop();

  const runs = await look.rows<{ task_id: number; attempt: number; status: string; cause: string; error_text: string }>(
    'select task_id, attempt, status, cause, error_text from executions order by task_id, attempt',
  );
  const of = (task: number) => runs.filter(({ task_id }) => task_id === task);
  for (const [i, task] of poisoned.entries()) {
    const attempts = [1, 2, 3].slice(0, 3 - i);
    expect(of(task)).toMatchObject(attempts.map((attempt) => ({ attempt, status: 'failed', cause: 'lease_lost' })));
    expect((await fleet.call()('GET', `/tasks/${task}`)).body.status).toBe('failed');
  }
  expect(of(hanging)).toMatchObject([
    { attempt: 1, status: 'timeout', cause: 'run_timeout', error_text: 'Not finished within 1 s.' },
  ]);
  expect(good.map((task) => of(task).at(-1)?.status)).toEqual(good.map(() => 'success'));
  await checkHistory({ database: look, history, reports: crew.reports.values(), servers: fleet.all, folder });
  await look.close();
});
