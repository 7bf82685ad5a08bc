import type { Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { tasks } from '../db/schema.ts';
import { cancelQueuedExecutions } from '../executions/executions.ts';
import type { Actor } from '../http/access.ts';
import { type TaskChange, tellChanges } from './changes.ts';
import { databaseNow } from './queries.ts';
import type { Task } from './task-events.ts';
import { taskTransition } from './task-state.ts';
import { firstRun } from './tasks.ts';

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
      before.map((task) => ({ task, status: taskTransition(task.status, 'deleted'), nextRunAt: null })),
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
        before.map((task) => ({ task, status: taskTransition(task.status, 'paused'), nextRunAt: null })),
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
      const changes = await write(
        tx,
        before.map((task) => ({
          task,
          status: taskTransition(task.status, around.get(task.id)?.running ? 'resumed_running' : 'resumed'),
          nextRunAt: around.get(task.id)?.ticked ? null : firstRun(task, now),
        })),
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

async function write(
  tx: Tx,
  wanted: readonly { task: Task; status: Task['status'] | undefined; nextRunAt: Date | null }[],
): Promise<TaskChange[]> {
  const { rows } = await tx.query({
    text: `
      update tasks t set status = n.status, next_run_at = n.next_run_at, pause_reason = case when n.status = 'disabled' then 'project' end, pause_until = null,
        version = t.version + 1, updated_at = now()
      from jsonb_to_recordset($1) as n(id bigint, status text, next_run_at timestamptz)
      where t.id = n.id returning t.*`,
    values: [
      JSON.stringify(
        wanted.map(({ task, status, nextRunAt }) => ({
          id: task.id,
          status: status ?? task.status,
          next_run_at: nextRunAt,
        })),
      ),
    ],
  });
  const after = new Map(rows.map(taskOf).map((task) => [task.id, task]));
  return wanted.flatMap(({ task: before }) => {
    const changed = after.get(before.id);
    return changed ? [{ before, after: changed }] : [];
  });
}
