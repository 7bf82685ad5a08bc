import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Socket } from 'node:net';
import websocket from '@fastify/websocket';
import type { FastifyRequest } from 'fastify';
import { z } from 'zod';
import { EVENT_TOPICS } from '../db/schema.ts';
import type { App, Deps } from '../http/app.ts';
import type { Identity, StillGood, VerifyCredential } from '../http/authenticate.ts';
import { invalid, Problem } from '../http/problem.ts';
import { addressKey } from '../http/rate-limit.ts';
import { idText, integerText } from '../http/validation.ts';
import { CLOSE } from './close-codes.ts';
import { createDeliveries } from './deliveries.ts';
import type { Feed } from './feed.ts';
import { openStream } from './server-sent-events.ts';
import { openSocket, SOCKET_OPTIONS } from './sockets.ts';
import { createSubscription, MAX_IDS } from './subscription.ts';
import { announceWorker } from './workers.ts';

const PATH = '/ws';

const place = integerText(0, Number.MAX_SAFE_INTEGER);

const topicsText = z
  .string()
  .transform((text) => text.split(','))
  .pipe(z.array(z.enum(EVENT_TOPICS, { error: `must be some of ${EVENT_TOPICS.join(',')}` })))
  .meta({ type: 'string', description: `Some of ${EVENT_TOPICS.join(',')}` });

const query = z.strictObject({
  token: z.string().optional(),
  ticket: z.string().optional(),
  last_event_id: place.optional(),
  topics: topicsText.optional(),
});

const idsText = z
  .string()
  .max(20_000)
  .transform((text) => text.split(','))
  .pipe(z.array(idText).max(MAX_IDS))
  .meta({ type: 'string', description: 'Ids, separated by commas.' });

const streamQuery = query.extend({
  task_ids: idsText.optional(),
  project_ids: idsText.optional(),
  agent_ids: idsText.optional(),
});

const healthAnswer = z
  .object({
    status: z.enum(['ok']),
    connections: z.int(),
    users: z.int().meta({ description: 'How many users they are, counted by each process.' }),
    subscriptions: z.record(z.string(), z.int()),
    workers: z.array(
      z.object({ id: z.string(), host: z.string(), pid: z.int(), connections: z.int(), users: z.int() }),
    ),
    redis: z.enum(['ok', 'away', 'disabled']),
    last_event_id: z.int(),
  })
  .meta({ id: 'RealtimeHealth' });

/** The WebSocket, and the header by which a read hands over to it. */
export async function realtimeRoutes(
  app: App,
  deps: Deps & { feed: Feed; verify: VerifyCredential; stillGood: StillGood },
): Promise<void> {
  const { config, feed } = deps;
  const deliveries = createDeliveries(deps);
  const workers = announceWorker(deps, deliveries);

  await app.register(websocket, {
    options: SOCKET_OPTIONS,
    // By default every socket whose client breaks the protocol is logged as an error and cut before it is told why.
    errorHandler: (error, socket, request) => {
      request.log.debug({ err: error }, 'a socket broke');
      socket.close(CLOSE.fault);
    },
    preClose(done) {
      workers.close();
      deliveries.closeAll().then(() => this.websocketServer.close(() => done()), done);
    },
  });
  endRefusedUpgrades(app);
  // Only /ws is upgraded. The plugin would answer 101 on any route.
  app.addHook('onRequest', async (request) => {
    if (request.ws && request.routeOptions.url !== PATH) {
      throw new Problem('invalid-request', `Only ${PATH} can be upgraded: leave the header Upgrade out.`);
    }
  });
  // Taken before anything is read: see createFeed for why nothing is missed.
  app.addHook('onRequest', async (request, reply) => {
    const position = feed.position();
    if (request.method === 'GET' && position >= 0 && request.url.startsWith('/api/')) {
      reply.header('x-event-cursor', position);
    }
  });

  app.get(
    PATH,
    {
      websocket: true,
      config: { access: { rule: 'owner', scopes: ['read'] }, credential: connectionCredential, limit: 'activity' },
      schema: { querystring: query },
      preValidation: async (request) => {
        if (!request.ws) throw new Problem('invalid-request', `${PATH} is for WebSocket clients.`);
        if (!originAllowed(request, config.CORS_ORIGINS)) {
          throw new Problem('forbidden', 'Pages of this origin may not connect: add it to CORS_ORIGINS.');
        }
        deliveries.admit(identityOf(request).userId, addressKey(request));
      },
    },
    (socket, request) => {
      const { last_event_id: lastEventId, topics } = request.query as z.output<typeof query>;
      const subscription = createSubscription(topics ?? EVENT_TOPICS);
      const hello = { identity: identityOf(request), subscription, lastEventId };
      request.log.info({ req: request, status: 101 }, 'request');
      const connection = request.raw.socket;
      letGo(connection);
      openSocket({ deliveries, verify: deps.verify }, { socket, connection }, addressKey(request), hello);
    },
  );

  app.get(
    '/api/v1/events',
    {
      config: { access: { rule: 'owner', scopes: ['read'] }, credential: connectionCredential, limit: 'activity' },
      // Not in the API document, whose clients wait for the end of an answer: this one has none.
      schema: { querystring: streamQuery, hide: true },
      preHandler: async (request) => deliveries.admit(identityOf(request).userId, addressKey(request)),
    },
    async (request, reply) => {
      const { last_event_id: asked, topics, ...ids } = request.query;
      const subscription = createSubscription(topics ?? EVENT_TOPICS);
      const { task_ids, project_ids, agent_ids } = ids;
      if (task_ids || project_ids || agent_ids) {
        subscription.change({ type: 'subscribe', task_ids, project_ids, agent_ids });
      }
      const lastEventId = readLastEventId(request) ?? asked;
      openStream(deliveries, reply, addressKey(request), { identity: identityOf(request), subscription, lastEventId });
      return reply;
    },
  );

  app.get(
    '/ws/health',
    {
      config: { access: { rule: 'public' }, limit: 'none' },
      schema: { tags: ['health'], summary: 'How many follow events, and where', response: { 200: healthAnswer } },
    },
    async () => {
      const { subscriptions } = deliveries.counts();
      const { all, redis } = await workers.list();
      return {
        status: 'ok' as const,
        connections: all.reduce((sum, worker) => sum + worker.connections, 0),
        users: all.reduce((sum, worker) => sum + worker.users, 0),
        subscriptions,
        workers: all,
        redis,
        last_event_id: Math.max(0, feed.position()),
      };
    },
  );
}

/**
 * Lets go of the answer that an upgraded connection will never give: with it go the request and all that was made for it,
 * several kilobytes that each socket would hold on to.
 */
function letGo(connection: Socket & { _httpMessage?: ServerResponse }): void {
  connection._httpMessage?.detachSocket(connection);
}

function identityOf(request: FastifyRequest): Identity {
  if (!request.identity) throw new Error('The connection has no identity.');
  return request.identity;
}

/** What a browser sends when it reconnects by itself: newer than what the URL says. */
function readLastEventId(request: FastifyRequest): number | undefined {
  const given = request.headers['last-event-id'];
  if (given === undefined || given === '') return undefined;
  const parsed = place.safeParse(given);
  if (!parsed.success) throw invalid('headers.last-event-id', 'must be an event_id, a whole number');
  return parsed.data;
}

/**
 * Ends the connection of an upgrade that is answered like any request. Node has let go of it by then, so none of the
 * server's timeouts would; and the plugin does so only for what its own hook has met, not for a 401 or 429 before it.
 */
function endRefusedUpgrades(app: App): void {
  const upgrades = new WeakSet<IncomingMessage>();
  app.server.prependListener('upgrade', (raw) => upgrades.add(raw));
  app.addHook('onSend', async (request, reply) => {
    // Or the client would send its next request there.
    if (upgrades.has(request.raw)) reply.header('connection', 'close');
  });
  app.addHook('onResponse', async (request) => {
    if (upgrades.has(request.raw)) request.raw.socket.destroy();
  });
}

/** From the query, from the sub-protocol (`bearer, <token>`), or from the header; browsers can only do the first two. */
function connectionCredential(request: FastifyRequest): string | undefined {
  const { token, ticket } = request.query as { token?: unknown; ticket?: unknown };
  if (typeof ticket === 'string' && ticket !== '') return ticket;
  if (typeof token === 'string' && token !== '') return token;
  const [protocol, credential] = (request.headers['sec-websocket-protocol'] ?? '')
    .split(',')
    .map((part) => part.trim());
  if (protocol === 'bearer' && credential) return credential;
  return /^Bearer +(\S+)$/i.exec(request.headers.authorization ?? '')?.[1];
}

/** Who sends no Origin is no page. A page of this server itself may connect, and those of CORS_ORIGINS. */
function originAllowed(request: FastifyRequest, allowed: readonly string[]): boolean {
  const { origin, host } = request.headers;
  if (origin === undefined || allowed.includes('*')) return true;
  if (!URL.canParse(origin)) return false;
  const { host: originHost, protocol, origin: canonical } = new URL(origin);
  if ((protocol === 'http:' || protocol === 'https:') && originHost === host) return true;
  return allowed.some((entry) => entry.toLowerCase() === canonical);
}
