import { z } from 'zod';
import { OCCURRENCE_CAUSES, VERDICTS } from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, idText, instant, time, toTime } from '../http/validation.ts';
import type { CalendarEntry } from './calendar.ts';
import type { OccurrenceRow } from './occurrences.ts';

const MAX_DAYS = 93;

export const calendarQuery = z
  .strictObject({
    from: instant.meta({ description: 'The start of the window.', example: '2026-11-23T00:00:00Z' }),
    to: instant.meta({ description: `Its end, at most ${MAX_DAYS} days later.`, example: '2026-11-30T00:00:00Z' }),
    project_id: idText.optional(),
    skill_name: z.string().max(255).optional(),
    user_id: idText.optional().meta({ description: 'Whose tasks; another than yourself: admins only.' }),
  })
  .superRefine(({ from, to }, context) => {
    if (!(from instanceof Date && to instanceof Date)) return; // It was said already what is wrong with them.
    const days = (to.getTime() - from.getTime()) / 86_400_000;
    if (days > 0 && days <= MAX_DAYS) return;
    const message = `must be later than from, by at most ${MAX_DAYS} days`;
    context.addIssue({ code: 'custom', path: ['to'], message });
  });

export const calendarAnswer = z
  .object({
    from: time,
    to: time,
    entries: z.array(
      z.object({
        task_id: id,
        title: z.string(),
        start_time: time,
        effective_at: time.meta({ description: 'When it runs: later by its place in spread_seconds.' }),
        timezone: z.string(),
        schedule_cron: z.string().nullable(),
        project_id: id.nullable(),
        skill_name: z.string(),
        status: z.enum(['planned', ...VERDICTS]).meta({ description: 'planned, or what became of it.' }),
        note: z.string().optional().meta({ description: 'What a clock change does to it.' }),
      }),
    ),
    truncated: z.boolean().meta({ description: 'There are more: ask for a shorter window.' }),
  })
  .meta({ id: 'Calendar' });

/** An entry of the calendar on the wire. */
export function calendarView(entry: CalendarEntry) {
  return {
    task_id: entry.taskId,
    title: entry.title,
    start_time: toTime(entry.startTime),
    effective_at: toTime(entry.effectiveAt),
    timezone: entry.timezone,
    schedule_cron: entry.scheduleCron,
    project_id: entry.projectId,
    skill_name: entry.skillName,
    status: entry.status,
    ...(entry.note === undefined ? {} : { note: entry.note }),
  };
}

export const occurrenceQuery = z.strictObject({
  ...pageQuery(),
  verdict: z.enum(VERDICTS).optional(),
  from: instant.optional().meta({ description: 'Ticks not before this.' }),
  to: instant.optional().meta({ description: 'Ticks before this.' }),
});
export type OccurrenceQuery = z.output<typeof occurrenceQuery>;

export const occurrenceList = z.object({
  occurrences: z.array(
    z
      .object({
        id,
        task_id: id,
        scheduled_for: time,
        verdict: z.enum(VERDICTS),
        cause: z.enum(OCCURRENCE_CAUSES).nullable().meta({ description: 'Why, where the verdict alone does not say.' }),
        detail: z.string().meta({ description: 'The same in a sentence.' }),
        ticks: z.int().meta({ description: 'More than 1 for a stretch of ticks with one verdict, up to `until`.' }),
        until: time.nullable(),
        covered_by: time.nullable().meta({ description: 'The tick whose run stands for this one too.' }),
        blocked_by: id.nullable().meta({ description: 'The unfinished run that was in the way.' }),
        execution_id: id.nullable().meta({ description: 'The run that it started, at its first attempt.' }),
        created_at: time,
      })
      .meta({ id: 'Occurrence' }),
  ),
  ...pageAnswer,
});

/** A tick on the wire. */
export function occurrenceView(row: OccurrenceRow) {
  return {
    id: row.id,
    task_id: row.taskId,
    scheduled_for: toTime(row.scheduledFor),
    verdict: row.verdict,
    cause: row.cause,
    detail: inWords(row),
    ticks: row.ticks,
    until: toTime(row.until),
    covered_by: toTime(row.coveredBy),
    blocked_by: row.blockedBy,
    execution_id: row.executionId,
    created_at: toTime(row.createdAt),
  };
}

const WORDS: Record<OccurrenceRow['verdict'], string> = {
  fired: 'It ran on time.',
  late: 'It ran late.',
  coalesced: 'It was missed, and a later tick ran for it too.',
  skipped_overlap: 'It did not run, since another run was in the way.',
  skipped_misfire: 'It was missed, and did not run.',
  paused: 'It did not run, since the task was paused.',
  dst_gap: 'It did not run, since clocks went forward over it.',
};

const CAUSE_WORDS: Record<NonNullable<OccurrenceRow['cause']>, string> = {
  delay: 'Muster was late by less than the task allows.',
  downtime: 'Nobody was there to fire it at its time.',
  catch_up_limit: 'More ticks were missed than are made up for.',
  open_run: 'The run before it had not ended.',
  queue_full: 'As many runs waited as may.',
  manual: 'Somebody paused it.',
  project: 'Its project was archived.',
  failures: 'It had failed as often in a row as it may.',
  clock_change: 'Its dst_gap is skip.',
  backfill: 'Somebody asked to make up for it.',
};

/** What became of a tick, and why, as people say it. */
const inWords = ({ verdict, cause }: Pick<OccurrenceRow, 'verdict' | 'cause'>) =>
  cause === null ? WORDS[verdict] : `${WORDS[verdict]} ${CAUSE_WORDS[cause]}`;
