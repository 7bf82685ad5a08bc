import { and, eq, ne, sql } from 'drizzle-orm';
import type { Tx } from '../db/database.ts';
import { projects } from '../db/schema.ts';
import { invalid } from '../http/problem.ts';

/**
 * Locks the project that a task of `ownerId` is to be in, so that it is not deleted meanwhile. Throws a 400 that names
 * `body.project_id` when that owner has no such project: what a body refers to is a value, and the answer is the same
 * for projects of others and for none, so nobody learns which exist. The task's owner decides and not the caller, or an
 * admin could put one person's tasks into another's project.
 */
export async function requireProject(tx: Tx, ownerId: number, id: number): Promise<void> {
  const found = await tx.orm
    .select({ id: projects.id })
    .from(projects)
    .where(and(eq(projects.id, id), eq(projects.userId, ownerId), ne(projects.status, 'deleted')))
    .for('no key update');
  if (found.length === 0) throw invalid('body.project_id', `there is no project ${id} of this task's owner`);
}

/** Keeps `tasks_count` true: to be called in the transaction that puts a task into a project (1) or takes it out (-1). */
export async function countTasks(tx: Tx, projectId: number, delta: 1 | -1): Promise<void> {
  await tx.orm
    .update(projects)
    .set({ tasksCount: sql`${projects.tasksCount} + ${delta}` })
    .where(eq(projects.id, projectId));
}
