import { randomBytes } from 'node:crypto';
import pg from 'pg';
import { inject } from 'vitest';

/** What the global setup hands to every test file. */
export interface TestPostgres {
  /** Leads to a database from which others are made; its user may make databases. */
  adminUrl: string;
  /** The migrated database that tests get copies of. */
  template: string;
  /** The Postgres server's major version. */
  major: number;
}

declare module 'vitest' {
  interface ProvidedContext {
    postgres: TestPostgres;
  }
}

export interface TestDatabase {
  url: string;
  /** Deletes the database, closing what is still connected to it. */
  drop(): Promise<void>;
}

/** Databases of tests begin with this, then the time in milliseconds, so that those of dead runs can be found. */
export const TEST_PREFIX = 'muster_test_';

/** A migrated database of the caller's own: a copy of the template, in some 25 ms. */
export async function createTestDatabase(): Promise<TestDatabase> {
  const { template, major } = inject('postgres');
  // Copying files beats the WAL, for small templates and without fsync; Postgres 14 knows no other way.
  return createDatabase(`template ${template}${major >= 15 ? ' strategy file_copy' : ''}`);
}

/** A database of the caller's own without any of our tables. */
export async function createEmptyDatabase(): Promise<TestDatabase> {
  return createDatabase('template template0');
}

async function createDatabase(from: string): Promise<TestDatabase> {
  const { adminUrl } = inject('postgres');
  const name = `${TEST_PREFIX}${Date.now()}_${randomBytes(4).toString('hex')}`;
  await query(adminUrl, `create database ${name} ${from}`);
  return {
    url: databaseUrl(adminUrl, name),
    async drop() {
      await query(adminUrl, `drop database if exists ${name} with (force)`);
    },
  };
}

/** The same server, another database. */
export function databaseUrl(url: string, name: string): string {
  const changed = new URL(url);
  changed.pathname = `/${name}`;
  return changed.href;
}

async function query(url: string, sql: string): Promise<void> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    await client.query(sql);
  } finally {
    await client.end();
  }
}
