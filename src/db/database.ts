import { drizzle, type NodePgDatabase } from 'drizzle-orm/node-postgres';
import type pg from 'pg';
import type { Bus } from '../platform/bus.ts';

/** Where reads go: the pool, or the transaction one is in. */
export interface Queryable {
  readonly orm: NodePgDatabase;
  query<R extends pg.QueryResultRow>(statement: pg.QueryConfig): Promise<pg.QueryResult<R>>;
}

/** A transaction under way. It refuses to work once it has ended. */
export interface Tx extends Queryable {
  /**
   * Sends a statement whose answer nobody needs, and does not wait: what follows goes with it in one round trip. When it
   * fails, nothing after it is done and the transaction fails with its error.
   */
  write(statement: pg.QueryConfig): void;
  /** Rings the bus after the commit, and only then. */
  ring(topic: string, detail?: string): void;
}

export interface Database extends Queryable {
  /**
   * Runs `work` in one transaction, and again (twice at most) when Postgres asks for that: a serialization failure or a
   * deadlock. Throws CommitUnknownError when the commit itself got no answer: it may have happened.
   */
  transaction<T>(work: (tx: Tx) => Promise<T>): Promise<T>;
  readonly pool: pg.Pool;
}

/** The commit was sent and no answer came: whether it happened, only a later look can tell. */
export class CommitUnknownError extends Error {
  override readonly name = 'CommitUnknownError';
}

const MAX_TRIES = 3;

/** The SQLSTATE of an error of Postgres, also when an error of Drizzle is wrapped around it. */
export function sqlState(error: unknown): string | undefined {
  for (let e = error; e instanceof Error; e = e.cause) {
    // Each has a digit; EPIPE and EBUSY, which are of the system, have not.
    if ('code' in e && typeof e.code === 'string' && /^(?=.*\d)[0-9A-Z]{5}$/.test(e.code)) return e.code;
  }
  return undefined;
}

/**
 * The database behind a pool. Transactions are ours and not Drizzle's, whose `transaction()` leaks the connection for
 * good when BEGIN fails, gives a dead one back when ROLLBACK fails, and lets a handle work on after its end.
 */
export function createDatabase(pool: pg.Pool, bus: Bus): Database {
  return {
    pool,
    orm: drizzle({ client: pool }),
    query: (statement) => pool.query(statement),
    async transaction(work) {
      for (let attempt = 1; ; attempt++) {
        try {
          return await once(pool, bus, work);
        } catch (error) {
          const state = sqlState(error);
          if (attempt === MAX_TRIES || (state !== '40001' && state !== '40P01')) throw error;
        }
      }
    },
  };
}

async function once<T>(pool: pg.Pool, bus: Bus, work: (tx: Tx) => Promise<T>): Promise<T> {
  const client = await pool.connect();
  // A client that could not be rolled back is destroyed instead of going back into the pool.
  let dead: Error | undefined;
  let open = true;
  // A connection that still owes an answer would not hear a ROLLBACK either; waiting for that one, too, takes twice as long.
  let mute = false;
  const heard = async <T>(answer: Promise<T>): Promise<T> => {
    try {
      return await answer;
    } catch (error) {
      mute ||= sqlState(error) === undefined;
      throw error;
    }
  };
  const rings: [topic: string, detail: string | undefined][] = [];
  const whileOpen: pg.PoolClient = new Proxy(client, {
    get(target, property) {
      if (!open) throw new Error('This transaction has ended.');
      const value = Reflect.get(target, property, target) as unknown;
      if (typeof value !== 'function') return value;
      return property === 'query' ? (...args: unknown[]) => heard(value.apply(target, args)) : value.bind(target);
    },
  });
  // Statements go out as they come (postgres.ts), so that those nobody waits for share a round trip with what follows. What
  // was sent after one that failed is refused by Postgres; the first error tells why.
  const unheard: Promise<unknown>[] = [];
  let failure: { error: unknown } | undefined;
  const send = (answer: Promise<unknown>) => {
    unheard.push(
      heard(answer).catch((error: unknown) => {
        failure ??= { error };
      }),
    );
  };
  let orm: NodePgDatabase | undefined;
  try {
    send(client.query('begin'));
    const result = await work({
      get orm() {
        orm ??= drizzle({ client: whileOpen });
        return orm;
      },
      query: async (statement) => whileOpen.query(statement),
      write: (statement) => send(whileOpen.query(statement)),
      ring: (topic, detail) => void rings.push([topic, detail]),
    });
    open = false;
    await commit(client);
    for (const [topic, detail] of rings) bus.ring(topic, detail);
    return result;
  } catch (thrown) {
    open = false;
    await Promise.all(unheard);
    // A commit without an answer stays one, even when what was sent with it got none either.
    const unknown = thrown instanceof CommitUnknownError && (!failure || sqlState(failure.error) === undefined);
    const error = failure && !unknown ? failure.error : thrown;
    dead = error instanceof Error ? error : new Error(String(error));
    if (!mute && !(error instanceof CommitUnknownError)) {
      try {
        await client.query('rollback');
        dead = undefined;
      } catch {
        // What went wrong first is what the caller must hear of.
      }
    }
    throw error;
  } finally {
    client.release(dead);
  }
}

async function commit(client: pg.PoolClient): Promise<void> {
  let answer: pg.QueryResult;
  try {
    answer = await client.query('commit');
  } catch (error) {
    if (sqlState(error) !== undefined) throw error; // Postgres answered: it did not happen.
    throw new CommitUnknownError('The commit got no answer.', { cause: error });
  }
  // Postgres answers ROLLBACK to the COMMIT of a transaction that had failed.
  if (answer.command !== 'COMMIT') throw new Error('The transaction was rolled back.');
}
