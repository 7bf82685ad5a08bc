import { type ChildProcess, execFile, spawn } from 'node:child_process';
import {
  chmod,
  chown,
  lstat,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  realpath,
  rename,
  rm,
  stat,
  symlink,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import pg from 'pg';
import { type FolderLock, lockFolder } from './folder-lock.ts';
import { findBinaries, type PostgresUser, SYSTEM_FOLDER } from './postgres-binaries.ts';
import { StartupError } from './startup-error.ts';

// Our own Postgres, for the embedded mode and for tests: a real one, from the binaries of an npm package, without Docker,
// configuration or a port.
//
//   <dataDir>/            0711 for root (others may pass, not look), else 0700; beside our secrets, each 0600
//   <dataDir>/postgres/   0700, of the user that Postgres runs as: data/ (PGDATA), run/ (socket), postgres.log
//
// Postgres refuses to run as root. So for root it runs as `postgres` or, where there is none, as `nobody`. Where that user
// cannot get to <dataDir>, as below /root, <dataDir>/postgres is a link to a folder of its own below /var/lib/muster.
//
// What may fail, and what is done about it:
//   Ctrl-C           goes to the whole terminal, so Postgres runs in a session of its own: we drain first, then stop it.
//   kill -9 of us    leaves nobody to stop it. A watchdog, a shell in a session of its own, reads a pipe that only we hold
//                    open; at its end it stops Postgres. Nothing acknowledged is lost: fsync is on.
//   both killed      the next start finds Postgres running without an owner, stops it and starts its own.
//   two starts       the folder is locked before anything is looked at; the second says so and goes.
//   first start cut  initdb works in a folder of another name that is renamed when all is done.

const MAJOR = '18';
const START_WITHIN_MS = 60_000;
const STOP_WITHIN_MS = 10_000;
const MAX_LOG_BYTES = 10 * 1024 * 1024;
/** A path of a Unix socket has 107 bytes at the most (sun_path); this much is the file's own name. */
const MAX_SOCKET_FOLDER = 107 - '/.s.PGSQL.5432'.length;

const run = promisify(execFile);
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

export interface EmbeddedPostgres {
  /** Where it is, for node-postgres. */
  url: string;
  /** True when this start made the data folder. */
  firstStart: boolean;
  /** Resolves when Postgres has ended, whoever ended it. */
  exited: Promise<{ reason: string }>;
  /** Stops it (fast shutdown) and gives the folder back. */
  stop(): Promise<void>;
}

/**
 * Starts Postgres on `<dataDir>/postgres`, made at the first start, and waits until it takes queries. Throws StartupError,
 * with one sentence, for everything that a person can put right. `fsync: false` is for data that may be lost.
 */
export async function startEmbeddedPostgres(options: {
  dataDir: string;
  fsync?: boolean;
  maxConnections?: number;
}): Promise<EmbeddedPostgres> {
  const { dataDir } = options;
  const user = await postgresUser();
  await makeFolder(dataDir, user ? 0o711 : 0o700);
  const lock = await lockFolder(dataDir);
  if (!lock) {
    throw new StartupError(`Another Muster is running on ${dataDir}: stop it, or set DATA_DIR to another folder.`);
  }
  try {
    return await startLocked(options, user, lock);
  } catch (error) {
    await lock.release();
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOSPC') throw new StartupError(`The disk that holds ${dataDir} is full.`);
    if (code === 'EACCES' || code === 'EPERM' || code === 'EROFS') throw notOurs(dataDir);
    throw error;
  }
}

const notOurs = (folder: string) =>
  new StartupError(`${folder} must be a folder that this user may read and write: set DATA_DIR to another.`);

async function makeFolder(folder: string, mode: number): Promise<void> {
  try {
    await mkdir(folder, { recursive: true, mode });
    await chmod(folder, mode);
  } catch {
    throw notOurs(folder);
  }
}

/** Whom Postgres is to run as: nobody else, unless we are root. */
async function postgresUser(): Promise<PostgresUser | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  const users = (await readFile('/etc/passwd', 'utf8').catch(() => '')).split('\n').map((line) => line.split(':'));
  const entry = users.find(([name]) => name === 'postgres') ?? users.find(([name]) => name === 'nobody');
  const [uid, gid] = [Number(entry?.[2]), Number(entry?.[3])];
  return uid > 0 && gid > 0 ? { uid, gid } : { uid: 65_534, gid: 65_534 };
}

async function startLocked(
  options: { dataDir: string; fsync?: boolean; maxConnections?: number },
  user: PostgresUser | undefined,
  lock: FolderLock,
): Promise<EmbeddedPostgres> {
  const binaries = join(await findBinaries(user), 'bin');
  const home = await postgresHome(options.dataDir, user);
  const data = join(home, 'data');
  const firstStart = await initialise(binaries, home, data, user);
  await requireMajor(data);
  await stopOrphan(data);
  const socket = await socketFolder(home, user);
  const logFile = join(home, 'postgres.log');
  const logSize = (await stat(logFile).catch(() => undefined))?.size ?? 0;
  if (logSize > MAX_LOG_BYTES) await rm(logFile, { force: true });

  const settings: Record<string, string> = {
    listen_addresses: '',
    unix_socket_directories: socket,
    unix_socket_permissions: '0700',
    max_connections: String(options.maxConnections ?? 100),
    shared_buffers: '64MB',
    fsync: options.fsync === false ? 'off' : 'on',
    synchronous_commit: options.fsync === false ? 'off' : 'on',
    full_page_writes: options.fsync === false ? 'off' : 'on',
    wal_compression: 'on',
    jit: 'off',
    timezone: 'UTC',
    log_timezone: 'UTC',
    logging_collector: 'off',
  };
  const log = await open(logFile, 'a', 0o600);
  let server: ChildProcess;
  try {
    server = spawn(
      join(binaries, 'postgres'),
      ['-D', data, ...Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`])],
      { ...user, cwd: '/', env: { LC_ALL: 'C', TZ: 'UTC' }, detached: true, stdio: ['ignore', log.fd, log.fd] },
    );
  } finally {
    await log.close();
  }
  let ended = false;
  const exited = new Promise<{ reason: string }>((resolve) => {
    server.once('error', (error) => resolve({ reason: error.message }));
    server.once('exit', (code, signal) => resolve({ reason: `Postgres ended (${signal ?? `code ${code}`})` }));
  });
  void exited.then(() => {
    ended = true;
  });
  server.unref();
  const watchdog = server.pid === undefined ? undefined : watchOver(server.pid);

  const stop = async () => {
    if (!ended) server.kill('SIGINT');
    const late = setTimeout(() => server.kill('SIGQUIT'), STOP_WITHIN_MS);
    server.ref();
    await exited;
    clearTimeout(late);
    watchdog?.kill('SIGKILL');
    if (!socket.startsWith(home)) await rm(socket, { recursive: true, force: true });
    await lock.release();
  };
  const url = `postgresql://muster@localhost/muster?host=${encodeURIComponent(socket)}`;
  try {
    await untilReady(url, () => ended, logFile);
  } catch (error) {
    await stop();
    throw error;
  }
  let stopping: Promise<void> | undefined;
  return {
    url,
    firstStart,
    exited,
    stop: () => {
      stopping ??= stop();
      return stopping;
    },
  };
}

/**
 * The folder of Postgres' own, which belongs to the user it runs as. Where that user cannot pass the folders above it, it
 * lies below /var/lib/muster under a name of its own, and a link leads there: who removes dataDir starts anew.
 */
async function postgresHome(dataDir: string, user: PostgresUser | undefined): Promise<string> {
  const home = join(dataDir, 'postgres');
  if (!user) {
    await mkdir(home, { recursive: true, mode: 0o700 });
    return home;
  }
  if (!(await lstat(home).catch(() => undefined))) {
    if (await reaches(user, dataDir)) {
      await mkdir(home, { mode: 0o700 });
    } else {
      await mkdir(SYSTEM_FOLDER, { recursive: true, mode: 0o755 });
      const elsewhere = await mkdtemp(join(SYSTEM_FOLDER, 'data-'));
      await symlink(elsewhere, home);
      await chown(elsewhere, user.uid, user.gid);
      return elsewhere;
    }
  }
  await chown(home, user.uid, user.gid);
  // The path that Postgres gets must not lead through a folder that it may not pass.
  return (await lstat(home)).isSymbolicLink() ? realpath(home) : home;
}

async function reaches(user: PostgresUser, folder: string): Promise<boolean> {
  try {
    await run('/bin/sh', ['-c', 'cd "$0"', folder], { ...user, cwd: '/' });
    return true;
  } catch {
    return false;
  }
}

/** Makes the data folder if there is none; answers whether it did. */
async function initialise(
  binaries: string,
  home: string,
  data: string,
  user: PostgresUser | undefined,
): Promise<boolean> {
  for (const name of await readdir(home)) {
    if (name.startsWith('new-')) await rm(join(home, name), { recursive: true, force: true });
  }
  if (await stat(data).catch(() => undefined)) return false;
  const fresh = await mkdtemp(join(home, 'new-'));
  if (user) await chown(fresh, user.uid, user.gid);
  try {
    const options = ['--username=muster', '--auth=trust', '--encoding=UTF8', '--no-instructions', '--data-checksums'];
    const locale = ['--locale-provider=builtin', '--builtin-locale=C.UTF-8', '--locale=C'];
    await run(join(binaries, 'initdb'), ['-D', fresh, ...options, ...locale], {
      ...user,
      cwd: '/',
      env: { LC_ALL: 'C', TZ: 'UTC', PATH: process.env['PATH'] ?? '/usr/bin:/bin' },
      timeout: START_WITHIN_MS,
    });
    // Postgres syncs the content; the new name must last as well.
    await rename(fresh, data);
    const folder = await open(home, 'r');
    await folder.sync();
    await folder.close();
    return true;
  } catch (error) {
    await rm(fresh, { recursive: true, force: true });
    const said = (error as { stderr?: string }).stderr ?? '';
    if (/No space left/i.test(said)) throw new StartupError(`The disk that holds ${home} is full.`);
    if (said) throw new StartupError(`Postgres could not make its data folder: ${lastLine(said)}.`);
    throw error;
  }
}

const lastLine = (text: string) => (text.trim().split('\n').at(-1) ?? '').replace(/\.$/, '').slice(0, 300);

async function requireMajor(data: string): Promise<void> {
  const major = (await readFile(join(data, 'PG_VERSION'), 'utf8')).trim();
  if (major !== MAJOR) {
    throw new StartupError(
      `${data} was made by Postgres ${major} and this is ${MAJOR}: move its content over with pg_dump, or set DATA_DIR to another folder.`,
    );
  }
}

/** Stops a Postgres that runs on our folder though nobody holds it: its server and its watchdog were both killed. */
async function stopOrphan(data: string): Promise<void> {
  const pid = await runningOn(data);
  if (pid === undefined) return;
  for (const signal of ['SIGINT', 'SIGQUIT', 'SIGKILL'] as const) {
    try {
      process.kill(pid, signal);
    } catch {
      return;
    }
    for (let waited = 0; waited < 5_000; waited += 25) {
      if ((await runningOn(data)) === undefined) return;
      await pause(25);
    }
  }
  throw new StartupError(
    `A Postgres (process ${pid}) is running on ${data} and does not end: end it, then start again.`,
  );
}

/** The process that postmaster.pid names, if it lives and is the Postgres of this folder: numbers are used again. */
async function runningOn(data: string): Promise<number | undefined> {
  const [line] = (await readFile(join(data, 'postmaster.pid'), 'utf8').catch(() => '')).split('\n');
  const pid = Number(line);
  if (!Number.isSafeInteger(pid) || pid <= 0) return undefined;
  try {
    const { stdout } = await run('ps', ['-o', 'stat=,command=', '-p', String(pid)]);
    return !stdout.trim().startsWith('Z') && stdout.includes(data) ? pid : undefined;
  } catch {
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    return command.includes(data) ? pid : undefined;
  }
}

async function socketFolder(home: string, user: PostgresUser | undefined): Promise<string> {
  const near = join(home, 'run');
  const folder = Buffer.byteLength(near) <= MAX_SOCKET_FOLDER ? near : await mkdtemp(join(tmpdir(), 'muster-'));
  await mkdir(folder, { recursive: true, mode: 0o700 });
  await chmod(folder, 0o700);
  if (user) await chown(folder, user.uid, user.gid);
  return folder;
}

/** A shell that waits for the end of a pipe that only we hold open, and then stops Postgres. */
function watchOver(pid: number): ChildProcess {
  const script = `cat >/dev/null; kill -INT ${pid}; n=0
    while kill -0 ${pid} 2>/dev/null && [ $n -lt 10 ]; do sleep 1; n=$((n+1)); done; kill -QUIT ${pid} 2>/dev/null`;
  const watchdog = spawn('/bin/sh', ['-c', script], { cwd: '/', detached: true, stdio: ['pipe', 'ignore', 'ignore'] });
  watchdog.on('error', () => {});
  watchdog.stdin.on('error', () => {});
  watchdog.unref();
  // A pipe of a child is a socket that would keep this process alive.
  (watchdog.stdin as unknown as { unref(): void }).unref();
  return watchdog;
}

async function untilReady(url: string, hasEnded: () => boolean, logFile: string): Promise<void> {
  const deadline = performance.now() + START_WITHIN_MS;
  for (;;) {
    const client = new pg.Client({
      connectionString: url.replace('/muster?', '/postgres?'),
      connectionTimeoutMillis: 2_000,
    });
    client.on('error', () => {});
    try {
      await client.connect();
      const { rowCount } = await client.query(`select from pg_database where datname = 'muster'`);
      if (!rowCount) await client.query('create database muster');
      return;
    } catch {
      if (hasEnded() || performance.now() > deadline) throw await notStarted(logFile);
      await pause(20);
    } finally {
      await client.end().catch(() => {});
    }
  }
}

async function notStarted(logFile: string): Promise<StartupError> {
  const log = await readFile(logFile, 'utf8').catch(() => '');
  if (/No space left on device/.test(log.slice(-4_000))) {
    return new StartupError(`Postgres could not start: the disk that holds ${logFile} is full.`);
  }
  const fatal = log
    .trim()
    .split('\n')
    .filter((line) => /FATAL|PANIC|ERROR/.test(line))
    .at(-1);
  return new StartupError(`Postgres could not start: ${lastLine(fatal ?? log) || 'it said nothing'}. See ${logFile}.`);
}
