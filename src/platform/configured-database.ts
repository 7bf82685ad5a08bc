import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Config } from '../config.ts';
import { startEmbeddedPostgres } from './embedded-postgres.ts';
import { createClient } from './postgres.ts';
import { StartupError } from './startup-error.ts';

/**
 * For the command line tools: gives `work` the URL of the database that is configured, DATABASE_URL or the embedded one in
 * DATA_DIR, whether a server runs on it or not. Throws StartupError, which ends with `usage`, when there is none.
 */
export async function withConfiguredDatabase<T>(
  { DATABASE_URL: url, DATA_DIR: dataDir }: Pick<Config, 'DATABASE_URL' | 'DATA_DIR'>,
  usage: string,
  work: (url: string) => Promise<T>,
): Promise<T> {
  if (url !== undefined) return work(url);
  const pgdata = join(dataDir, 'postgres');
  if (!existsSync(join(pgdata, 'PG_VERSION'))) {
    throw new StartupError(
      `DATABASE_URL is not set, and ${dataDir} holds no embedded database: set DATABASE_URL or DATA_DIR. ${usage}`,
    );
  }
  const running = await embeddedUrl(pgdata);
  if (running !== undefined) return work(running);
  const postgres = await startEmbeddedPostgres({ dataDir });
  try {
    return await work(postgres.url);
  } finally {
    await postgres.stop();
  }
}

/** Where the Postgres of a running server listens, by what it wrote to postmaster.pid; undefined when none answers. */
async function embeddedUrl(pgdata: string): Promise<string | undefined> {
  const [, , , port, folder] = (await readFile(join(pgdata, 'postmaster.pid'), 'utf8').catch(() => '')).split('\n');
  if (port === undefined || folder === undefined) return undefined;
  const socket = encodeURIComponent(folder === '.' ? pgdata : folder);
  const url = `postgres://muster@${socket}:${port}/muster?sslmode=disable`;
  const client = createClient({ url, name: 'muster-command', queryTimeoutMs: 5_000 });
  client.on('error', () => {}); // The call under way rejects with the same error.
  try {
    await client.connect();
    return url;
  } catch {
    return undefined;
  } finally {
    await client.end().catch(() => {});
  }
}
