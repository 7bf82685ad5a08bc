import type { Database } from '../db/database.ts';
import { isDatabaseAway } from '../http/problem.ts';
import { LOCKS } from '../platform/locks.ts';
import type { Logger } from '../platform/logger.ts';
import { startLoop } from '../platform/loop.ts';
import { type ChainedEntry, chainHash, FIRST_HASH, hashedTime } from './chain.ts';

// How the audit log becomes tamper-evident.
//
// Every entry has a place in the chain of its owner: each place holds the hash of the entry and of the place before it, so
// that whoever changes, removes, swaps or puts in an entry must change every later hash too, and the newest hash (the head)
// that somebody has kept elsewhere tells. Entries of nobody have a chain of their own, that of owner 0.
//
// Places are given after the commit and not in the transaction of the change: a chain has one end, and to hold it until the
// commit would make all changes of an owner wait for each other, and for the rows that they hold besides. So an entry is
// written together with a row in audit_pending, and the sealer takes those in the order of their ids, appends them to their
// chains, and deletes the pending rows, in one transaction. What is between an entry and its seal is a second at the most.
// An entry that was removed in that time leaves its pending row: it gets a place in the chain of owner 0, where the verifier
// finds it gone. One whose pending row went with it is not missed by anybody. A pending row of an entry that has its place
// already is nobody's but a forger's, and only deleted: the sealer must not stand still for it.
//
// The invariant: one sealer at a time, by LOCKS.auditSeal, which its transaction holds to its end. Any number of processes
// try; whoever does not get the lock has nothing to do. A crash in the middle rolls everything back.

const BATCH = 500;
/**
 * Nobody waits for a seal, so nothing wakes the sealer: what one second has written is sealed together. Woken at each write
 * instead, it costs writers a fifth: 368 POST /tasks a second for 449 (medians of eight rounds that took turns, 2 cores).
 */
const EVERY_MS = 1_000;

const LOCK = {
  name: 'audit-seal-lock',
  text: 'select pg_try_advisory_xact_lock($1, $2) as mine',
  values: [...LOCKS.auditSeal],
};

/** Entries that wait, oldest first. One that is gone from the log has nothing but its pending row (`id` is null). */
const PENDING = {
  name: 'audit-seal-pending',
  text: `
    select p.audit_id, exists (select from audit_chain c where c.audit_id = p.audit_id) as placed, l.id, l.user_id, l.owner_id, l.operation, l.entity_type, l.entity_id, l.changed_fields, l.ip_address,
      l.user_agent, l.request_id, l.created_at
    from (select audit_id from audit_pending order by audit_id limit ${BATCH}) p left join audit_log l on l.id = p.audit_id
    order by p.audit_id`,
};

/** The ends of chains. Served by the primary key. */
const HEADS = {
  name: 'audit-seal-heads',
  text: `
    select o.owner_id, c.seq, c.hash from unnest($1::bigint[]) o(owner_id) join lateral (
      select seq, hash from audit_chain c where c.owner_id = o.owner_id order by seq desc limit 1
    ) c on true`,
};

const APPEND = {
  name: 'audit-seal-append',
  text: `
    with sealed as (
      insert into audit_chain (owner_id, seq, audit_id, hash, prev_hash)
      select * from jsonb_to_recordset($1) as n(owner_id bigint, seq bigint, audit_id bigint, hash text, prev_hash text)
    )
    delete from audit_pending where audit_id = any($2::bigint[])`,
};

type PendingRow = { audit_id: number; placed: boolean; id: number | null } & Omit<ChainedEntry, 'id' | 'created_at'> & {
    created_at: Date | number;
  };

/** Gives a batch of entries their places; answers how many waited, and the ids of those that are gone from the log. */
export async function sealEntries(db: Database): Promise<{ sealed: number; missing: number[] }> {
  return db.transaction(async (tx) => {
    const lock = await tx.query<{ mine: boolean }>(LOCK);
    if (!lock.rows[0]?.mine) return { sealed: 0, missing: [] };
    const { rows } = await tx.query<PendingRow>(PENDING);
    if (rows.length === 0) return { sealed: 0, missing: [] };
    const owners = [...new Set(rows.map((row) => row.owner_id ?? 0))];
    const heads = await tx.query<{ owner_id: number; seq: number; hash: string }>({ ...HEADS, values: [owners] });
    const ends = new Map(heads.rows.map(({ owner_id, seq, hash }) => [owner_id, { seq, hash }]));
    const missing: number[] = [];
    const places = rows.flatMap(({ audit_id, placed, id, created_at, ...entry }) => {
      if (placed) return [];
      if (id === null) missing.push(audit_id);
      const owner = entry.owner_id ?? 0;
      const { seq, hash: prevHash } = ends.get(owner) ?? { seq: 0, hash: FIRST_HASH };
      const hash = chainHash(prevHash, { id: audit_id, ...entry, created_at: hashedTime(created_at) });
      ends.set(owner, { seq: seq + 1, hash });
      return [{ owner_id: owner, seq: seq + 1, audit_id, hash, prev_hash: prevHash }];
    });
    await tx.query({ ...APPEND, values: [JSON.stringify(places), rows.map(({ audit_id }) => audit_id)] });
    return { sealed: rows.length, missing };
  });
}

/** Seals what is written to the audit log, soon after its commit. */
export function startSealer({ db, logger }: { db: Database; logger: Logger }): {
  close(): Promise<void>;
} {
  const log = (error: unknown) => {
    if (isDatabaseAway(error)) logger.warn('the audit sealer waits for the database');
    else logger.error({ err: error }, 'the audit sealer failed');
  };
  const loop = startLoop(log, async () => {
    const { sealed, missing } = await sealEntries(db);
    if (missing.length > 0)
      logger.error({ missing }, 'entries were removed from the audit log before they were sealed');
    return sealed === BATCH ? 0 : EVERY_MS;
  });
  return { close: () => loop.stop() };
}
