import { eq, sql } from 'drizzle-orm';
import type { Database, Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { tasks } from '../db/schema.ts';
import { hasRunningExecution } from '../executions/executions.ts';
import { tellChanges } from '../tasks/changes.ts';
import { type NewTick, newTick, pausedTicks, recordTicks } from '../tasks/ledger.ts';
import { nextGap, nextRun, overdueFrom, quietWhilePaused, recurrenceOf, spreadOf } from '../tasks/next-times.ts';
import { hasTicked } from '../tasks/queries.ts';
import type { Task } from '../tasks/task-events.ts';
import { taskTransition } from '../tasks/task-state.ts';

// What is to be noted though nothing runs, so that the ledger answers for every tick: the ticks of paused tasks, and those
// that a clock change leaves out; and the ends of pauses that have one. Each such moment is a task's `quiet_at`. What fires
// (fire.ts) never looks at this column, so tasks that run pay nothing for it.
//
// As there, a batch is one transaction over rows that are locked with SKIP LOCKED, and the database's clock decides.

const BATCH = 200;
const taskOf = rowsOf(tasks);

/** Served by tasks_quiet_idx. */
const DUE = {
  name: 'scheduler-quiet',
  text: `
    select *, now() as now from tasks where quiet_at <= now() order by quiet_at, id limit $1
    for no key update skip locked`,
};

const MOVE = {
  name: 'scheduler-quiet-move',
  text: `
    update tasks t set quiet_at = n.quiet_at from jsonb_to_recordset($1) as n(id bigint, quiet_at timestamptz)
    where t.id = n.id`,
};

/** Notes what is due to be noted, a batch of tasks, and ends pauses that are over. Answers whether there may be more. */
export async function noteQuiet(db: Database): Promise<{ more: boolean }> {
  return db.transaction(async (tx) => {
    const { rows } = await tx.query({ ...DUE, values: [BATCH] });
    const noted: { task: Task; ticks: NewTick[] }[] = [];
    const moves: { id: number; quiet_at: Date | null }[] = [];
    for (const row of rows) {
      const task = taskOf(row);
      const now = row['now'] as Date;
      if (task.status !== 'disabled') {
        const { ticks, next } = leftOut(task, now);
        noted.push({ task, ticks });
        moves.push({ id: task.id, quiet_at: next });
      } else if (task.pauseUntil !== null && task.pauseUntil <= now) {
        noted.push({ task, ticks: pausedTicks(task, task.pauseUntil) });
        await endPause(tx, task, task.pauseUntil, now);
      } else {
        const after = new Date(now.getTime() + 1);
        noted.push({ task, ticks: pausedTicks(task, after) });
        const tick = recurrenceOf(task)?.next(now.getTime() - spreadOf(task));
        const next = tick ? new Date(tick.scheduledFor + spreadOf(task)) : null;
        moves.push({ id: task.id, quiet_at: quietWhilePaused(task, next, task.pauseUntil) });
      }
    }
    if (moves.length > 0) tx.write({ ...MOVE, values: [JSON.stringify(moves)] });
    recordTicks(tx, noted);
    return { more: rows.length === BATCH };
  });
}

/** The times up to now that a clock change left out, and the next one. */
function leftOut(task: Task, now: Date): { ticks: NewTick[]; next: Date | null } {
  const ticks: NewTick[] = [];
  const offset = spreadOf(task);
  let at = task.quietAt;
  while (at !== null && at <= now) {
    const scheduledFor = at.getTime() - offset;
    ticks.push(newTick(scheduledFor, 'dst_gap', { cause: 'clock_change' }));
    at = nextGap(task, scheduledFor);
  }
  return { ticks, next: at };
}

/**
 * Resumes a task whose pause is over: it goes on with the first tick from the end of the pause on, which may be due by now;
 * how late it is, its misfire policy judges. A one-off whose time passed meanwhile is due at once.
 */
async function endPause(tx: Tx, before: Task, end: Date, now: Date): Promise<void> {
  const running = await hasRunningExecution(tx, before.id);
  const status = taskTransition(before.status, running ? 'resumed_running' : 'resumed') ?? before.status;
  const from = end.getTime() - spreadOf(before) - 1;
  const fired = before.runAt !== null && (await hasTicked(tx, before.id, before.runAt));
  const [after] = await tx.orm
    .update(tasks)
    .set({
      status,
      nextRunAt: fired ? null : nextRun(before, from),
      quietAt: nextGap(before, from),
      pauseReason: null,
      pauseUntil: null,
      consecutiveFailures: 0,
      overdueAt: overdueFrom(before, now),
      version: before.version + 1,
      updatedAt: sql`now()`,
    })
    .where(eq(tasks.id, before.id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  tellChanges(tx, null, 'UPDATE', [{ before, after }]);
}
