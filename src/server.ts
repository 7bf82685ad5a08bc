import cors from '@fastify/cors';
import helmet from '@fastify/helmet';
import { type FastifyBaseLogger, fastify, LogController } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { agentRoutes } from './agents/routes.ts';
import { auditRoutes } from './audit/routes.ts';
import { credentials } from './auth/credentials.ts';
import { authRoutes } from './auth/routes.ts';
import { limitRoutes } from './executions/limit-routes.ts';
import { executionRoutes } from './executions/routes.ts';
import { createMetrics, type Metrics } from './health/metrics.ts';
import { healthRoutes } from './health/routes.ts';
import { requireAccessRules } from './http/access.ts';
import type { App, Deps } from './http/app.ts';
import { authenticate } from './http/authenticate.ts';
import { compressAnswers } from './http/compression.ts';
import { createDrain, type Drain } from './http/drain.ts';
import { handleClientError, handleErrors, handleFrameworkError } from './http/error-handler.ts';
import { describeApi } from './http/openapi.ts';
import { rateLimits } from './http/rate-limit.ts';
import { requestId } from './http/request-id.ts';
import { validateWithZod } from './http/validation.ts';
import type { Memories } from './memory/memory.ts';
import { memoryRoutes } from './memory/routes.ts';
import { projectRoutes } from './projects/routes.ts';
import type { Feed } from './realtime/feed.ts';
import { realtimeRoutes } from './realtime/routes.ts';
import { taskRoutes } from './tasks/routes.ts';

const CONNECTIONS = { headersTimeout: 10_000, connectionsCheckingInterval: 5_000, maxHeaderSize: 16_384 };

/** A certificate and its key, as PEM. */
export interface TlsPair {
  cert: Buffer;
  key: Buffer;
}

/** Builds the server: every plugin and every noun, in the order in which a request meets them. */
export async function buildServer(
  deps: Omit<Deps, 'limits'> & {
    jwtSecret: string | undefined;
    version: string;
    feed: Feed;
    memory: Memories;
    tls?: TlsPair | undefined;
  },
): Promise<{ app: App; drain: Drain }> {
  const { config, logger, version, tls } = deps;
  const app = fastify({
    loggerInstance: logger as FastifyBaseLogger,
    // One line a request, below, instead of two.
    logController: new LogController({ disableRequestLogging: true, requestIdLogLabel: 'request_id' }),
    genReqId: requestId,
    trustProxy: config.TRUST_PROXY.length > 0 ? config.TRUST_PROXY : false,
    bodyLimit: config.BODY_LIMIT_BYTES,
    frameworkErrors: handleFrameworkError,
    clientErrorHandler: handleClientError,
    return503OnClosing: false, // drain.ts answers what still arrives.
    forceCloseConnections: false,
    keepAliveTimeout: 5_000,
    // Slow senders are cut: headers within 10 s, the whole request within 15 s. Answers may take longer (long polls).
    requestTimeout: 15_000,
    ...(tls ? { https: { ...tls, ...CONNECTIONS } as never } : { http: CONNECTIONS }),
    routerOptions: { ignoreTrailingSlash: true, maxParamLength: 128 },
  }).withTypeProvider<ZodTypeProvider>();
  // Node drops headers past the two-thousandth without a word, Authorization and X-Forwarded-For among them
  // (CVE-2026-58044, not fixed in Node 20). Without a count, the size limit above refuses the request instead.
  app.server.maxHeadersCount = 0;

  handleErrors(app);
  requireAccessRules(app);
  validateWithZod(app);
  const metrics = config.METRICS === 'off' ? undefined : createMetrics(deps);
  logRequests(app, metrics);
  const drain = createDrain(app);

  await app.register(helmet, {
    contentSecurityPolicy: { directives: { defaultSrc: ["'none'"], frameAncestors: ["'none'"] }, useDefaults: false },
    hsts: config.NODE_ENV === 'production',
  });
  await app.register(cors, {
    origin: config.CORS_ORIGINS.includes('*') ? '*' : config.CORS_ORIGINS,
    methods: ['GET', 'POST', 'PUT', 'DELETE'],
    exposedHeaders: [
      'ETag',
      'Idempotency-Replayed',
      'Location',
      'Retry-After',
      'X-Event-Cursor',
      'X-Request-ID',
      'RateLimit-Limit',
      'RateLimit-Remaining',
      'RateLimit-Reset',
      'X-RateLimit-Limit',
      'X-RateLimit-Remaining',
      'X-RateLimit-Reset',
    ],
    maxAge: 600,
  });
  await compressAnswers(app, { except: /^\/api\/v1\/auth\// });
  const limits = await rateLimits(app, config, deps.redis);
  const { verify, stillGood, tokens } = await credentials(app, deps, deps.jwtSecret);
  authenticate(app, verify, limits);
  await describeApi(app, version);
  const all = { ...deps, limits, drain, tokens, verify, stillGood };
  healthRoutes(app, { ...all, metrics });
  await realtimeRoutes(app, all);
  await app.register(
    async (api: App) => {
      authRoutes(api, all);
      projectRoutes(api, all);
      taskRoutes(api, all);
      executionRoutes(api, all);
      limitRoutes(api, all);
      agentRoutes(api, all);
      memoryRoutes(api, all);
      auditRoutes(api, all);
    },
    { prefix: '/api/v1' },
  );
  return { app, drain };
}

/** One line a request, and its time for the metrics; and the request's id goes back to whoever sent it. */
function logRequests(app: App, metrics: Metrics | undefined): void {
  app.addHook('onRequest', async (request, reply) => {
    reply.header('x-request-id', request.id);
  });
  app.addHook('onResponse', async (request, reply) => {
    const entry = { req: request, status: reply.statusCode, ms: Math.round(reply.elapsedTime) };
    if (request.routeOptions.config.limit === 'none') request.log.debug(entry, 'request');
    else request.log.info(entry, 'request');
    const { method, routeOptions } = request;
    metrics?.observe({ method, route: routeOptions.url, status: reply.statusCode, ms: reply.elapsedTime });
  });
}
