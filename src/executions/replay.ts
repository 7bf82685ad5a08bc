import type { Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { executions } from '../db/schema.ts';
import { type Actor, requireAccess } from '../http/access.ts';
import { conflict } from '../http/problem.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import type { Task } from '../tasks/task-events.ts';
import { tellQueued } from './queued.ts';
import type { Execution } from './schemas.ts';

// A replay is a new run of what an ended one was: for the same tick, with the same skill and params, whatever its task has
// become since. It waits for no other run, and is retried as its task says. The run that it repeats stays as it is.

/** What decides whether a run can be replayed, and by whom. Served by the primary keys. */
const FIND = {
  name: 'replay-find',
  text: `select task_id as "taskId", user_id as "userId", status from executions where id = $1`,
};

/** Pinned to an agent that was removed since, it would wait for ever: the task's pin of now holds. Served by the primary keys. */
const WRITE = {
  name: 'replay-write',
  text: `
    insert into executions (task_id, user_id, trigger, occurrence_id, replay_of, scheduled_for, skill_name, params, priority,
      timeout_seconds, heartbeat_timeout_seconds, pinned_agent_id, required_capabilities, available_at, expires_at)
    select e.task_id, e.user_id, 'replay', e.occurrence_id, e.id, e.scheduled_for, e.skill_name,
      coalesce($2::jsonb, e.params), e.priority, e.timeout_seconds, e.heartbeat_timeout_seconds,
      case when a.deleted_at is null then e.pinned_agent_id else t.agent_id end, e.required_capabilities, now(),
      now() + t.queue_ttl_seconds * interval '1 second'
    from executions e join tasks t on t.id = e.task_id left join agents a on a.id = e.pinned_agent_id
    where e.id = any($1::bigint[]) order by e.id
    returning *`,
};
const runOf = rowsOf(executions);

/** Why a run cannot be replayed; undefined when it can. */
export function notReplayable(id: number, status: Execution['status'], taskDeleted: boolean): string | undefined {
  if (status === 'queued' || status === 'running') {
    return `The execution ${id} has not ended (${status}): wait for its end, or cancel it first.`;
  }
  if (taskDeleted) return `The task of the execution ${id} was deleted: make a new one.`;
  return undefined;
}

/** Queues a run that repeats one which has ended; `params` stand in for those that it was given. */
export async function replayExecution(
  tx: Tx,
  actor: Actor,
  id: number,
  params: Record<string, unknown> | undefined,
): Promise<Execution> {
  const { rows } = await tx.query<Pick<Execution, 'taskId' | 'userId' | 'status'>>({ ...FIND, values: [id] });
  // The owner alone, as with cancelling.
  const { taskId, status } = requireAccess(actor, rows[0], 'execution', id);
  const tasks = await lockTasks(tx, [taskId]);
  const reason = notReplayable(id, status, tasks.get(taskId)?.status === 'deleted');
  if (reason !== undefined) throw conflict(reason);
  const [run] = await queueReplays(tx, actor, tasks, [id], params);
  if (!run) throw new Error('The insert answered no row.');
  return run;
}

/** Queues a run for each of these, which can be replayed and whose tasks the caller has locked, and tells of them. */
export async function queueReplays(
  tx: Tx,
  actor: Actor,
  tasks: ReadonlyMap<number, Task>,
  ids: readonly number[],
  params?: Record<string, unknown>,
): Promise<Execution[]> {
  if (ids.length === 0) return [];
  const { rows } = await tx.query({ ...WRITE, values: [ids, params ? JSON.stringify(params) : null] });
  const runs = rows.map(runOf).toSorted((a, b) => a.id - b.id);
  tellQueued(
    tx,
    actor,
    runs.flatMap((run) => {
      const task = tasks.get(run.taskId);
      const more = { replayOf: run.replayOf, ...(params ? { params } : {}) };
      return task ? [{ task, run: { ...run, available: true, more } }] : [];
    }),
  );
  return runs;
}
