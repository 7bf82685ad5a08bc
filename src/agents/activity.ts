import { and, eq, sql } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { agents, executions, tasks } from '../db/schema.ts';
import { cut } from '../executions/output.ts';
import type { Execution } from '../executions/schemas.ts';
import { settleEnd } from '../executions/settle.ts';
import { type Actor, mayAccess } from '../http/access.ts';
import { conflict, invalid } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { type Task, taskStatusUpdate } from '../tasks/task-events.ts';
import { taskTransition } from '../tasks/task-state.ts';
import { agentActivity } from './agent-events.ts';
import { type Agent, lockAgents } from './agents.ts';
import type { Activity } from './schemas.ts';

// What agents do of their own accord and not by a claim: a run is written for it, with the trigger `activity`. One that is
// still under way has a lease like any other, which nobody is given the token of and which ends with the task's timeout, so
// that a run whose agent falls silent ends too. Such runs are never retried.

/** Writes down what an agent says that it does, or did, for a task; 400 for an agent or task that is not the caller's. */
export async function recordActivity(tx: Tx, actor: Actor, input: Activity): Promise<Execution> {
  const agent = (await lockAgents(tx, [input.agent_id])).get(input.agent_id);
  if (!agent || agent.deletedAt !== null || !mayAccess(actor, agent.userId)) {
    throw invalid('body.agent_id', `there is no agent ${input.agent_id} of yours`);
  }
  const task = (await lockTasks(tx, [input.task_id])).get(input.task_id);
  if (!task || task.status === 'deleted' || !(task.userId === agent.userId || agent.shared)) {
    throw invalid('body.task_id', `there is no task ${input.task_id} that this agent may run`);
  }
  const open = input.execution_id === undefined ? undefined : await openRun(tx, agent, task, input.execution_id);
  await noteAlive(tx, agent, open);
  return input.status === 'running' ? start(tx, actor, agent, task, open) : end(tx, actor, agent, task, open, input);
}

/** Who reports is alive; one that was offline is back, and `agent` is brought up to date. */
async function noteAlive(tx: Tx, agent: Agent, open: Execution | undefined): Promise<void> {
  const back = agent.status === 'offline';
  if (back) agent.status = open ? 'busy' : 'idle';
  await tx.orm.update(agents).set({ lastActiveAt: sql`now()`, status: agent.status }).where(eq(agents.id, agent.id));
  if (back) emitEvents(tx, [agentActivity(agent, 'heartbeat')]);
}

async function openRun(tx: Tx, agent: Agent, task: Task, id: number): Promise<Execution> {
  const [run] = await tx.orm
    .select()
    .from(executions)
    .where(and(eq(executions.id, id), eq(executions.taskId, task.id), eq(executions.agentId, agent.id)))
    .for('update');
  if (run && run.trigger !== 'activity') {
    throw conflict(`The execution ${id} was claimed: report on it by /executions/${id}/complete with its lease_token.`);
  }
  // The same for runs of others and for none, so nobody learns which exist.
  if (run?.status !== 'running') {
    throw conflict(
      `The agent ${agent.id} is at no execution ${id} of the task ${task.id}: leave execution_id out to report a new one.`,
    );
  }
  return run;
}

async function start(tx: Tx, actor: Actor, agent: Agent, task: Task, open: Execution | undefined): Promise<Execution> {
  if (open) return open;
  const previousStatus = task.status;
  const run = await insert(tx, task, agent, {
    status: 'running',
    startedAt: sql`now()`,
    leaseToken: sql`gen_random_uuid()`,
    leaseExpiresAt: sql`now() + ${task.timeoutSeconds} * interval '1 second'`,
    deadlineAt: sql`now() + ${task.timeoutSeconds} * interval '1 second'`,
  });
  const status = taskTransition(task.status, 'run_started') ?? task.status;
  await tx.orm.update(tasks).set({ status, lastRunAt: sql`now()` }).where(eq(tasks.id, task.id));
  await tx.orm.update(agents).set({ status: 'busy' }).where(eq(agents.id, agent.id));
  await audit(tx, actor, null, run);
  emitEvents(tx, [
    taskStatusUpdate(
      { ...task, status },
      { previousStatus, executionId: run.id, executionStatus: 'running', agentId: agent.id },
    ),
    agentActivity({ ...agent, status: 'busy' }, 'running', { taskId: task.id, executionId: run.id }),
  ]);
  return run;
}

const CAUSES = { success: null, failed: 'agent_failed', timeout: 'run_timeout' } as const;

async function end(
  tx: Tx,
  actor: Actor,
  agent: Agent,
  task: Task,
  open: Execution | undefined,
  input: Activity,
): Promise<Execution> {
  const { status } = input;
  if (status === 'running') throw new Error('A run that goes on has no end.');
  const output = cut(input.output);
  const error = cut(input.error);
  const result = {
    status,
    cause: CAUSES[status],
    endedAt: sql`now()`,
    outputText: output?.text ?? null,
    errorText: error?.text ?? null,
    outputTruncated: (output?.truncated ?? false) || (error?.truncated ?? false),
    result: input.result,
    ...(input.duration_ms === undefined
      ? {}
      : { startedAt: sql`now() - ${input.duration_ms}::bigint * interval '1 millisecond'` }),
  };
  let run: Execution | undefined;
  if (open) {
    [run] = await tx.orm
      .update(executions)
      .set({ ...result, leaseToken: null, leaseExpiresAt: null })
      .where(eq(executions.id, open.id))
      .returning();
  } else {
    run = await insert(tx, task, agent, { startedAt: sql`now()`, ...result });
    await tx.orm.update(tasks).set({ lastRunAt: sql`now()` }).where(eq(tasks.id, task.id));
  }
  if (!run) throw new Error('The update answered no row.');
  await audit(tx, actor, open ?? null, run);
  await settleEnd(tx, task, agent, run);
  return run;
}

async function insert(
  tx: Tx,
  task: Task,
  agent: Agent,
  fields: { [K in keyof typeof executions.$inferInsert]?: unknown },
): Promise<Execution> {
  const [run] = await tx.orm
    .insert(executions)
    .values({
      taskId: task.id,
      userId: task.userId,
      agentId: agent.id,
      trigger: 'activity',
      scheduledFor: sql`now()`,
      availableAt: sql`now()`,
      skillName: task.skillName,
      params: task.params,
      priority: task.priority,
      timeoutSeconds: task.timeoutSeconds,
      pinnedAgentId: task.agentId,
      requiredCapabilities: task.requiredCapabilities,
      ...(fields as Partial<typeof executions.$inferInsert>),
    })
    .returning();
  if (!run) throw new Error('The insert answered no row.');
  return run;
}

const audit = (tx: Tx, actor: Actor, before: Execution | null, after: Execution) =>
  recordAudit(tx, actor, {
    operation: before ? 'UPDATE' : 'CREATE',
    entityType: 'execution',
    entityId: after.id,
    ownerId: after.userId,
    changedFields: changedFields(before && told(before), told(after)),
  });

const told = ({ taskId, agentId, trigger, status, cause }: Execution) => ({ taskId, agentId, trigger, status, cause });
