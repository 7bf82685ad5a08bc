import { and, asc, eq, inArray, isNull, sql } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { agents } from '../db/schema.ts';
import { type Actor, requireAccess } from '../http/access.ts';
import { Problem } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { agentActivity } from './agent-events.ts';

export type Agent = typeof agents.$inferSelect;

/** What may be said of an agent when it registers. */
export interface Registration {
  name: string;
  type: Agent['type'];
  capabilities: string[];
  maxConcurrency: number;
  shared?: boolean | undefined;
}

/**
 * Registers an agent, or, when the caller has one of that name, brings that one up to date. Only admins may say whether it
 * is shared.
 */
export async function registerAgent(
  tx: Tx,
  actor: Actor,
  input: Registration,
): Promise<{ agent: Agent; created: boolean }> {
  if (input.shared !== undefined && actor.role !== 'admin') {
    throw new Problem('forbidden', 'Only an admin may say whether an agent is shared: leave shared out.');
  }
  const { shared, ...facts } = input;
  const wanted = { ...facts, ...(shared === undefined ? {} : { shared }) };
  const inserted = await tx.orm
    .insert(agents)
    .values({ userId: actor.userId, ...wanted })
    .onConflictDoNothing({ target: [agents.userId, agents.name], where: isNull(agents.deletedAt) })
    .returning();
  if (inserted[0]) return { agent: await told(tx, actor, null, inserted[0]), created: true };

  const [before] = await tx.orm
    .select()
    .from(agents)
    .where(and(eq(agents.userId, actor.userId), eq(agents.name, input.name), isNull(agents.deletedAt)))
    .for('no key update');
  if (!before) throw new Problem('conflict', 'The agent of that name is being removed: try again.');
  const changed = Object.keys(changedFields(pick(before, wanted), wanted)).length > 0;
  const [after] = await tx.orm
    .update(agents)
    .set({
      ...wanted,
      lastActiveAt: sql`now()`,
      // It starts anew: what it held before is leased still, and shows as busy.
      status: before.status === 'busy' ? 'busy' : 'idle',
      ...(changed ? { version: sql`${agents.version} + 1`, updatedAt: sql`now()` } : {}),
    })
    .where(eq(agents.id, before.id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  if (changed) return { agent: await told(tx, actor, before, after), created: false };
  if (before.status !== after.status) await emitEvents(tx, [agentActivity(after, 'registered')]);
  return { agent: after, created: false };
}

async function told(tx: Tx, actor: Actor, before: Agent | null, after: Agent): Promise<Agent> {
  await recordAudit(tx, actor, {
    operation: before ? 'UPDATE' : 'CREATE',
    entityType: 'agent',
    entityId: after.id,
    ownerId: after.userId,
    changedFields: changedFields(before && facts(before), facts(after)),
  });
  await emitEvents(tx, [agentActivity(after, before ? 'updated' : 'registered')]);
  return after;
}

/** What of an agent is said by people, and so is audited; the rest is its heartbeat. */
const facts = ({ name, type, capabilities, maxConcurrency, shared }: Agent) => ({
  name,
  type,
  capabilities,
  maxConcurrency,
  shared,
});

const pick = (row: object, like: object) =>
  Object.fromEntries(Object.keys(like).map((key) => [key, (row as Record<string, unknown>)[key]]));

/** The agent, if it exists and is not deleted. */
export async function findAgent(q: Queryable, id: number): Promise<Agent | undefined> {
  const [agent] = await q.orm
    .select()
    .from(agents)
    .where(and(eq(agents.id, id), isNull(agents.deletedAt)));
  return agent;
}

/** The agent by the owner rule: 404 or 403 otherwise. */
export async function requireAgent(q: Queryable, actor: Actor, id: number): Promise<Agent> {
  return requireAccess(actor, await findAgent(q, id), 'agent', id);
}

/** Notes that an agent is alive, and what it says of itself. One that was offline and says nothing is idle again. */
export async function heartbeatAgent(
  tx: Tx,
  actor: Actor,
  id: number,
  status: Agent['status'] | undefined,
): Promise<Agent> {
  const before = await requireAgent(tx, actor, id);
  const [after] = await tx.orm
    .update(agents)
    .set({
      lastActiveAt: sql`now()`,
      status: status ?? sql`case when ${agents.status} = 'offline' then 'idle' else ${agents.status} end`,
    })
    .where(eq(agents.id, id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  if (after.status !== before.status) await emitEvents(tx, [agentActivity(after, 'heartbeat')]);
  return after;
}

/** Marks as offline the agents that were silent for too long, and tells of it; answers how many. */
export async function markSilentAgents(tx: Tx, afterSeconds: number): Promise<number> {
  const silent = await tx.orm
    .update(agents)
    .set({ status: 'offline' })
    .where(
      inArray(
        agents.id,
        tx.orm
          .select({ id: agents.id })
          .from(agents)
          .where(
            sql`deleted_at is null and status <> 'offline' and last_active_at < now() - ${afterSeconds} * interval '1 second'`,
          )
          .orderBy(asc(agents.id))
          .limit(500)
          .for('no key update', { skipLocked: true }),
      ),
    )
    .returning();
  await emitEvents(
    tx,
    silent.map((agent) => agentActivity(agent, 'offline')),
  );
  return silent.length;
}

/** Locks agents, in rising order of id so that two who lock several never wait for each other, and answers them by id. */
export async function lockAgents(tx: Tx, ids: readonly number[]): Promise<Map<number, Agent>> {
  const rows = await tx.orm
    .select()
    .from(agents)
    .where(inArray(agents.id, [...new Set(ids)]))
    .orderBy(asc(agents.id))
    .for('no key update');
  return new Map(rows.map((row) => [row.id, row]));
}
