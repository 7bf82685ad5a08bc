import { and, arrayContains, arrayOverlaps, eq, inArray, isNull, or, type SQL, sql } from 'drizzle-orm';
import type { Queryable } from '../db/database.ts';
import { agents } from '../db/schema.ts';
import { type Actor, ownedBy, requireAccess } from '../http/access.ts';
import { type Page, paginate, type SortKey } from '../http/pagination.ts';
import { type Agent, findAgent } from './agents.ts';
import type { AGENT_SORTS, AgentQuery } from './schemas.ts';

/** The agent, for whoever may look at it: its owner, an admin, and everybody when it is shared. */
export async function getVisibleAgent(q: Queryable, actor: Actor, id: number): Promise<Agent> {
  const agent = await findAgent(q, id);
  return agent?.shared ? agent : requireAccess(actor, agent, 'agent', id);
}

const SORT_KEYS: Record<(typeof AGENT_SORTS)[number], SortKey> = {
  created_at: { by: sql`${agents.createdAt}`, type: 'timestamptz' },
  name: { by: sql`${agents.name}`, type: 'text' },
  // It moves as agents are heard of: one that is heard of between two pages may be on both or on neither.
  last_active_at: { by: sql`${agents.lastActiveAt}`, type: 'timestamptz' },
};

/** A page of the agents that the caller may see: its own and the shared ones, all for admins. */
export async function listAgents(q: Queryable, actor: Actor, query: AgentQuery): Promise<Page<Agent>> {
  const { limit, offset, cursor, total, sort_by = 'created_at', ...filters } = query;
  const order = query.sort_order ?? (sort_by === 'name' ? 'asc' : 'desc');
  const { type, status, shared, capabilities, match = 'any' } = filters;
  const own = ownedBy(actor, agents.userId);
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['agents', actor.role === 'admin' ? 'all' : actor.userId, sort_by, order, filters],
    sort: SORT_KEYS[sort_by],
    order,
    id: sql`${agents.id}`,
    filter: and(
      sql`${agents.deletedAt} is null`,
      own && or(own, sql`${agents.shared}`),
      type === undefined ? undefined : eq(agents.type, type),
      status === undefined ? undefined : eq(agents.status, status),
      shared === undefined ? undefined : eq(agents.shared, shared),
      capabilities === undefined
        ? undefined
        : (match === 'all' ? arrayContains : arrayOverlaps)(agents.capabilities, capabilities),
    ),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ row: agents, key })
        .from(agents)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ row, key }) => ({ row, id: row.id, key }));
    },
    count: (where: SQL | undefined) => q.orm.$count(agents, where),
  });
}

/** The agents that may run tasks of these owners, by id: theirs and the shared ones. Served by agents_owner_name_key and agents_shared_idx. */
export async function findAgentsFor(q: Queryable, ownerIds: readonly number[]): Promise<Agent[]> {
  return q.orm
    .select()
    .from(agents)
    .where(and(isNull(agents.deletedAt), or(inArray(agents.userId, [...ownerIds]), sql`${agents.shared}`)))
    .orderBy(agents.id);
}
