import { sql } from 'drizzle-orm';
import { noteRunEnded } from '../agents/agents.ts';
import type { Tx } from '../db/database.ts';
import { executions } from '../db/schema.ts';
import { emitEvents } from '../realtime/events.ts';
import { retryDelayMs } from '../schedule/backoff.ts';
import { setTaskStatus } from '../tasks/locked-tasks.ts';
import { type Task, taskStatusUpdate } from '../tasks/task-events.ts';
import { taskTransition } from '../tasks/task-state.ts';
import { QUEUE_TOPIC, queueDetail, RETRY_TOPIC } from './queue.ts';
import { durationMs, type Execution } from './schemas.ts';

// What follows from the end of a run, the same whether the agent reported it, the reaper took it back, or somebody
// cancelled it: perhaps a retry, the turn of a run that waited behind it, the task's and the agent's status, the events.
// Callers hold the locks of the agent and the task, in that order (see lease.ts).

/** Whether a run that ended like this is tried again. A paused task starts nothing, and a retry is a start. */
function retries(task: Task, run: Execution): boolean {
  return (
    (run.status === 'failed' || run.status === 'timeout') &&
    run.attempt < task.maxAttempts &&
    !run.cancelRequested &&
    task.status !== 'disabled' &&
    task.status !== 'deleted'
  );
}

/** Settles everything that follows from the end of `run`; `task` is its task as locked. Answers the retry, if there is one. */
export async function settleEnd(tx: Tx, task: Task, run: Execution): Promise<void> {
  const retry = retries(task, run) ? await queueRetry(tx, task, run) : undefined;
  await releaseWaiting(tx, task);
  await settleTask(tx, task, run, {
    agentId: run.agentId,
    output: run.outputText,
    outputTruncated: run.outputTruncated,
    error: run.errorText,
    durationMs: durationMs(run),
  });
  if (retry) {
    await emitEvents(tx, [
      taskStatusUpdate(task, { previousStatus: task.status, executionId: retry.id, executionStatus: retry.status }),
    ]);
  }
  if (run.agentId !== null) {
    await settleAgentOf(tx, run.agentId, run.status, {
      taskId: task.id,
      executionId: run.id,
      durationMs: durationMs(run),
    });
  }
}

async function queueRetry(tx: Tx, task: Task, run: Execution): Promise<Execution | undefined> {
  // A lost lease says nothing against the work: it is offered again at once. What failed waits its backoff.
  const delayMs = run.cause === 'lease_lost' ? 0 : retryDelayMs(run.attempt, task.retryBackoffSeconds, Math.random);
  const [retry] = await tx.orm
    .insert(executions)
    .values({
      taskId: run.taskId,
      userId: run.userId,
      trigger: 'retry',
      occurrenceId: run.occurrenceId,
      scheduledFor: run.scheduledFor,
      attempt: run.attempt + 1,
      retryOf: run.id,
      skillName: run.skillName,
      params: run.params,
      priority: run.priority,
      timeoutSeconds: run.timeoutSeconds,
      pinnedAgentId: run.pinnedAgentId,
      requiredCapabilities: run.requiredCapabilities,
      availableAt: sql`now() + ${delayMs} * interval '1 millisecond'`,
    })
    .returning();
  if (delayMs === 0) tx.ring(QUEUE_TOPIC, queueDetail(run));
  else tx.ring(RETRY_TOPIC);
  return retry;
}

/** Gives the run that waits longest its turn, unless another one of the task is still before it. */
async function releaseWaiting(tx: Tx, task: Task): Promise<void> {
  const { rows } = await tx.query<{ user_id: number; skill_name: string }>({
    name: 'release-waiting',
    text: `
      update executions set available_at = now() where id = (
        select min(id) from executions where task_id = $1 and status = 'queued' and available_at is null
      ) and not exists (
        select from executions where task_id = $1 and (status = 'running' or (status = 'queued' and available_at is not null))
      )
      returning user_id, skill_name`,
    values: [task.id],
  });
  for (const row of rows) tx.ring(QUEUE_TOPIC, queueDetail({ userId: row.user_id, skillName: row.skill_name }));
}

/** Brings the task's status in line with its runs, and tells of `run`. */
export async function settleTask(
  tx: Tx,
  task: Task,
  run: Pick<Execution, 'id' | 'status'>,
  told: Omit<Parameters<typeof taskStatusUpdate>[1], 'previousStatus'>,
): Promise<void> {
  const previousStatus = task.status;
  const { rows } = await tx.query<{ running: number; queued: number }>({
    name: 'count-open-runs',
    text: `
      select count(*) filter (where status = 'running')::int as running, count(*) filter (where status = 'queued')::int as queued
      from executions where task_id = $1 and status in ('queued', 'running')`,
    values: [task.id],
  });
  const open = rows[0] ?? { running: 0, queued: 0 };
  if (open.running === 0) {
    const more = open.queued > 0 || task.nextRunAt !== null;
    const event = more ? 'run_ended_more' : run.status === 'success' ? 'run_succeeded_last' : 'run_failed_last';
    const status = taskTransition(task.status, event);
    if (status) await setTaskStatus(tx, task, status);
  }
  await emitEvents(tx, [
    taskStatusUpdate(task, { ...told, previousStatus, executionId: run.id, executionStatus: run.status }),
  ]);
}

/** Tells the agent's noun that a run of it ended. */
export async function settleAgentOf(
  tx: Tx,
  agentId: number,
  action: string,
  run: { taskId?: number; executionId?: number; durationMs?: number | null },
): Promise<void> {
  const { rows } = await tx.query({
    name: 'agent-has-runs',
    text: `select from executions where agent_id = $1 and status = 'running' limit 1`,
    values: [agentId],
  });
  await noteRunEnded(tx, agentId, rows.length > 0, action, run);
}
