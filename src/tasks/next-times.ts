import type { Queryable } from '../db/database.ts';
import { type Recurrence, recurrence, spreadOffsetMs } from '../schedule/recurrence.ts';
import type { Task } from './task-events.ts';

// When a task runs next, and when there is next something to note of it. A tick has two times: the one by which it is known
// (nominal), and the one at which it runs, later by the task's place in its spread (effective). `next_run_at` and `quiet_at`
// are effective times; `scheduled_for` is nominal.

/** The bus topic that is rung when a task gets a next time, or a moment to note; its detail is that time (RFC 3339). */
export const SCHEDULE_TOPIC = 'schedule';

/** The columns that decide when a task ticks. */
export type Schedule = Pick<
  Task,
  'id' | 'scheduleCron' | 'timezone' | 'dstGap' | 'dstFold' | 'startsAt' | 'endsAt' | 'spreadSeconds' | 'runAt'
>;

/** The ticks of a task that has a schedule; undefined for one that runs once, or on demand. */
export function recurrenceOf(task: Omit<Schedule, 'id' | 'runAt' | 'spreadSeconds'>): Recurrence | undefined {
  if (task.scheduleCron === null) return undefined;
  return recurrence({
    expression: task.scheduleCron,
    timezone: task.timezone,
    dstGap: task.dstGap,
    dstFold: task.dstFold,
    startsAt: task.startsAt?.getTime() ?? null,
    endsAt: task.endsAt?.getTime() ?? null,
  });
}

/** How much later than their nominal times the ticks of a task run, in ms. */
export const spreadOf = (task: Pick<Schedule, 'id' | 'scheduleCron' | 'spreadSeconds'>): number =>
  task.scheduleCron === null ? 0 : spreadOffsetMs(String(task.id), task.spreadSeconds);

/**
 * The next time of a task that is not paused: of its first tick whose nominal time is after `after` (ms); a one-off's time as
 * it is. Null when there is none, and on demand.
 */
export function nextRun(task: Schedule & Pick<Task, 'maxRuns' | 'firedCount'>, after: number): Date | null {
  const ticks = recurrenceOf(task);
  if (!ticks) return task.runAt;
  if (task.maxRuns !== null && task.firedCount >= task.maxRuns) return null;
  const next = ticks.next(after);
  return next ? new Date(next.scheduledFor + spreadOf(task)) : null;
}

/** The next moment at which a task that is not paused has something to note: a time that a clock change leaves out. */
export function nextGap(task: Schedule, after: number): Date | null {
  const gap = task.dstGap === 'skip' ? recurrenceOf(task)?.nextGap(after) : undefined;
  return gap ? new Date(gap.scheduledFor + spreadOf(task)) : null;
}

/**
 * The next moment at which a task that is being paused has something to note: the tick it would have run at, or the end of
 * the pause. A one-off waits for its resumption, and is no tick before.
 */
export function quietWhilePaused(
  task: Pick<Task, 'scheduleCron'>,
  nextTick: Date | null,
  pauseUntil: Date | null,
): Date | null {
  const times = [task.scheduleCron === null ? null : nextTick, pauseUntil].flatMap((time) => time?.getTime() ?? []);
  return times.length === 0 ? null : new Date(Math.min(...times));
}

/** When a task that is expected to succeed every so often will be overdue, unless it does; null when nobody expects it. */
export const overdueFrom = (task: Pick<Task, 'expectSuccessWithinSeconds'>, now: Date): Date | null =>
  task.expectSuccessWithinSeconds === null ? null : new Date(now.getTime() + task.expectSuccessWithinSeconds * 1000);

/** When it is, by the clock that decides what is due: in a transaction, the time of its start. */
export async function databaseNow(q: Queryable): Promise<Date> {
  const { rows } = await q.query<{ now: Date }>({ name: 'database-now', text: 'select now()' });
  const [row] = rows;
  if (!row) throw new Error('select now() answered no row.');
  return row.now;
}
