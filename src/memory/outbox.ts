import type { Database, Queryable } from '../db/database.ts';
import type { Breaker } from './breaker.ts';
import { LinkError } from './link.ts';
import { COLUMNS, type Memory, memoryOf, outgoing } from './memories.ts';
import type { Remote } from './remote.ts';

// How memories reach the server. Whoever sends takes its turn at a row by moving `available_at` past the time that takes,
// and marks it ambiguous: should the process die, the next one looks whether it arrived before it sends it again.

/** The bus topic that is rung when memories wait to be sent. */
export const MEMORY_TOPIC = 'memory';

const BATCH = 25;
const AT_ONCE = 4;
/** Tries that reached a server which is well; then it is the memory's fault. */
const MAX_ATTEMPTS = 12;
const FIRST_BACKOFF_SECONDS = 2;
const MAX_BACKOFF_SECONDS = 600;

const CLAIM = {
  name: 'memory-outbox-claim',
  text: `
    with due as (
      select memory_id, ambiguous from memory_outbox where dead_at is null and available_at <= now()
      order by available_at limit $1 for update skip locked
    ), taken as (
      update memory_outbox o set available_at = now() + $2::int * interval '1 millisecond', ambiguous = true
      from due where due.memory_id = o.memory_id
    )
    select ${COLUMNS}, due.ambiguous from due join memories m on m.id = due.memory_id order by m.id`,
};

const SETTLE = {
  name: 'memory-outbox-settle',
  text: `
    with delivered as (delete from memory_outbox where memory_id = any($1::bigint[]) returning memory_id),
    marked as (
      update memories set delivered_at = now() where id in (select memory_id from delivered) and delivered_at is null
    )
    update memory_outbox o set
      ambiguous = f.ambiguous,
      attempts = o.attempts + f.counts,
      last_error = coalesce(f.error, o.last_error),
      available_at = now() + case when f.counts = 0 then interval '1 second' else
        least(${MAX_BACKOFF_SECONDS}, ${FIRST_BACKOFF_SECONDS} * power(2, o.attempts)) * (0.5 + random() / 2) * interval '1 second' end,
      dead_at = case when f.rejected or o.attempts + f.counts >= ${MAX_ATTEMPTS} then now() end
    from jsonb_to_recordset($2) as f(memory_id bigint, ambiguous boolean, counts int, rejected boolean, error text)
    where o.memory_id = f.memory_id`,
};

interface Claimed {
  memory: Memory;
  ambiguous: boolean;
}

interface Failure {
  memory_id: number;
  ambiguous: boolean;
  counts: 0 | 1;
  rejected: boolean;
  error: string | null;
}

/** How long a turn at a batch may take before somebody else may have one. */
export const turnMs = (storeTimeoutMs: number, searchTimeoutMs: number) =>
  Math.ceil(BATCH / AT_ONCE) * (storeTimeoutMs + searchTimeoutMs) + 10_000;

/** Sends memories that were claimed, and settles each: gone from the outbox, or tried again later. Answers which arrived. */
export async function sendMemories(
  { db, remote, breaker }: { db: Database; remote: Remote; breaker: Breaker },
  claimed: readonly Claimed[],
): Promise<Memory[]> {
  const arrived: Memory[] = [];
  const failures: Failure[] = [];
  const waiting = [...claimed];
  const worker = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      const { memory, ambiguous } = next;
      let sent = false;
      try {
        const known =
          ambiguous && !remote.profile.idempotent && (await breaker.call('has', () => remote.has(outgoing(memory))));
        if (!known) {
          // With the breaker open it is not sent at all.
          if (breaker.state() === 'closed') sent = true;
          await breaker.call('store', () => remote.store(outgoing(memory)));
        }
        arrived.push(memory);
      } catch (error) {
        const { ambiguous: unknown, rejected, message } = error as LinkError;
        failures.push({
          memory_id: memory.id,
          ambiguous: sent && error instanceof LinkError ? unknown || ambiguous : sent || ambiguous,
          // What did not reach a server that is well says nothing against the memory.
          counts: sent && breaker.state() === 'closed' ? 1 : 0,
          rejected: error instanceof LinkError && rejected,
          error: sent ? String(message).slice(0, 500) : null,
        });
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, claimed.length) }, worker));
  await db.query({ ...SETTLE, values: [arrived.map(({ id }) => id), JSON.stringify(failures)] });
  return arrived;
}

/** Takes a turn at what is due; answers what arrived and whether there may be more. */
export async function sendDue(
  parts: { db: Database; remote: Remote; breaker: Breaker },
  turn: number,
): Promise<{ arrived: Memory[]; more: boolean }> {
  const { rows } = await parts.db.query({ ...CLAIM, values: [BATCH, turn] });
  if (rows.length === 0) return { arrived: [], more: false };
  const arrived = await sendMemories(
    parts,
    rows.map((row) => ({ memory: memoryOf(row), ambiguous: row['ambiguous'] as boolean })),
  );
  return { arrived, more: rows.length === BATCH && arrived.length > 0 };
}

/** The outbox in numbers. */
export interface Backlog {
  waiting: number;
  dead: number;
  oldest: Date | null;
  /** How long the oldest has waited, by the database's clock; 0 for none. */
  oldestSeconds: number;
}

/** What waits, since when, and what was given up, in all. */
export async function backlog(q: Queryable): Promise<Backlog> {
  const { rows } = await q.query<Backlog>({
    name: 'memory-outbox-backlog',
    text: `
      select count(*) filter (where dead_at is null)::int as waiting, count(dead_at)::int as dead,
        min(created_at) filter (where dead_at is null) as oldest,
        coalesce(extract(epoch from now() - min(created_at) filter (where dead_at is null)), 0)::float8 as "oldestSeconds"
      from memory_outbox`,
  });
  if (!rows[0]) throw new Error('The counts of the outbox answered no row.');
  return rows[0];
}

/** Puts what was delivered since a time, and these memories, back into the outbox, to be looked for first; answers how many. */
export async function sendAgain(q: Queryable, since: Date, ids: readonly number[]): Promise<number> {
  const { rowCount } = await q.query({
    // By memories_delivered_idx and the primary key.
    name: 'memory-outbox-again',
    text: `
      with again as (
        update memories set delivered_at = null where delivered_at >= $1 or id = any($2::bigint[]) returning id
      )
      insert into memory_outbox (memory_id, ambiguous) select id, true from again on conflict do nothing`,
    values: [since, ids],
  });
  return rowCount ?? 0;
}

/** Gives dead letters another life; answers how many. */
export async function reviveDead(q: Queryable): Promise<number> {
  const { rowCount } = await q.query({
    text: `update memory_outbox set dead_at = null, attempts = 0, available_at = now() where dead_at is not null`,
  });
  return rowCount ?? 0;
}

/** Puts the memories with the ids after `after` into the outbox, so many at a time, for a server that has lost them. */
export async function queueAll(q: Queryable, after: number, limit: number): Promise<{ last: number; queued: number }> {
  const { rows } = await q.query<{ last: string | null; queued: number }>({
    text: `
      with next as (select id from memories where id > $1 order by id limit $2),
      marked as (update memories m set delivered_at = null from next where next.id = m.id and delivered_at is not null),
      queued as (insert into memory_outbox (memory_id, ambiguous) select id, true from next on conflict do nothing)
      select max(id) as last, count(*)::int as queued from next`,
    values: [after, limit],
  });
  return { last: Number(rows[0]?.last ?? after), queued: rows[0]?.queued ?? 0 };
}
