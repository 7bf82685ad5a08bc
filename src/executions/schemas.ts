import { z } from 'zod';
import {
  EXECUTION_CAUSES,
  EXECUTION_STATUSES,
  EXECUTION_TRIGGERS,
  type executions,
  type orphanResults,
} from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { booleanText, id, idText, instant, integerText, time, toTime } from '../http/validation.ts';

export type Execution = typeof executions.$inferSelect;

/** How much of an output lists carry: its end. */
export const PREVIEW_CHARACTERS = 4_096;
/** How much of an error lists carry, its end; and params no larger than so many bytes, or 500 runs would be tens of MB. */
export const ERROR_PREVIEW_CHARACTERS = 1_024;
export const LISTED_PARAMS_BYTES = 1_024;
export const LISTED_RESULT_BYTES = 1_024;
/** What is kept of an output: its end. */
export const MAX_OUTPUT_BYTES = 1_048_576;

const MAX_RESULT_BYTES = 65_536;

/** What a run answers, in a body. */
export const jsonResult = z
  .unknown()
  .refine((value) => value === undefined || Buffer.byteLength(JSON.stringify(value)) <= MAX_RESULT_BYTES, {
    error: `must be at most ${MAX_RESULT_BYTES} bytes of JSON`,
  })
  .meta({ description: 'What it answers, as any JSON value; null is the same as none.' });

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
  lost_leases: z.int().meta({ description: 'How many attempts before this one ended with a lost lease.' }),
  retry_of: id.nullable(),
  replay_of: id.nullable().meta({ description: 'The run that it repeats.' }),
  status: z.enum(EXECUTION_STATUSES),
  cause: z.enum(EXECUTION_CAUSES).nullable().meta({ description: 'Why it did not succeed.' }),
  skill_name: z.string(),
  params: z.record(z.string(), z.unknown()),
  available_at: time
    .nullable()
    .meta({ description: 'From when an agent may take it; null while another run is in its way.' }),
  expires_at: time.nullable().meta({ description: 'Cancelled, unless an agent has taken it by then.' }),
  lease_expires_at: time.nullable(),
  cancel_requested: z.boolean(),
  progress: progress.nullable(),
  started_at: time.nullable(),
  ended_at: time.nullable(),
  duration_ms: z.int().nullable(),
  error_text: z.string().nullable(),
  output_truncated: z.boolean(),
  result: z.unknown().meta({ description: 'What the agent answered, as JSON.' }),
  created_at: time,
};

/** A run as lists have it: of its output and error only the end, and of its params only small ones. */
export const executionSummary = z
  .object({
    ...common,
    params: common.params
      .nullable()
      .meta({ description: `In lists null when larger than ${LISTED_PARAMS_BYTES} bytes: get the run.` }),
    result: z
      .unknown()
      .meta({ description: `In lists null when larger than ${LISTED_RESULT_BYTES} bytes: get the run.` }),
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
export const completeBody = z
  .strictObject({
    lease_token: leaseToken,
    status: z.enum(['success', 'failed'], { error: 'must be success or failed' }),
    output: z.string().optional().meta({ description: 'Left out, what was streamed is the output.' }),
    error: z.string().optional(),
    result: jsonResult.optional(),
    retry_after_seconds: z
      .int()
      .min(0)
      .max(86_400)
      .optional()
      .meta({ description: 'With failed: the retry, if there is one, waits so long instead of the backoff.' }),
    non_retryable: z.boolean().optional().meta({ description: 'With failed: it would fail again, so no retry.' }),
  })
  .superRefine((body, context) => {
    if (body.status === 'failed') return;
    for (const field of ['retry_after_seconds', 'non_retryable'] as const) {
      if (body[field] === undefined || body[field] === false) continue;
      context.addIssue({ code: 'custom', path: [field], message: 'goes with the status failed alone' });
    }
  })
  .meta({
    examples: [
      { lease_token: '3f6c0a52-6d0f-4a86-9a3e-2f0d1b0c5f11', status: 'success', output: 'Done.', result: { rows: 42 } },
    ],
  });

export const outputBody = z.strictObject({
  lease_token: leaseToken,
  text: z.string().min(1),
  offset: z.int().min(0).max(2_147_483_647).optional().meta({
    description: 'Where it begins, in characters from the beginning of the output: makes it harmless to send it twice.',
  }),
});
export const outputAnswer = z.object({
  next_offset: z.int().meta({ description: 'Where the next piece begins.' }),
  truncated: z.boolean().meta({ description: `Some of it is not kept: of a run, ${MAX_OUTPUT_BYTES} bytes are.` }),
});
export const outputQuery = z.strictObject({
  offset: integerText(0, 2_147_483_646)
    .optional()
    .transform((offset) => offset ?? 0)
    .meta({ description: 'From which character on; 0 unless given.' }),
  limit: integerText(1, MAX_OUTPUT_BYTES)
    .optional()
    .transform((limit) => limit ?? 65_536)
    .meta({ description: 'How many characters at the most; 65536 unless given.' }),
});
export const outputRange = z
  .object({
    execution_id: id,
    offset: z.int(),
    text: z.string(),
    next_offset: z.int(),
    length: z.int().meta({ description: 'How many characters there are by now.' }),
    complete: z.boolean().meta({ description: 'The run has ended: nothing will follow.' }),
  })
  .meta({ id: 'OutputRange' });

export const orphanSummary = z
  .object({
    id,
    execution_id: id,
    task_id: id,
    agent_id: id.nullable(),
    status: z.enum(['success', 'failed']),
    error_text: common.error_text.meta({ description: `Its last ${ERROR_PREVIEW_CHARACTERS} characters.` }),
    output_preview: z
      .string()
      .nullable()
      .meta({ description: `Its last ${PREVIEW_CHARACTERS} characters; all of it is in the run that adopts it.` }),
    output_truncated: z.boolean(),
    result: z.unknown().meta({ description: `Null when larger than ${LISTED_RESULT_BYTES} bytes.` }),
    adopted_by: id.nullable().meta({ description: 'The run that was made of it.' }),
    created_at: time,
  })
  .meta({ id: 'OrphanResult' });
export const orphanList = z.object({ orphan_results: z.array(orphanSummary), ...pageAnswer });
export const orphanQuery = z.strictObject({ ...pageQuery(), adopted: booleanText.optional() });

/** A run on the wire, without its output. */
function executionCommon(row: Omit<Execution, 'outputText' | 'params'>) {
  return {
    id: row.id,
    task_id: row.taskId,
    agent_id: row.agentId,
    trigger: row.trigger,
    scheduled_for: toTime(row.scheduledFor),
    attempt: row.attempt,
    lost_leases: row.lostLeases,
    retry_of: row.retryOf,
    replay_of: row.replayOf,
    status: row.status,
    cause: row.cause,
    skill_name: row.skillName,
    available_at: toTime(row.availableAt),
    expires_at: toTime(row.expiresAt),
    lease_expires_at: toTime(row.leaseExpiresAt),
    cancel_requested: row.cancelRequested,
    progress: row.progress,
    started_at: toTime(row.startedAt),
    ended_at: toTime(row.endedAt),
    duration_ms: durationMs(row),
    error_text: row.errorText,
    output_truncated: row.outputTruncated,
    result: row.result,
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

/** A late result as lists have it. */
export function orphanView(
  row: Pick<
    typeof orphanResults.$inferSelect,
    'id' | 'executionId' | 'agentId' | 'status' | 'errorText' | 'outputTruncated' | 'result' | 'adoptedBy' | 'createdAt'
  > & { taskId: number; outputPreview: string | null },
) {
  return {
    id: row.id,
    execution_id: row.executionId,
    task_id: row.taskId,
    agent_id: row.agentId,
    status: row.status,
    error_text: row.errorText,
    output_preview: row.outputPreview,
    output_truncated: row.outputTruncated,
    result: row.result,
    adopted_by: row.adoptedBy,
    created_at: toTime(row.createdAt),
  };
}

/**
 * How long a run took, in milliseconds, by the database's clock; null while it goes on or when it never started. Zero when
 * that clock was put back meanwhile.
 */
export function durationMs(row: Pick<Execution, 'startedAt' | 'endedAt'>): number | null {
  return row.startedAt && row.endedAt ? Math.max(0, row.endedAt.getTime() - row.startedAt.getTime()) : null;
}
