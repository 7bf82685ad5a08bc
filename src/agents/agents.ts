import { and, asc, eq, inArray, isNull, sql } from 'drizzle-orm';
import type { PgUpdateSetSource } from 'drizzle-orm/pg-core';
import { changedFields, recordAudit } from '../audit/record.ts';
import { type Queryable, sqlState, type Tx } from '../db/database.ts';
import { agents } from '../db/schema.ts';
import { QUEUE_TOPIC } from '../executions/queue.ts';
import { type Actor, requireAccess } from '../http/access.ts';
import { requireVersion } from '../http/etag.ts';
import { conflict, Problem } from '../http/problem.ts';
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
  requireAdminToShare(actor, input.shared);
  const { shared, ...facts } = input;
  const wanted = { ...facts, ...(shared === undefined ? {} : { shared }) };
  const inserted = await tx.orm
    .insert(agents)
    .values({ userId: actor.userId, ...wanted })
    .onConflictDoNothing({ target: [agents.userId, agents.name], where: isNull(agents.deletedAt) })
    .returning();
  if (inserted[0]) return { agent: told(tx, actor, null, inserted[0]), created: true };

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
  if (changed) return { agent: told(tx, actor, before, after), created: false };
  if (before.status !== after.status) emitEvents(tx, [agentActivity(after, 'registered')]);
  return { agent: after, created: false };
}

function requireAdminToShare(actor: Actor, shared: boolean | undefined): void {
  if (shared !== undefined && actor.role !== 'admin') {
    throw new Problem('forbidden', 'Only an admin may say whether an agent is shared: leave shared out.');
  }
}

/**
 * Changes the facts of an agent that are given and differ. `expected` are the versions of which it must have one, else 412;
 * 409 for a name that another agent of its owner has.
 */
export async function updateAgent(
  tx: Tx,
  actor: Actor,
  id: number,
  input: { [K in keyof Registration]?: Registration[K] | undefined } & { draining?: boolean | undefined },
  expected: readonly number[] | undefined,
): Promise<Agent> {
  requireAdminToShare(actor, input.shared);
  const before = await lockAgent(tx, actor, id);
  requireVersion('agent', before, expected);
  const wanted = Object.fromEntries(Object.entries(input).filter(([, value]) => value !== undefined));
  if (Object.keys(changedFields(pick(before, wanted), wanted)).length === 0) return before;
  const after = await write(tx, id, wanted);
  told(tx, actor, before, after);
  // Its long polls look again: they end when it drains, and may find more when it can do more.
  tx.ring(QUEUE_TOPIC);
  return after;
}

/**
 * Removes an agent from the registry. Runs that it holds may still be reported. 409 while tasks or queued runs are pinned to
 * it: they would wait for it for ever.
 */
export async function deleteAgent(
  tx: Tx,
  actor: Actor,
  id: number,
  expected: readonly number[] | undefined,
): Promise<void> {
  const before = await lockAgent(tx, actor, id);
  requireVersion('agent', before, expected);
  const { rows } = await tx.query<{ tasks: number; runs: number }>({
    name: 'agent-pinned',
    text: `
      select (select count(*)::int from tasks where agent_id = $1 and status <> 'deleted') as tasks,
        (select count(*)::int from executions where pinned_agent_id = $1 and status = 'queued') as runs`,
    values: [id],
  });
  const { tasks = 0, runs = 0 } = rows[0] ?? {};
  if (tasks + runs > 0) {
    throw conflict(
      `The agent ${id} is the only one that may run what is pinned to it (tasks: ${tasks}, queued runs: ${runs}): give the tasks another agent_id (or null) and cancel the runs first.`,
    );
  }
  const after = await write(tx, id, { deletedAt: sql`now()`, status: 'offline' });
  recordAudit(tx, actor, {
    operation: 'DELETE',
    entityType: 'agent',
    entityId: id,
    ownerId: after.userId,
    changedFields: changedFields(facts(before), null),
  });
  emitEvents(tx, [agentActivity(after, 'deleted')]);
  tx.ring(QUEUE_TOPIC);
}

async function lockAgent(tx: Tx, actor: Actor, id: number): Promise<Agent> {
  const found = (await lockAgents(tx, [id])).get(id);
  return requireAccess(actor, found?.deletedAt === null ? found : undefined, 'agent', id);
}

async function write(tx: Tx, id: number, changes: PgUpdateSetSource<typeof agents>): Promise<Agent> {
  const [after] = await tx.orm
    .update(agents)
    .set({ ...changes, version: sql`${agents.version} + 1`, updatedAt: sql`now()` })
    .where(eq(agents.id, id))
    .returning()
    .catch((error: unknown) => {
      if (sqlState(error) === '23505') throw conflict(`Another agent of yours has that name: choose another.`);
      throw error;
    });
  if (!after) throw new Error('The update answered no row.');
  return after;
}

function told(tx: Tx, actor: Actor, before: Agent | null, after: Agent): Agent {
  recordAudit(tx, actor, {
    operation: before ? 'UPDATE' : 'CREATE',
    entityType: 'agent',
    entityId: after.id,
    ownerId: after.userId,
    changedFields: changedFields(before && facts(before), facts(after)),
  });
  emitEvents(tx, [agentActivity(after, before ? 'updated' : 'registered')]);
  return after;
}

/** What of an agent is said by people, and so is audited; the rest is its heartbeat. */
const facts = ({ name, type, capabilities, maxConcurrency, shared, draining }: Agent) => ({
  name,
  type,
  capabilities,
  maxConcurrency,
  shared,
  draining,
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

/** The same, kept from being removed until the transaction ends: for whoever makes something depend on it. */
export async function holdAgent(tx: Tx, id: number): Promise<Agent | undefined> {
  const [agent] = await tx.orm
    .select()
    .from(agents)
    .where(and(eq(agents.id, id), isNull(agents.deletedAt)))
    .for('share');
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
  // As locked, or it could be marked offline in between, and nobody would be told that it is back.
  const before = await lockAgent(tx, actor, id);
  const [after] = await tx.orm
    .update(agents)
    .set({
      lastActiveAt: sql`now()`,
      status: status ?? sql`case when ${agents.status} = 'offline' then 'idle' else ${agents.status} end`,
    })
    .where(eq(agents.id, id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  if (after.status !== before.status) emitEvents(tx, [agentActivity(after, 'heartbeat')]);
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
  emitEvents(
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
