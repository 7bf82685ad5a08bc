import rateLimit, { normalizeIP } from '@fastify/rate-limit';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { Config } from '../config.ts';
import { Problem } from './problem.ts';

declare module 'fastify' {
  interface FastifyContextConfig {
    /** `activity` for the calls that agents make all the time, `none` for probes; `normal` unless given. */
    limit?: 'normal' | 'activity' | 'none';
  }
}

const WINDOW_MS = 60_000;
/** How many callers are remembered. Well above the plugin's 5,000: a caller that is pushed out starts anew. */
const CALLERS = 50_000;

/** Counts something per key and minute. */
export interface Limit {
  /** Counts one; throws the 429 problem when that is more than allowed. */
  hit(request: FastifyRequest, reply: FastifyReply): Promise<void>;
  /** Throws the 429 problem when one more would be too many, and counts nothing. */
  peek(request: FastifyRequest, reply: FastifyReply): Promise<void>;
}

export interface RateLimits {
  /** Every call, by its user or else its address, against the limit of its route. */
  call: Limit;
  /** Credentials that were no good, by address. */
  badCredential: Limit;
  /** A limit of its own, for what needs a tighter one. */
  create(options: { max: number; key: (request: FastifyRequest) => string }): Limit;
}

/** The address as it is counted: IPv6 by its /64, which one subscriber has to itself. */
export function addressKey(request: FastifyRequest): string {
  // An injected upgrade has no address.
  return normalizeIP(request.ip ?? '', 64);
}

/** Registers the rate limits: counted per user, and for callers without a good credential per address. */
export async function rateLimits(app: FastifyInstance, config: Config): Promise<RateLimits> {
  await app.register(rateLimit, { global: false, timeWindow: WINDOW_MS, cache: CALLERS });

  const create: RateLimits['create'] = ({ max, key }) => {
    const count = app.createRateLimit({ max, timeWindow: WINDOW_MS, keyGenerator: key });
    const apply = async (request: FastifyRequest, reply: FastifyReply, increment: boolean) => {
      const state = await count(request, { increment });
      if (state.isAllowed) return;
      const { remaining, ttlInSeconds } = state;
      const exceeded = increment ? state.isExceeded : remaining === 0;
      if (increment || exceeded) {
        reply.headers({
          'ratelimit-limit': max,
          'ratelimit-remaining': remaining,
          'ratelimit-reset': ttlInSeconds,
          'x-ratelimit-limit': max,
          'x-ratelimit-remaining': remaining,
          'x-ratelimit-reset': ttlInSeconds,
        });
      }
      if (exceeded) {
        throw new Problem('rate-limited', `More than ${max} in a minute: try again in ${ttlInSeconds} s.`, {
          headers: { 'retry-after': String(Math.max(1, ttlInSeconds)) },
        });
      }
    };
    return {
      hit: (request, reply) => apply(request, reply, true),
      peek: (request, reply) => apply(request, reply, false),
    };
  };

  const caller = (request: FastifyRequest) =>
    request.identity ? `user:${request.identity.userId}` : `address:${addressKey(request)}`;
  const normal = create({ max: config.RATE_LIMIT_PER_MINUTE, key: caller });
  const activity = create({ max: config.RATE_LIMIT_ACTIVITY_PER_MINUTE, key: caller });
  const unlimited: Limit = { hit: async () => {}, peek: async () => {} };
  const limitOf = (request: FastifyRequest) => {
    const { limit = 'normal' } = request.routeOptions.config;
    return { normal, activity, none: unlimited }[limit];
  };
  return {
    call: {
      hit: (request, reply) => limitOf(request).hit(request, reply),
      peek: (request, reply) => limitOf(request).peek(request, reply),
    },
    badCredential: create({ max: config.RATE_LIMIT_PER_MINUTE, key: addressKey }),
    create,
  };
}
