import { asc, inArray } from 'drizzle-orm';
import type { Tx } from '../db/database.ts';
import { tasks } from '../db/schema.ts';
import type { Task } from './task-events.ts';
import type { TaskStatus } from './task-state.ts';

/** Locks tasks, in rising order of id so that two who lock several never wait for each other, and answers them by id. */
export async function lockTasks(tx: Tx, ids: readonly number[]): Promise<Map<number, Task>> {
  const rows = await tx.orm
    .select()
    .from(tasks)
    .where(inArray(tasks.id, [...new Set(ids)]))
    .orderBy(asc(tasks.id))
    .for('no key update');
  return new Map(rows.map((row) => [row.id, row]));
}

/**
 * Sets the status of a locked task, in the table and in `task`. What runs do to a task is not an edit of it: its version,
 * which guards edits against each other, stays.
 */
export async function setTaskStatus(tx: Tx, task: Task, status: TaskStatus): Promise<void> {
  await tx.query({
    name: 'set-task-status',
    text: 'update tasks set status = $2 where id = $1',
    values: [task.id, status],
  });
  task.status = status;
}
