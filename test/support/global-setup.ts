import { spawnSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import type { TestProject } from 'vitest/node';
import { migrateDatabase } from '../../src/db/migrate.ts';
import { startEmbeddedPostgres } from '../../src/platform/embedded-postgres.ts';
import { databaseUrl, TEST_PREFIX } from './postgres.ts';

const MIGRATIONS = fileURLToPath(new URL('../../migrations', import.meta.url));
const TEMPLATE_PREFIX = 'muster_template_';
/** Any number that no other program takes in the database of TEST_DATABASE_URL. */
const TEMPLATE_LOCK = 0x4d757374;

interface Server {
  url: string;
  stop(): Promise<void>;
}

/** Gives the tests a real Postgres, with a migrated template to copy; answers what takes it away again. */
export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const server = await startPostgres();
  const admin = new pg.Client({ connectionString: server.url });
  try {
    await admin.connect();
    await dropLeftovers(admin);
    const { rows } = await admin.query<{ major: number }>(
      `select current_setting('server_version_num')::int / 10000 as major`,
    );
    const template = await requireTemplate(admin, server.url);
    project.provide('postgres', { adminUrl: server.url, template, major: rows[0]?.major ?? 0 });
  } catch (error) {
    await server.stop();
    throw error;
  } finally {
    await admin.end();
  }
  return server.stop;
}

/** TEST_DATABASE_URL when it is set; else a container when a Docker engine answers; else the one that Muster brings. */
async function startPostgres(): Promise<Server> {
  const given = process.env['TEST_DATABASE_URL'];
  if (given) return { url: given, stop: async () => {} };
  if (spawnSync('docker', ['info'], { stdio: 'ignore', timeout: 10_000 }).status === 0) return startContainer();
  const dataDir = await mkdtemp(join(tmpdir(), 'muster-test-postgres-'));
  const postgres = await startEmbeddedPostgres({ dataDir, fsync: false });
  return {
    url: postgres.url,
    async stop() {
      await postgres.stop();
      await rm(dataDir, { recursive: true, force: true });
    },
  };
}

async function startContainer(): Promise<Server> {
  const { PostgreSqlContainer } = await import('@testcontainers/postgresql');
  const container = await new PostgreSqlContainer('postgres:18-alpine')
    .withCommand(['postgres', '-c', 'fsync=off', '-c', 'full_page_writes=off', '-c', 'max_connections=300'])
    .withTmpFs({ '/var/lib/postgresql': 'rw' })
    .start();
  return {
    url: container.getConnectionUri(),
    async stop() {
      await container.stop();
    },
  };
}

const HOUR_MS = 3_600_000;

/** Drops what runs that were killed left: test databases after an hour and templates after a day, unless in use. */
async function dropLeftovers(admin: pg.Client): Promise<void> {
  const { rows } = await admin.query<{ name: string; made: string | null }>(
    `select datname as name, shobj_description(oid, 'pg_database') as made from pg_database
     where starts_with(datname, '${TEST_PREFIX}') or starts_with(datname, '${TEMPLATE_PREFIX}')`,
  );
  for (const { name, made } of rows) {
    const isTemplate = name.startsWith(TEMPLATE_PREFIX);
    const since = Number(isTemplate ? made : name.slice(TEST_PREFIX.length).split('_', 1)[0]);
    if (Date.now() - since < (isTemplate ? 24 * HOUR_MS : HOUR_MS)) continue;
    await admin.query(`drop database if exists ${name}`).catch(() => {}); // In use by a long run.
  }
}

/**
 * The template for the migrations as they are now, made when it is missing. It gets its name only when it is whole, and
 * nobody can connect to it, which would keep others from copying it.
 */
async function requireTemplate(admin: pg.Client, adminUrl: string): Promise<string> {
  const template = `${TEMPLATE_PREFIX}${await hashOfMigrations()}`;
  // Runs of several projects or people may begin at once on one server.
  await admin.query('select pg_advisory_lock($1)', [TEMPLATE_LOCK]);
  try {
    const { rowCount } = await admin.query('select from pg_database where datname = $1', [template]);
    if (rowCount === 0) {
      const making = `${TEST_PREFIX}${Date.now()}_${randomBytes(4).toString('hex')}`;
      await admin.query(`create database ${making} template template0`);
      await migrateDatabase(databaseUrl(adminUrl, making));
      await admin.query(`alter database ${making} allow_connections false`);
      await admin.query(`alter database ${making} rename to ${template}`);
    }
    await admin.query(`comment on database ${template} is '${Date.now()}'`);
  } finally {
    await admin.query('select pg_advisory_unlock($1)', [TEMPLATE_LOCK]);
  }
  return template;
}

async function hashOfMigrations(): Promise<string> {
  const hash = createHash('sha256');
  const files = (await readdir(MIGRATIONS, { recursive: true })).filter((name) => /\.(sql|json)$/.test(name)).sort();
  for (const name of files) hash.update(`${name}\0`).update(await readFile(join(MIGRATIONS, name)));
  return hash.digest('hex').slice(0, 16);
}
