import type pg from 'pg';
import type { Database } from '../db/database.ts';
import { isDatabaseAway } from '../http/problem.ts';
import type { Bus } from '../platform/bus.ts';
import { LOCKS } from '../platform/locks.ts';
import type { Logger } from '../platform/logger.ts';
import { startLoop } from '../platform/loop.ts';
import { createClient } from '../platform/postgres.ts';
import { OUTBOX_TOPIC } from './events.ts';

// How events get their order.
//
// Events are written to event_outbox in the transaction that caused them. The ids they get there are no order to resume
// by: a sequence counts when rows are inserted, and a transaction that took id 7 may commit after the one that took 8.
// Whoever has read up to 8 by then, and goes on with "id > 8", never sees 7. Measured on this very pattern: 5 % of events
// lost so, 61 % with 10 ms between insert and commit.
//
// So one relay moves them to `events`, and they get their final id there:
//
//   write ──commit──▶ event_outbox ──relay: delete + insert, one transaction──▶ events (event_id) ──▶ feeds ──▶ sockets
//
// The invariant: ids in `events` are given in the order in which they become visible. It holds because ids are only given
// under a lock that the transaction keeps until it has committed (LOCKS.relayOrder), so the next batch gets its first id
// when the one before can be seen. That lock alone makes any number of relays correct; that there is but one at work is
// thrift. The leader holds LOCKS.relayLeader on a connection of its own: when it dies, so does its session, and another
// process gets the lock at its next try, a second later at most. A leader that was cut off and does not know it yet may go
// on beside the new one without harm.
//
// What may fail: a crash before the commit of a batch moves nothing, and one after it only delays the ring, which feeds
// make up for by looking by themselves. Nothing is sent that is not in `events`, so whoever resumes finds what was sent.

/** The bus topic that is rung when events got their place. */
export const EVENTS_TOPIC = 'events';

const BATCH = 1_000;
const LOOK_ANYWAY_MS = 1_000;
const TRY_LEAD_EVERY_MS = 1_000;
const PROBE_TIMEOUT_MS = 2_000;
/** How long events are kept for those who resume. */
export const EVENTS_KEPT_HOURS = 24;
const PRUNE_EVERY_MS = 60_000;
const PRUNE_BATCH = 5_000;

const ORDER = { name: 'relay-order', text: 'select pg_advisory_xact_lock($1, $2)', values: [...LOCKS.relayOrder] };

const MOVE = {
  name: 'relay-move',
  text: `
    with moved as (
      delete from event_outbox where id in (select id from event_outbox order by id limit ${BATCH}) returning *
    )
    insert into events (user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at)
    select user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at from moved order by id`,
};

/** Bounded, and never the newest event: the last id must stay known. */
const PRUNE = {
  name: 'relay-prune',
  text: `
    delete from events where event_id in (
      select event_id from events where created_at < now() - interval '${EVENTS_KEPT_HOURS} hours'
        and event_id < (select max(event_id) from events)
      order by created_at limit ${PRUNE_BATCH})`,
};

export interface Relay {
  /** Whether this process is the one that relays. */
  isLeader(): boolean;
  close(): Promise<void>;
}

/** Moves one batch; answers how many events it moved. Correct beside any number of others. */
export async function relayBatch(db: Database): Promise<number> {
  return db.transaction(async (tx) => {
    await tx.query(ORDER);
    const { rowCount } = await tx.query(MOVE);
    if (rowCount) tx.ring(EVENTS_TOPIC);
    return rowCount ?? 0;
  });
}

/** Takes part in relaying: leads when nobody else does, else stands by. */
export async function startRelay(deps: { db: Database; bus: Bus; logger: Logger; directUrl: string }): Promise<Relay> {
  const { db, bus, logger, directUrl } = deps;
  let session: pg.Client | undefined;
  let prunedAt = Number.NEGATIVE_INFINITY;

  const lead = async (): Promise<boolean> => {
    if (session) {
      // Proof that the lock is held still: a session that does not answer may have lost it.
      await session.query('select 1');
      return true;
    }
    const client = createClient({ url: directUrl, name: 'muster-relay', queryTimeoutMs: PROBE_TIMEOUT_MS });
    const lost = () => {
      if (session === client) session = undefined;
    };
    client.on('error', lost);
    client.on('end', lost);
    try {
      await client.connect();
      const { rows } = await client.query<{ led: boolean }>('select pg_try_advisory_lock($1, $2) as led', [
        ...LOCKS.relayLeader,
      ]);
      if (rows[0]?.led) {
        session = client;
        logger.debug('this process relays events now');
        return true;
      }
    } catch (error) {
      client.end().catch(() => {});
      throw error;
    }
    await client.end().catch(() => {});
    return false;
  };

  const stepDown = () => {
    const client = session;
    session = undefined;
    client?.end().catch(() => {});
  };

  const loop = startLoop(
    (error) => {
      stepDown();
      if (isDatabaseAway(error)) logger.warn('the event relay waits for the database');
      else logger.error({ err: error }, 'the event relay failed');
    },
    async () => {
      if (!(await lead())) return TRY_LEAD_EVERY_MS;
      while ((await relayBatch(db)) === BATCH);
      if (performance.now() - prunedAt > PRUNE_EVERY_MS) {
        const { rowCount } = await db.query(PRUNE);
        if ((rowCount ?? 0) < PRUNE_BATCH) prunedAt = performance.now();
      }
      return LOOK_ANYWAY_MS;
    },
  );
  // Followers have nothing to do at a ring.
  const off = bus.on(OUTBOX_TOPIC, () => {
    if (session) loop.wake();
  });
  return {
    isLeader: () => session !== undefined,
    async close() {
      off();
      await loop.stop();
      const client = session;
      session = undefined;
      await client?.end().catch(() => {});
    },
  };
}
