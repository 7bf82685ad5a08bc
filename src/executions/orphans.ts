import { and, eq, isNotNull, isNull, type SQL, sql } from 'drizzle-orm';
import { agentActivity } from '../agents/agent-events.ts';
import { findAgent } from '../agents/agents.ts';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { executions, orphanResults } from '../db/schema.ts';
import { type Actor, ownedBy, requireAccess } from '../http/access.ts';
import { type Page, type PageRequest, paginate } from '../http/pagination.ts';
import { conflict } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { cancelQueuedExecutions, requireExecution, smallResult } from './executions.ts';
import { ERROR_PREVIEW_CHARACTERS, type Execution, PREVIEW_CHARACTERS } from './schemas.ts';
import { settleAdopted } from './settle.ts';

// Late results. Who lost its lease may have done the work all the same, and says so too late: the run is over, and perhaps
// somebody else is at it again. Such a report changes nothing, or two could both be right; but it is kept beside the run, once
// a lease, and the run's owner may take it for the result.

type Orphan = typeof orphanResults.$inferSelect;

/** A late result as lists have it: of its output and error the ends, and of its result only a small one. */
export type OrphanRow = Omit<Orphan, 'outputText' | 'leaseToken'> & { taskId: number; outputPreview: string | null };

const summaryColumns = {
  id: orphanResults.id,
  executionId: orphanResults.executionId,
  taskId: executions.taskId,
  userId: orphanResults.userId,
  agentId: orphanResults.agentId,
  status: orphanResults.status,
  outputPreview: sql<string | null>`right(${orphanResults.outputText}, ${sql.raw(String(PREVIEW_CHARACTERS))})`,
  errorText: sql<string | null>`right(${orphanResults.errorText}, ${sql.raw(String(ERROR_PREVIEW_CHARACTERS))})`,
  outputTruncated: orphanResults.outputTruncated,
  result: smallResult(orphanResults.result),
  adoptedBy: orphanResults.adoptedBy,
  createdAt: orphanResults.createdAt,
};

/**
 * Keeps a report under a lease that the reaper took away, and answers its id; that of the first when it comes again.
 * Undefined when the token is of no such lease.
 */
export async function keepOrphan(
  tx: Tx,
  actor: Actor,
  executionId: number,
  report: Pick<Orphan, 'leaseToken' | 'status' | 'outputText' | 'errorText' | 'outputTruncated' | 'result'>,
): Promise<number | undefined> {
  const [run] = await tx.orm
    .select()
    .from(executions)
    .where(and(eq(executions.id, executionId), eq(executions.lostToken, report.leaseToken)));
  if (!run) return undefined;
  // Without an output of its own, the report is about what was streamed, which the run has.
  const streamed =
    report.outputText === null ? { outputText: run.outputText, outputTruncated: run.outputTruncated } : {};
  const [kept] = await tx.orm
    .insert(orphanResults)
    .values({ ...report, ...streamed, executionId, userId: run.userId, agentId: run.agentId })
    .onConflictDoNothing()
    .returning({ id: orphanResults.id });
  if (!kept) {
    const [first] = await tx.orm
      .select({ id: orphanResults.id })
      .from(orphanResults)
      .where(and(eq(orphanResults.executionId, executionId), eq(orphanResults.leaseToken, report.leaseToken)));
    return first?.id;
  }
  recordAudit(tx, actor, {
    operation: 'CREATE',
    entityType: 'orphan_result',
    entityId: kept.id,
    ownerId: run.userId,
    changedFields: changedFields(null, { executionId, agentId: run.agentId, status: report.status }),
  });
  const agent = run.agentId === null ? undefined : await findAgent(tx, run.agentId);
  if (agent) emitEvents(tx, [agentActivity(agent, 'late_result', { taskId: run.taskId, executionId })]);
  return kept.id;
}

/** A page of late results, newest first unless asked otherwise: the caller's, or those of one run by its owner rule. */
export async function listOrphans(
  q: Queryable,
  actor: Actor,
  query: PageRequest & { sort_order?: 'asc' | 'desc' | undefined; adopted?: boolean | undefined },
  executionId?: number,
): Promise<Page<OrphanRow>> {
  if (executionId !== undefined) await requireExecution(q, actor, executionId);
  const { sort_order: order = 'desc', adopted } = query;
  const filter = and(
    executionId === undefined ? ownedBy(actor, orphanResults.userId) : eq(orphanResults.executionId, executionId),
    adopted === undefined ? undefined : (adopted ? isNotNull : isNull)(orphanResults.adoptedBy),
  );
  return paginate({
    page: query,
    scope: ['orphan-results', executionId === undefined ? actor.userId : { executionId }, order, adopted],
    sort: { by: sql`${orphanResults.createdAt}`, type: 'timestamptz' },
    order,
    id: sql`${orphanResults.id}`,
    filter,
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ ...summaryColumns, key })
        .from(orphanResults)
        .innerJoin(executions, eq(executions.id, orphanResults.executionId))
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ key: rowKey, ...row }) => ({ row, id: row.id, key: rowKey }));
    },
    count: (where: SQL | undefined) => q.orm.$count(orphanResults, where),
  });
}

/**
 * Every attempt of the fire that a run belongs to: back to the first one by their keys, and from there on by
 * executions_task_idx, since no attempt is older than the first.
 */
const FIRE = {
  name: 'fire-attempts',
  text: `
    with recursive back as (
      select id, retry_of, created_at from executions where id = $1
      union all
      select e.id, e.retry_of, e.created_at from back join executions e on e.id = back.retry_of
    ), first as (
      select id, created_at from back order by id limit 1
    ), later as materialized (
      select id, retry_of from executions
      where task_id = $2 and created_at >= (select created_at from first) and retry_of is not null
    ), fire as (
      select id from first
      union
      select later.id from fire join later on later.retry_of = fire.id
    )
    select e.id, e.status from fire join executions e on e.id = fire.id order by e.id`,
};

/**
 * Takes a late result for the result of its fire: a run of its own, `adopted`, that ends now. A retry that waits is cancelled.
 * Throws a 409 when that was done already, when the fire has succeeded, and while an agent is at a retry of it.
 */
export async function adoptOrphan(tx: Tx, actor: Actor, id: number): Promise<Execution> {
  const [found] = await tx.orm.select().from(orphanResults).where(eq(orphanResults.id, id));
  const { executionId } = requireAccess(actor, found, 'orphan result', id);
  const [lost] = await tx.orm.select().from(executions).where(eq(executions.id, executionId));
  if (!lost) throw new Error('A late result outlived its run.');
  const task = (await lockTasks(tx, [lost.taskId])).get(lost.taskId);
  const [orphan] = await tx.orm.select().from(orphanResults).where(eq(orphanResults.id, id)).for('update');
  if (!task || !orphan) throw new Error('A late result went while it was looked at.');
  if (orphan.adoptedBy !== null) {
    throw conflict(`The orphan result ${id} was adopted already, as execution ${orphan.adoptedBy}.`);
  }
  // Ends of runs lock their task first, so nothing but a claim can happen to these now.
  const { rows: attempts } = await tx.query<Pick<Execution, 'id' | 'status'>>({
    ...FIRE,
    values: [lost.id, lost.taskId],
  });
  const success = attempts.find(({ status }) => status === 'success');
  if (success) throw conflict(`Execution ${success.id} of the same fire has succeeded: there is nothing to adopt for.`);
  const running = attempts.find(({ status }) => status === 'running');
  const waiting = attempts.filter(({ status }) => status === 'queued').map((attempt) => attempt.id);
  const atIt = `an agent is at it: cancel it, or wait for its end`;
  if (running) throw conflict(`Execution ${running.id} is a retry of the same fire, and ${atIt}.`);
  if (waiting.length > 0 && (await cancelQueuedExecutions(tx, actor, [task], waiting)) < waiting.length) {
    throw conflict(`Execution ${waiting[0]} is a retry of the same fire, and ${atIt}.`);
  }

  const [run] = await tx.orm.insert(executions).values(adopted(lost, orphan)).returning();
  if (!run) throw new Error('The insert answered no row.');
  await tx.orm.update(orphanResults).set({ adoptedBy: run.id }).where(eq(orphanResults.id, id));
  recordAudit(tx, actor, {
    operation: 'CREATE',
    entityType: 'execution',
    entityId: run.id,
    ownerId: run.userId,
    changedFields: changedFields(null, {
      taskId: run.taskId,
      trigger: run.trigger,
      status: run.status,
      cause: run.cause,
      attempt: run.attempt,
      retryOf: run.retryOf,
    }),
  });
  recordAudit(tx, actor, {
    operation: 'UPDATE',
    entityType: 'orphan_result',
    entityId: id,
    ownerId: run.userId,
    changedFields: { adopted_by: { old: null, new: run.id } },
  });
  // A fire that had failed for good before is not one more failure.
  const last = attempts.at(-1)?.status;
  const counted = run.status === 'failed' && (last === 'failed' || last === 'timeout');
  await settleAdopted(tx, task, run, counted);
  return run;
}

/** The run that is made of a late result: the lost one as its agent says that it ended. */
function adopted(lost: Execution, orphan: Orphan): typeof executions.$inferInsert {
  return {
    taskId: lost.taskId,
    userId: lost.userId,
    agentId: lost.agentId,
    trigger: 'adopted',
    occurrenceId: lost.occurrenceId,
    scheduledFor: lost.scheduledFor,
    attempt: lost.attempt,
    lostLeases: lost.lostLeases,
    retryOf: lost.id,
    status: orphan.status,
    cause: orphan.status === 'failed' ? 'agent_failed' : null,
    skillName: lost.skillName,
    params: lost.params,
    priority: lost.priority,
    timeoutSeconds: lost.timeoutSeconds,
    heartbeatTimeoutSeconds: lost.heartbeatTimeoutSeconds,
    pinnedAgentId: lost.pinnedAgentId,
    requiredCapabilities: lost.requiredCapabilities,
    availableAt: lost.availableAt,
    startedAt: lost.startedAt,
    endedAt: sql`now()` as unknown as Date,
    outputText: orphan.outputText,
    errorText: orphan.errorText,
    outputTruncated: orphan.outputTruncated,
    result: orphan.result,
  };
}
