import type { z } from 'zod';
import { changedFields, recordAudit } from '../audit/record.ts';
import { listExecutions } from '../executions/executions.ts';
import { executionSummaryView } from '../executions/schemas.ts';
import type { App, Deps } from '../http/app.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { idParams, toTime } from '../http/validation.ts';
import { getProject } from '../projects/queries.ts';
import { getTask } from '../tasks/queries.ts';
import { taskSummaryView, taskView } from '../tasks/schemas.ts';
import { type Memory, noteOf, projectMemory, taskMemories } from './memories.ts';
import type { Memories } from './memory.ts';
import {
  foundView,
  healthAnswer,
  historyAnswer,
  historyQuery,
  memoryView,
  projectMemoryAnswer,
  searchAnswer,
  searchBody,
  storeAnswer,
  storeBody,
  tagsView,
} from './schemas.ts';

/** Memory: what was done, by whom, when, for which project and why. */
export function memoryRoutes(app: App, { db, config, memory }: Deps & { memory: Memories }): void {
  const tags = ['memory'];
  const read = { access: { rule: 'owner', scopes: ['read'] } } as const;

  app.post(
    '/memory/store',
    {
      config: { access: { rule: 'owner', scopes: ['write', 'agent'] }, limit: 'activity' },
      schema: {
        tags,
        summary: 'Remember something',
        description:
          'It is in Postgres when this answers, and on the Memory MCP server too unless that is away (`degraded`): then it gets there later, once.',
        headers: idempotencyHeaders,
        body: storeBody,
        response: { 201: storeAnswer },
      },
    },
    (request, reply) => {
      let deliver: (() => Promise<boolean>) | undefined;
      return answerOnce(
        db,
        request,
        reply,
        async (tx) => {
          const note = await noteOf(tx, request.actor, request.body);
          const written = await memory.write(tx, note);
          if (!written) throw new Error('The memory was not written.');
          recordAudit(tx, request.actor, {
            operation: 'CREATE',
            entityType: 'memory',
            entityId: written.id,
            ownerId: written.userId,
            changedFields: changedFields(null, audited(written)),
          });
          deliver = () => memory.deliver(written);
          return {
            status: 201,
            body: {
              memory_id: written.id,
              storage: 'postgresql_fallback' as 'memory_mcp' | 'postgresql_fallback',
              status: memory.remote ? ('degraded' as const) : ('success' as 'success' | 'degraded'),
              metadata: tagsView(written),
            },
          };
        },
        {
          committed: async (body) =>
            (await deliver?.()) ? { ...body, storage: 'memory_mcp' as const, status: 'success' as const } : body,
        },
      );
    },
  );

  app.post(
    '/memory/search',
    {
      config: { access: { rule: 'owner', scopes: ['read', 'agent'] }, limit: 'activity' },
      schema: {
        tags,
        summary: 'Find what is remembered, best first',
        description: 'By the Memory MCP server where there is one and it answers, else by words in Postgres.',
        body: searchBody,
        response: { 200: searchAnswer },
      },
    },
    async (request) => {
      const start = performance.now();
      const { found, source, degraded, ageSeconds } = await memory.search(request.actor, request.body);
      return {
        results: found.map(foundView),
        source,
        degraded,
        age_seconds: ageSeconds,
        took_ms: Math.round(performance.now() - start),
      };
    },
  );

  app.get(
    '/memory/health',
    {
      config: { access: { rule: 'self', scopes: ['read'] } },
      schema: { tags, summary: 'How the Memory MCP server is, and what waits for it', response: { 200: healthAnswer } },
    },
    async (request) => {
      const health = await memory.health();
      return {
        status: !memory.remote
          ? ('disabled' as const)
          : health.available
            ? ('healthy' as const)
            : ('degraded' as const),
        breaker_state: health.breaker,
        mcp_available: health.available,
        transport: config.MEMORY_MCP_TRANSPORT ?? null,
        profile: config.MEMORY_MCP_PROFILE ?? null,
        last_check: toTime(health.lastCheck),
        last_error: request.actor.role === 'admin' ? health.lastError : null,
        changed_at: toTime(health.changedAt),
        backlog: health.waiting,
        oldest_pending_at: toTime(health.oldest),
        dead_letters: health.dead,
      };
    },
  );

  app.get(
    '/projects/:id/memory',
    {
      config: read,
      schema: {
        tags,
        summary: 'What is remembered of a project: how much, of what kind, by whom, when; and the latest',
        params: idParams,
        response: { 200: projectMemoryAnswer },
      },
    },
    async (request) => {
      const project = await getProject(db, request.actor, request.params.id);
      const { total, intents, agents, weeks, latest } = await projectMemory(db, project.id);
      return {
        project_id: project.id,
        total,
        by_intent: intents as z.input<typeof projectMemoryAnswer>['by_intent'],
        by_agent: agents as z.input<typeof projectMemoryAnswer>['by_agent'],
        by_week: weeks as z.input<typeof projectMemoryAnswer>['by_week'],
        latest: latest.map(memoryView),
      };
    },
  );

  app.get(
    '/tasks/:id/history',
    {
      config: read,
      schema: {
        tags,
        summary: 'What a task did: its runs and what is remembered of it, newest first',
        description:
          '`related=true` adds what is remembered of similar work. When the Memory MCP server is away that comes from the last copy (`redis_cache_stale`, with its age), else from Postgres.',
        params: idParams,
        querystring: historyQuery,
        response: {
          200: historyAnswer,
        },
      },
    },
    async (request) => {
      const { actor, params, query } = request;
      const task = await getTask(db, actor, params.id);
      const [runs, memories, related] = await Promise.all([
        listExecutions(db, actor, { task_id: task.id, limit: query.limit, total: false }),
        taskMemories(db, task.id, query.limit),
        query.related ? memory.related(task, query.limit) : undefined,
      ]);
      const others = [...new Set(related?.found.flatMap(({ memory: { taskId } }) => taskId ?? []))];
      const relatedTasks = await Promise.all(
        others.slice(0, 20).map((id) => getTask(db, actor, id).catch(() => undefined)),
      );
      return {
        task: taskView(task),
        executions: runs.rows.map(executionSummaryView),
        memories: memories.map(memoryView),
        related_memories: related?.found.map(foundView) ?? [],
        related_tasks: relatedTasks.flatMap((found) => (found ? [taskSummaryView(found)] : [])),
        source:
          related?.source === 'memory_mcp'
            ? ('memory_mcp' as const)
            : related?.source === 'redis_cache'
              ? ('redis_cache_stale' as const)
              : ('postgresql_fallback' as const),
        degraded: related?.degraded ?? false,
        age_seconds: related ? related.ageSeconds : 0,
      };
    },
  );
}

const AUDITED_CHARACTERS = 1_000;

/** What the audit log keeps of a memory: of a long one the beginning, since the memory itself never changes. */
const audited = ({ agentId, projectId, taskId, intent, content, metadata }: Memory) => ({
  agentId,
  projectId,
  taskId,
  intent,
  content: content.slice(0, AUDITED_CHARACTERS).toWellFormed(),
  metadata,
});
