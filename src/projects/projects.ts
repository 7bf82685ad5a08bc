import { eq, sql } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { type AUDIT_OPERATIONS, projects } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { requireVersion } from '../http/etag.ts';
import { deleteTasksOf, pauseTasksOf, resumeTasksOf } from '../tasks/project-tasks.ts';
import { lockProject } from './queries.ts';
import type { CreateProject, UpdateProject } from './schemas.ts';

export type Project = typeof projects.$inferSelect;

/** Creates a project of the caller's. */
export async function createProject(tx: Tx, actor: Actor, input: CreateProject): Promise<Project> {
  const [project] = await tx.orm
    .insert(projects)
    .values({ ...input, userId: actor.userId })
    .returning();
  if (!project) throw new Error('The insert answered no row.');
  tell(tx, actor, 'CREATE', null, project);
  return project;
}

/**
 * Changes the fields of a project that are given and differ. Archiving pauses its tasks that have a next time, restoring
 * resumes those of them that nobody has touched since. `expected` are the versions of which it must have one, else 412.
 */
export async function updateProject(
  tx: Tx,
  actor: Actor,
  id: number,
  input: UpdateProject,
  expected: readonly number[] | undefined,
): Promise<Project> {
  const before = await lockProject(tx, actor, id);
  requireVersion('project', before, expected);
  const { name = before.name, description = before.description, status = before.status } = input;
  if (name === before.name && description === before.description && status === before.status) return before;
  const after = await write(tx, before, { name, description, status });
  tell(tx, actor, 'UPDATE', before, after);
  if (status !== before.status) {
    await (status === 'archived' ? pauseTasksOf : resumeTasksOf)(tx, actor, id);
  }
  return after;
}

/** Deletes a project softly, with its tasks and their queued runs; an agent that is at a run of one finishes. */
export async function deleteProject(
  tx: Tx,
  actor: Actor,
  id: number,
  expected: readonly number[] | undefined,
): Promise<void> {
  const before = await lockProject(tx, actor, id);
  requireVersion('project', before, expected);
  await deleteTasksOf(tx, actor, id);
  const after = await write(tx, before, { status: 'deleted', tasksCount: 0 });
  tell(tx, actor, 'DELETE', before, after);
}

async function write(tx: Tx, before: Project, changes: Partial<Project>): Promise<Project> {
  const [after] = await tx.orm
    .update(projects)
    .set({ ...changes, version: before.version + 1, updatedAt: sql`now()` })
    .where(eq(projects.id, before.id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  return after;
}

function tell(
  tx: Tx,
  actor: Actor,
  operation: (typeof AUDIT_OPERATIONS)[number],
  before: Project | null,
  after: Project,
): void {
  recordAudit(tx, actor, {
    operation,
    entityType: 'project',
    entityId: after.id,
    ownerId: after.userId,
    changedFields: changedFields(before && facts(before), facts(after)),
  });
}

/** What of a project is said by people; how many tasks it has follows from their own entries. */
const facts = ({ id, userId, name, description, status }: Project) => ({ id, userId, name, description, status });
