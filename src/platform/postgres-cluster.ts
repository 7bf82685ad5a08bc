import { chmod, chown, mkdir, mkdtemp, open, readdir, readFile, rename, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Account, namelessBinaries, type PostgresBinaries } from './postgres-binaries.ts';
import type { PostgresLog } from './postgres-log.ts';
import { exitOf, spawnWatched } from './postgres-processes.ts';
import { StartupError } from './startup-error.ts';

const MAKING = 'postgres.new-';

/** What every step of a start works with. */
export interface Place {
  dataDir: string;
  pgdata: string;
  account: Account | undefined;
  fsync: boolean;
  log: (line: string) => void;
  journal: PostgresLog;
  binaries: PostgresBinaries;
}

/** As root the user to run Postgres as; else undefined, which is the user of this process. */
export async function chooseAccount(pgdata: string): Promise<Account | undefined> {
  const owner = await stat(pgdata).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
    return undefined;
  });
  const uid = process.getuid?.();
  if (uid === 0) {
    if (owner && owner.uid !== 0) return { uid: owner.uid, gid: owner.gid };
    const passwd = await readFile('/etc/passwd', 'utf8').catch(() => '');
    for (const name of ['postgres', '_postgres', 'nobody']) {
      const [, user, group] = new RegExp(`^${name}:[^:]*:(\\d+):(\\d+):`, 'm').exec(passwd) ?? [];
      if (user && user !== '0') return { uid: Number(user), gid: Number(group) };
    }
    return { uid: 65534, gid: 65534 };
  }
  if (owner && owner.uid !== uid) {
    throw new StartupError(
      `${pgdata} belongs to another user (uid ${owner.uid}): start Muster as the user who made it, or set DATA_DIR to another folder.`,
    );
  }
  return undefined;
}

/** Makes the cluster unless it is there; removes what interrupted starts left of theirs. */
export async function requireCluster(place: Place): Promise<void> {
  const { dataDir, pgdata, binaries, log } = place;
  for (const name of await readdir(dataDir)) {
    // What resists is left to the next start.
    if (name.startsWith(MAKING)) await rm(join(dataDir, name), { recursive: true, force: true }).catch(() => {});
  }
  const version = await clusterVersion(pgdata);
  if (version === undefined) {
    log(`making a database cluster in ${pgdata}`);
    await makeCluster(place);
  } else if (version !== binaries.major) {
    throw new StartupError(
      `${pgdata} was made by Postgres ${version} and this Muster brings Postgres ${binaries.major}: move its data with pg_dump, or set DATA_DIR to another folder.`,
    );
  }
}

async function clusterVersion(pgdata: string): Promise<string | undefined> {
  try {
    return (await readFile(join(pgdata, 'PG_VERSION'), 'utf8')).trim();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** What Postgres is to call its data folder when it is started in it. */
export function pgdataArgument({ pgdata, account }: Pick<Place, 'pgdata' | 'account'>): string {
  return account && process.platform === 'linux' ? '/proc/self/cwd' : pgdata;
}

async function makeCluster(place: Place): Promise<void> {
  const { dataDir, account, journal, binaries } = place;
  const making = await mkdtemp(join(dataDir, MAKING));
  let programs: string | undefined;
  try {
    await chmod(making, 0o711); // Where /proc is missing, another user has to walk through it.
    const pgdata = join(making, 'pgdata');
    await mkdir(pgdata, { mode: 0o700 });
    if (account) await chown(pgdata, account.uid, account.gid);
    const run = async ({ initdb }: PostgresBinaries) =>
      exitOf(
        await spawnWatched(initdb, initdbArguments({ ...place, pgdata }), {
          ...place,
          cwd: pgdata,
          output: journal.fd,
        }),
      );
    let code = await run(binaries);
    if (code !== 0 && journal.tail().includes('could not look up effective user ID')) {
      programs = await mkdtemp(join(account ? tmpdir() : making, 'muster-'));
      await chmod(programs, 0o755);
      code = await run(await namelessBinaries(binaries, programs));
    }
    if (code !== 0) throw journal.failure('The database cluster could not be made', dataDir);
    await rename(pgdata, place.pgdata);
    await syncFolder(dataDir);
  } catch (error) {
    const { code = '' } = error as NodeJS.ErrnoException;
    if (code !== 'ENOTEMPTY' && code !== 'EEXIST') throw error;
    throw new StartupError(`${place.pgdata} holds files that are no database cluster: move them away.`);
  } finally {
    for (const folder of [making, programs]) {
      if (folder) await rm(folder, { recursive: true, force: true });
    }
  }
}

/** Makes renames in the folder last through a power failure. */
async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

function initdbArguments({ pgdata, account, fsync }: Pick<Place, 'pgdata' | 'account' | 'fsync'>): string[] {
  return [
    `--pgdata=${pgdataArgument({ pgdata, account })}`,
    '--username=muster',
    '--auth=trust',
    // The same order and case rules on every machine, whatever its locales.
    '--encoding=UTF8',
    '--locale=C',
    '--locale-provider=builtin',
    '--builtin-locale=C.UTF-8',
    '--no-instructions',
    ...(fsync ? [] : ['--no-sync']),
  ];
}
