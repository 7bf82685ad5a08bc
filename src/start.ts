import { readFileSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { createSecureContext, type Server as TlsServer } from 'node:tls';
import { startSealer } from './audit/seal.ts';
import type { Config } from './config.ts';
import { createDatabase, type Database, sqlState } from './db/database.ts';
import { migrateDatabase } from './db/migrate.ts';
import type { App } from './http/app.ts';
import { createMemory } from './memory/memory.ts';
import { createBus } from './platform/bus.ts';
import type { Logger } from './platform/logger.ts';
import { createClient, createPool } from './platform/postgres.ts';
import { connectRedis } from './platform/redis.ts';
import { StartupError } from './platform/startup-error.ts';
import { createFeed } from './realtime/feed.ts';
import { startRelay } from './realtime/relay.ts';
import { startScheduler } from './scheduler/scheduler.ts';
import { buildServer, type TlsPair } from './server.ts';

/** A server that listens. */
export interface Running {
  /** Where, as http://host:port. */
  url: string;
  app: App;
  db: Database;
  /** Reads the TLS certificate and key again, for connections from now on. */
  reload(): void;
  /** Drains and closes everything that was started here; the second call waits for the first. */
  stop(): Promise<void>;
}

export interface StartOptions {
  config: Config;
  logger: Logger;
  databaseUrl: string;
  /** For LISTEN, session locks and migrations; the same unless a pooler is in between. */
  directUrl: string;
  jwtSecret: string | undefined;
  version: string;
  /** What must be done on the migrated database before anybody can call. */
  prepare?: (db: Database) => Promise<void>;
}

/**
 * Migrates the database and starts everything that serves from it, in this order: bus, events, HTTP, scheduler.
 * Throws StartupError for what a person can fix; whatever had been started by then is closed again.
 */
export async function startMuster(options: StartOptions): Promise<Running> {
  const { config, logger, databaseUrl, directUrl } = options;
  await requireDatabase(directUrl);
  await migrateDatabase(directUrl);
  const tls = readTls(config);

  const closers: (() => Promise<unknown>)[] = [];
  const closeAll = async () => {
    for (let close = closers.pop(); close; close = closers.pop()) {
      await close().catch((error: unknown) => logger.error({ err: error }, 'closing failed'));
    }
  };
  try {
    const pool = createPool({ url: databaseUrl, size: config.DATABASE_POOL_SIZE, name: 'muster', logger });
    closers.push(() => pool.end());
    const redis = config.REDIS_URL === undefined ? undefined : connectRedis(config.REDIS_URL, logger);
    if (redis) closers.push(redis.close);
    // The embedded database has no other server; with several workers, there are other processes.
    const alone = config.embedded && config.workers === 1;
    const bus = await createBus({ pool, directUrl, redis, alone, logger });
    closers.push(() => bus.close());
    const db = createDatabase(pool, bus);
    await options.prepare?.(db);
    const relay = await startRelay({ db, bus, logger, directUrl });
    closers.push(() => relay.close());
    const sealer = startSealer({ db, logger });
    closers.push(() => sealer.close());
    const feed = createFeed({ db, bus, logger });
    feed.start();
    closers.push(() => feed.close());
    const memory = createMemory({ db, bus, redis, logger, config });
    memory.start();
    closers.push(() => memory.stop());
    const { app, drain } = await buildServer({ ...options, db, bus, redis, feed, memory, tls });
    closers.push(() => app.close());
    await listen(app, config);
    const scheduler = startScheduler({ db, bus, logger, config });
    closers.push(() => scheduler.stop());
    drain.signal.addEventListener('abort', () => void scheduler.stop());

    const { address, port } = app.server.address() as AddressInfo;
    const host = address.includes(':') ? `[${address}]` : address;
    let stopped: Promise<void> | undefined;
    const stop = async () => {
      await drain.finish();
      await closeAll();
    };
    return {
      url: `${tls ? 'https' : 'http'}://${host}:${port}`,
      app,
      db,
      reload() {
        if (!tls) return;
        try {
          (app.server as unknown as TlsServer).setSecureContext(readTls(config) ?? tls);
          logger.info('the TLS certificate was read again');
        } catch (error) {
          logger.error({ err: error }, 'the TLS certificate could not be read again: the old one stays');
        }
      },
      stop: () => {
        stopped ??= stop();
        return stopped;
      },
    };
  } catch (error) {
    await closeAll();
    throw error;
  }
}

/** Migrates the database and does on it what must be done before anybody can call. Throws StartupError as startMuster does. */
export async function prepareDatabase(options: {
  databaseUrl: string;
  directUrl: string;
  logger: Logger;
  prepare: (db: Database) => Promise<void>;
}): Promise<void> {
  const { databaseUrl, directUrl, logger, prepare } = options;
  await requireDatabase(directUrl);
  await migrateDatabase(directUrl);
  const pool = createPool({ url: databaseUrl, size: 1, name: 'muster-start', logger });
  try {
    const bus = await createBus({ pool, directUrl, alone: true, logger });
    await prepare(createDatabase(pool, bus));
  } finally {
    await pool.end();
  }
}

/** The certificate and key of TLS_CERT_FILE and TLS_KEY_FILE; undefined when TLS is off. Throws StartupError. */
function readTls({ TLS_CERT_FILE: certFile, TLS_KEY_FILE: keyFile }: Config): TlsPair | undefined {
  if (certFile === undefined || keyFile === undefined) return undefined;
  const read = (name: string, file: string) => {
    try {
      return readFileSync(file);
    } catch (error) {
      throw new StartupError(`${name} cannot be read (${(error as NodeJS.ErrnoException).code}).`);
    }
  };
  const pair = { cert: read('TLS_CERT_FILE', certFile), key: read('TLS_KEY_FILE', keyFile) };
  try {
    createSecureContext(pair);
  } catch {
    throw new StartupError('TLS_CERT_FILE and TLS_KEY_FILE must be the PEM files of a certificate and its key.');
  }
  return pair;
}

const OLDEST_POSTGRES = 14;

async function requireDatabase(url: string): Promise<void> {
  const client = createClient({ url, name: 'muster-start', queryTimeoutMs: 5_000 });
  client.on('error', () => {}); // The call under way rejects with the same error.
  try {
    await client.connect();
    const { rows } = await client.query<{ version: number }>(
      `select current_setting('server_version_num')::int / 10000 as version`,
    );
    const version = rows[0]?.version ?? 0;
    if (version < OLDEST_POSTGRES) {
      throw new StartupError(`Muster needs Postgres ${OLDEST_POSTGRES} or later; DATABASE_URL leads to ${version}.`);
    }
  } catch (error) {
    if (error instanceof StartupError) throw error;
    throw new StartupError(databaseSentence(error));
  } finally {
    await client.end().catch(() => {});
  }
}

/** Why the database cannot be used, without repeating its URL, which holds a password. */
function databaseSentence(error: unknown): string {
  const state = sqlState(error);
  if (state === '28P01' || state === '28000') return 'Postgres refuses the user or password of DATABASE_URL.';
  if (state === '3D000') return 'The database that DATABASE_URL names does not exist: create it first.';
  if (state !== undefined) return `Postgres at DATABASE_URL refuses to serve (SQLSTATE ${state}): see its log.`;
  const { code } = error as NodeJS.ErrnoException;
  return `Postgres at DATABASE_URL cannot be reached (${code ?? 'no answer'}): check its host and port, and that it runs.`;
}

async function listen(app: App, { HOST: host, PORT: port }: Config): Promise<void> {
  try {
    await app.listen({ host, port });
  } catch (error) {
    throw listenError(error, host, port);
  }
}

/** The sentence for a port that cannot be listened on; any other error as it is. */
export function listenError(error: unknown, host: string, port: number): unknown {
  const { code } = error as NodeJS.ErrnoException;
  if (code === 'EADDRINUSE') {
    return new StartupError(`Port ${port} on ${host} is taken: stop what listens there, or set PORT to another.`);
  }
  if (code === 'EACCES') return new StartupError(`Port ${port} needs privileges: set PORT to one above 1023.`);
  if (code === 'EADDRNOTAVAIL' || code === 'ENOTFOUND') {
    return new StartupError(`HOST=${host} is no address of this machine: set it to 127.0.0.1, or 0.0.0.0 for all.`);
  }
  return error;
}
