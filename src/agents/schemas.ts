import { z } from 'zod';
import { AGENT_STATUSES, AGENT_TYPES } from '../db/schema.ts';
import { id, time, toTime } from '../http/validation.ts';
import type { Agent } from './agents.ts';

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

export const agentAnswer = z
  .object({
    id,
    user_id: id,
    name: z.string(),
    type: z.enum(AGENT_TYPES),
    capabilities: z.array(z.string()),
    status: z.enum(AGENT_STATUSES),
    shared: z.boolean(),
    max_concurrency: z.int(),
    last_active_at: time,
    version: z.int(),
    created_at: time,
    updated_at: time,
  })
  .meta({ id: 'Agent' });

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
    max_concurrency: agent.maxConcurrency,
    last_active_at: toTime(agent.lastActiveAt),
    version: agent.version,
    created_at: toTime(agent.createdAt),
    updated_at: toTime(agent.updatedAt),
  };
}
