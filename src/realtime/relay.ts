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
// thrift. The leader holds LOCKS.relayLeader in a session of its own, and every other process tries for it once a second.
//
// What may fail:
// - The leader dies: its session dies with it, and the next try of another process succeeds.
// - It hangs, or the network swallows its connection, which Postgres would not notice for hours: the session proves itself
//   every second, and Postgres ends one that it has not heard of for three. A leader that hangs in the middle of a batch
//   holds up the order for as long.
// - It was cut off and does not know it yet: it may go on beside the new one, since the fence is what counts.
// - It crashes before a batch has committed: nothing has moved. After that: the ring is lost, and feeds look by themselves.
// Nothing is sent that is not in `events`, so whoever resumes finds what was sent.
//
// Old events are deleted from the front only, in the order of their ids: what is kept has no holes, so the first id that is
// kept tells whether somebody who resumes has missed anything.

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
/** How long Postgres waits for a word of the leader, be it in its session or between the statements of a batch. */
const SILENT_LEADER_MS = 3_000;

const ORDER = {
  name: 'relay-order',
  text: `
    select pg_advisory_xact_lock($1, $2),
      set_config('idle_in_transaction_session_timeout', '${SILENT_LEADER_MS}', true)`,
  values: [...LOCKS.relayOrder],
};

const MOVE = {
  name: 'relay-move',
  text: `
    with moved as (
      delete from event_outbox where id in (select id from event_outbox order by id limit ${BATCH}) returning *
    )
    insert into events (user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at)
    select user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at from moved order by id`,
};

/**
 * The oldest events, up to the first that is young enough. By id and not by time, which is when a transaction began: the
 * one of a long transaction lies before that of its neighbours. The newest event stays: the last id must stay known.
 */
const PRUNE = {
  name: 'relay-prune',
  text: `
    with oldest as (
      select event_id, created_at < now() - interval '${EVENTS_KEPT_HOURS} hours' as old
      from events order by event_id limit ${PRUNE_BATCH}
    )
    delete from events where event_id < (
      select coalesce(min(event_id) filter (where not old), max(event_id)) from oldest)`,
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

/** Deletes a batch of the events that need not be kept any longer; answers whether there may be more of them. */
export async function pruneBatch(db: Database): Promise<boolean> {
  const { rowCount } = await db.query(PRUNE);
  return rowCount === PRUNE_BATCH - 1;
}

/** Takes part in relaying: leads when nobody else does, else stands by. Returns at once; `isLeader` tells what became of it. */
export async function startRelay(deps: { db: Database; bus: Bus; logger: Logger; directUrl: string }): Promise<Relay> {
  const { db, bus, logger, directUrl } = deps;
  let session: { client: pg.Client; leads: boolean } | undefined;
  let prunedAt = Number.NEGATIVE_INFINITY;

  const open = async () => {
    const client = createClient({ url: directUrl, name: 'muster-relay', queryTimeoutMs: PROBE_TIMEOUT_MS });
    const lost = () => {
      if (session?.client !== client) return;
      session = undefined;
      loop.wake();
    };
    client.on('error', lost);
    client.on('end', lost);
    try {
      await client.connect();
      await client.query(`set idle_session_timeout = ${SILENT_LEADER_MS}`);
    } catch (error) {
      client.end().catch(() => {});
      throw error;
    }
    return { client, leads: false };
  };
  const stepDown = () => {
    const client = session?.client;
    session = undefined;
    // Not waited for: a connection that only this side believes in would never end in order.
    client?.end().catch(() => {});
  };

  /** Whether this process leads now. Asks Postgres: a session that does not answer may have lost the lock. */
  const lead = async (): Promise<boolean> => {
    session ??= await open();
    const current = session;
    const { rows } = current.leads
      ? await current.client.query<{ leads: boolean }>('select true as leads')
      : await current.client.query<{ leads: boolean }>('select pg_try_advisory_lock($1, $2) as leads', [
          ...LOCKS.relayLeader,
        ]);
    if (!current.leads && rows[0]?.leads) logger.debug('this process relays events now');
    current.leads = rows[0]?.leads ?? false;
    return current.leads;
  };

  const loop = startLoop(
    (error) => {
      stepDown();
      if (isDatabaseAway(error)) logger.warn('the event relay waits for the database');
      else logger.error({ err: error }, 'the event relay failed');
    },
    async () => {
      do {
        if (!(await lead())) return TRY_LEAD_EVERY_MS;
      } while ((await relayBatch(db)) === BATCH);
      if (performance.now() - prunedAt > PRUNE_EVERY_MS && !(await pruneBatch(db))) prunedAt = performance.now();
      return LOOK_ANYWAY_MS;
    },
  );
  // Followers have nothing to do at a ring.
  const off = bus.on(OUTBOX_TOPIC, () => {
    if (session?.leads) loop.wake();
  });
  return {
    isLeader: () => session?.leads ?? false,
    async close() {
      off();
      await loop.stop();
      stepDown();
    },
  };
}
