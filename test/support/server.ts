import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ensureFirstAdmin } from '../../src/auth/first-admin.ts';
import { type Config, readConfig } from '../../src/config.ts';
import type { Database } from '../../src/db/database.ts';
import type { App } from '../../src/http/app.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { startMuster } from '../../src/start.ts';
import { createTestDatabase } from './postgres.ts';
import { until } from './work.ts';

/** An answer of the server, with its body parsed when it is JSON. */
export interface Answer {
  status: number;
  headers: Headers;
  // biome-ignore lint/suspicious/noExplicitAny: tests look into answers of every shape, and assert what they find there.
  body: any;
}

export type Caller = (
  method: string,
  path: string,
  body?: unknown,
  headers?: Record<string, string>,
) => Promise<Answer>;

export interface TestServer {
  url: string;
  databaseUrl: string;
  config: Config;
  db: Database;
  app: App;
  /** The first admin's API key, with all scopes. */
  adminKey: string;
  /** Calls as the admin. `path` is under /api/v1 unless it starts with `//`, which stands for the root. */
  admin: Caller;
  /** Calls with any credential, or none. */
  as(credential: string | undefined): Caller;
  /** Registers a new plain user and answers its credential and how to call as it. */
  newUser(): Promise<{ id: number; email: string; password: string; token: string; call: Caller }>;
  /** Resolves when every event that is written now has been delivered by this server. */
  feedCaughtUp(): Promise<void>;
  /** Stops it; the database goes too unless it was given. */
  stop(): Promise<void>;
}

/**
 * Starts the real server in this process, on a port of its own and a database of its own (or `databaseUrl`, to start a
 * second one beside the first). `env` overrides the configuration by its names.
 */
export async function startServer(
  options: { env?: Record<string, string>; databaseUrl?: string } = {},
): Promise<TestServer> {
  const database = options.databaseUrl ? undefined : await createTestDatabase();
  const databaseUrl = options.databaseUrl ?? database?.url ?? '';
  const folder = await mkdtemp(join(tmpdir(), 'muster-test-'));
  const config = readConfig(
    {
      NODE_ENV: 'test',
      PORT: '0',
      DATA_DIR: folder,
      DATABASE_URL: databaseUrl,
      LOG_LEVEL: process.env['TEST_LOG_LEVEL'] ?? 'silent',
      JWT_SECRET: SECRET,
      RATE_LIMIT_PER_MINUTE: '1000000',
      RATE_LIMIT_ACTIVITY_PER_MINUTE: '1000000',
      AUTH_REGISTRATION: 'open',
      ...options.env,
    },
    folder,
  );
  const running = await startMuster({
    config,
    logger: createLogger(config.LOG_LEVEL, false),
    databaseUrl,
    directUrl: databaseUrl,
    jwtSecret: config.JWT_SECRET,
    version: '0.0.0-test',
  });
  const { key: adminKey } = await ensureFirstAdmin(running.db, folder);
  const as = (credential: string | undefined) => caller(running.url, credential);
  return {
    url: running.url,
    databaseUrl,
    config,
    db: running.db,
    app: running.app,
    adminKey,
    admin: as(adminKey),
    as,
    async newUser() {
      const email = `${randomBytes(8).toString('hex')}@example.com`;
      const password = randomBytes(12).toString('base64url');
      const user = await as(undefined)('POST', '/auth/register', { email, password });
      const login = await as(undefined)('POST', '/auth/login', { email, password });
      const token = login.body.access_token as string;
      return { id: user.body.id as number, email, password, token, call: as(token) };
    },
    async feedCaughtUp() {
      const events = await until(
        async () =>
          (
            await running.db.query<{ waiting: number; last: number }>({
              text: `select (select count(*)::int from event_outbox) as waiting, (select coalesce(max(event_id), 0) from events) as last`,
            })
          ).rows[0],
        (row) => row?.waiting === 0,
      );
      await until(
        async () => Number((await as(adminKey)('GET', '/auth/me')).headers.get('x-event-cursor')),
        (cursor) => cursor >= (events?.last ?? 0),
      );
    },
    async stop() {
      await running.stop();
      await database?.drop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

const SECRET = randomBytes(48).toString('base64');

/** Calls a server over HTTP with a credential, or none. */
export function caller(url: string, credential: string | undefined): Caller {
  return async (method, path, body, headers = {}) => {
    const response = await fetch(`${url}${path.startsWith('//') ? path.slice(1) : `/api/v1${path}`}`, {
      method,
      headers: {
        ...(credential === undefined ? {} : { authorization: `Bearer ${credential}` }),
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        ...headers,
      },
      ...(body === undefined ? {} : { body: typeof body === 'string' ? body : JSON.stringify(body) }),
    });
    const text = await response.text();
    const json = /^application\/(problem\+)?json/.test(response.headers.get('content-type') ?? '');
    return { status: response.status, headers: response.headers, body: json ? JSON.parse(text) : text };
  };
}
