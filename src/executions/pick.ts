import type { Tx } from '../db/database.ts';
import { CLAIM_LOCKS } from '../platform/locks.ts';

// Which queued runs a claim takes: SQL for the `with` of the claim (lease.ts), up to a part that is called `picked`.
//
// What an agent may take: queued, due, of its owner (any owner's, for shared agents), of a skill it asks for, not pinned to
// another agent, and asking for no capability that it lacks. Of one owner: highest priority first, then whoever waits
// longest. Between the owners that a shared agent serves: whoever has the fewest under way, so that the length of one's queue
// or its priorities are no matter of the others.
//
// Limits (limits.ts) are kept to exactly: a claim counts what is under way only while it holds the claim lock of the owner
// alone. An owner without limits has its lock taken in shared mode, which holds up nobody; it is there so that who makes an
// owner's first limit can wait for the claims that do not know of it. The lock of nobody's, 0, is the same for shared agents.
// Claims that find an owner with limits of which they do not hold the lock leave it alone.
//
// These are advisory locks and not the rows of the limits: they are taken in memory, where `for no key update` would write to
// each row at each claim, and they stay when the row by which the others would have waited is deleted.
//
// A skill at its limit is left out while the queue is walked, so it hides nothing behind it. Of the others a walk may find more
// than their limits leave free; then at least one of them is at its limit afterwards, and a claim that still wants runs walks
// once more.

/** How many owners a shared agent's claim looks at; with more, each claim begins with another one. */
const MAX_OWNERS = 1_000;
/** How many runs it looks at in all, beyond one of each owner: enough that one with few rivals may get all that it asks for. */
const MAX_CANDIDATES = 500;
/** How many more runs a claim looks at than it wants, since claims that go on at the same time hold the first ones. */
const SPARE = 16;
/** What an owner has under way is counted up to here: with more, two owners are the same to the others. */
const MANY_RUNNING = 200;

const lockKey = (owner: string) => `${CLAIM_LOCKS}, (${owner} % 2147483647)::int`;

/**
 * Locks the agent for a claim, so that claims of one agent take turns and none sees too many free slots; then the claim lock
 * of its owner, alone when that has limits. Answers the agent, and whether there are limits to keep to: its owner's, or
 * anybody's for shared agents. Served by concurrency_limits_key.
 *
 * The setting is for the plans of the claim: Postgres thinks that next to no run has the capabilities asked for, so that it
 * would rather read an owner's whole queue and sort that than walk an index for long (50 owners with 4,000 each: 1.3 s).
 */
export const LOCK_AGENT = {
  name: 'claim-lock-agent',
  text: `
    with agent as materialized (
      select * from agents where id = $1 and deleted_at is null for no key update
    ), known as materialized (
      select agent.*, exists (select from concurrency_limits l where agent.shared or l.user_id = agent.user_id) as limited
      from agent
    )
    select known.*, set_config('enable_sort', 'off', true),
      case when limited and not shared then pg_advisory_xact_lock(${lockKey('user_id')})
        else pg_advisory_xact_lock_shared(${lockKey('case when shared then 0 else user_id end')}) end
    from known`,
};

/** Holds up the claims of what is an owner's until the transaction ends: for whoever changes its limits. */
export function lockClaimsOf(tx: Tx, userId: number): void {
  tx.write({
    name: 'claim-lock-all',
    text: `select pg_advisory_xact_lock(${lockKey('0::bigint')}), pg_advisory_xact_lock(${lockKey('$1::bigint')})`,
    values: [userId],
  });
}

/** How many runs the agent $1 may take: $3 at the most, $4 with what it has. */
const FREE = `
    free as (
      select greatest(0, least($3::int, $4::int - count(*)))::int as slots
      from executions where agent_id = $1 and status = 'running'
    )`;

/**
 * A millisecond of slack, since timestamptz(3) rounds up. What goes with it is in the order of executions_owner_queue_idx, to
 * the letter: an index with "nulls last" does not serve an order without.
 */
const takeable = `
        e.available_at <= now() + interval '1 millisecond'
        and ($5::text[] is null or e.skill_name = any($5))
        and (e.pinned_agent_id is null or e.pinned_agent_id = $1)
        and e.required_capabilities <@ $6::text[]`;

/**
 * Of the owner $2, who has no limits: should one have been made since the claim began, nothing. Served by
 * executions_owner_queue_idx.
 */
export const PICK_OF_FREE_OWNER = `
    with ${FREE}, picked as (
      select e.id from executions e
      where e.status = 'queued' and e.user_id = $2 and ${takeable}
        and not exists (select from concurrency_limits where user_id = $2)
      order by e.priority desc nulls last, e.available_at, e.id
      limit (select slots from free)
      for update skip locked
    )`;

/** The order is the index's, so that no other index with the owner in front, which holds the history too, will do. */
const next = (where: string) => `
        select e.user_id from executions e where e.status = 'queued' ${where}
        order by e.user_id, e.priority desc nulls last, e.available_at, e.id limit 1`;
/**
 * The owners with queued runs, one by one, since an index knows no "next other value"; from a random place on ($2, 0 to 1),
 * so that none is left out for ever where there are too many. Served by executions_owner_queue_idx.
 */
const OWNERS_WITH_QUEUE = `
    last as (
      select e.user_id from executions e where e.status = 'queued'
      order by e.user_id desc, e.priority nulls first, e.available_at desc, e.id desc limit 1
    ), start as materialized (
      select floor($2::float8 * user_id)::bigint as user_id from last
    ), later as (
      (${next('and e.user_id >= (select user_id from start)')})
      union all
      select (${next('and e.user_id > o.user_id')}) from later o where o.user_id is not null
    ), earlier as (
      (${next('')})
      union all
      select (${next('and e.user_id > o.user_id')}) from earlier o where o.user_id < (select user_id from start)
    ), owners as materialized (
      select user_id from (
        select user_id from later
        union all
        select user_id from earlier where user_id < (select user_id from start)
      ) o
      where user_id is not null and (select slots from free) > 0
      limit ${MAX_OWNERS}
    )`;

/**
 * What a claim may take, best first, and a few more: `offered`. Of each owner a walk of executions_owner_queue_idx that ends
 * after a few runs, so that the cost goes with the number of owners and not with their queues. `owners` says of whom,
 * `rival` how many runs an owner has under way, and `unless` which ones with limits are left out.
 */
const offered = ({ owners, rival, unless }: { owners: string; rival: string; unless: string }) => `
    with recursive ${FREE}, ${owners}, under_way as (
      select e.user_id, e.skill_name, count(*) as running
      from (select distinct user_id from owners join concurrency_limits using (user_id)) o
      join executions e on e.user_id = o.user_id and e.status = 'running'
      group by e.user_id, e.skill_name
    ), limits as materialized (
      select l.user_id, l.skill_name, greatest(0, l.max_running - coalesce(sum(u.running), 0))::int as free
      from owners join concurrency_limits l using (user_id)
      left join under_way u on u.user_id = l.user_id and (l.skill_name is null or u.skill_name = l.skill_name)
      group by l.id
    ), waiting as materialized (
      select o.user_id, ${rival} as running, l.user_id is not null as limited, l.free, coalesce(l.full, '{}') as full
      from owners o left join (
        select user_id, min(free) filter (where skill_name is null) as free,
          array_agg(skill_name) filter (where skill_name is not null and free = 0) as full
        from limits group by user_id
      ) l on l.user_id = o.user_id
      where l.free is distinct from 0 ${unless}
    ), candidates as (
      select w.user_id, w.running, w.limited, w.free, c.*,
        row_number() over (partition by w.user_id, c.skill_name order by c.priority desc, c.available_at, c.id) as of_skill
      from waiting w cross join lateral (
        select e.id, e.skill_name, e.priority, e.available_at from executions e
        where e.status = 'queued' and e.user_id = w.user_id and ${takeable}
          and e.skill_name <> all(w.full)
        order by e.priority desc nulls last, e.available_at, e.id
        limit (select least(slots + ${SPARE}, 1 + ${MAX_CANDIDATES} / (select count(*) from owners)) from free)
      ) c
    ), fitting as (
      select c.*, row_number() over (partition by c.user_id order by c.priority desc, c.available_at, c.id) as of_owner
      from candidates c left join limits l on l.user_id = c.user_id and l.skill_name = c.skill_name
      where l.free is null or c.of_skill <= l.free
    ), offered as materialized (
      select id, user_id, limited,
        row_number() over (order by running + of_owner, priority desc, available_at, id) as place
      from fitting where free is null or of_owner <= free
      order by place limit (select slots + ${SPARE} from free)
    )`;

/** Of those, as many as are wanted, in their order. What other claims have in hand is passed over. */
const PICKED = `
    picked as (
      select e.id from offered o join executions e on e.id = o.id
      where e.status = 'queued'
      order by o.place
      limit (select slots from free)
      for update of e skip locked
    )`;

/** Of the owner $2, who has limits, and whose lock the claim holds alone. */
export const PICK_OF_LIMITED_OWNER = `${offered({
  owners: 'owners as materialized (select $2::bigint as user_id where (select slots from free) > 0)',
  rival: '0',
  unless: '',
})}, ${PICKED}`;

/** Served by executions_owner_running_idx. */
const rival = `
        (select count(*) from (select from executions r where r.status = 'running' and r.user_id = o.user_id
          limit ${MANY_RUNNING}) r)`;

/** Of all owners, but of those with limits only the ones whose locks the claim holds: $9. */
export const PICK_OF_ALL = `${offered({
  owners: OWNERS_WITH_QUEUE,
  rival,
  unless: 'and (l.user_id is null or o.user_id = any($9::bigint[]))',
})}, ${PICKED}`;

/**
 * Takes the locks of the owners with limits of whom a shared agent would get runs as things look now, by rising id; answers
 * them. Takes the first six parameters of the claim.
 */
export const LOCK_OWNERS = {
  name: 'claim-lock-owners',
  text: `${offered({ owners: OWNERS_WITH_QUEUE, rival, unless: '' })}, wanted as materialized (
      select distinct user_id from offered where limited and place <= (select slots from free) order by user_id
    )
    select user_id, pg_advisory_xact_lock(${lockKey('user_id')}) from wanted`,
};
