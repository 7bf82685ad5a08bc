import { and, eq, gte, lt, sql } from 'drizzle-orm';
import type { Queryable } from '../db/database.ts';
import { occurrences } from '../db/schema.ts';
import { type Page, paginate } from '../http/pagination.ts';
import type { OccurrenceQuery } from './calendar-schemas.ts';

export type OccurrenceRow = typeof occurrences.$inferSelect & { executionId: number | null };

/** The first attempt that a tick started. Served by executions_task_idx. Drizzle would leave out the names of the table. */
const started = sql<number | null>`(
  select e.id from executions e
  where e.task_id = "occurrences"."task_id" and e.created_at >= "occurrences"."created_at"
    and e.occurrence_id = "occurrences"."id" and e.attempt = 1
  order by e.created_at limit 1)`.mapWith((id: unknown) => (id === null ? null : Number(id)));

/** A page of a task's ticks, newest first unless asked otherwise. Served by occurrences_tick_key. */
export async function listOccurrences(
  q: Queryable,
  taskId: number,
  query: OccurrenceQuery,
): Promise<Page<OccurrenceRow>> {
  const { limit, offset, cursor, total, sort_order: order = 'desc', ...filters } = query;
  const { verdict, from, to } = filters;
  return paginate({
    page: { limit, offset, cursor, total },
    scope: ['occurrences', taskId, order, filters],
    sort: { by: sql`${occurrences.scheduledFor}`, type: 'timestamptz' },
    order,
    id: sql`${occurrences.id}`,
    filter: and(
      eq(occurrences.taskId, taskId),
      verdict === undefined ? undefined : eq(occurrences.verdict, verdict),
      from === undefined ? undefined : gte(occurrences.scheduledFor, from),
      to === undefined ? undefined : lt(occurrences.scheduledFor, to),
    ),
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ row: occurrences, executionId: started, key })
        .from(occurrences)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ row, executionId, key }) => ({ row: { ...row, executionId }, id: row.id, key }));
    },
    count: (where) => q.orm.$count(occurrences, where),
  });
}
