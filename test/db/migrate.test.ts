import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import pg from 'pg';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { migrateDatabase } from '../../src/db/migrate.ts';
import { createEmptyDatabase, createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, startProgram } from '../support/processes.ts';
import { until } from '../support/work.ts';

let database: TestDatabase;
let client: pg.Client;
let folder: string;
beforeEach(async () => {
  database = await createEmptyDatabase();
  client = await connected(database);
  folder = await mkdtemp(join(tmpdir(), 'muster-migrations-'));
  await cp(resolve(import.meta.dirname, '../../migrations'), folder, { recursive: true });
});
afterEach(async () => {
  await endPrograms();
  await client.end();
  await database.drop();
  await rm(folder, { recursive: true });
});

async function connected({ url }: TestDatabase): Promise<pg.Client> {
  const made = new pg.Client({ connectionString: url });
  made.on('error', () => {});
  await made.connect();
  return made;
}

/** Adds a migration behind those there are, as drizzle-kit would. */
async function addMigration(tag: string, statements: string): Promise<void> {
  const journalFile = join(folder, 'meta/_journal.json');
  const journal = JSON.parse(await readFile(journalFile, 'utf8'));
  const last = journal.entries.at(-1);
  journal.entries.push({ ...last, idx: last.idx + 1, when: last.when + 1, tag });
  await writeFile(journalFile, JSON.stringify(journal));
  await writeFile(join(folder, `${tag}.sql`), statements);
}

const applied = async (on = client) =>
  (await on.query<{ times: number }>('select count(*)::int as times from drizzle.__drizzle_migrations')).rows[0]?.times;
const known = async () => JSON.parse(await readFile(join(folder, 'meta/_journal.json'), 'utf8')).entries.length;

describe('migrations', () => {
  test('of twenty at once on an empty database each is applied once', async () => {
    await Promise.all(Array.from({ length: 20 }, () => migrateDatabase(database.url)));
    expect(await applied()).toBe(await known());
    await client.query(`insert into users (email) values ('a@example.com')`);
  });

  test('that take a while are waited for', async () => {
    await addMigration('9999_slow', 'create table slow (id int);--> statement-breakpoint\nselect pg_sleep(1);');
    await Promise.all(Array.from({ length: 6 }, () => migrateDatabase(database.url, { folder })));
    expect(await applied()).toBe(await known());
  });

  test('that were killed in the middle leave nothing, and the next one finishes the job', async () => {
    await addMigration('9999_slow', 'create table slow (id int);--> statement-breakpoint\nselect pg_sleep(3);');
    const doomed = startProgram('test/support/migrate-child.ts', { folder, args: [database.url, folder] });
    const sleeping = async () =>
      (
        await client.query(
          `select from pg_stat_activity where datname = current_database() and query like '%pg_sleep(3)%' and pid <> pg_backend_pid()`,
        )
      ).rowCount;
    await until(sleeping, (count) => count === 1);
    doomed.child.kill('SIGKILL');
    expect(await doomed.exited).toBe('SIGKILL');
    expect((await client.query(`select to_regclass('slow') as slow, to_regclass('tasks') as tasks`)).rows).toEqual([
      { slow: null, tasks: null },
    ]);
    await migrateDatabase(database.url, { folder });
    expect(await applied()).toBe(await known());
    await client.query('select from slow');
  });

  test('of the next version go onto a database of this one, and keep what is in it', async () => {
    const filled = await createTestDatabase();
    const there = await connected(filled);
    try {
      await there.query(`insert into users (email) values ('a@example.com')`);
      await there.query(`insert into tasks (user_id, skill_name, next_run_at) select id, 'kept', now() from users`);
      await addMigration('9999_next', `alter table tasks add column colour text not null default 'blue';`);
      await migrateDatabase(filled.url, { folder });
      expect((await there.query('select skill_name, colour from tasks')).rows).toEqual([
        { skill_name: 'kept', colour: 'blue' },
      ]);
      // The version before refuses what the next one has made of it.
      await expect(migrateDatabase(filled.url)).rejects.toThrow(/migrated by a newer version of Muster/);
    } finally {
      await there.end();
      await filled.drop();
    }
  });
});
