import { and, asc, eq, gte, inArray, lt, lte, type SQL, sql } from 'drizzle-orm';
import type { Queryable } from '../db/database.ts';
import { auditChain, auditLog } from '../db/schema.ts';
import { type Actor, ownedBy } from '../http/access.ts';
import { type Page, paginate } from '../http/pagination.ts';
import { Problem } from '../http/problem.ts';
import { ENTITY_TYPES } from './record.ts';
import type { AuditFilters, AuditQuery } from './schemas.ts';

/** An entry with its place in its owner's chain, which it gets within a second of being written. */
export type AuditRow = typeof auditLog.$inferSelect & {
  seq: number | null;
  hash: string | null;
  prevHash: string | null;
};

const EXPORT_BATCH = 500;
const DEFAULT_LIMIT = 20;

function filterOf(actor: Actor, filters: AuditFilters): SQL | undefined {
  const { entity_type, entity_id, user_id, operation, from, to } = filters;
  if (user_id !== undefined && user_id !== actor.userId && actor.role !== 'admin') {
    throw new Problem('forbidden', 'Only an admin may ask for what another user did: leave user_id out.');
  }
  return and(
    ownedBy(actor, auditLog.ownerId),
    // By an id alone, in all types: audit_log_entity_idx begins with the type.
    entity_type !== undefined
      ? eq(auditLog.entityType, entity_type)
      : entity_id !== undefined
        ? inArray(auditLog.entityType, [...ENTITY_TYPES])
        : undefined,
    entity_id === undefined ? undefined : eq(auditLog.entityId, entity_id),
    user_id === undefined ? undefined : eq(auditLog.userId, user_id),
    operation === undefined ? undefined : eq(auditLog.operation, operation),
    from === undefined ? undefined : gte(auditLog.createdAt, from),
    to === undefined ? undefined : lt(auditLog.createdAt, to),
  );
}

/** A page of the entries of what the caller owns (of everything for admins), newest first. */
export async function listAudit(q: Queryable, actor: Actor, query: AuditQuery): Promise<Page<AuditRow>> {
  const { limit = DEFAULT_LIMIT, offset, cursor, total, sort_order: order = 'desc', format: _, ...filters } = query;
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['audit', actor.role === 'admin' ? 'all' : actor.userId, order, filters],
    sort: { by: sql`${auditLog.createdAt}`, type: 'timestamptz' },
    order,
    id: sql`${auditLog.id}`,
    filter: filterOf(actor, filters),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ row: auditLog, chain: auditChain, key })
        .from(auditLog)
        .leftJoin(auditChain, eq(auditChain.auditId, auditLog.id))
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ row, chain, key }) => ({ row: withPlace(row, chain), id: row.id, key }));
    },
    count: (where) => q.orm.$count(auditLog, where),
  });
}

/**
 * How far each chain (with $1, that owner's alone) has come, and a time by which all of that was written: times are when
 * transactions began, rounded to milliseconds. The chains' owners one by one, since an index knows no "next other value".
 */
const ENDS = {
  name: 'audit-export-ends',
  text: `
    with recursive owners as (
      (select owner_id from audit_chain where $1::bigint is null or owner_id = $1 order by owner_id limit 1)
      union all
      select (select c.owner_id from audit_chain c where $1::bigint is null and c.owner_id > o.owner_id
        order by c.owner_id limit 1)
      from owners o where o.owner_id is not null
    )
    select clock_timestamp() + interval '1 ms' as until, coalesce((
      select jsonb_object_agg(owner_id, (select max(seq) from audit_chain c where c.owner_id = o.owner_id))
      from owners o where owner_id is not null
    ), '{}') as ends`,
};

/**
 * Every entry that the filters let through, oldest first, a batch at a time, as the log stood at the first batch. Entries
 * that got their place since are given without it: by time, those of a transaction that committed late lie behind what was
 * read already, and the chain of an export that showed only the ones after them would have holes.
 */
export async function* exportAudit(q: Queryable, actor: Actor, filters: AuditFilters): AsyncGenerator<AuditRow[]> {
  const filter = filterOf(actor, filters);
  const {
    rows: [began],
  } = await q.query<{ until: Date; ends: Record<string, number> }>({
    ...ENDS,
    values: [actor.role === 'admin' ? null : actor.userId],
  });
  if (!began) throw new Error('The query answered no row.');
  const wasPlaced = (chain: typeof auditChain.$inferSelect | null) =>
    chain !== null && chain.seq <= (began.ends[chain.ownerId] ?? 0);
  for (let after: SQL | undefined; ; ) {
    const rows = await q.orm
      .select({ row: auditLog, chain: auditChain })
      .from(auditLog)
      .leftJoin(auditChain, eq(auditChain.auditId, auditLog.id))
      .where(and(filter, lte(auditLog.createdAt, began.until), after))
      .orderBy(asc(auditLog.createdAt), asc(auditLog.id))
      .limit(EXPORT_BATCH);
    if (rows.length > 0) yield rows.map(({ row, chain }) => withPlace(row, wasPlaced(chain) ? chain : null));
    const last = rows.at(-1)?.row;
    if (!last || rows.length < EXPORT_BATCH) return;
    after = sql`(${auditLog.createdAt}, ${auditLog.id}) > (${last.createdAt.toISOString()}::timestamptz, ${last.id}::bigint)`;
  }
}

const withPlace = (row: typeof auditLog.$inferSelect, chain: typeof auditChain.$inferSelect | null): AuditRow => ({
  ...row,
  seq: chain?.seq ?? null,
  hash: chain?.hash ?? null,
  prevHash: chain?.prevHash ?? null,
});
