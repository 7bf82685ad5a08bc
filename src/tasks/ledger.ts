import type { Tx } from '../db/database.ts';
import type { OCCURRENCE_CAUSES, VERDICTS } from '../db/schema.ts';
import { emitEvents, type NewEvent } from '../realtime/events.ts';
import { listTicks } from '../schedule/misfire.ts';
import { recurrenceOf, spreadOf } from './next-times.ts';
import type { Task } from './task-events.ts';

// The ledger of ticks: each has one verdict, and why. Where many ticks have one verdict, the newest are listed and the others
// are one row, a stretch: so a task of every second can be paused for a year.

/** A tick, or a stretch of them, before it is written. */
export interface NewTick {
  /** The nominal time, RFC 3339. */
  scheduled_for: string;
  verdict: (typeof VERDICTS)[number];
  cause: (typeof OCCURRENCE_CAUSES)[number] | null;
  /** The unfinished run that was in the way. */
  blocked_by: number | null;
  /** The nominal time of the tick whose run stands for this one too. */
  covered_by: string | null;
  ticks: number;
  /** The end of a stretch, exclusive. */
  until: string | null;
}

const iso = (ms: number) => new Date(ms).toISOString();

/** A tick with a verdict, and what is not given empty. */
export const newTick = (
  scheduledFor: number,
  verdict: NewTick['verdict'],
  more: Partial<Pick<NewTick, 'cause' | 'blocked_by' | 'covered_by'>> = {},
): NewTick => ({
  scheduled_for: iso(scheduledFor),
  verdict,
  cause: null,
  blocked_by: null,
  covered_by: null,
  ticks: 1,
  until: null,
  ...more,
});

/** A stretch of ticks with one verdict. */
export const newStretch = (
  { from, until, count }: { from: number; until: number; count: number },
  verdict: NewTick['verdict'],
  more: Parameters<typeof newTick>[2] = {},
): NewTick => ({ ...newTick(from, verdict, more), ticks: count, until: iso(until) });

/** How many ticks an event lists; it counts all of them. */
const TOLD = 20;

/**
 * The event that tells of ticks and their verdicts, one for all of a task that were decided at once. Ticks that simply fired
 * are told by the event of the run that they started.
 */
export function ticksDecided(
  task: Pick<Task, 'id' | 'userId' | 'projectId' | 'skillName'>,
  ticks: readonly (NewTick & { execution_id?: number | undefined })[],
): NewEvent {
  const counts: Partial<Record<NewTick['verdict'], number>> = {};
  for (const { verdict, ticks: count } of ticks) counts[verdict] = (counts[verdict] ?? 0) + count;
  return {
    type: 'task_occurrences',
    userId: task.userId,
    taskId: task.id,
    projectId: task.projectId,
    data: {
      task_id: task.id,
      project_id: task.projectId,
      skill_name: task.skillName,
      counts,
      occurrences: ticks.slice(-TOLD),
    },
  };
}

/** Ticks that start nothing. What has its verdict keeps it: UNIQUE (task_id, scheduled_for). */
const WRITE = {
  name: 'ledger-write',
  text: `
    insert into occurrences (task_id, user_id, scheduled_for, verdict, cause, ticks, until)
    select * from jsonb_to_recordset($1) as d(
      task_id bigint, user_id bigint, scheduled_for timestamptz, verdict text, cause text, ticks int, until timestamptz)
    on conflict on constraint occurrences_tick_key do nothing`,
};

/** Notes ticks of tasks that start nothing, and tells of them. The caller has locked the tasks. */
export function recordTicks(tx: Tx, noted: readonly { task: Task; ticks: readonly NewTick[] }[]): void {
  const some = noted.filter(({ ticks }) => ticks.length > 0);
  if (some.length === 0) return;
  const rows = some.flatMap(({ task, ticks }) =>
    ticks.map((tick) => ({ ...tick, task_id: task.id, user_id: task.userId })),
  );
  tx.write({ ...WRITE, values: [JSON.stringify(rows)] });
  emitEvents(
    tx,
    some.map(({ task, ticks }) => ticksDecided(task, ticks)),
  );
}

/** The ticks of a paused task that would have run from its `quietAt` on and before `until`: none of a one-off. */
export function pausedTicks(task: Task, until: Date): NewTick[] {
  const ticks = recurrenceOf(task);
  if (!ticks || task.status !== 'disabled' || task.quietAt === null || task.quietAt >= until) return [];
  const offset = spreadOf(task);
  const { listed, unlisted } = listTicks(ticks, task.quietAt.getTime() - offset, until.getTime() - offset);
  const why = { cause: task.pauseReason ?? 'manual' };
  return [
    ...(unlisted ? [newStretch(unlisted, 'paused', why)] : []),
    ...listed.map((scheduledFor) => newTick(scheduledFor, 'paused', why)),
  ];
}
