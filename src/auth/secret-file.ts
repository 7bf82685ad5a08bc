import { randomBytes } from 'node:crypto';
import { link, open, readFile, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { makeFolder } from '../platform/make-folder.ts';
import { StartupError } from '../platform/startup-error.ts';

/** The content of a secret's file, without the line end; undefined when there is none. */
export async function readSecret(file: string): Promise<string | undefined> {
  try {
    return (await readFile(file, 'utf8')).trim() || undefined;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw cannotUse(file, error);
  }
}

/**
 * Writes a secret so that only its owner reads it, and so that a crash leaves the old content or the new, never half of it.
 * With `keepExisting`, of several writers the first wins, and all answer its content.
 */
export async function writeSecret(file: string, secret: string, keepExisting = false): Promise<string> {
  const temporary = join(dirname(file), `.${randomBytes(6).toString('hex')}.tmp`);
  try {
    await makeFolder(dirname(file), 0o700);
    const handle = await open(temporary, 'wx', 0o600);
    try {
      await handle.writeFile(`${secret}\n`);
      await handle.sync();
    } finally {
      await handle.close();
    }
    if (!keepExisting) {
      await rename(temporary, file);
      return secret;
    }
    try {
      await link(temporary, file);
      return secret;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
      const existing = await readSecret(file);
      if (existing !== undefined) return existing;
      // Emptied by hand, or by a disk that was full: nothing that anybody can have read.
      await rename(temporary, file);
      return secret;
    }
  } catch (error) {
    throw error instanceof StartupError ? error : cannotUse(file, error);
  } finally {
    await rm(temporary, { force: true });
  }
}

const cannotUse = (file: string, error: unknown) =>
  new StartupError(
    `${file} cannot be used (${(error as NodeJS.ErrnoException).code}): DATA_DIR must be a folder that this user may read and write.`,
  );
