import { and, asc, eq, gte, isNotNull, isNull, lt, type SQL, sql } from 'drizzle-orm';
import { coalesced } from '../db/coalesce.ts';
import type { Database, Queryable, Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { occurrences, tasks } from '../db/schema.ts';
import { type Actor, ownedBy, requireAccess } from '../http/access.ts';
import { type Page, paginate, type SortKey } from '../http/pagination.ts';
import { contains } from '../http/search.ts';
import type { TASK_SORTS, TaskQuery } from './schemas.ts';
import type { Task } from './task-events.ts';

// Written out and not as a parameter, so that the planner sees that the partial indexes of lists apply.
const notDeleted = sql`${tasks.status} <> 'deleted'`;

const taskOf = rowsOf(tasks);
const GET = { name: 'task-get', text: `select * from tasks where id = $1 and status <> 'deleted'` };
const LOCK = { name: 'task-lock', text: `${GET.text} for no key update` };
const GET_MANY = {
  name: 'tasks-get',
  text: `
    select t.* from unnest($1::bigint[]) with ordinality w(id, n)
    left join tasks t on t.id = w.id and t.status <> 'deleted' order by w.n`,
};

/** One task by the owner rule: 404 when there is none or it was deleted, 403 when it is somebody else's. */
export async function getTask(q: Queryable, actor: Actor, id: number): Promise<Task> {
  const { rows } = await q.query({ ...GET, values: [id] });
  return requireAccess(actor, rows[0] && taskOf(rows[0]), 'task', id);
}

/** The same as getTask, of which any number may be asked for at once: they share queries. */
export function taskReader(db: Database): (actor: Actor, id: number) => Promise<Task> {
  const find = coalesced(async (ids: number[]) => {
    const { rows } = await db.query({ ...GET_MANY, values: [ids] });
    return rows.map((row) => (row['id'] === null ? undefined : taskOf(row)));
  });
  return async (actor, id) => requireAccess(actor, await find(id), 'task', id);
}

/** The same, with the row locked until the transaction ends; runs of the task may still refer to it. */
export async function lockTask(tx: Tx, actor: Actor, id: number): Promise<Task> {
  const { rows } = await tx.query({ ...LOCK, values: [id] });
  return requireAccess(actor, rows[0] && taskOf(rows[0]), 'task', id);
}

/** Whether a tick of the task at this time has had its verdict. Served by occurrences_tick_key. */
export async function hasTicked(q: Queryable, taskId: number, at: Date): Promise<boolean> {
  const found = await q.orm
    .select({ id: occurrences.id })
    .from(occurrences)
    .where(and(eq(occurrences.taskId, taskId), eq(occurrences.scheduledFor, at)));
  return found.length > 0;
}

// The expressions of tasks_owner_next_run_idx and tasks_search_idx, to the letter.
const nextRun = sql<Date>`coalesce(${tasks.nextRunAt}, 'infinity'::timestamptz)`.mapWith(tasks.nextRunAt);
const searched = sql`(coalesce(${tasks.name}, '') || chr(10) || ${tasks.skillName})`;

/** Each order, served by the index tasks_owner_<order>_idx. A task without a next run comes after all that have one. */
const SORT_KEYS: Record<(typeof TASK_SORTS)[number], SortKey> = {
  created_at: { by: sql`${tasks.createdAt}`, type: 'timestamptz' },
  updated_at: { by: sql`${tasks.updatedAt}`, type: 'timestamptz' },
  next_run_at: { by: nextRun, type: 'timestamptz' },
  status: { by: sql`${tasks.status}`, type: 'text' },
  priority: { by: sql`${tasks.priority}`, type: 'smallint' },
};

/** A page of the caller's tasks (of everybody's for admins), newest first unless asked otherwise. */
export async function listTasks(q: Queryable, actor: Actor, query: TaskQuery): Promise<Page<Task>> {
  const { limit, offset, cursor, total, sort_by = 'created_at', sort_order = 'desc', ...filters } = query;
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['tasks', actor.role === 'admin' ? 'all' : actor.userId, sort_by, sort_order, filters],
    sort: SORT_KEYS[sort_by],
    order: sort_order,
    id: sql`${tasks.id}`,
    filter: filterOf(actor, filters),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ row: tasks, key })
        .from(tasks)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ row, key }) => ({ row, id: row.id, key }));
    },
    count: (where) => q.orm.$count(tasks, where),
  });
}

type TaskFilters = Pick<TaskQuery, 'status' | 'skill_name' | 'project_id' | 'agent_id' | 'search'> &
  Partial<Pick<TaskQuery, 'overdue' | 'next_run_from' | 'next_run_to'>>;

function filterOf(actor: Actor, filters: TaskFilters): SQL | undefined {
  const { status, skill_name, project_id, agent_id, search, overdue, next_run_from, next_run_to } = filters;
  return and(
    notDeleted,
    ownedBy(actor, tasks.userId),
    status === undefined ? undefined : eq(tasks.status, status),
    skill_name === undefined ? undefined : eq(tasks.skillName, skill_name),
    project_id === undefined ? undefined : eq(tasks.projectId, project_id),
    agent_id === undefined ? undefined : eq(tasks.agentId, agent_id),
    search === undefined ? undefined : contains(searched, search),
    overdue === undefined ? undefined : (overdue ? isNotNull : isNull)(tasks.overdueSince),
    next_run_from === undefined ? undefined : and(gte(nextRun, next_run_from), sql`${nextRun} < 'infinity'`),
    next_run_to === undefined ? undefined : lt(nextRun, next_run_to),
  );
}

/** The ids of the caller's tasks that the filters let through, lowest first, so many at the most; and how many there are. */
export async function matchingTasks(
  q: Queryable,
  actor: Actor,
  filters: TaskFilters,
  limit: number,
): Promise<{ ids: number[]; matched: number }> {
  const where = filterOf(actor, filters);
  const rows = await q.orm.select({ id: tasks.id }).from(tasks).where(where).orderBy(asc(tasks.id)).limit(limit);
  return {
    ids: rows.map(({ id }) => id),
    matched: rows.length < limit ? rows.length : await q.orm.$count(tasks, where),
  };
}
