import { randomBytes } from 'node:crypto';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { freePort, type Started, startServerProcess } from './processes.ts';
import { type Caller, caller } from './server.ts';

const SECRET = randomBytes(48).toString('base64');

/** Several server processes on one database. */
export interface Fleet {
  urls: string[];
  /** The process in each place, and all there ever were. */
  servers: Started[];
  all: Started[];
  /** Calls the server in a place, as the fleet's user. */
  call(place?: number): Caller;
  user: { id: number; key: string };
  /** SIGKILLs the server in a place and starts another one at the same address; answers when that serves. */
  replace(place: number): Promise<void>;
}

/** Starts them, each on a port that it keeps, and makes a user with an API key. */
export async function startFleet(options: {
  databaseUrl: string;
  folder: string;
  size: number;
  env?: Record<string, string>;
  /** More of the environment, for the server in one place. */
  envOf?: (place: number) => Record<string, string>;
}): Promise<Fleet> {
  const ports = await Promise.all(Array.from({ length: options.size }, freePort));
  const urls = ports.map((port) => `http://127.0.0.1:${port}`);
  const all: Started[] = [];
  const start = async (place: number) => {
    const folder = join(options.folder, `server-${place}`);
    await mkdir(folder, { recursive: true });
    const started = await startServerProcess({
      folder,
      env: {
        DATABASE_URL: options.databaseUrl,
        JWT_SECRET: SECRET,
        LOG_LEVEL: 'warn',
        LEASE_SECONDS: '2',
        PORT: String(ports[place]),
        ...options.env,
        ...options.envOf?.(place),
      },
    });
    all.push(started);
    return started;
  };
  const servers = await Promise.all(urls.map((_, place) => start(place)));

  const anybody = caller(urls[0] ?? '', undefined);
  const account = { email: `${randomBytes(8).toString('hex')}@example.com`, password: randomBytes(12).toString('hex') };
  const { body: user } = await anybody('POST', '/auth/register', account);
  const { body: login } = await anybody('POST', '/auth/login', account);
  // A key, since tokens end by the clock of the host that reads them.
  const wish = { name: 'fleet', scopes: ['read', 'write', 'agent'] };
  const made = await caller(urls[0] ?? '', login.access_token)('POST', '/auth/api-keys', wish);
  if (made.status !== 201) throw new Error(`No key was made: ${made.status} ${JSON.stringify(made.body)}`);
  const { key } = made.body;
  return {
    urls,
    servers,
    all,
    user: { id: user.id, key },
    call: (place = 0) => caller(urls[place] ?? '', key),
    async replace(place) {
      const before = servers[place];
      before?.child.kill('SIGKILL');
      await before?.exited;
      servers[place] = await start(place);
    },
  };
}
