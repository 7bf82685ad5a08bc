import { type AnyColumn, and, desc, eq, getTableColumns, gte, lt, type SQL, sql } from 'drizzle-orm';
import { agentActivity } from '../agents/agent-events.ts';
import { findAgent } from '../agents/agents.ts';
import { changedFields, recordAudit, recordAudits } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { executions } from '../db/schema.ts';
import { type Actor, mayAccess, ownedBy, requireAccess } from '../http/access.ts';
import { type Page, type PageRequest, paginate } from '../http/pagination.ts';
import { conflict, notFound, Problem } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { type Task, type TaskFacts, taskStatusUpdate } from '../tasks/task-events.ts';
import { QUEUE_TOPIC, queueDetail } from './queue.ts';
import {
  ERROR_PREVIEW_CHARACTERS,
  type Execution,
  LISTED_PARAMS_BYTES,
  LISTED_RESULT_BYTES,
  PREVIEW_CHARACTERS,
} from './schemas.ts';
import { settleEnd } from './settle.ts';

/**
 * A run without its output, but with the end of it: what lists read. Of the error it has the end; large params and results
 * are null.
 */
export type ExecutionRow = Omit<Execution, 'outputText' | 'params'> & {
  params: Execution['params'] | null;
  outputPreview: string | null;
};

/** A result as lists have it: null when it is large. */
export const smallResult = (result: AnyColumn) =>
  sql<unknown>`case when octet_length(${result}::text) <= ${sql.raw(String(LISTED_RESULT_BYTES))} then ${result} end`;

// Cut in the database, so that what is long never leaves it.
const { outputText, ...columns } = getTableColumns(executions);
const summaryColumns = {
  ...columns,
  params: sql<Execution['params'] | null>`
    case when octet_length(${columns.params}::text) <= ${sql.raw(String(LISTED_PARAMS_BYTES))} then ${columns.params} end`,
  errorText: sql<string | null>`right(${columns.errorText}, ${sql.raw(String(ERROR_PREVIEW_CHARACTERS))})`,
  result: smallResult(columns.result),
  outputPreview: sql<string | null>`right(${outputText}, ${sql.raw(String(PREVIEW_CHARACTERS))})`,
};

/** Queues a run that somebody asked for; it does not wait for other runs of the task. Tells of it and wakes agents. */
export async function enqueueExecution(
  tx: Tx,
  task: Task,
  input: { trigger: 'manual'; actor: Actor; params?: Record<string, unknown> | undefined },
): Promise<Execution> {
  const [run] = await tx.orm
    .insert(executions)
    .values({
      taskId: task.id,
      userId: task.userId,
      trigger: input.trigger,
      scheduledFor: sql`now()`,
      skillName: task.skillName,
      params: input.params ?? task.params,
      priority: task.priority,
      timeoutSeconds: task.timeoutSeconds,
      heartbeatTimeoutSeconds: task.heartbeatTimeoutSeconds,
      pinnedAgentId: task.agentId,
      requiredCapabilities: task.requiredCapabilities,
      availableAt: sql`now()`,
      expiresAt: sql`now() + ${task.queueTtlSeconds}::int * interval '1 second'`,
    })
    .returning();
  if (!run) throw new Error('The insert answered no row.');
  recordAudit(tx, input.actor, {
    operation: 'CREATE',
    entityType: 'execution',
    entityId: run.id,
    ownerId: run.userId,
    changedFields: changedFields(null, {
      taskId: run.taskId,
      trigger: run.trigger,
      params: run.params,
      status: run.status,
    }),
  });
  emitEvents(tx, [
    taskStatusUpdate(task, { previousStatus: task.status, executionId: run.id, executionStatus: run.status }),
  ]);
  tx.ring(QUEUE_TOPIC, queueDetail(run));
  return run;
}

/**
 * Cancels the queued runs of tasks that the caller has locked, or of those `only` some, and answers how many. A run that an
 * agent is taking at this moment counts as taken.
 */
export async function cancelQueuedExecutions(
  tx: Tx,
  actor: Actor | null,
  tasks: readonly TaskFacts[],
  only: readonly number[] | null = null,
): Promise<number> {
  const { rows } = await tx.query<{ id: number; task_id: number }>({
    text: `
      update executions set status = 'cancelled', cause = 'cancelled', ended_at = now() where id in (
        select id from executions
        where task_id = any($1::bigint[]) and status = 'queued' and ($2::bigint[] is null or id = any($2))
        for update skip locked
      ) returning id, task_id`,
    values: [tasks.map(({ id }) => id), only],
  });
  const byId = new Map(tasks.map((task) => [task.id, task]));
  const cancelled = rows.flatMap(({ id, task_id: taskId }) => {
    const task = byId.get(taskId);
    return task ? [{ id, task }] : [];
  });
  recordAudits(
    tx,
    actor,
    cancelled.map(({ id, task }) => ({
      operation: 'UPDATE',
      entityType: 'execution',
      entityId: id,
      ownerId: task.userId,
      changedFields: { status: { old: 'queued', new: 'cancelled' } },
    })),
  );
  emitEvents(
    tx,
    cancelled.map(({ id, task }) =>
      taskStatusUpdate(task, { previousStatus: task.status, executionId: id, executionStatus: 'cancelled' }),
    ),
  );
  return cancelled.length;
}

/** Cancels the queued runs of a task that the caller has locked, and asks its running ones to stop. */
export async function cancelOpenExecutions(tx: Tx, actor: Actor | null, task: TaskFacts): Promise<void> {
  await cancelQueuedExecutions(tx, actor, [task]);
  // Those that an agent took at this moment are still queued in this transaction's eyes.
  await tx.query({
    text: `update executions set cancel_requested = true where task_id = $1 and status in ('queued', 'running')`,
    values: [task.id],
  });
}

/** The newest runs of a task, for executionSummaryView. Served by executions_task_idx. */
export async function recentExecutions(q: Queryable, taskId: number, limit: number): Promise<ExecutionRow[]> {
  if (limit === 0) return [];
  return q.orm
    .select(summaryColumns)
    .from(executions)
    .where(eq(executions.taskId, taskId))
    .orderBy(desc(executions.createdAt), desc(executions.id))
    .limit(limit);
}

/** The newest runs of an agent, of those that the caller may see. Served by executions_agent_idx. */
export async function executionsOfAgent(
  q: Queryable,
  actor: Actor,
  agentId: number,
  limit: number,
): Promise<ExecutionRow[]> {
  if (limit === 0) return [];
  return q.orm
    .select(summaryColumns)
    .from(executions)
    .where(and(eq(executions.agentId, agentId), ownedBy(actor, executions.userId)))
    .orderBy(desc(executions.createdAt), desc(executions.id))
    .limit(limit);
}

/** The runs of tasks that are queued or under way, by task. Served by executions_task_open_idx. */
export async function openExecutionsOf(q: Queryable, taskIds: readonly number[]): Promise<Map<number, number[]>> {
  const { rows } = await q.query<{ task_id: number; ids: number[] }>({
    name: 'executions-open',
    text: `
      select task_id, array_agg(id order by id) as ids from executions
      where task_id = any($1::bigint[]) and status in ('queued', 'running') group by task_id`,
    values: [taskIds],
  });
  return new Map(rows.map(({ task_id, ids }) => [task_id, ids.map(Number)]));
}

/** Whether an agent is at a run of the task. Served by executions_task_open_idx. */
export async function hasRunningExecution(q: Queryable, taskId: number): Promise<boolean> {
  const rows = await q.orm
    .select({ id: executions.id })
    .from(executions)
    .where(and(eq(executions.taskId, taskId), eq(executions.status, 'running')))
    .limit(1);
  return rows.length > 0;
}

/** A page of the caller's runs, newest first unless asked otherwise. */
export async function listExecutions(
  q: Queryable,
  actor: Actor,
  query: PageRequest & {
    sort_order?: 'asc' | 'desc' | undefined;
    task_id?: number | undefined;
    agent_id?: number | undefined;
    status?: Execution['status'] | undefined;
    from?: Date | undefined;
    to?: Date | undefined;
  },
): Promise<Page<ExecutionRow>> {
  const { sort_order: order = 'desc', task_id, agent_id, status, from, to } = query;
  const filter = and(
    ownedBy(actor, executions.userId),
    task_id === undefined ? undefined : eq(executions.taskId, task_id),
    agent_id === undefined ? undefined : eq(executions.agentId, agent_id),
    status === undefined ? undefined : eq(executions.status, status),
    from === undefined ? undefined : gte(executions.createdAt, from),
    to === undefined ? undefined : lt(executions.createdAt, to),
  );
  return paginate({
    page: query,
    scope: ['executions', actor.userId, order, task_id, agent_id, status, from, to],
    sort: { by: sql`${executions.createdAt}`, type: 'timestamptz' },
    order,
    id: sql`${executions.id}`,
    filter,
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ ...summaryColumns, key })
        .from(executions)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ key: rowKey, ...row }) => ({ row, id: row.id, key: rowKey }));
    },
    count: (where: SQL | undefined) => q.orm.$count(executions, where),
  });
}

/** One run with the whole of its output, by the owner rule. */
export async function getExecution(q: Queryable, actor: Actor, id: number): Promise<Execution> {
  await requireExecution(q, actor, id);
  const [row] = await q.orm.select().from(executions).where(eq(executions.id, id));
  if (!row) throw notFound('execution', id);
  return row;
}

/**
 * The owner rule for a run: it is its owner's, and that of the owner of the agent that holds it (a shared agent reports on
 * runs of others). Answers what locks are needed for it.
 */
export async function requireExecution(
  q: Queryable,
  actor: Actor,
  id: number,
): Promise<{ taskId: number; agentId: number | null }> {
  const { rows } = await q.query<{
    task_id: number;
    agent_id: number | null;
    user_id: number;
    agent_owner: number | null;
  }>({
    name: 'execution-owner',
    text: `
      select e.task_id, e.agent_id, e.user_id, a.user_id as agent_owner
      from executions e left join agents a on a.id = e.agent_id where e.id = $1`,
    values: [id],
  });
  const [row] = rows;
  if (!row) throw notFound('execution', id);
  if (!mayAccess(actor, row.user_id) && !(row.agent_owner !== null && mayAccess(actor, row.agent_owner))) {
    throw new Problem('forbidden', `The execution ${id} belongs to somebody else.`);
  }
  return { taskId: row.task_id, agentId: row.agent_id };
}

/**
 * Cancels a run: a queued one at once; a running one is asked to stop at its next heartbeat and ended when its lease is
 * over. Cancelling a cancelled run, or asking twice, changes nothing; any other end is a 409.
 */
export async function cancelExecution(tx: Tx, actor: Actor, id: number): Promise<Execution> {
  const [found] = await tx.orm.select().from(executions).where(eq(executions.id, id)).for('update');
  // The owner alone: who runs the work for others may not cancel it.
  const run = requireAccess(actor, found, 'execution', id);
  if (run.status === 'cancelled' || (run.status === 'running' && run.cancelRequested)) return run;
  if (run.status !== 'queued' && run.status !== 'running') {
    throw conflict(`The execution ${id} has ended (${run.status}): there is nothing to cancel.`);
  }
  const queued = run.status === 'queued';
  const [after] = await tx.orm
    .update(executions)
    .set(queued ? { status: 'cancelled', cause: 'cancelled', endedAt: sql`now()` } : { cancelRequested: true })
    .where(eq(executions.id, id))
    .returning();
  if (!after) throw notFound('execution', id);
  recordAudit(tx, actor, {
    operation: 'UPDATE',
    entityType: 'execution',
    entityId: id,
    ownerId: run.userId,
    changedFields: queued
      ? { status: { old: 'queued', new: 'cancelled' } }
      : { cancel_requested: { old: false, new: true } },
  });
  if (queued) {
    const task = (await lockTasks(tx, [run.taskId])).get(run.taskId);
    if (task) await settleEnd(tx, task, undefined, after);
  } else if (run.agentId !== null) {
    const agent = await findAgent(tx, run.agentId);
    if (agent) emitEvents(tx, [agentActivity(agent, 'cancel_requested', { taskId: run.taskId, executionId: id })]);
  }
  return after;
}
