import { and, eq, type SQL, sql } from 'drizzle-orm';
import type { Queryable, Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { projects } from '../db/schema.ts';
import { type Actor, ownedBy, requireAccess } from '../http/access.ts';
import { type Page, paginate, type SortKey } from '../http/pagination.ts';
import { contains } from '../http/search.ts';
import type { Project } from './projects.ts';
import type { PROJECT_SORTS, ProjectQuery } from './schemas.ts';

const projectOf = rowsOf(projects);
const GET = { name: 'project-get', text: `select * from projects where id = $1 and status <> 'deleted'` };
const LOCK = { name: 'project-lock', text: `${GET.text} for no key update` };

/** One project by the owner rule: 404 when there is none or it was deleted, 403 when it is somebody else's. */
export async function getProject(q: Queryable, actor: Actor, id: number): Promise<Project> {
  return read(q, GET, actor, id);
}

/** The same, with the row locked until the transaction ends. */
export async function lockProject(tx: Tx, actor: Actor, id: number): Promise<Project> {
  return read(tx, LOCK, actor, id);
}

async function read(q: Queryable, statement: typeof GET, actor: Actor, id: number): Promise<Project> {
  const { rows } = await q.query({ ...statement, values: [id] });
  return requireAccess(actor, rows[0] && projectOf(rows[0]), 'project', id);
}

/** Each order, served by the index projects_owner_<order>_idx. */
const SORT_KEYS: Record<(typeof PROJECT_SORTS)[number], SortKey> = {
  created_at: { by: sql`${projects.createdAt}`, type: 'timestamptz' },
  updated_at: { by: sql`${projects.updatedAt}`, type: 'timestamptz' },
  name: { by: sql`${projects.name}`, type: 'text' },
  tasks_count: { by: sql`${projects.tasksCount}`, type: 'bigint' },
};
// The expression of projects_search_idx, to the letter.
const searched = sql`(${projects.name} || chr(10) || coalesce(${projects.description}, ''))`;

/** A page of the caller's projects (of everybody's for admins), newest first unless asked otherwise. */
export async function listProjects(q: Queryable, actor: Actor, query: ProjectQuery): Promise<Page<Project>> {
  const { limit, offset, cursor, total, sort_by: word = 'created_at', status, search } = query;
  const descending = word.startsWith('-');
  const sortBy = (descending ? word.slice(1) : word) as (typeof PROJECT_SORTS)[number];
  const order = query.sort_order ?? (descending || sortBy === 'created_at' ? 'desc' : 'asc');
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['projects', actor.role === 'admin' ? 'all' : actor.userId, sortBy, order, status, search],
    sort: SORT_KEYS[sortBy],
    order,
    id: sql`${projects.id}`,
    filter: and(
      sql`${projects.status} <> 'deleted'`,
      ownedBy(actor, projects.userId),
      status === undefined ? undefined : eq(projects.status, status),
      search === undefined ? undefined : contains(searched, search),
    ),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ row: projects, key })
        .from(projects)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ row, key }) => ({ row, id: row.id, key }));
    },
    count: (where: SQL | undefined) => q.orm.$count(projects, where),
  });
}

/** Every project of these owners, by id. Served by projects_owner_created_idx. */
export async function findProjectsOf(q: Queryable, ownerIds: readonly number[]): Promise<Project[]> {
  const { rows } = await q.query({
    name: 'projects-of-owners',
    text: `select * from projects where user_id = any($1::bigint[]) and status <> 'deleted' order by id`,
    values: [ownerIds],
  });
  return rows.map(projectOf);
}
