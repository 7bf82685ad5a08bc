import { setImmediate } from 'node:timers/promises';
import { z } from 'zod';
import { DST_FOLD_POLICIES, DST_GAP_POLICIES } from '../db/schema.ts';
import { instant, integerText, time } from '../http/validation.ts';
import { type CronFields, parseCron } from '../schedule/cron.ts';
import { type DstPolicy, nextOccurrence } from '../schedule/occurrences.ts';
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
  effective_at: time.meta({ description: 'The time at which it fires.' }),
  note: z.string().optional().meta({ description: 'What a clock change does to it.' }),
});

export const previewAnswer = z.object({ runs: z.array(run) }).meta({ id: 'Preview' });

type Run = z.input<typeof run>;

/** The next `count` times of a task after `after`, by its schedule alone; none for one that runs on demand. */
export async function previewTask(
  task: Pick<Task, 'scheduleCron' | 'timezone' | 'runAt'>,
  after: Date,
  count: number,
): Promise<Run[]> {
  if (task.scheduleCron !== null) return next(parseCron(task.scheduleCron), task.timezone, after, count);
  return task.runAt && task.runAt > after ? [runAt(task.runAt.getTime())] : [];
}

/** The next times after `after` of a schedule that is no task yet. */
export async function previewSchedule(body: z.output<typeof previewBody>, after: Date): Promise<Run[]> {
  const policy = { gap: body.dst_gap, fold: body.dst_fold };
  return next(parseCron(body.schedule_cron), body.timezone, after, body.count, policy);
}

async function next(fields: CronFields, zone: string, after: Date, count: number, policy?: DstPolicy): Promise<Run[]> {
  const runs: Run[] = [];
  let at = after.getTime();
  while (runs.length < count) {
    const found = nextOccurrence(fields, zone, at, policy);
    if (!found) break;
    runs.push(runAt(found.scheduledFor, found.note));
    at = found.scheduledFor;
    // A leap day on one weekday comes every 28 years or more, and a hundred of those are seconds of searching.
    await setImmediate();
  }
  return runs;
}

const runAt = (ms: number, note?: string): Run => ({
  scheduled_for: new Date(ms).toISOString(),
  effective_at: new Date(ms).toISOString(),
  ...(note === undefined ? {} : { note }),
});
