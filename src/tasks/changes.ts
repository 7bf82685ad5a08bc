import { isDeepStrictEqual } from 'node:util';
import { changedFields, recordAudits } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import type { AUDIT_OPERATIONS } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { emitEvents, type NewEvent } from '../realtime/events.ts';
import { SCHEDULE_TOPIC } from './next-times.ts';
import { priorityWord } from './schemas.ts';
import { calendarEvent, type Task, taskStatusUpdate } from './task-events.ts';

// What is told of changes of tasks, one or a thousand: entries of the audit log, events, a ring for the scheduler.

/** A task before and after a change; before null, it is new. */
export interface TaskChange {
  before: Task | null;
  after: Task;
}

/** Writes the audit entries and the events of changes, and wakes the scheduler for new next times. */
export function tellChanges(
  tx: Tx,
  actor: Actor | null,
  operation: (typeof AUDIT_OPERATIONS)[number],
  changes: readonly TaskChange[],
): void {
  recordAudits(
    tx,
    actor,
    changes.map(({ before, after }) => ({
      operation,
      entityType: 'task',
      entityId: after.id,
      ownerId: after.userId,
      changedFields: changedFields(before && audited(before), audited(after)),
    })),
  );
  emitEvents(
    tx,
    changes.flatMap(({ before, after }) => {
      const calendar = calendarChange(before, after);
      return [taskStatusUpdate(after, { previousStatus: before?.status ?? null }), ...(calendar ? [calendar] : [])];
    }),
  );
  const next = changes.flatMap(({ before, after }) =>
    (['nextRunAt', 'quietAt'] as const).flatMap((column) => {
      const time = after[column]?.getTime();
      return time === undefined || time === before?.[column]?.getTime() ? [] : [time];
    }),
  );
  if (next.length > 0) tx.ring(SCHEDULE_TOPIC, new Date(Math.min(...next)).toISOString());
}

const audited = ({ quietAt: _, overdueAt: __, ...task }: Task) => ({ ...task, priority: priorityWord(task.priority) });

/** What calendars must hear: a next time came, went, or shows otherwise. Of one that went, the time it had is told. */
function calendarChange(before: Task | null, after: Task): NewEvent | undefined {
  if (!before?.nextRunAt) return after.nextRunAt ? calendarEvent('created', after) : undefined;
  if (!after.nextRunAt) return calendarEvent('deleted', { ...after, nextRunAt: before.nextRunAt });
  const updated = calendarEvent('updated', after);
  return isDeepStrictEqual(updated.data, calendarEvent('updated', before).data) ? undefined : updated;
}
