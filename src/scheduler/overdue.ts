import { changedFields, recordAudits } from '../audit/record.ts';
import type { Database } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { tasks } from '../db/schema.ts';
import { emitEvents } from '../realtime/events.ts';
import { taskOverdue } from '../tasks/task-events.ts';

// The dead man's switch of a task: whoever says `expect_success_within_seconds` hears when no success came in time. When
// that is stands in `overdue_at`, set by whoever creates, changes, resumes or ends well a task; here it only passes.

const BATCH = 500;
const taskOf = rowsOf(tasks);

/**
 * Each is told of once, since what makes it found goes. A paused or deleted one is overdue to nobody. Served by
 * tasks_overdue_idx.
 */
const MARK = {
  name: 'overdue-mark',
  text: `
    with due as (
      select id from tasks where overdue_at <= now() order by overdue_at, id limit $1 for no key update skip locked
    )
    update tasks t set overdue_at = null,
      overdue_since = case when t.status in ('disabled', 'deleted') then t.overdue_since else t.overdue_at end
    from due where t.id = due.id returning t.*`,
};

/** Served by tasks_overdue_idx. A millisecond more, since timers may fire early. */
const NEXT = {
  name: 'overdue-next',
  text: `
    select (extract(epoch from overdue_at - clock_timestamp()) * 1000)::float8 as in_ms
    from tasks where overdue_at is not null order by overdue_at, id limit 1`,
};

/**
 * Marks a batch of tasks that did not succeed in time, each with its entry in the audit log and its event. Any number of
 * processes may do so at once. Answers in how many ms there is more to do; undefined when nothing is known of.
 */
export async function markOverdue(db: Database): Promise<number | undefined> {
  const found = await db.transaction(async (tx) => {
    const { rows } = await tx.query({ ...MARK, values: [BATCH] });
    const overdue = rows.map(taskOf).filter(({ status }) => status !== 'disabled' && status !== 'deleted');
    recordAudits(
      tx,
      null,
      overdue.map((task) => ({
        operation: 'UPDATE',
        entityType: 'task',
        entityId: task.id,
        ownerId: task.userId,
        changedFields: changedFields({ overdueSince: null }, { overdueSince: task.overdueSince }),
      })),
    );
    emitEvents(tx, overdue.map(taskOverdue));
    return rows.length;
  });
  if (found === BATCH) return 0;
  const { rows } = await db.query<{ in_ms: number }>(NEXT);
  return rows[0] && Math.max(1, Math.ceil(rows[0].in_ms) + 1);
}
