import type { ChildProcess } from 'node:child_process';
import { chmod, open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import pg from 'pg';
import { migrateDatabase } from '../../src/db/migrate.ts';
import { startEmbeddedPostgres } from '../../src/platform/embedded-postgres.ts';
import { installedBinaries, readyBinaries } from '../../src/platform/postgres-binaries.ts';
import { chooseAccount, pgdataArgument } from '../../src/platform/postgres-cluster.ts';
import { exitOf, hasEnded, processesIn, spawnWatched } from '../../src/platform/postgres-processes.ts';
import { until } from './work.ts';

/** A Postgres of a test's own, which loses nothing that it has acknowledged, and which the test may end as it likes. */
export interface OwnPostgres {
  /** Leads to a migrated database; stays the same through restarts. */
  url: string;
  /** Starts it, and answers when it serves; `env` goes to it alone. */
  start(env?: Record<string, string>): Promise<void>;
  /** SIGINT is the fast stop, SIGQUIT the immediate one, and SIGKILL hits every process of it. Answers when it has ended. */
  end(signal: 'SIGINT' | 'SIGQUIT' | 'SIGKILL'): Promise<void>;
  /** Ends it if it runs. The folder is the caller's. */
  close(): Promise<void>;
}

const SETTINGS = {
  listen_addresses: '',
  unix_socket_directories: '.',
  max_connections: '150',
  shared_buffers: '64MB',
  timezone: 'UTC',
  io_method: 'sync',
  wal_level: 'minimal',
  max_wal_senders: '0',
};

/** Makes one in `folder`, and starts it. */
export async function ownPostgres(folder: string): Promise<OwnPostgres> {
  const dataDir = join(folder, 'pg');
  const made = await startEmbeddedPostgres({ dataDir, fsync: false });
  const { url } = made;
  await migrateDatabase(url);
  await made.stop();
  // For the user that it runs as, when that is not ours.
  await chmod(folder, 0o755);

  const pgdata = join(dataDir, 'postgres');
  const account = await chooseAccount(pgdata);
  const binaries = await readyBinaries({ native: installedBinaries(), copyTo: [dataDir], account, log: () => {} });
  let child: ChildProcess | undefined;

  const start = async (env: Record<string, string> = {}) => {
    const log = await open(join(folder, 'postgres.log'), 'a');
    try {
      const settings = Object.entries(SETTINGS).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
      const given = Object.entries(env).map(([name, value]) => `${name}=${value}`);
      const args = [...given, binaries.postgres, '-D', pgdataArgument({ pgdata, account }), ...settings];
      child = await spawnWatched('/usr/bin/env', args, { cwd: pgdata, account, output: log.fd });
    } finally {
      await log.close();
    }
    await until(
      () => answers(url),
      (yes) => yes || child === undefined || hasEnded(child),
      60,
    );
    if (child === undefined || hasEnded(child)) {
      throw new Error(
        `Postgres did not start:\n${(await readFile(join(folder, 'postgres.log'), 'utf8')).slice(-2_000)}`,
      );
    }
  };
  const end: OwnPostgres['end'] = async (signal) => {
    const ending = child;
    if (!ending || hasEnded(ending)) return;
    const postmaster = Number((await readFile(join(pgdata, 'postmaster.pid'), 'utf8')).split('\n', 1)[0]);
    for (const pid of signal === 'SIGKILL' ? await processesIn(pgdata) : [postmaster]) {
      try {
        process.kill(pid, signal);
      } catch {
        // It has just ended.
      }
    }
    await exitOf(ending);
    await until(
      () => processesIn(pgdata),
      (left) => left.length === 0,
    );
  };
  await start();
  return { url, start, end, close: () => end('SIGINT') };
}

async function answers(url: string): Promise<boolean> {
  const client = new pg.Client({ connectionString: url, connectionTimeoutMillis: 1_000 });
  client.on('error', () => {});
  try {
    await client.connect();
    await client.query('select');
    return true;
  } catch {
    return false;
  } finally {
    await client.end().catch(() => {});
  }
}
