import { and, asc, eq, inArray, lt, lte, sql } from 'drizzle-orm';
import { lockAgents } from '../agents/agents.ts';
import { changedFields, recordAudits } from '../audit/record.ts';
import type { Database } from '../db/database.ts';
import { executions } from '../db/schema.ts';
import { keepStreamed } from '../executions/output.ts';
import { settleEnd } from '../executions/settle.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';

const BATCH = 100;

/**
 * Takes back the runs whose lease is over, a batch at a time, and settles each as the end it is: cancelled when that was
 * asked for, a timeout when its deadline has passed, else a lost lease. It touches only rows that are `running` with a
 * lease that is over at the moment of the update, so queued runs, ended ones, and ones whose agent got through just now
 * stay as they are. Any number of processes may reap at once. Answers how many it took.
 */
export async function reapLeases(db: Database): Promise<number> {
  return db.transaction(async (tx) => {
    // Found without locks, since locks go agent → task → run (executions/lease.ts) and this starts from the run.
    const found = await tx.orm
      .select({ id: executions.id, taskId: executions.taskId, agentId: executions.agentId })
      .from(executions)
      .where(and(eq(executions.status, 'running'), lt(executions.leaseExpiresAt, sql`now()`)))
      .orderBy(asc(executions.leaseExpiresAt))
      .limit(BATCH);
    if (found.length === 0) return 0;
    const agents = await lockAgents(
      tx,
      found.flatMap(({ agentId }) => agentId ?? []),
    );
    const tasks = await lockTasks(
      tx,
      found.map(({ taskId }) => taskId),
    );
    const lost = await tx.orm
      .update(executions)
      .set({
        status: sql`case when cancel_requested then 'cancelled' when deadline_at <= now() then 'timeout' else 'failed' end`,
        cause: sql`case when cancel_requested then 'cancelled' when deadline_at <= now() then 'run_timeout' else 'lease_lost' end`,
        errorText: sql`case when cancel_requested then 'Cancelled; the agent did not confirm it before its lease was over.'
          when deadline_at <= now() then 'Not finished within ' || timeout_seconds || ' s.'
          else 'The agent was not heard of until its lease was over.' end`,
        endedAt: sql`now()`,
        leaseToken: null,
        // Who held it may still report, and is heard then (executions/orphans.ts).
        lostToken: sql`lease_token`,
        leaseExpiresAt: null,
      })
      .where(
        and(
          inArray(
            executions.id,
            found.map(({ id }) => id),
          ),
          eq(executions.status, 'running'),
          lt(executions.leaseExpiresAt, sql`now()`),
        ),
      )
      .returning();
    recordAudits(
      tx,
      null,
      lost.map((run) => ({
        operation: 'UPDATE',
        entityType: 'execution',
        entityId: run.id,
        ownerId: run.userId,
        changedFields: changedFields({ status: 'running' }, { status: run.status, cause: run.cause }),
      })),
    );
    for (const run of lost) {
      const task = tasks.get(run.taskId);
      const agent = run.agentId === null ? undefined : agents.get(run.agentId);
      if (task) await settleEnd(tx, task, agent, await keepStreamed(tx, run));
    }
    return lost.length;
  });
}

/**
 * Ends the runs that no agent took in time, a batch at a time: cancelled, and whoever waits behind them has its turn. A run
 * that waits for another one does not wait for an agent yet. Any number of processes may do so at once. Answers how many.
 * Served by executions_expiry_idx.
 */
export async function endExpired(db: Database): Promise<number> {
  return db.transaction(async (tx) => {
    const expired = and(
      eq(executions.status, 'queued'),
      lte(executions.expiresAt, sql`now()`),
      lte(executions.availableAt, sql`now()`),
    );
    // Found without locks, since locks go task → run (executions/lease.ts).
    const found = await tx.orm
      .select({ id: executions.id, taskId: executions.taskId })
      .from(executions)
      .where(expired)
      .orderBy(asc(executions.expiresAt))
      .limit(BATCH);
    if (found.length === 0) return 0;
    const tasks = await lockTasks(
      tx,
      found.map(({ taskId }) => taskId),
    );
    const ids = found.map(({ id }) => id);
    const ended = await tx.orm
      .update(executions)
      .set({
        status: 'cancelled',
        cause: 'queue_expired',
        errorText: sql`'No agent took it within ' || round(extract(epoch from expires_at - available_at)) || ' s.'`,
        endedAt: sql`now()`,
      })
      .where(
        inArray(
          executions.id,
          // Those that an agent is taking at this moment are its own.
          tx.orm
            .select({ id: executions.id })
            .from(executions)
            .where(and(inArray(executions.id, ids), expired))
            .for('update', { skipLocked: true }),
        ),
      )
      .returning();
    recordAudits(
      tx,
      null,
      ended.map((run) => ({
        operation: 'UPDATE',
        entityType: 'execution',
        entityId: run.id,
        ownerId: run.userId,
        changedFields: changedFields({ status: 'queued' }, { status: run.status, cause: run.cause }),
      })),
    );
    for (const run of ended) {
      const task = tasks.get(run.taskId);
      if (task) await settleEnd(tx, task, undefined, run);
    }
    return ended.length;
  });
}
