import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { drizzle } from 'drizzle-orm/node-postgres';
import { migrate } from 'drizzle-orm/node-postgres/migrator';
import { LOCKS } from '../platform/locks.ts';
import { createClient } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';

const FOLDER = fileURLToPath(new URL('../../migrations', import.meta.url));

/**
 * Brings the database up to the newest migration of `folder`. Any number of processes may call it at once: an advisory
 * lock on a connection of its own lets one work and the others wait, and Drizzle applies all pending ones in one
 * transaction, so a process that dies in the middle leaves nothing half done.
 * Throws StartupError when the database was already migrated by a newer Muster.
 */
export async function migrateDatabase(url: string, { folder = FOLDER } = {}): Promise<void> {
  const client = createClient({ url, name: 'muster-migrate', queryTimeoutMs: 0 });
  client.on('error', () => {}); // The query under way rejects with the same error.
  await client.connect();
  try {
    await client.query('select pg_advisory_lock($1, $2)', [...LOCKS.migrations]);
    await refuseNewerSchema(client, folder);
    await migrate(drizzle({ client }), { migrationsFolder: folder });
  } finally {
    await client.end();
  }
}

async function refuseNewerSchema(client: ReturnType<typeof createClient>, folder: string): Promise<void> {
  const known = await client.query<{ known: boolean }>(
    `select to_regclass('drizzle.__drizzle_migrations') is not null as known`,
  );
  if (!known.rows[0]?.known) return;
  const applied = await client.query<{ newest: number | null }>(
    'select max(created_at) as newest from drizzle.__drizzle_migrations',
  );
  const journal = JSON.parse(await readFile(`${folder}/meta/_journal.json`, 'utf8')) as { entries: { when: number }[] };
  const newest = Math.max(0, ...journal.entries.map((entry) => entry.when));
  if ((applied.rows[0]?.newest ?? 0) > newest) {
    throw new StartupError(
      'The database was migrated by a newer version of Muster than this one: start that version, or restore a backup made before.',
    );
  }
}
