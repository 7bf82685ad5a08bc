import pg from 'pg';
import type { Logger } from './logger.ts';

// pg has no timeouts unless told: a hung server would hang every request for ever.
const CONNECT_TIMEOUT_MS = 2_000;
const QUERY_TIMEOUT_MS = 5_000;

const INT8 = 20;

/** int8 as a number: our ids stop at 2^53−1, which the identity columns enforce. */
const types: pg.CustomTypesConfig = {
  getTypeParser: (oid: number, format?: 'text' | 'binary') =>
    oid === INT8 ? Number : pg.types.getTypeParser(oid, format as 'text'),
};

/**
 * A pool that answers within five seconds or fails: connect 2 s, statement 4.5 s on the server, 5 s here.
 * A connection that breaks, in use or idle, is logged and replaced; it never ends the process.
 */
export function createPool(options: { url: string; size: number; name: string; logger: Logger }): pg.Pool {
  const pool = new pg.Pool({
    connectionString: options.url,
    max: options.size,
    application_name: options.name,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    query_timeout: QUERY_TIMEOUT_MS,
    statement_timeout: QUERY_TIMEOUT_MS - 500,
    idle_in_transaction_session_timeout: 10_000,
    keepAlive: true,
    // What a transaction sends without waiting goes out at once (db/database.ts).
    pipeline: true,
    types,
  });
  const onError = (error: Error) => {
    if (!pool.ending) options.logger.warn({ err: error }, 'postgres connection lost');
  };
  pool.on('error', onError);
  // A client that is checked out reports on itself, not on the pool; unheard, that would end the process.
  pool.on('connect', (client) => client.on('error', onError));
  return pool;
}

/** A single connection of its own, for LISTEN, session locks and migrations. `queryTimeoutMs: 0` waits as long as it takes. */
export function createClient(options: { url: string; name: string; queryTimeoutMs: number }): pg.Client {
  return new pg.Client({
    connectionString: options.url,
    application_name: options.name,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    ...(options.queryTimeoutMs > 0 ? { query_timeout: options.queryTimeoutMs } : {}),
    keepAlive: true,
    types,
  });
}
