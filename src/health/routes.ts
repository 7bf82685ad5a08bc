import { z } from 'zod';
import type { App, Deps } from '../http/app.ts';
import type { Drain } from '../http/drain.ts';
import { unavailable } from '../http/problem.ts';
import { time } from '../http/validation.ts';
import type { Memories } from '../memory/memory.ts';
import { createHealthChecks } from './health.ts';
import type { Metrics } from './metrics.ts';

const state = z.enum(['ok', 'away', 'disabled']);

const healthAnswer = z
  .object({
    status: z.enum(['healthy', 'degraded', 'unhealthy']),
    version: z.string(),
    uptime_seconds: z.number(),
    timestamp: time,
    database: state,
    redis: state,
    memory_mcp: state,
    overdue_tasks: z
      .int()
      .nullable()
      .meta({ description: 'How many tasks did not succeed in time; 10,000 stands for that many or more.' }),
    checks: z.record(z.string(), z.object({ status: state, took_ms: z.number() })),
  })
  .meta({ id: 'Health' });

const probeAnswer = z.object({ status: z.enum(['ok']) });

/**
 * Probes, for load balancers and people: never limited, never signed in. And what Prometheus scrapes, which may be for admins
 * alone (METRICS=token).
 */
export function healthRoutes(
  app: App,
  deps: Deps & { drain: Drain; version: string; memory: Memories; metrics: Metrics | undefined },
): void {
  const check = createHealthChecks(deps);
  const config = { access: { rule: 'public' }, limit: 'none' } as const;
  const startedAt = performance.now();

  for (const url of ['/health', '/api/v1/health']) {
    app.get(
      url,
      {
        config,
        schema: { tags: ['health'], summary: 'How Muster is', response: { 200: healthAnswer, 503: healthAnswer } },
      },
      async (_request, reply) => {
        const health = await check();
        return reply.code(health.status === 'unhealthy' ? 503 : 200).send({
          ...health,
          version: deps.version,
          uptime_seconds: Math.round((performance.now() - startedAt) / 1000),
          timestamp: new Date().toISOString(),
        });
      },
    );
  }

  for (const url of ['/health/live', '/api/v1/liveness']) {
    app.get(
      url,
      { config, schema: { tags: ['health'], summary: 'Whether the process answers', response: { 200: probeAnswer } } },
      async () => ({ status: 'ok' as const }),
    );
  }

  for (const url of ['/health/ready', '/api/v1/readiness']) {
    app.get(
      url,
      {
        config,
        schema: { tags: ['health'], summary: 'Whether to send requests here', response: { 200: probeAnswer } },
      },
      async () => {
        if (deps.drain.signal.aborted) throw unavailable('The server is stopping.');
        if ((await check()).status === 'unhealthy') throw unavailable('The database is not available.');
        return { status: 'ok' as const };
      },
    );
  }

  const { metrics } = deps;
  if (!metrics) return;
  const admins = { access: { rule: 'admin', scopes: ['read'] }, limit: 'none' } as const;
  app.get(
    '/metrics',
    {
      config: deps.config.METRICS === 'token' ? admins : config,
      schema: {
        tags: ['health'],
        summary: 'How Muster does, in numbers, as Prometheus reads them',
        response: { 200: { description: 'Text.', content: { 'text/plain': { schema: z.string() } } } },
      },
    },
    async (_request, reply) => reply.type(metrics.contentType).send(await metrics.render()),
  );
}
