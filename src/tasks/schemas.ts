import { z } from 'zod';
import {
  DST_FOLD_POLICIES,
  DST_GAP_POLICIES,
  MISFIRE_POLICIES,
  OVERLAP_POLICIES,
  PAUSE_REASONS,
  PRIORITIES,
  TASK_STATUSES,
} from '../db/schema.ts';
import { executionSummary } from '../executions/schemas.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { booleanText, id, idText, instant, integerText, time, toTime } from '../http/validation.ts';
import { CronError } from '../schedule/cron.ts';
import { parseExpression } from '../schedule/recurrence.ts';
import { isTimeZone } from '../schedule/zone.ts';
import type { Task } from './task-events.ts';

const MAX_PARAMS_BYTES = 65_536;

const LISTED_STATUSES = TASK_STATUSES.filter((status) => status !== 'deleted');

/** What a task can be sorted by. */
export const TASK_SORTS = ['created_at', 'next_run_at', 'updated_at', 'status', 'priority'] as const;

/** The name of a skill in a body. */
export const skillName = z
  .string()
  .regex(/^[a-zA-Z0-9_-]{1,255}$/, { error: 'must be 1 to 255 letters, digits, _ or -' })
  .meta({ description: 'What an agent must be able to do to take a run of it.' });

const params = z
  .record(z.string(), z.unknown(), { error: 'must be a JSON object' })
  .refine((value) => Buffer.byteLength(JSON.stringify(value)) <= MAX_PARAMS_BYTES, {
    error: `must be at most ${MAX_PARAMS_BYTES} bytes of JSON`,
  });

/** A schedule in a body. */
export const cron = z
  .string()
  .superRefine((text, context) => {
    try {
      parseExpression(text);
    } catch (error) {
      if (!(error instanceof CronError)) throw error;
      context.addIssue({ code: 'custom', message: error.message.replace(/\.$/, '') });
    }
  })
  .meta({
    description:
      'Five fields, or six with seconds first, or a name such as @daily, in `timezone`; or `@every <interval>[/<phase>]`, such as @every 90m, in elapsed time.',
  });

/** A time zone in a body. */
export const timezone = z
  .string()
  .refine(isTimeZone, { error: 'must be a time zone of the IANA database, such as Europe/Rome or UTC' })
  .meta({ description: 'An IANA time zone.' });

const capabilities = z
  .array(z.string().trim().min(1).max(64))
  .max(32)
  .refine((list) => new Set(list).size === list.length, { error: 'must not name a capability twice' });

/** What the policies for clock changes mean, in words. */
export const DST_GAP =
  'What becomes of times that clocks going forward leave out: skipped, or shifted by what is left out. Unless given, `skip` for schedules of every hour and `shift` for others.';
export const DST_FOLD =
  'What becomes of times that clocks going back bring twice: run the first time, or both. Unless given, `both` for schedules of every hour and `first` for others.';

/** The fields of a task that a caller writes. Those that can be empty take null for that. */
const writable = {
  name: z.string().trim().min(1).max(255).nullable(),
  skill_name: skillName,
  project_id: id.nullable(),
  params,
  priority: z.enum(PRIORITIES),
  schedule_cron: cron.nullable(),
  timezone,
  run_at: instant.nullable().meta({ description: 'The one time to run at, instead of schedule_cron.' }),
  dst_gap: z.enum(DST_GAP_POLICIES).nullable().meta({ description: DST_GAP }),
  dst_fold: z.enum(DST_FOLD_POLICIES).nullable().meta({ description: DST_FOLD }),
  starts_at: instant.nullable().meta({ description: 'A schedule has no tick before this.' }),
  ends_at: instant.nullable().meta({ description: 'A schedule has no tick from this on.' }),
  spread_seconds: z.int().min(0).max(86_400).meta({
    description:
      'Its ticks run so much later at the most, always by the same, so that tasks of one time do not run at once.',
  }),
  max_runs: z
    .int()
    .min(1)
    .max(1_000_000)
    .nullable()
    .meta({ description: 'How many ticks run in all; then it has ended.' }),
  overlap_policy: z.enum(OVERLAP_POLICIES),
  misfire_policy: z.enum(MISFIRE_POLICIES),
  max_lateness_seconds: z.int().min(1).max(604_800).nullable().meta({
    description:
      'A tick so late at the most simply runs; beyond, it was missed, and misfire_policy decides. Unless given, half the time between two ticks, an hour at the most.',
  }),
  max_attempts: z.int().min(1).max(20).meta({ description: 'How often a run is tried that fails by itself.' }),
  max_lost_leases: z.int().min(0).max(20).nullable().meta({
    description: 'How often it is offered again when its agent was lost; unless given, one less than max_attempts.',
  }),
  retry_backoff_seconds: z.int().min(0).max(3_600),
  timeout_seconds: z.int().min(1).max(604_800),
  queue_ttl_seconds: z.int().min(1).max(2_592_000).nullable().meta({
    description: 'A run that no agent takes within this is cancelled.',
  }),
  heartbeat_timeout_seconds: z.int().min(2).max(3_600).nullable().meta({
    description: 'How long a lease lasts without a heartbeat, instead of LEASE_SECONDS.',
  }),
  pause_after_failures: z.int().min(1).max(100).nullable().meta({
    description: 'It is paused when so many runs in a row have failed, all their attempts included.',
  }),
  expect_success_within_seconds: z.int().min(1).max(31_622_400).nullable().meta({
    description: 'When it has not succeeded for so long, it is overdue: an event task_overdue, and a count in /health.',
  }),
  agent_id: id.nullable().meta({ description: 'The one agent that may run it.' }),
  required_capabilities: capabilities,
};

// Examples under this name, since zod leaves out `examples` where a schema transforms what it reads, as instants do.
const TASK_EXAMPLES = {
  schedule: {
    summary: 'On a schedule',
    value: {
      name: 'Morning report',
      skill_name: 'report',
      params: { audience: 'team' },
      schedule_cron: '0 9 * * mon-fri',
      timezone: 'Europe/Rome',
      priority: 'high',
    },
  },
  once: { summary: 'Once', value: { skill_name: 'deploy', run_at: '2099-01-01T03:00:00Z', max_attempts: 1 } },
  onDemand: { summary: 'On demand', value: { skill_name: 'report', params: { audience: 'board' } } },
};

export const createTaskBody = z
  .strictObject({
    ...writable,
    name: writable.name.default(null),
    project_id: writable.project_id.default(null),
    params: params.default({}),
    priority: writable.priority.default('medium'),
    schedule_cron: writable.schedule_cron.default(null),
    timezone: timezone.default('UTC'),
    run_at: instant.nullish(),
    dst_gap: writable.dst_gap.default(null),
    dst_fold: writable.dst_fold.default(null),
    starts_at: instant.nullish(),
    ends_at: instant.nullish(),
    spread_seconds: writable.spread_seconds.default(0),
    max_runs: writable.max_runs.default(null),
    overlap_policy: writable.overlap_policy.default('skip'),
    misfire_policy: writable.misfire_policy.default('fire_last'),
    max_lateness_seconds: writable.max_lateness_seconds.default(null),
    max_attempts: writable.max_attempts.default(3),
    max_lost_leases: writable.max_lost_leases.default(null),
    retry_backoff_seconds: writable.retry_backoff_seconds.default(10),
    timeout_seconds: writable.timeout_seconds.default(3_600),
    queue_ttl_seconds: writable.queue_ttl_seconds.default(null),
    heartbeat_timeout_seconds: writable.heartbeat_timeout_seconds.default(null),
    pause_after_failures: writable.pause_after_failures.default(null),
    expect_success_within_seconds: writable.expect_success_within_seconds.default(null),
    agent_id: writable.agent_id.default(null),
    required_capabilities: capabilities.default([]),
  })
  .meta({ 'x-examples': TASK_EXAMPLES });
export type CreateTask = z.output<typeof createTaskBody>;

export const updateTaskBody = z
  .strictObject(writable)
  .partial()
  .refine((body) => Object.keys(body).length > 0, { error: 'must have at least one field to change' })
  .meta({
    'x-examples': {
      schedule: { summary: 'Another schedule', value: { schedule_cron: '*/15 9-17 * * *', priority: 'critical' } },
    },
  });
export type UpdateTask = z.output<typeof updateTaskBody>;

/** What a run is given instead of its task's params. */
export const runTaskParams = params;

/** A body that may be left out altogether. */
export const runTaskBody = z
  .strictObject({ params: params.optional().meta({ description: 'For this run, instead of those of the task.' }) })
  .nullish()
  .meta({ examples: [{ params: { audience: 'board' } }] });

/** A body that may be left out altogether. */
export const pauseTaskBody = z
  .strictObject({
    until: instant.nullish().meta({ description: 'When it goes on by itself; unless given, when it is resumed.' }),
  })
  .nullish()
  .meta({ 'x-examples': { until: { summary: 'For a while', value: { until: '2099-01-01T00:00:00Z' } } } });

export const taskQuery = z.strictObject({
  ...pageQuery(),
  status: z
    .enum(LISTED_STATUSES, {
      error: `must be ${LISTED_STATUSES.slice(0, -1).join(', ')} or ${LISTED_STATUSES.at(-1)}; deleted tasks are not listed`,
    })
    .optional(),
  skill_name: skillName.optional(),
  project_id: idText.optional(),
  agent_id: idText.optional(),
  search: z.string().max(255).optional().meta({
    description: 'Part of the name or skill_name, in any case; one or two letters: the start of a word in them.',
  }),
  overdue: booleanText.optional().meta({ description: 'Only those that are overdue, or only those that are not.' }),
  next_run_from: instant.optional().meta({ description: 'Only those whose next run is not before this.' }),
  next_run_to: instant.optional().meta({ description: 'Only those whose next run is before this.' }),
  sort_by: z.enum(TASK_SORTS).optional().meta({ description: 'created_at unless given.' }),
});
export type TaskQuery = z.output<typeof taskQuery>;

export const historyQuery = z.strictObject({
  history_limit: integerText(0, 500)
    .optional()
    .transform((limit) => limit ?? 50)
    .meta({ description: 'How many of its latest runs to show; 50 unless given.' }),
});

const taskFields = {
  id,
  user_id: id,
  project_id: id.nullable(),
  name: z.string().nullable(),
  skill_name: z.string(),
  params: z.record(z.string(), z.unknown()),
  priority: z.enum(PRIORITIES),
  schedule_cron: z.string().nullable(),
  timezone: z.string(),
  run_at: time.nullable(),
  next_run_at: time.nullable().meta({ description: 'When it fires next; null when it does not.' }),
  last_run_at: time.nullable(),
  status: z.enum(TASK_STATUSES),
  pause_reason: z.enum(PAUSE_REASONS).nullable(),
  pause_until: time.nullable(),
  dst_gap: z.enum(DST_GAP_POLICIES).nullable(),
  dst_fold: z.enum(DST_FOLD_POLICIES).nullable(),
  starts_at: time.nullable(),
  ends_at: time.nullable(),
  spread_seconds: z.int(),
  max_runs: z.int().nullable(),
  fired_count: z.int().meta({ description: 'How many ticks have run.' }),
  overlap_policy: z.enum(OVERLAP_POLICIES),
  misfire_policy: z.enum(MISFIRE_POLICIES),
  max_lateness_seconds: z.int().nullable(),
  max_attempts: z.int(),
  max_lost_leases: z.int().nullable(),
  retry_backoff_seconds: z.int(),
  timeout_seconds: z.int(),
  queue_ttl_seconds: z.int().nullable(),
  heartbeat_timeout_seconds: z.int().nullable(),
  pause_after_failures: z.int().nullable(),
  consecutive_failures: z
    .int()
    .meta({ description: 'How many runs in a row have failed, all their attempts included.' }),
  expect_success_within_seconds: z.int().nullable(),
  last_success_at: time.nullable(),
  overdue_since: time.nullable().meta({ description: 'Since when it is overdue.' }),
  agent_id: id.nullable(),
  required_capabilities: z.array(z.string()),
  version: z.int(),
  created_at: time,
  updated_at: time,
};

export const taskAnswer = z.object(taskFields).meta({ id: 'Task' });
/** A task with its latest runs, newest first. */
export const taskDetail = z.object({ ...taskFields, executions: z.array(executionSummary) }).meta({ id: 'TaskDetail' });
/** How large the params are that lists carry: with all of a hundred tasks, an answer would be 6 MB. */
const LISTED_PARAMS_BYTES = 8_192;
/** A task as lists have it: of its params only small ones. */
export const taskSummary = z
  .object({
    ...taskFields,
    params: taskFields.params
      .nullable()
      .meta({ description: `In lists null when larger than ${LISTED_PARAMS_BYTES} bytes: get the task.` }),
  })
  .meta({ id: 'TaskSummary' });
export const taskList = z.object({ tasks: z.array(taskSummary), ...pageAnswer });
export const taskDeleted = z.object({ message: z.string(), task_id: id, status: z.enum(['deleted']) });

/** A task on the wire. */
export function taskView(task: Task): z.input<typeof taskAnswer> {
  return {
    id: task.id,
    user_id: task.userId,
    project_id: task.projectId,
    name: task.name,
    skill_name: task.skillName,
    params: task.params,
    priority: priorityWord(task.priority),
    schedule_cron: task.scheduleCron,
    timezone: task.timezone,
    run_at: toTime(task.runAt),
    next_run_at: toTime(task.nextRunAt),
    last_run_at: toTime(task.lastRunAt),
    status: task.status,
    pause_reason: task.pauseReason,
    pause_until: toTime(task.pauseUntil),
    dst_gap: task.dstGap,
    dst_fold: task.dstFold,
    starts_at: toTime(task.startsAt),
    ends_at: toTime(task.endsAt),
    spread_seconds: task.spreadSeconds,
    max_runs: task.maxRuns,
    fired_count: task.firedCount,
    overlap_policy: task.overlapPolicy,
    misfire_policy: task.misfirePolicy,
    max_lateness_seconds: task.maxLatenessSeconds,
    max_attempts: task.maxAttempts,
    max_lost_leases: task.maxLostLeases,
    retry_backoff_seconds: task.retryBackoffSeconds,
    timeout_seconds: task.timeoutSeconds,
    queue_ttl_seconds: task.queueTtlSeconds,
    heartbeat_timeout_seconds: task.heartbeatTimeoutSeconds,
    pause_after_failures: task.pauseAfterFailures,
    consecutive_failures: task.consecutiveFailures,
    expect_success_within_seconds: task.expectSuccessWithinSeconds,
    last_success_at: toTime(task.lastSuccessAt),
    overdue_since: toTime(task.overdueSince),
    agent_id: task.agentId,
    required_capabilities: task.requiredCapabilities,
    version: task.version,
    created_at: toTime(task.createdAt),
    updated_at: toTime(task.updatedAt),
  };
}

/** A task as lists have it. */
export function taskSummaryView(task: Task): z.input<typeof taskSummary> {
  const large = Buffer.byteLength(JSON.stringify(task.params)) > LISTED_PARAMS_BYTES;
  return { ...taskView(task), params: large ? null : task.params };
}

/** The word for a priority as the table has it: its place in PRIORITIES. */
export function priorityWord(priority: number): (typeof PRIORITIES)[number] {
  const word = PRIORITIES[priority];
  if (word === undefined) throw new Error(`There is no priority ${priority}.`);
  return word;
}
