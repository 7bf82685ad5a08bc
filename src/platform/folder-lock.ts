import { spawnSync } from 'node:child_process';
import { closeSync, constants, ftruncateSync, openSync, readFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { StartupError } from './startup-error.ts';

/*
 * One owner per folder, by a flock on a file in it.
 *
 * The kernel holds a flock for an open file and lets go when the last descriptor closes, however the process ended. So
 * a dead owner needs no clearing away, a reused pid cannot look like an owner, of two that race exactly one wins, and
 * two containers on one volume see each other. A pid file has none of these without a start time, a boot id and a rule
 * for races, and still fails across containers; a listening socket leaves a file behind that two may take over at once.
 *
 * Node has no flock of its own. macOS locks while opening (O_EXLOCK). On Linux the command `flock` locks the file that
 * is open here: it gets our descriptor, and the lock stays with the open file when the command is gone. Node opens with
 * close-on-exec, so nothing else that it starts keeps the lock alive.
 */

const O_EXLOCK = 0x20; // <fcntl.h> of macOS; node:fs has no name for it.
const HELD = 1; // flock(1): another holds the lock.

/** Held until `release` or the end of this process. */
export interface FolderLock {
  release(): void;
}

/**
 * Takes the folder for this process. Throws StartupError when another one has it, or when the command `flock` is
 * missing; a system error when the file `lock` cannot be opened. The file stays: to delete it would let two own it.
 */
export function lockFolder(folder: string): FolderLock {
  const file = join(folder, 'lock');
  const fd = process.platform === 'darwin' ? openLocked(file, folder) : open(file);
  if (process.platform !== 'darwin') {
    const { status, error, stderr } = spawnSync('flock', ['-n', '3'], { stdio: ['ignore', 'ignore', 'pipe', fd] });
    if (status !== 0) {
      closeSync(fd);
      if (status === HELD) throw taken(file, folder);
      if ((error as NodeJS.ErrnoException | undefined)?.code === 'ENOENT') {
        throw new StartupError(
          'The command flock (package util-linux) is missing: install it, or set DATABASE_URL to a Postgres of yours.',
        );
      }
      throw error ?? new Error(`flock cannot lock ${file}: ${stderr.toString().trim()}`);
    }
  }
  ftruncateSync(fd);
  writeSync(fd, String(process.pid), 0);
  let held = true;
  return {
    release() {
      if (held) closeSync(fd);
      held = false;
    },
  };
}

function open(file: string, flags = 0): number {
  return openSync(file, constants.O_RDWR | constants.O_CREAT | flags, 0o600);
}

function openLocked(file: string, folder: string): number {
  try {
    return open(file, O_EXLOCK | constants.O_NONBLOCK);
  } catch (error) {
    throw (error as NodeJS.ErrnoException).code === 'EAGAIN' ? taken(file, folder) : error;
  }
}

/** The pid only helps to find the other one; it may be missing when that one has just begun. */
function taken(file: string, folder: string): StartupError {
  const pid = readFileSync(file, 'utf8');
  const who = pid === '' ? 'Another Muster' : `Another Muster (process ${pid})`;
  return new StartupError(`${who} is using ${folder}: stop it, or set DATA_DIR to another folder.`);
}
