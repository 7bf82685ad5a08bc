import { createHash } from 'node:crypto';
import { realpath, rm } from 'node:fs/promises';
import { connect, createServer, type Server } from 'node:net';
import { join } from 'node:path';

/** A folder held by this process. */
export interface FolderLock {
  release(): Promise<void>;
}

/**
 * Holds a folder against other processes of this machine; undefined when another one holds it. The lock is a socket that
 * somebody listens on, so it ends with its process, however that ends, and a number that is used again cannot fake it. On
 * Linux the name is abstract and taking it is one step; elsewhere the socket is a file, which a dead process leaves behind,
 * and whether somebody listens is tried out.
 */
export async function lockFolder(folder: string): Promise<FolderLock | undefined> {
  const path = await realpath(folder);
  const name = createHash('sha256').update(path).digest('hex').slice(0, 32);
  if (process.platform === 'linux') return listen(`\0muster-${name}`);
  if (process.platform === 'win32') return listen(`\\\\.\\pipe\\muster-${name}`);
  const file = join(path, 'lock');
  const lock = await listen(file);
  if (lock || (await answers(file))) return lock;
  await rm(file, { force: true });
  return listen(file);
}

function listen(path: string): Promise<FolderLock | undefined> {
  return new Promise((resolve, reject) => {
    const server: Server = createServer((socket) => socket.destroy());
    server.once('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'EADDRINUSE') resolve(undefined);
      else reject(error);
    });
    server.listen(path, () => {
      server.unref();
      resolve({ release: () => new Promise((done) => server.close(() => done())) });
    });
  });
}

function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path);
    socket.once('connect', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
  });
}
