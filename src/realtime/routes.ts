import type { IncomingMessage } from 'node:http';
import websocket from '@fastify/websocket';
import type { FastifyRequest } from 'fastify';
import { z } from 'zod';
import { EVENT_TOPICS } from '../db/schema.ts';
import type { App, Deps } from '../http/app.ts';
import { Problem } from '../http/problem.ts';
import { integerText } from '../http/validation.ts';
import { CLOSE } from './close-codes.ts';
import type { Feed } from './feed.ts';
import { createSockets, SOCKET_OPTIONS } from './sockets.ts';

const PATH = '/ws';

const topicsText = z
  .string()
  .transform((text) => text.split(','))
  .pipe(z.array(z.enum(EVENT_TOPICS, { error: `must be some of ${EVENT_TOPICS.join(',')}` })))
  .meta({ type: 'string', description: `Some of ${EVENT_TOPICS.join(',')}` });

const query = z.strictObject({
  token: z.string().optional(),
  last_event_id: integerText(0, Number.MAX_SAFE_INTEGER).optional(),
  topics: topicsText.optional(),
});

/** The WebSocket, and the header by which a read hands over to it. */
export async function realtimeRoutes(app: App, deps: Deps & { feed: Feed }): Promise<void> {
  const { config, feed } = deps;
  const sockets = createSockets(deps);

  await app.register(websocket, {
    options: SOCKET_OPTIONS,
    // By default every socket whose client breaks the protocol is logged as an error and cut before it is told why.
    errorHandler: (error, socket, request) => {
      request.log.debug({ err: error }, 'a socket broke');
      socket.close(CLOSE.fault);
    },
    preClose(done) {
      sockets.closeAll().then(() => this.websocketServer.close(() => done()), done);
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
      config: { access: { rule: 'owner', scopes: ['read'] }, credential: socketCredential },
      schema: { querystring: query },
      preValidation: async (request) => {
        if (!request.ws) throw new Problem('invalid-request', `${PATH} is for WebSocket clients.`);
        if (!originAllowed(request, config.CORS_ORIGINS)) {
          throw new Problem('forbidden', 'Pages of this origin may not connect: add it to CORS_ORIGINS.');
        }
      },
    },
    (socket, request) => {
      const { last_event_id: lastEventId, topics } = request.query as z.output<typeof query>;
      if (!request.identity) throw new Error('The socket has no identity.');
      sockets.open(socket, { identity: request.identity, topics: topics ?? EVENT_TOPICS, lastEventId });
    },
  );
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
function socketCredential(request: FastifyRequest): string | undefined {
  const { token } = request.query as { token?: unknown };
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
