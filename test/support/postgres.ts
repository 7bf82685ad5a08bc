import { createHash, randomBytes } from 'node:crypto';
import { readdir, readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import { inject } from 'vitest';
import { migrateDatabase } from '../../src/db/migrate.ts';

// Every test file has a database of its own: a copy of a template that holds the schema, made in milliseconds.

const MIGRATIONS = fileURLToPath(new URL('../../migrations', import.meta.url));
/** What is older than this was left behind by a run that died. */
const LEFT_BEHIND_MS = 3_600_000;

export interface TestDatabase {
  url: string;
  drop(): Promise<void>;
}

/** Runs statements on the server's own database. */
async function withServer<T>(url: string, work: (client: pg.Client) => Promise<T>): Promise<T> {
  const client = new pg.Client({ connectionString: url });
  client.on('error', () => {});
  await client.connect();
  try {
    return await work(client);
  } finally {
    await client.end();
  }
}

/** The URL of another database on the same server. */
export function databaseUrl(server: string, name: string): string {
  const url = new URL(server);
  url.pathname = `/${name}`;
  return url.href;
}

async function templateName(): Promise<string> {
  const hash = createHash('sha256');
  for (const file of (await readdir(MIGRATIONS)).filter((name) => name.endsWith('.sql')).toSorted()) {
    hash.update(await readFile(`${MIGRATIONS}/${file}`));
  }
  return `muster_template_${hash.digest('hex').slice(0, 16)}`;
}

/** Makes the template of these migrations, if there is none, and drops what dead runs left. Called once a run. */
export async function prepareTemplate(server: string): Promise<void> {
  const name = await templateName();
  await withServer(server, async (client) => {
    // One run prepares at a time: others on the same server wait here.
    await client.query(`select pg_advisory_lock(hashtext('muster tests'))`);
    const { rows } = await client.query<{ datname: string }>(
      `select datname from pg_database where datname like 'muster\\_test\\_%' or datname = $1`,
      [name],
    );
    for (const { datname } of rows) {
      const made = Number(/^muster_test_(\d+)_/.exec(datname)?.[1]);
      if (made && Date.now() - made > LEFT_BEHIND_MS)
        await client.query(`drop database if exists ${datname} with (force)`);
    }
    if (rows.some((row) => row.datname === name)) return;
    // Migrated under another name first: a template that a run left half made would fool the next.
    const fresh = `${name}_new`;
    await client.query(`drop database if exists ${fresh} with (force)`);
    await client.query(`create database ${fresh}`);
    await migrateDatabase(databaseUrl(server, fresh));
    await client.query(`alter database ${fresh} rename to ${name}`);
  });
}

/** A migrated database for one test file. */
export async function createTestDatabase(): Promise<TestDatabase> {
  return create(`template ${await templateName()} strategy file_copy`);
}

/** A database without anything in it. */
export async function createEmptyDatabase(): Promise<TestDatabase> {
  return create('');
}

async function create(options: string): Promise<TestDatabase> {
  const server = inject('postgresUrl');
  const name = `muster_test_${Date.now()}_${randomBytes(4).toString('hex')}`;
  await withServer(server, (client) => client.query(`create database ${name} ${options}`));
  return {
    url: databaseUrl(server, name),
    drop: () =>
      withServer(server, async (client) => void (await client.query(`drop database if exists ${name} with (force)`))),
  };
}
