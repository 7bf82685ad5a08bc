import { z } from 'zod';
import { EXECUTION_CAUSES, EXECUTION_STATUSES, EXECUTION_TRIGGERS, type executions } from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, idText, instant, time, toTime } from '../http/validation.ts';

export type Execution = typeof executions.$inferSelect;

/** How much of an output lists carry: its end. */
export const PREVIEW_CHARACTERS = 4_096;
/** How much of an error lists carry, its end; and params no larger than so many bytes, or 500 runs would be tens of MB. */
export const ERROR_PREVIEW_CHARACTERS = 1_024;
export const LISTED_PARAMS_BYTES = 1_024;
/** What is kept of an output: its end. */
export const MAX_OUTPUT_BYTES = 1_048_576;

export const progress = z
  .strictObject({
    percent: z.number().min(0).max(100).optional(),
    message: z.string().max(2_048).optional(),
  })
  .meta({ id: 'Progress' });

const common = {
  id,
  task_id: id,
  agent_id: id.nullable(),
  trigger: z.enum(EXECUTION_TRIGGERS),
  scheduled_for: time,
  attempt: z.int(),
  retry_of: id.nullable(),
  status: z.enum(EXECUTION_STATUSES),
  cause: z.enum(EXECUTION_CAUSES).nullable().meta({ description: 'Why it did not succeed.' }),
  skill_name: z.string(),
  params: z.record(z.string(), z.unknown()),
  available_at: time
    .nullable()
    .meta({ description: 'From when an agent may take it; null while another run is in its way.' }),
  lease_expires_at: time.nullable(),
  cancel_requested: z.boolean(),
  progress: progress.nullable(),
  started_at: time.nullable(),
  ended_at: time.nullable(),
  duration_ms: z.int().nullable(),
  error_text: z.string().nullable(),
  output_truncated: z.boolean(),
  created_at: time,
};

/** A run as lists have it: of its output and error only the end, and of its params only small ones. */
export const executionSummary = z
  .object({
    ...common,
    params: common.params
      .nullable()
      .meta({ description: `In lists null when larger than ${LISTED_PARAMS_BYTES} bytes: get the run.` }),
    error_text: common.error_text.meta({ description: `Its last ${ERROR_PREVIEW_CHARACTERS} characters.` }),
    output_preview: z
      .string()
      .nullable()
      .meta({ description: `Its last ${PREVIEW_CHARACTERS} characters.` }),
  })
  .meta({ id: 'Execution' });
/** A run with the whole of its output. */
export const executionDetail = z
  .object({ ...common, output_text: z.string().nullable() })
  .meta({ id: 'ExecutionDetail' });

export const executionList = z.object({ executions: z.array(executionSummary), ...pageAnswer });
export const executionQuery = z.strictObject({
  ...pageQuery(),
  task_id: idText.optional(),
  agent_id: idText.optional(),
  status: z.enum(EXECUTION_STATUSES).optional(),
  from: instant.optional(),
  to: instant.optional(),
});

export const claimBody = z.strictObject({
  max: z.int().min(1).max(100).default(1),
  wait_ms: z.int().min(0).max(30_000).default(0),
  skills: z
    .array(z.string().regex(/^[a-zA-Z0-9_-]{1,255}$/))
    .min(1)
    .max(100)
    .optional(),
});
export const claimAnswer = z.object({
  draining: z.boolean().meta({ description: 'True when the agent is given nothing until it is resumed.' }),
  executions: z.array(
    z.object({
      execution_id: id,
      task_id: id,
      skill_name: z.string(),
      params: z.record(z.string(), z.unknown()),
      attempt: z.int(),
      scheduled_for: time,
      lease_token: z.string(),
      lease_expires_at: time,
      timeout_seconds: z.int(),
    }),
  ),
});

const leaseToken = z.uuid({ error: 'must be the lease_token that the claim gave' });
export const heartbeatBody = z.strictObject({ lease_token: leaseToken, progress: progress.optional() });
export const heartbeatAnswer = z.object({ cancel_requested: z.boolean(), lease_expires_at: time });
export const completeBody = z.strictObject({
  lease_token: leaseToken,
  status: z.enum(['success', 'failed'], { error: 'must be success or failed' }),
  output: z.string().optional(),
  error: z.string().optional(),
});

/** A run on the wire, without its output. */
function executionCommon(row: Omit<Execution, 'outputText' | 'params'>) {
  return {
    id: row.id,
    task_id: row.taskId,
    agent_id: row.agentId,
    trigger: row.trigger,
    scheduled_for: toTime(row.scheduledFor),
    attempt: row.attempt,
    retry_of: row.retryOf,
    status: row.status,
    cause: row.cause,
    skill_name: row.skillName,
    available_at: toTime(row.availableAt),
    lease_expires_at: toTime(row.leaseExpiresAt),
    cancel_requested: row.cancelRequested,
    progress: row.progress,
    started_at: toTime(row.startedAt),
    ended_at: toTime(row.endedAt),
    duration_ms: durationMs(row),
    error_text: row.errorText,
    output_truncated: row.outputTruncated,
    created_at: toTime(row.createdAt),
  };
}

/** A run as lists have it; `outputPreview` is read as such, so that long outputs never leave the database. */
export function executionSummaryView(
  row: Omit<Execution, 'outputText' | 'params'> & {
    params: Execution['params'] | null;
    outputPreview: string | null;
  },
) {
  return { ...executionCommon(row), params: row.params, output_preview: row.outputPreview };
}

/** A run with the whole of its output. */
export function executionDetailView(row: Execution) {
  return { ...executionCommon(row), params: row.params, output_text: row.outputText };
}

/**
 * How long a run took, in milliseconds, by the database's clock; null while it goes on or when it never started. Zero when
 * that clock was put back meanwhile.
 */
export function durationMs(row: Pick<Execution, 'startedAt' | 'endedAt'>): number | null {
  return row.startedAt && row.endedAt ? Math.max(0, row.endedAt.getTime() - row.startedAt.getTime()) : null;
}
