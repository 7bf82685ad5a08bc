import { asc, eq, inArray, sql } from 'drizzle-orm';
import type { Tx } from '../db/database.ts';
import { projects } from '../db/schema.ts';
import { invalid } from '../http/problem.ts';

/**
 * Takes a task of `ownerId` out of one project and puts it into another (null: none), as far as the projects are
 * concerned: their `tasks_count`, kept true in the transaction that writes the task. Locks both, in rising order of id so
 * that two who move tasks to and fro never wait for each other, and so that neither is deleted meanwhile.
 *
 * Throws a 400 that names `body.project_id` when that owner has no such project. What a body refers to is a value, and the
 * answer is the same for projects of others and for none, so nobody learns which exist. The task's owner decides and not
 * the caller, or an admin could put one person's tasks into another's project.
 */
export async function moveTask(tx: Tx, ownerId: number, from: number | null, to: number | null): Promise<void> {
  if (from === to) return;
  const locked = await tx.orm
    .select({ id: projects.id, userId: projects.userId, status: projects.status })
    .from(projects)
    .where(
      inArray(
        projects.id,
        [from, to].filter((id) => id !== null),
      ),
    )
    .orderBy(asc(projects.id))
    .for('no key update');
  const target = locked.find(({ id }) => id === to);
  if (to !== null && (target?.userId !== ownerId || target.status === 'deleted')) {
    throw invalid('body.project_id', `there is no project ${to} of this task's owner`);
  }
  if (target?.status === 'archived') {
    throw invalid('body.project_id', `the project ${to} is archived and takes no tasks: restore it first`);
  }
  if (from !== null) await count(tx, from, -1);
  if (to !== null) await count(tx, to, 1);
}

async function count(tx: Tx, id: number, delta: 1 | -1): Promise<void> {
  await tx.orm
    .update(projects)
    .set({ tasksCount: sql`${projects.tasksCount} + ${delta}` })
    .where(eq(projects.id, id));
}
