import { and, eq, getTableColumns, type SQL, sql } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { type AUDIT_OPERATIONS, concurrencyLimits, users } from '../db/schema.ts';
import { type Actor, mayAccess, ownedBy, requireAccess } from '../http/access.ts';
import { requireVersion } from '../http/etag.ts';
import { type Page, paginate } from '../http/pagination.ts';
import { conflict, invalid, Problem } from '../http/problem.ts';
import type { LimitQuery } from './limit-schemas.ts';
import { lockClaimsOf } from './pick.ts';
import { QUEUE_TOPIC, queueDetail } from './queue.ts';

// How many runs of an owner, or of one of its skills, may be under way at once. Claims keep to it (pick.ts); what is under way
// when a limit comes down to less goes on. What agents do of their own accord is counted and not held back.

/** A limit, and how many of the runs that it counts are under way. */
export type Limit = typeof concurrencyLimits.$inferSelect & { running: number };

/** Every claim of the owner reads all of them. */
const MAX_LIMITS = 100;

// Served by executions_owner_running_idx.
const columns = {
  ...getTableColumns(concurrencyLimits),
  running: sql<number>`(
    select count(*)::int from executions e where e.status = 'running' and e.user_id = concurrency_limits.user_id
      and (concurrency_limits.skill_name is null or e.skill_name = concurrency_limits.skill_name))`,
};

/**
 * Sets the limit of an owner (the caller; another one's for admins) for a skill, or for all together; what changes nothing
 * does nothing. `expected` are the versions of which it must have one, else 412. 409 when the owner has too many.
 */
export async function setLimit(
  tx: Tx,
  actor: Actor,
  input: { userId?: number | undefined; skillName: string | null; maxRunning: number },
  expected: readonly number[] | undefined,
): Promise<{ limit: Limit; created: boolean }> {
  const { userId = actor.userId, skillName, maxRunning } = input;
  if (!mayAccess(actor, userId)) {
    throw new Problem('forbidden', 'Only an admin may limit the runs of another user: leave user_id out.');
  }
  if (userId !== actor.userId) await requireUser(tx, userId);
  lockClaimsOf(tx, userId);
  const before = await find(
    tx,
    and(eq(concurrencyLimits.userId, userId), sql`coalesce(${concurrencyLimits.skillName}, '') = ${skillName ?? ''}`),
  );
  if (!before) {
    if (expected)
      throw new Problem('precondition-failed', 'There is no such limit yet: leave If-Match out to make it.');
    return { limit: await create(tx, actor, { userId, skillName, maxRunning }), created: true };
  }
  requireVersion('concurrency limit', before, expected);
  if (before.maxRunning === maxRunning) return { limit: before, created: false };
  await tx.orm
    .update(concurrencyLimits)
    .set({ maxRunning, version: before.version + 1, updatedAt: sql`now()` })
    .where(eq(concurrencyLimits.id, before.id));
  const after = await reread(tx, before.id);
  tell(tx, actor, 'UPDATE', before, after);
  return { limit: after, created: false };
}

async function create(
  tx: Tx,
  actor: Actor,
  row: { userId: number; skillName: string | null; maxRunning: number },
): Promise<Limit> {
  // Nobody adds one meanwhile: the caller holds the owner's lock.
  if ((await tx.orm.$count(concurrencyLimits, eq(concurrencyLimits.userId, row.userId))) >= MAX_LIMITS) {
    throw conflict(`There are ${MAX_LIMITS} concurrency limits already: delete one that is not needed first.`);
  }
  const [made] = await tx.orm.insert(concurrencyLimits).values(row).returning({ id: concurrencyLimits.id });
  if (!made) throw new Error('The insert answered no row.');
  const limit = await reread(tx, made.id);
  tell(tx, actor, 'CREATE', null, limit);
  return limit;
}

/** Removes a limit; `expected` as above. */
export async function deleteLimit(
  tx: Tx,
  actor: Actor,
  id: number,
  expected: readonly number[] | undefined,
): Promise<void> {
  const { userId } = await getLimit(tx, actor, id);
  lockClaimsOf(tx, userId);
  const before = await getLimit(tx, actor, id);
  requireVersion('concurrency limit', before, expected);
  await tx.orm.delete(concurrencyLimits).where(eq(concurrencyLimits.id, id));
  tell(tx, actor, 'DELETE', before, null);
}

/** One limit by the owner rule: 404 when there is none, 403 when it is somebody else's. */
export async function getLimit(q: Queryable, actor: Actor, id: number): Promise<Limit> {
  return requireAccess(actor, await find(q, eq(concurrencyLimits.id, id)), 'concurrency limit', id);
}

/** A page of the caller's limits (of everybody's for admins), newest first unless asked otherwise. */
export async function listLimits(q: Queryable, actor: Actor, query: LimitQuery): Promise<Page<Limit>> {
  const { limit, offset, cursor, total, sort_order: order = 'desc', user_id } = query;
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['concurrency-limits', actor.role === 'admin' ? 'all' : actor.userId, order, user_id],
    sort: { by: sql`${concurrencyLimits.createdAt}`, type: 'timestamptz' },
    order,
    id: sql`${concurrencyLimits.id}`,
    filter: and(
      ownedBy(actor, concurrencyLimits.userId),
      user_id === undefined ? undefined : eq(concurrencyLimits.userId, user_id),
    ),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ ...columns, key })
        .from(concurrencyLimits)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ key, ...row }) => ({ row, id: row.id, key }));
    },
    count: (where: SQL | undefined) => q.orm.$count(concurrencyLimits, where),
  });
}

async function find(q: Queryable, where: SQL | undefined): Promise<Limit | undefined> {
  const [limit] = await q.orm.select(columns).from(concurrencyLimits).where(where);
  return limit;
}

async function reread(tx: Tx, id: number): Promise<Limit> {
  const limit = await find(tx, eq(concurrencyLimits.id, id));
  if (!limit) throw new Error('What was written is not there.');
  return limit;
}

async function requireUser(tx: Tx, id: number): Promise<void> {
  const [user] = await tx.orm.select({ id: users.id }).from(users).where(eq(users.id, id));
  if (!user) throw invalid('body.user_id', `there is no user ${id}`);
}

/** Notes a change in the audit log, and has waiting agents look: there may be something that they may take now. */
function tell(
  tx: Tx,
  actor: Actor,
  operation: (typeof AUDIT_OPERATIONS)[number],
  before: Limit | null,
  after: Limit | null,
): void {
  const limit = after ?? before;
  if (!limit) return;
  recordAudit(tx, actor, {
    operation,
    entityType: 'concurrency_limit',
    entityId: limit.id,
    ownerId: limit.userId,
    changedFields: changedFields(before && facts(before), after && facts(after)),
  });
  tx.ring(QUEUE_TOPIC, queueDetail(limit));
}

const facts = ({ id, userId, skillName, maxRunning }: Limit) => ({ id, userId, skillName, maxRunning });
