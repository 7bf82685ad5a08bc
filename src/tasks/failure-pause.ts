import { eq } from 'drizzle-orm';
import type { Tx } from '../db/database.ts';
import { tasks } from '../db/schema.ts';
import { tellChanges } from './changes.ts';
import type { Task } from './task-events.ts';
import { taskTransition } from './task-state.ts';

/**
 * Pauses a task, which the caller has locked, when it failed as often in a row as it may, and brings `task` up to date. One
 * that is paused or deleted stays as it is. `at` is the time of the transaction.
 */
export async function pauseAfterFailures(tx: Tx, task: Task, at: Date): Promise<void> {
  if (task.pauseAfterFailures === null || task.consecutiveFailures < task.pauseAfterFailures) return;
  const status = taskTransition(task.status, 'failed_too_often');
  if (!status) return;
  const before = { ...task };
  const changes = {
    status,
    pauseReason: 'failures',
    pauseUntil: null,
    nextRunAt: null,
    // The ticks of the pause are noted from the next one on.
    quietAt: task.scheduleCron === null ? null : task.nextRunAt,
    overdueAt: null,
    overdueSince: null,
    version: task.version + 1,
    updatedAt: at,
  } as const;
  Object.assign(task, changes);
  await tx.orm.update(tasks).set(changes).where(eq(tasks.id, task.id));
  tellChanges(tx, null, 'UPDATE', [{ before, after: { ...task } }]);
}
