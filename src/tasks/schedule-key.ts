import type { Queryable, Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { tasks } from '../db/schema.ts';
import type { Task } from './task-events.ts';

// The tie between a task and its entry in a schedule file (schedule-file/). It is bookkeeping: neither a version, nor the
// audit log, nor an event tells of it.

const taskOf = rowsOf(tasks);

/**
 * The tasks that have a key and belong to one of these owners, deleted ones too as long as their key was not forgotten; those of
 * anybody that have one of these keys; and those of these ids that are not deleted. Reads the whole table, once: no index
 * holds deleted tasks.
 */
export async function findKeyedTasks(
  q: Queryable,
  { ownerIds, keys, ids }: { ownerIds: readonly number[]; keys: readonly string[]; ids: readonly number[] },
): Promise<Task[]> {
  const { rows } = await q.query({
    name: 'tasks-keyed',
    text: `
      select * from tasks
      where schedule_key is not null and (user_id = any($1::bigint[]) or schedule_key = any($2::text[]))
        or id = any($3::bigint[]) and status <> 'deleted'
      order by id`,
    values: [ownerIds, keys, ids],
  });
  return rows.map(taskOf);
}

/** Every task of an owner, oldest first. Served by tasks_owner_created_idx. */
export async function findTasksOf(q: Queryable, ownerId: number): Promise<Task[]> {
  const { rows } = await q.query({
    name: 'tasks-of-owner',
    text: `select * from tasks where user_id = $1 and status <> 'deleted' order by created_at, id`,
    values: [ownerId],
  });
  return rows.map(taskOf);
}

/** Who has tasks with a key. Served by tasks_schedule_key. */
export async function findKeyOwners(q: Queryable): Promise<number[]> {
  const { rows } = await q.query<{ user_id: number }>({
    name: 'tasks-key-owners',
    text: `select distinct user_id from tasks where status <> 'deleted' and schedule_key is not null order by user_id`,
  });
  return rows.map(({ user_id }) => user_id);
}

/**
 * Notes the key of a task and what the file said of it, or forgets both (null). Answers whether the task still has this
 * version: if not, somebody has changed it, and nothing is noted.
 */
export async function setScheduleKey(
  tx: Tx,
  { id, version }: Pick<Task, 'id' | 'version'>,
  tie: { key: string; base: Readonly<Record<string, unknown>> } | null,
): Promise<boolean> {
  const { rowCount } = await tx.query({
    name: 'task-set-schedule-key',
    text: 'update tasks set schedule_key = $3, schedule_base = $4 where id = $1 and version = $2',
    values: [id, version, tie?.key ?? null, tie && JSON.stringify(tie.base)],
  });
  return rowCount === 1;
}
