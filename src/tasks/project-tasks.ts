import type { Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { tasks } from '../db/schema.ts';
import { cancelQueuedExecutions } from '../executions/executions.ts';
import type { Actor } from '../http/access.ts';
import { type TaskChange, tellChanges } from './changes.ts';
import { pausedTicks, recordTicks } from './ledger.ts';
import { databaseNow, quietWhilePaused } from './next-times.ts';
import type { Task } from './task-events.ts';
import { taskTransition } from './task-state.ts';
import { resumed } from './tasks.ts';

// What becomes of a project's tasks when the project is deleted, archived or restored: the same as if each were deleted,
// paused or resumed by itself, with its entry in the audit log and its events, but a thousand a statement. All of it
// happens in the transaction of the project, whose row the caller has locked.

const CHUNK = 1_000;
const taskOf = rowsOf(tasks);

/** Deletes a project's tasks softly and cancels what is queued of them. */
export async function deleteTasksOf(tx: Tx, actor: Actor, projectId: number): Promise<void> {
  await inChunks(tx, `project_id = $1 and status <> 'deleted'`, projectId, async (before) => {
    const changes = await write(
      tx,
      before,
      before.map((task) => ({ ...task, ...STOPPED, status: taskTransition(task.status, 'deleted') ?? task.status })),
    );
    tellChanges(tx, actor, 'DELETE', changes);
    await cancelQueuedExecutions(
      tx,
      actor,
      changes.map(({ after }) => after),
    );
  });
}

/** Pauses the tasks of a project that have a next time, and marks them, for resumeTasksOf to know them by. */
export async function pauseTasksOf(tx: Tx, actor: Actor, projectId: number): Promise<void> {
  await inChunks(
    tx,
    `project_id = $1 and status <> 'deleted' and next_run_at is not null`,
    projectId,
    async (before) => {
      const changes = await write(
        tx,
        before,
        before.map((task) => ({
          ...task,
          ...STOPPED,
          status: taskTransition(task.status, 'paused') ?? task.status,
          pauseReason: 'project' as const,
          quietAt: quietWhilePaused(task, task.nextRunAt, null),
        })),
      );
      tellChanges(tx, actor, 'UPDATE', changes);
    },
  );
}

/** Resumes the tasks that pauseTasksOf paused and nobody has touched since, each as resumeTask would. */
export async function resumeTasksOf(tx: Tx, actor: Actor, projectId: number): Promise<void> {
  const now = await databaseNow(tx);
  await inChunks(
    tx,
    `project_id = $1 and status = 'disabled' and pause_reason = 'project'`,
    projectId,
    async (before) => {
      const { rows } = await tx.query<{ id: number; running: boolean; ticked: boolean }>({
        text: `
        select t.id,
          exists (select from executions e where e.task_id = t.id and e.status = 'running') as running,
          exists (select from occurrences o where o.task_id = t.id and o.scheduled_for = t.run_at) as ticked
        from tasks t where t.id = any($1::bigint[])`,
        values: [before.map(({ id }) => id)],
      });
      const around = new Map(rows.map((row) => [row.id, row]));
      const until = new Date(now.getTime() + 1);
      recordTicks(
        tx,
        before.map((task) => ({ task, ticks: pausedTicks(task, until) })),
      );
      const changes = await write(
        tx,
        before,
        before.map((task) => {
          const { running = false, ticked = false } = around.get(task.id) ?? {};
          const status = taskTransition(task.status, running ? 'resumed_running' : 'resumed') ?? task.status;
          return { ...task, status, ...resumed(task, now, ticked) };
        }),
      );
      tellChanges(tx, actor, 'UPDATE', changes);
    },
  );
}

/** Locks the tasks of a condition in rising order of id, so many at a time, and hands them on. */
async function inChunks(
  tx: Tx,
  condition: string,
  projectId: number,
  work: (before: Task[]) => Promise<void>,
): Promise<void> {
  for (let last = 0; ; ) {
    const { rows } = await tx.query({
      text: `select * from tasks where ${condition} and id > $2 order by id limit ${CHUNK} for no key update`,
      values: [projectId, last],
    });
    const before = rows.map(taskOf);
    if (before.length > 0) await work(before);
    last = before.at(-1)?.id ?? last;
    if (before.length < CHUNK) return;
  }
}

/** What of a task that no longer runs is empty. */
const STOPPED = {
  nextRunAt: null,
  quietAt: null,
  overdueAt: null,
  overdueSince: null,
  pauseReason: null,
  pauseUntil: null,
};

/** Writes what changes of tasks when they stop or go on; answers each as it was and as it is. */
async function write(tx: Tx, before: readonly Task[], wanted: readonly Task[]): Promise<TaskChange[]> {
  const { rows } = await tx.query({
    text: `
      update tasks t set status = n.status, next_run_at = n.next_run_at, quiet_at = n.quiet_at, overdue_at = n.overdue_at,
        overdue_since = n.overdue_since, pause_reason = n.pause_reason, pause_until = n.pause_until,
        consecutive_failures = n.consecutive_failures, version = t.version + 1, updated_at = now()
      from jsonb_to_recordset($1) as n(id bigint, status text, next_run_at timestamptz, quiet_at timestamptz,
        overdue_at timestamptz, overdue_since timestamptz, pause_reason text, pause_until timestamptz,
        consecutive_failures int)
      where t.id = n.id returning t.*`,
    values: [
      JSON.stringify(
        wanted.map((task) => ({
          id: task.id,
          status: task.status,
          next_run_at: task.nextRunAt,
          quiet_at: task.quietAt,
          overdue_at: task.overdueAt,
          overdue_since: task.overdueSince,
          pause_reason: task.pauseReason,
          pause_until: task.pauseUntil,
          consecutive_failures: task.consecutiveFailures,
        })),
      ),
    ],
  });
  const after = new Map(rows.map(taskOf).map((task) => [task.id, task]));
  return before.flatMap((task) => {
    const changed = after.get(task.id);
    return changed ? [{ before: task, after: changed }] : [];
  });
}
