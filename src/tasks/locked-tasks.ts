import { asc, inArray } from 'drizzle-orm';
import type { Tx } from '../db/database.ts';
import { tasks } from '../db/schema.ts';
import type { Task } from './task-events.ts';

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
