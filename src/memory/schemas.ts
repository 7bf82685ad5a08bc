import { z } from 'zod';
import { MEMORY_INTENTS, MEMORY_KINDS } from '../db/schema.ts';
import { executionSummary } from '../executions/schemas.ts';
import { id, integerText, time, toTime } from '../http/validation.ts';
import { taskAnswer, taskSummary } from '../tasks/schemas.ts';
import type { FoundMemory, Memory } from './memories.ts';

/** Where memories are found: the server, Postgres, or what the server found last, as Redis has it. */
export const MEMORY_SOURCES = ['memory_mcp', 'postgresql', 'redis_cache'] as const;

const MAX_CONTENT = 32_768;
const MAX_METADATA_BYTES = 8_192;

const intent = z.enum(MEMORY_INTENTS).meta({ description: 'Why it was done.' });

export const storeBody = z.strictObject({
  content: z
    .string()
    .min(1)
    .max(MAX_CONTENT)
    .refine((text) => text.trim() !== '', { error: 'must not be blank' })
    .meta({ example: 'The breaker opens at the third failure in a row.' }),
  intent,
  agent_id: id.optional().meta({ description: 'The agent that did it: one of yours, or a shared one.' }),
  project_id: id.optional().meta({ description: 'A project of yours; that of the task unless given.' }),
  task_id: id.optional(),
  metadata: z
    .record(z.string().max(64), z.unknown())
    .default({})
    .refine((value) => Buffer.byteLength(JSON.stringify(value)) <= MAX_METADATA_BYTES, {
      error: `must be at most ${MAX_METADATA_BYTES} bytes of JSON`,
    })
    .meta({ description: 'Anything else; a text under `description` becomes the WHY’s description.' }),
});
export type StoreMemory = z.output<typeof storeBody>;

const tags = z
  .object({
    who: z.object({
      user_id: id,
      agent_id: id.nullable(),
      agent_name: z.string().nullable(),
      agent_category: z.string().nullable(),
      capabilities: z.array(z.string()),
    }),
    when: z.object({ iso: time, unix: z.int(), readable: z.string() }),
    project: z.object({
      project_id: id.nullable(),
      project_name: z.string().nullable(),
      task_id: id.nullable(),
      task_name: z.string().nullable(),
      execution_id: id.nullable(),
    }),
    why: z.object({ intent, description: z.string() }),
    kind: z.enum(MEMORY_KINDS),
    extra: z.record(z.string(), z.unknown()).meta({ description: 'The metadata that it was stored with.' }),
  })
  .meta({ id: 'MemoryMetadata' });

export const storeAnswer = z.object({
  memory_id: id,
  storage: z
    .enum(['memory_mcp', 'postgresql_fallback'])
    .meta({ description: 'Where it can be found by now. It is in Postgres in any case.' }),
  status: z
    .enum(['success', 'degraded'])
    .meta({ description: 'degraded: there is a Memory MCP server, and it gets this memory when it is back.' }),
  metadata: tags,
});

export const searchBody = z.strictObject({
  query: z
    .string()
    .min(1)
    .max(1_000)
    .refine((text) => text.trim() !== '', { error: 'must not be blank' })
    .meta({ example: 'when does the breaker open' }),
  project_id: id.optional(),
  task_id: id.optional(),
  intent: intent.optional(),
  limit: z.int().min(1).max(100).default(10),
  min_score: z.number().min(0).max(1).default(0),
});
export type SearchMemory = z.output<typeof searchBody>;

const found = z
  .object({
    memory_id: id,
    content: z.string(),
    score: z.number().min(0).max(1),
    source: z.enum(MEMORY_SOURCES).meta({ description: 'Which of them found it.' }),
    metadata: tags,
  })
  .meta({ id: 'FoundMemory' });

export const searchAnswer = z.object({
  results: z.array(found),
  source: z.enum(MEMORY_SOURCES).meta({ description: 'What was asked.' }),
  degraded: z.boolean().meta({ description: 'There is a Memory MCP server, and it did not answer.' }),
  age_seconds: z.int().nullable().meta({
    description:
      '0 when the Memory MCP server answered, or there is none; else how long ago it last answered, null when it never did.',
  }),
  took_ms: z.int(),
});

export const memorySummary = z.object({ memory_id: id, content: z.string(), metadata: tags }).meta({ id: 'Memory' });

export const healthAnswer = z.object({
  status: z.enum(['healthy', 'degraded', 'disabled']),
  breaker_state: z.enum(['closed', 'open', 'half_open']).nullable(),
  mcp_available: z.boolean(),
  transport: z.string().nullable(),
  profile: z.string().nullable(),
  last_check: time.nullable(),
  last_error: z.string().nullable().meta({ description: 'For admins; others get null.' }),
  changed_at: time.nullable().meta({ description: 'When the breaker last changed.' }),
  backlog: z.int().meta({ description: 'Memories that wait for the server.' }),
  oldest_pending_at: time.nullable(),
  dead_letters: z.int().meta({ description: 'Memories that were given up: npm run memory:replay.' }),
});

export const projectMemoryAnswer = z
  .object({
    project_id: id,
    total: z.int(),
    by_intent: z.array(z.object({ intent, count: z.int() })),
    by_agent: z.array(z.object({ agent_id: id.nullable(), agent_name: z.string().nullable(), count: z.int() })),
    by_week: z
      .array(z.object({ week: time, count: z.int() }))
      .meta({ description: 'The last 12 weeks that have any.' }),
    latest: z.array(memorySummary),
  })
  .meta({ id: 'ProjectMemory' });

export const historyQuery = z.strictObject({
  related: z
    .enum(['true', 'false'], { error: 'must be true or false' })
    .default('false')
    .transform((text) => text === 'true')
    .meta({ type: 'boolean', description: 'Also what is remembered of similar work, and the tasks it was done in.' }),
  limit: integerText(1, 100)
    .optional()
    .transform((limit) => limit ?? 20),
});

export const historyAnswer = z
  .object({
    task: taskAnswer,
    executions: z.array(executionSummary),
    memories: z.array(memorySummary),
    related_memories: z.array(found),
    related_tasks: z.array(taskSummary),
    source: z.enum(['memory_mcp', 'redis_cache_stale', 'postgresql_fallback']),
    degraded: z.boolean(),
    age_seconds: z.int().nullable().meta({
      description:
        'Of related memories: 0 when the Memory MCP server found them, or there is none; the age of the copy; else how long ago the server last answered, null when it never did.',
    }),
  })
  .meta({ id: 'TaskHistory' });

/** What goes with a memory on the wire: who, when, project and why, nested. */
export function tagsView(memory: Memory): z.input<typeof tags> {
  const { createdAt } = memory;
  return {
    who: memory.tags.who,
    when: { iso: toTime(createdAt), unix: Math.floor(createdAt.getTime() / 1000), readable: readable(createdAt) },
    project: { ...memory.tags.project, execution_id: memory.executionId },
    why: { intent: memory.intent, description: describe(memory) },
    kind: memory.kind,
    extra: memory.metadata,
  };
}

/** A time as people read it, in UTC. */
export const readable = (date: Date) => date.toUTCString().replace(' GMT', ' UTC');

/** The WHY in a sentence: what was given as one, or the first line. */
export function describe({ metadata, content }: Pick<Memory, 'metadata' | 'content'>): string {
  const { description } = metadata;
  const text = typeof description === 'string' ? description : (content.split('\n', 1)[0] ?? '');
  return text.slice(0, 200).toWellFormed();
}

/** A memory on the wire. */
export const memoryView = (memory: Memory) => ({
  memory_id: memory.id,
  content: memory.content,
  metadata: tagsView(memory),
});

/** A memory that was found, on the wire. */
export const foundView = ({ memory, score, source }: FoundMemory) => ({ ...memoryView(memory), score, source });
