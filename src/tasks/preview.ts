import { setImmediate } from 'node:timers/promises';
import { z } from 'zod';
import { DST_FOLD_POLICIES, DST_GAP_POLICIES } from '../db/schema.ts';
import { instant, integerText, time } from '../http/validation.ts';
import type { Occurrence } from '../schedule/occurrences.ts';
import { type Recurrence, recurrence } from '../schedule/recurrence.ts';
import { recurrenceOf, type Schedule, spreadOf } from './next-times.ts';
import { cron, DST_FOLD, DST_GAP, timezone } from './schemas.ts';
import type { Task } from './task-events.ts';

const MAX_COUNT = 100;
const DEFAULT_COUNT = 10;

const from = instant.optional().meta({ description: 'The times after this; now unless given.' });

export const previewQuery = z.strictObject({
  from,
  count: integerText(1, MAX_COUNT)
    .optional()
    .transform((count) => count ?? DEFAULT_COUNT),
});

export const previewBody = z
  .strictObject({
    schedule_cron: cron,
    timezone: timezone.default('UTC'),
    from,
    count: z.int().min(1).max(MAX_COUNT).default(DEFAULT_COUNT),
    dst_gap: z.enum(DST_GAP_POLICIES).optional().meta({ description: DST_GAP }),
    dst_fold: z.enum(DST_FOLD_POLICIES).optional().meta({ description: DST_FOLD }),
    starts_at: instant.optional().meta({ description: 'No time before this.' }),
    ends_at: instant.optional().meta({ description: 'No time from this on.' }),
  })
  .meta({
    'x-examples': {
      clockChange: {
        summary: 'Over a clock change',
        value: { schedule_cron: '30 2 * * *', timezone: 'Europe/Rome', from: '2027-03-26T00:00:00Z', count: 4 },
      },
    },
  });

const run = z.object({
  scheduled_for: time.meta({ description: 'The time by which the run is known.' }),
  effective_at: time.meta({ description: 'The time at which it fires: later by its place in spread_seconds.' }),
  note: z.string().optional().meta({ description: 'What a clock change does to it.' }),
});

export const previewAnswer = z.object({ runs: z.array(run) }).meta({ id: 'Preview' });

type Run = z.input<typeof run>;

/**
 * The next `count` times of a task: after `from`, by its schedule alone; where that is not given, from the tick on that it
 * runs next, or after `now`. None for one that runs on demand.
 */
export async function previewTask(
  task: Schedule & Pick<Task, 'nextRunAt'>,
  from: Date | undefined,
  now: Date,
  count: number,
): Promise<Run[]> {
  const ticks = recurrenceOf(task);
  // A task that is new or was changed does not owe the tick whose time was before that, though its spread lies after it.
  const armed = task.nextRunAt && new Date(task.nextRunAt.getTime() - 1);
  const after = from ?? (ticks && armed ? armed : now);
  if (ticks) return next(ticks, after, count, spreadOf(task));
  return task.runAt && task.runAt > after ? [runAt({ scheduledFor: task.runAt.getTime() }, 0)] : [];
}

/** The next times after `after` of a schedule that is no task yet. */
export async function previewSchedule(body: z.output<typeof previewBody>, after: Date): Promise<Run[]> {
  const { schedule_cron: expression, timezone, dst_gap, dst_fold, starts_at, ends_at } = body;
  const ticks = recurrence({
    expression,
    timezone,
    dstGap: dst_gap ?? null,
    dstFold: dst_fold ?? null,
    startsAt: starts_at?.getTime() ?? null,
    endsAt: ends_at?.getTime() ?? null,
  });
  return next(ticks, after, body.count, 0);
}

async function next(ticks: Recurrence, after: Date, count: number, offset: number): Promise<Run[]> {
  const runs: Run[] = [];
  // What has its nominal time before and runs after is still to come.
  let at = after.getTime() - offset;
  while (runs.length < count) {
    const found = ticks.next(at);
    if (!found) break;
    runs.push(runAt(found, offset));
    at = found.scheduledFor;
    // A leap day on one weekday comes every 28 years or more, and a hundred of those are seconds of searching.
    await setImmediate();
  }
  return runs;
}

const runAt = ({ scheduledFor, note }: Occurrence, offset: number): Run => ({
  scheduled_for: new Date(scheduledFor).toISOString(),
  effective_at: new Date(scheduledFor + offset).toISOString(),
  ...(note === undefined ? {} : { note }),
});
