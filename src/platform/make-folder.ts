import { mkdir, stat } from 'node:fs/promises';
import { dirname } from 'node:path';

/**
 * Makes a folder and those above it that are missing; one that is there stays as it is. Step by step, since Node's own
 * recursive mkdir never ends where the system answers ENOENT for a parent that exists, as /proc does (Node 20).
 */
export async function makeFolder(folder: string, mode: number): Promise<void> {
  try {
    await mkdir(folder, { mode });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'EEXIST' && (await stat(folder)).isDirectory()) return;
    const above = dirname(folder);
    if (code !== 'ENOENT' || above === folder || (await stat(above).catch(() => undefined))) throw error;
    await makeFolder(above, mode);
    // Another start may have made it by now.
    return makeFolder(folder, mode);
  }
}
