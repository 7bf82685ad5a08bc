import websocket from '@fastify/websocket';
import type { FastifyRequest } from 'fastify';
import { z } from 'zod';
import { EVENT_TOPICS } from '../db/schema.ts';
import type { App, Deps } from '../http/app.ts';
import { Problem } from '../http/problem.ts';
import { integerText } from '../http/validation.ts';
import type { Feed } from './feed.ts';
import { createSockets, type Topic } from './sockets.ts';

const PATH = '/ws';
const MAX_FRAME_BYTES = 65_536;

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

  // Only /ws is upgraded. The plugin would answer 101 on any route.
  app.addHook('onRequest', async (request) => {
    if (request.headers.upgrade !== undefined && request.routeOptions.url !== PATH) {
      throw new Problem('invalid-request', `Only ${PATH} can be upgraded: leave the header Upgrade out.`);
    }
  });
  // Taken before anything is read: what the read does not show has a later id.
  app.addHook('onRequest', async (request, reply) => {
    const position = feed.position();
    if (request.method === 'GET' && position >= 0 && request.url.startsWith('/api/')) {
      reply.header('x-event-cursor', position);
    }
  });

  await app.register(websocket, {
    options: {
      maxPayload: MAX_FRAME_BYTES,
      perMessageDeflate: false,
      handleProtocols: (protocols: Set<string>) => (protocols.has('bearer') ? 'bearer' : false),
    },
    preClose(done) {
      sockets.closeAll().then(() => this.websocketServer.close(() => done()), done);
    },
  });

  app.get(
    PATH,
    {
      websocket: true,
      config: { access: { rule: 'owner', scopes: ['read'] }, credential: socketCredential },
      schema: { querystring: query },
      preValidation: async (request) => {
        if (!originAllowed(request, config.CORS_ORIGINS)) {
          throw new Problem('forbidden', 'Pages of this origin may not connect: add it to CORS_ORIGINS.');
        }
      },
    },
    (socket, request) => {
      const { last_event_id: lastEventId, topics } = request.query as z.output<typeof query>;
      if (!request.identity) throw new Error('The socket has no identity.');
      sockets.open(socket, {
        identity: request.identity,
        topics: topics ?? (EVENT_TOPICS as readonly Topic[]),
        lastEventId,
      });
    },
  );
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
