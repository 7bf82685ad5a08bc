import { and, eq, sql } from 'drizzle-orm';
import { lockAgents } from '../agents/agents.ts';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { executions } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { conflict } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { taskStatusUpdate } from '../tasks/task-events.ts';
import type { TaskStatus } from '../tasks/task-state.ts';
import { requireExecution } from './executions.ts';
import { DEADLINE_GRACE_SECONDS } from './lease.ts';
import { keepOrphan } from './orphans.ts';
import { cut, keepStreamed } from './output.ts';
import type { RetryWish } from './retry.ts';
import type { Execution } from './schemas.ts';
import { settleEnd } from './settle.ts';

// What agents say of the runs that they hold: that they are at it, what they print, how it ended. Each is fenced by the
// token of the lease (lease.ts).

const staleLease = (id: number) =>
  conflict(`The lease on execution ${id} is not yours any more: stop the work and claim again.`);

/** Extends a lease and notes the progress; 409 when the lease is lost. Answers whether somebody wants the run cancelled. */
export async function heartbeatExecution(
  tx: Tx,
  actor: Actor,
  id: number,
  beat: { leaseToken: string; progress?: Execution['progress'] | undefined; leaseSeconds: number },
): Promise<{ cancelRequested: boolean; leaseExpiresAt: Date }> {
  await requireExecution(tx, actor, id);
  const { rows } = await tx.query<{
    cancel_requested: boolean;
    lease_expires_at: Date;
    agent_id: number;
    task_id: number;
    user_id: number;
    project_id: number | null;
    skill_name: string;
    task_status: TaskStatus;
    next_run_at: Date | null;
  }>({
    name: 'execution-heartbeat',
    text: `
      update executions e set
        lease_expires_at = least(now() + coalesce(e.heartbeat_timeout_seconds, $3::int) * interval '1 second',
          e.deadline_at + $4::int * interval '1 second'),
        progress = coalesce($5::jsonb, e.progress)
      from tasks t
      where e.id = $1 and e.lease_token = $2 and e.status = 'running' and t.id = e.task_id
        and e.lease_expires_at > now()
      returning e.cancel_requested, e.lease_expires_at, e.agent_id, e.task_id, e.user_id, t.project_id, e.skill_name,
        t.status as task_status, t.next_run_at`,
    values: [
      id,
      beat.leaseToken,
      beat.leaseSeconds,
      DEADLINE_GRACE_SECONDS,
      beat.progress ? JSON.stringify(beat.progress) : null,
    ],
  });
  const [run] = rows;
  if (!run) throw staleLease(id);
  if (beat.progress) {
    emitEvents(tx, [
      taskStatusUpdate(
        {
          id: run.task_id,
          userId: run.user_id,
          projectId: run.project_id,
          skillName: run.skill_name,
          status: run.task_status,
          nextRunAt: run.next_run_at,
        },
        {
          previousStatus: run.task_status,
          executionId: id,
          executionStatus: 'running',
          agentId: run.agent_id,
          progress: beat.progress,
        },
      ),
    ]);
  }
  return { cancelRequested: run.cancel_requested, leaseExpiresAt: run.lease_expires_at };
}

/** How an agent says that a run ended. */
export interface Report extends RetryWish {
  leaseToken: string;
  status: 'success' | 'failed';
  /** Undefined: what was streamed. */
  output?: string | undefined;
  error?: string | undefined;
  result?: unknown;
}

/**
 * Ends a run as its agent reports it. A failure after the deadline is a timeout, and one after a cancel was asked for is a
 * cancel. What is too long of the output is cut from its start. Throws a 409 when the lease is not the caller's, and then
 * nothing changes; but when the reaper took it away, the report is kept, and the id that it is kept under is answered,
 * since a throw would undo that.
 */
export async function completeExecution(
  tx: Tx,
  actor: Actor,
  id: number,
  report: Report,
): Promise<{ run: Execution } | { orphan: number }> {
  const { taskId, agentId } = await requireExecution(tx, actor, id);
  const agent = agentId === null ? undefined : (await lockAgents(tx, [agentId])).get(agentId);
  const task = (await lockTasks(tx, [taskId])).get(taskId);
  const output = cut(report.output);
  const error = cut(report.error);
  const failed = report.status === 'failed';
  const told = {
    outputText: output?.text ?? null,
    errorText: error?.text ?? null,
    outputTruncated: (output?.truncated ?? false) || (error?.truncated ?? false),
    result: report.result ?? null,
  };
  const [ended] = await tx.orm
    .update(executions)
    .set({
      ...told,
      status: failed
        ? sql`case when cancel_requested then 'cancelled' when deadline_at <= now() then 'timeout' else 'failed' end`
        : 'success',
      cause: failed
        ? sql`case when cancel_requested then 'cancelled' when deadline_at <= now() then 'run_timeout' else 'agent_failed' end`
        : null,
      endedAt: sql`now()`,
      leaseToken: null,
      leaseExpiresAt: null,
    })
    .where(and(eq(executions.id, id), eq(executions.leaseToken, report.leaseToken), eq(executions.status, 'running')))
    .returning();
  if (!ended || !task) {
    const orphan = await keepOrphan(tx, actor, id, { ...told, leaseToken: report.leaseToken, status: report.status });
    if (orphan === undefined) throw staleLease(id);
    return { orphan };
  }
  recordAudit(tx, actor, {
    operation: 'UPDATE',
    entityType: 'execution',
    entityId: id,
    ownerId: ended.userId,
    changedFields: changedFields({ status: 'running' }, { status: ended.status, cause: ended.cause }),
  });
  const run = await keepStreamed(tx, ended);
  await settleEnd(tx, task, agent, run, report);
  return { run };
}
