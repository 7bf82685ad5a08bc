import { closeSync, fstatSync, ftruncateSync, openSync, readSync } from 'node:fs';
import { StartupError } from './startup-error.ts';

const LIMIT_BYTES = 10 * 1024 * 1024;

/** What Postgres writes, and what it said since this start. */
export interface PostgresLog {
  fd: number;
  tail(): string;
  lastLine(): string;
  close(): void;
  /** The error to throw when it failed: the sentence with its reason, and the tail as the cause. */
  failure(what: string, dataDir: string): StartupError;
}

/** Opens the log for this start to append to; one of more than 10 MB begins anew. */
export function openPostgresLog(file: string): PostgresLog {
  const fd = openSync(file, 'a+', 0o600);
  if (fstatSync(fd).size > LIMIT_BYTES) ftruncateSync(fd);
  const begin = fstatSync(fd).size;
  const tail = () => {
    const { size } = fstatSync(fd);
    const from = Math.max(begin, size - 4096);
    const buffer = Buffer.alloc(size - from);
    readSync(fd, buffer, 0, buffer.length, from);
    return buffer.toString().trim();
  };
  const lastLine = () => tail().split('\n').at(-1) ?? '';
  return {
    fd,
    tail,
    lastLine,
    close: () => closeSync(fd),
    failure(what, dataDir) {
      const said = tail();
      if (/No space left on device|Disk quota exceeded/.test(said)) return diskFull(dataDir);
      const why = /^.*(?:FATAL|PANIC|error): +(.*)$/m.exec(said)?.[1] ?? lastLine();
      return new StartupError(`${what} (${why || 'it said nothing'}): see ${file}.`, { cause: new Error(said) });
    },
  };
}

/** The error for a full disk. */
export function diskFull(dataDir: string): StartupError {
  return new StartupError(`The disk of ${dataDir} is full: free some space, or set DATA_DIR to another folder.`);
}
