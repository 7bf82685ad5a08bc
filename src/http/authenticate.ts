import type { FastifyInstance, FastifyRequest } from 'fastify';
import { type Actor, requireScope, type Scope } from './access.ts';
import { Problem } from './problem.ts';
import type { RateLimits } from './rate-limit.ts';

/** What a good credential says. */
export interface Identity {
  userId: number;
  role: Actor['role'];
  scopes: readonly Scope[];
  /** When the credential ends by itself; null when it does not. */
  expiresAt: Date | null;
  /** What stands behind it: an API key, the login (family) of one of our tokens, or neither for tokens of an issuer. */
  apiKeyId: number | null;
  family: string | null;
}

/** Of identities that were good once, whether each still is, with the same rights: for connections that outlast a call. */
export type StillGood = (identities: readonly Identity[]) => Promise<boolean[]>;

/** The bus topic that is rung when credentials ended before their time. */
export const CREDENTIALS_TOPIC = 'credentials';

/**
 * Checks a bearer credential (a JWT or an API key, and a ticket where it is for a connection, which spends it); throws the
 * 401 problem for every one that is not good.
 */
export type VerifyCredential = (credential: string, use?: 'call' | 'connection') => Promise<Identity>;

declare module 'fastify' {
  interface FastifyContextConfig {
    /** Where this route takes the credential from, if not from the Authorization header. */
    credential?: (request: FastifyRequest) => string | undefined;
  }
  interface FastifyRequest {
    /** Who calls. Reading it on a public route throws, since nobody was asked. */
    readonly actor: Actor;
    identity: Identity | null;
  }
}

/** The 401 that RFC 6750 describes. */
export function unauthorized(detail: string): Problem {
  return new Problem('unauthorized', detail, { headers: { 'www-authenticate': 'Bearer realm="muster"' } });
}

/**
 * The first thing a request meets: its credential is checked and its call counted, in that order but as one step, so that
 * bad credentials are counted against the address they come from and guessing has a limit.
 */
export function authenticate(app: FastifyInstance, verify: VerifyCredential, limits: RateLimits): void {
  app.decorateRequest('identity', null);
  app.decorateRequest('actor', {
    getter(this: FastifyRequest): Actor {
      if (!this.identity) throw new Error(`${this.routeOptions.url} is public and has no actor.`);
      return {
        userId: this.identity.userId,
        role: this.identity.role,
        scopes: this.identity.scopes,
        ip: this.ip,
        userAgent: this.headers['user-agent']?.slice(0, 512) ?? null,
        requestId: this.id,
      };
    },
  });
  app.addHook('onRequest', async (request, reply) => {
    const access = request.routeOptions.config.access;
    // The not-found handler has no rule: it is counted and answers everybody the same.
    if (!access || access.rule === 'public') return limits.call.hit(request, reply);
    // A guesser is turned away before its credential is looked at: it must not cost a query.
    await limits.badCredential.peek(request, reply);
    try {
      const use = request.routeOptions.config.credential ? 'connection' : 'call';
      request.identity = await verify(credentialOf(request), use);
    } catch (error) {
      if (error instanceof Problem && error.status === 401) await limits.badCredential.hit(request, reply);
      throw error;
    }
    await limits.call.hit(request, reply);
    const { scopes, role } = request.identity;
    requireScope(scopes, access.scopes);
    if (access.rule === 'admin' && role !== 'admin') throw new Problem('forbidden', 'Only admins may do this.');
  });
}

function credentialOf(request: FastifyRequest): string {
  const { credential: extract } = request.routeOptions.config;
  if (extract) {
    const credential = extract(request);
    if (credential === undefined) throw unauthorized('Send an access token or API key.');
    return credential;
  }
  const header = request.headers.authorization;
  if (header === undefined) {
    throw unauthorized('Send the header Authorization: Bearer <access token or API key>.');
  }
  const [, credential] = /^Bearer +([\w.~+/=-]{1,8192})$/i.exec(header) ?? [];
  if (credential === undefined)
    throw unauthorized('The header Authorization must be: Bearer <access token or API key>.');
  return credential;
}
