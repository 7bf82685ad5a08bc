import { sql } from 'drizzle-orm';
import { agentActivity } from '../agents/agent-events.ts';
import type { Agent } from '../agents/agents.ts';
import { durationBucket } from '../agents/metrics.ts';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { executions } from '../db/schema.ts';
import { emitEvents, type NewEvent } from '../realtime/events.ts';
import { pauseAfterFailures } from '../tasks/failure-pause.ts';
import { type Task, taskStatusUpdate } from '../tasks/task-events.ts';
import { taskTransition } from '../tasks/task-state.ts';
import { QUEUE_TOPIC, queueDetail, RETRY_TOPIC } from './queue.ts';
import { nextAttempt, type RetryWish } from './retry.ts';
import { durationMs, type Execution } from './schemas.ts';

// What follows from the end of a run, the same whether the agent reported it, the reaper took it back, or somebody
// cancelled it: perhaps a retry, the turn of a run that waited behind it, the task's and the agent's status, how the task
// does (its last success, its failures in a row, perhaps a pause), the events.
// Callers hold the locks of the agent and the task, in that order (see lease.ts), and have ended the run.

/**
 * What is still open around a run that has ended, and, when it counted towards limits of its owner, for which skill they leave
 * another one free ('' for any). Served by executions_task_open_idx, executions_agent_running_idx and concurrency_limits_key.
 */
const AROUND = {
  name: 'settle-around',
  text: `
    select
      count(*) filter (where status = 'running')::int as running,
      count(*) filter (where status = 'queued' and available_at is not null)::int as ready,
      min(id) filter (where status = 'queued' and available_at is null) as waiting,
      (select count(*)::int from executions where agent_id = $2 and status = 'running') as agent_running,
      (select min(coalesce(skill_name, '')) from concurrency_limits
        where user_id = $3 and coalesce(skill_name, '') in ('', $4)) as freed
    from executions where task_id = $1 and status in ('queued', 'running')`,
};

/**
 * The rows that a run's end changes besides its own, its place in the agent's counts among them: one statement for all,
 * since every end passes here.
 */
const SETTLE = {
  name: 'settle',
  text: `
    with released as (
      update executions set available_at = now(), expires_at = now() + $9::int * interval '1 second'
      where id = $1 and status = 'queued'
    ), task as (
      update tasks set status = $3, consecutive_failures = $11, last_success_at = $12, overdue_at = $13, overdue_since = $14
      where id = $2 and (status <> $3 or $10)
    ), counted as (
      insert into agent_stats_hourly as s (agent_id, hour, outcome, duration_bucket, runs, duration_ms_sum)
      select $4::bigint, date_trunc('hour', $6::timestamptz, 'UTC'), $7::text, ${durationBucket('$8::bigint')}, 1, $8::bigint
      where $4::bigint is not null and $7::text is not null
      on conflict (agent_id, hour, outcome, duration_bucket)
      do update set runs = s.runs + 1, duration_ms_sum = s.duration_ms_sum + excluded.duration_ms_sum
    )
    update agents set status = $5 where id = $4 and status <> $5`,
};

/**
 * How a fire, the attempts at one tick or one wish, has ended: undefined when it has not, since a retry follows, and when it
 * counts for nothing, as what was cancelled and what agents do of their own accord.
 */
export type FireEnd = 'succeeded' | 'failed' | undefined;

/**
 * Settles everything that follows from the end of `run`; `task` and `agent` are as locked, and brought up to date. `wish` is
 * what the agent said of a retry.
 */
export async function settleEnd(
  tx: Tx,
  task: Task,
  agent: Agent | undefined,
  run: Execution,
  wish: RetryWish = {},
): Promise<void> {
  const retry = await queueRetry(tx, task, agent, run, wish);
  const fire = retry ? undefined : fireEnd(run);
  const events = await settle(tx, task, agent, run, fire);
  if (retry) {
    recordAudit(tx, null, {
      operation: 'CREATE',
      entityType: 'execution',
      entityId: retry.id,
      ownerId: retry.userId,
      changedFields: changedFields(null, {
        taskId: retry.taskId,
        trigger: retry.trigger,
        status: retry.status,
        attempt: retry.attempt,
        retryOf: retry.retryOf,
      }),
    });
    events.push(
      taskStatusUpdate(task, { previousStatus: task.status, executionId: retry.id, executionStatus: retry.status }),
    );
  }
  emitEvents(tx, events);
  if (fire === 'failed' && run.endedAt) await pauseAfterFailures(tx, task, run.endedAt);
}

/**
 * Settles what follows from a late result that was taken for the end of a fire (orphans.ts). It is no end of an agent's: that
 * it lost the lease stays counted. `counted` says that the fire's failure was noted before.
 */
export async function settleAdopted(tx: Tx, task: Task, run: Execution, counted: boolean): Promise<void> {
  const fire = counted ? undefined : fireEnd(run);
  emitEvents(tx, await settle(tx, task, undefined, run, fire));
  if (fire === 'failed' && run.endedAt) await pauseAfterFailures(tx, task, run.endedAt);
}

function fireEnd(run: Execution): FireEnd {
  if (run.trigger === 'activity') return undefined;
  if (run.status === 'success') return 'succeeded';
  return run.status === 'failed' || run.status === 'timeout' ? 'failed' : undefined;
}

/** Notes on a task how a fire of it ended, which was at `at`. */
function note(task: Task, fire: FireEnd, at: Date): void {
  if (fire === 'failed') task.consecutiveFailures += 1;
  if (fire !== 'succeeded') return;
  const { expectSuccessWithinSeconds: within, status } = task;
  const expected = within !== null && status !== 'disabled' && status !== 'deleted';
  task.lastSuccessAt = at;
  task.consecutiveFailures = 0;
  task.overdueSince = null;
  task.overdueAt = expected ? new Date(at.getTime() + within * 1000) : null;
}

/**
 * Brings the statuses of a run's task and agent in line with the runs that are open, gives a waiting run its turn, notes how
 * its fire ended, and answers the events that tell of it.
 */
export async function settle(
  tx: Tx,
  task: Task,
  agent: Agent | undefined,
  run: Pick<
    Execution,
    | 'id'
    | 'status'
    | 'cause'
    | 'agentId'
    | 'outputText'
    | 'outputTruncated'
    | 'errorText'
    | 'startedAt'
    | 'endedAt'
    | 'skillName'
  >,
  fire?: FireEnd,
): Promise<NewEvent[]> {
  const previousStatus = task.status;
  const { rows } = await tx.query<{
    running: number;
    ready: number;
    waiting: number | null;
    agent_running: number;
    freed: string | null;
  }>({ ...AROUND, values: [task.id, agent?.id ?? null, task.userId, run.skillName] });
  const around = rows[0] ?? { running: 0, ready: 0, waiting: null, agent_running: 0, freed: null };

  // The run that waits longest gets its turn when no other one is before it.
  const released = around.running + around.ready === 0 ? around.waiting : null;
  if (around.running === 0) {
    const more = around.ready > 0 || around.waiting !== null || task.nextRunAt !== null;
    const event = more ? 'run_ended_more' : run.status === 'success' ? 'run_succeeded_last' : 'run_failed_last';
    task.status = taskTransition(task.status, event) ?? task.status;
  }
  if (agent?.status === 'busy' && around.agent_running === 0) agent.status = 'idle';
  if (run.endedAt) note(task, fire, run.endedAt);
  const took = durationMs(run);
  tx.write({
    ...SETTLE,
    values: [
      released,
      task.id,
      task.status,
      agent?.id ?? null,
      agent?.status ?? null,
      run.endedAt,
      took === null ? null : run.status === 'success' ? 'success' : run.cause,
      Math.max(0, took ?? 0),
      task.queueTtlSeconds,
      fire !== undefined,
      task.consecutiveFailures,
      task.lastSuccessAt,
      task.overdueAt,
      task.overdueSince,
    ],
  });
  // A run waits behind others of its own task: same owner, same skill, unless the task's was changed since.
  if (released !== null) tx.ring(QUEUE_TOPIC);
  else if (around.freed !== null) {
    tx.ring(QUEUE_TOPIC, queueDetail({ userId: task.userId, skillName: around.freed || null }));
  }

  const events = [
    taskStatusUpdate(task, {
      previousStatus,
      executionId: run.id,
      executionStatus: run.status,
      agentId: run.agentId,
      output: run.outputText,
      outputTruncated: run.outputTruncated,
      error: run.errorText,
      durationMs: durationMs(run),
    }),
  ];
  if (agent) {
    const action = run.status === 'queued' ? 'returned' : run.status;
    events.push(agentActivity(agent, action, { taskId: task.id, executionId: run.id, durationMs: durationMs(run) }));
  }
  return events;
}

/**
 * Queues the next attempt, when there is one. A paused task starts nothing, and a retry is a start; what an agent did of its
 * own accord is not ours to repeat.
 */
async function queueRetry(
  tx: Tx,
  task: Task,
  agent: Agent | undefined,
  run: Execution,
  wish: RetryWish,
): Promise<Execution | undefined> {
  const over = run.trigger === 'activity' || run.cancelRequested;
  if (over || task.status === 'disabled' || task.status === 'deleted') return undefined;
  const next = nextAttempt(run, task, wish, Math.random);
  if (!next) return undefined;
  const { delayMs, lostLeases } = next;
  const [retry] = await tx.orm
    .insert(executions)
    .values({
      taskId: run.taskId,
      userId: run.userId,
      trigger: 'retry',
      occurrenceId: run.occurrenceId,
      scheduledFor: run.scheduledFor,
      attempt: run.attempt + 1,
      lostLeases,
      retryOf: run.id,
      skillName: run.skillName,
      params: run.params,
      priority: run.priority,
      timeoutSeconds: run.timeoutSeconds,
      heartbeatTimeoutSeconds: run.heartbeatTimeoutSeconds,
      // Pinned to an agent that was removed since, it would wait for ever: the task's pin of now holds.
      pinnedAgentId: agent?.deletedAt != null && run.pinnedAgentId === agent.id ? task.agentId : run.pinnedAgentId,
      requiredCapabilities: run.requiredCapabilities,
      availableAt: sql`now() + ${delayMs} * interval '1 millisecond'`,
      // It waits for an agent from when one may take it.
      expiresAt: sql`now() + ${delayMs} * interval '1 millisecond' + ${task.queueTtlSeconds}::int * interval '1 second'`,
    })
    .returning();
  if (delayMs === 0) tx.ring(QUEUE_TOPIC, queueDetail(run));
  else tx.ring(RETRY_TOPIC);
  return retry;
}
