import { z } from 'zod';
import { AGENT_STATUSES, AGENT_TYPES } from '../db/schema.ts';
import { executionSummary, jsonResult } from '../executions/schemas.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { booleanText, id, integerText, time, toTime } from '../http/validation.ts';
import type { Agent } from './agents.ts';
import type { AgentMetrics } from './metrics.ts';

const capability = z.string().trim().min(1).max(64);
const capabilities = z
  .array(capability)
  .max(64)
  .refine((list) => new Set(list).size === list.length, { error: 'must not name a capability twice' });

export const registerBody = z
  .strictObject({
    name: z.string().trim().min(1).max(255),
    type: z.enum(AGENT_TYPES).default('custom'),
    capabilities: capabilities.default([]),
    max_concurrency: z.int().min(1).max(1_000).default(1),
    shared: z.boolean().optional().meta({ description: 'Admins only: it runs the tasks of all users.' }),
  })
  .meta({ examples: [{ name: 'build-1', type: 'coder', capabilities: ['typescript'], max_concurrency: 2 }] });

export const heartbeatBody = z
  .strictObject({
    status: z.enum(['active', 'idle', 'busy', 'offline', 'error']).optional(),
  })
  .nullish()
  .meta({ examples: [{ status: 'idle' }] });

const facts = {
  name: z.string().trim().min(1).max(255),
  type: z.enum(AGENT_TYPES),
  capabilities,
  max_concurrency: z.int().min(1).max(1_000),
  shared: z.boolean().meta({ description: 'Admins only: everybody sees it, and it runs the tasks of all users.' }),
};

export const updateAgentBody = z
  .strictObject(facts)
  .partial()
  .refine((body) => Object.keys(body).length > 0, { error: 'must have at least one field to change' })
  .meta({ examples: [{ capabilities: ['typescript', 'sql'], max_concurrency: 4 }] });

/** What agents can be sorted by. */
export const AGENT_SORTS = ['created_at', 'name', 'last_active_at'] as const;

export const agentQuery = z.strictObject({
  ...pageQuery({ max: 1_000, default: 100 }),
  type: z.enum(AGENT_TYPES).optional(),
  status: z.enum(AGENT_STATUSES).optional(),
  shared: booleanText.optional(),
  capabilities: z
    .string()
    .transform((text) => text.split(','))
    .pipe(z.array(capability).max(64))
    .optional()
    .meta({ type: 'string', description: 'Some capabilities, separated by commas.', example: 'typescript,sql' }),
  match: z
    .enum(['any', 'all'], { error: 'must be any or all' })
    .optional()
    .meta({ description: 'Whether any of the capabilities will do (unless given), or all must be there.' }),
  sort_by: z.enum(AGENT_SORTS).optional().meta({ description: 'created_at unless given.' }),
});
export type AgentQuery = z.output<typeof agentQuery>;

export const agentDetailQuery = z.strictObject({
  history_limit: integerText(0, 500)
    .optional()
    .transform((limit) => limit ?? 50)
    .meta({ description: 'How many of its latest runs to show; 50 unless given.' }),
  window_hours: integerText(1, 8_760)
    .optional()
    .transform((hours) => hours ?? 720)
    .meta({
      description: 'How far back the metrics reach, to the start of the hour; 720 (30 days) unless given.',
    }),
});

export const activityBody = z
  .strictObject({
    agent_id: id,
    task_id: id,
    execution_id: id
      .optional()
      .meta({ description: 'The run that an earlier report with `running` was answered with.' }),
    status: z.enum(['running', 'success', 'failed', 'timeout'], {
      error: 'must be running, success, failed or timeout',
    }),
    output: z.string().optional(),
    error: z.string().optional(),
    result: jsonResult.optional(),
    duration_ms: z.int().min(0).max(31_536_000_000).optional().meta({ description: 'How long it took, up to now.' }),
  })
  .meta({ examples: [{ agent_id: 1, task_id: 1, status: 'success', output: 'All tests pass.', duration_ms: 5300 }] });
export type Activity = z.output<typeof activityBody>;

export const activityAnswer = z
  .object({
    status: z.enum(['running', 'success', 'failed', 'timeout']),
    message: z.string(),
    agent_id: id,
    task_id: id,
    execution_id: id,
    stored_in_memory_mcp: z.boolean().meta({ description: 'Whether the Memory MCP server has it already.' }),
    broadcasted_via_websocket: z.boolean().meta({
      description: 'Whether its event has its place in the order and went to the sockets; false: it will, soon.',
    }),
  })
  .meta({ id: 'ActivityAnswer' });

const agentFields = {
  id,
  user_id: id,
  name: z.string(),
  type: z.enum(AGENT_TYPES),
  capabilities: z.array(z.string()),
  status: z.enum(AGENT_STATUSES),
  shared: z.boolean(),
  draining: z.boolean().meta({ description: 'It finishes what it has and is given nothing more.' }),
  max_concurrency: z.int(),
  last_active_at: time,
  version: z.int(),
  created_at: time,
  updated_at: time,
};

export const agentAnswer = z.object(agentFields).meta({ id: 'Agent' });
export const agentList = z.object({ agents: z.array(agentAnswer), ...pageAnswer });

const rate = z.number().min(0).max(1).nullable();
const metricFields = {
  success_rate: rate.meta({ description: 'Of all runs that ended but for cancelled ones; null when there is none.' }),
  avg_duration_ms: z.int().nullable(),
  p50_duration_ms: z.int().nullable().meta({ description: 'Within 5 %.' }),
  p95_duration_ms: z.int().nullable().meta({ description: 'Within 5 %.' }),
};

/** An agent with its latest runs, newest first, as far as the caller may see them, and how good it is. */
export const agentDetail = z
  .object({
    ...agentFields,
    execution_history: z.array(executionSummary),
    ...metricFields,
    runs_last_24h: z.int(),
    metrics: z.object({
      window_hours: z.int(),
      n: z.int().meta({ description: 'How many runs the success rate is made of.' }),
      successes: z.int(),
      confidence_low: rate.meta({ description: 'Lower end of the 95 % interval of the success rate (Wilson).' }),
      confidence_high: rate.meta({ description: 'Upper end of the 95 % interval.' }),
      failures: z.object({
        agent_failed: z.int(),
        lease_lost: z.int(),
        run_timeout: z.int(),
        cancelled: z.int(),
      }),
      ...metricFields,
    }),
  })
  .meta({ id: 'AgentDetail' });

/** The metrics of an agent on the wire. */
export function metricsView(metrics: AgentMetrics, windowHours: number) {
  const common = {
    success_rate: metrics.successRate,
    avg_duration_ms: metrics.averageMs,
    p50_duration_ms: metrics.p50Ms,
    p95_duration_ms: metrics.p95Ms,
  };
  return {
    ...common,
    runs_last_24h: metrics.runsLastDay,
    metrics: {
      window_hours: windowHours,
      n: metrics.n,
      successes: metrics.successes,
      confidence_low: metrics.confidence?.low ?? null,
      confidence_high: metrics.confidence?.high ?? null,
      failures: metrics.failures,
      ...common,
    },
  };
}

/** An agent on the wire. */
export function agentView(agent: Agent): z.input<typeof agentAnswer> {
  return {
    id: agent.id,
    user_id: agent.userId,
    name: agent.name,
    type: agent.type,
    capabilities: agent.capabilities,
    status: agent.status,
    shared: agent.shared,
    draining: agent.draining,
    max_concurrency: agent.maxConcurrency,
    last_active_at: toTime(agent.lastActiveAt),
    version: agent.version,
    created_at: toTime(agent.createdAt),
    updated_at: toTime(agent.updatedAt),
  };
}
