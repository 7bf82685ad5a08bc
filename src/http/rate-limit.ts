import rateLimit, { normalizeIP } from '@fastify/rate-limit';
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { Config } from '../config.ts';
import type { RedisConnection, WindowCount } from '../platform/redis.ts';
import { Problem } from './problem.ts';

// Who may call how often, counted per key in windows of a minute that begin with a key's first call.
//
// With Redis there is one count for all servers, and Redis ends its window. It may be lost or hang at any time, and neither
// may cost an answer or lift the limit (the plugin's own store does one or the other: it fails every call, or lets all
// pass). So each process remembers the last count it heard of a key, and goes on from there by itself while Redis does not
// answer: a caller then gets at most one limit per process. After a failure nobody asks Redis for a second, and then one
// call does while the others go on counting here; so that of a Redis that hangs, one call a second notices, by 150 ms. A
// count that was given up may have happened after all: that errs towards the limit, by one.

declare module 'fastify' {
  interface FastifyContextConfig {
    /** `activity` for the calls that agents make all the time, `none` for probes; `normal` unless given. */
    limit?: 'normal' | 'activity' | 'none';
  }
}

const WINDOW_MS = 60_000;
/** How many callers are remembered per limit. Well above the plugin's 5,000: a caller that is pushed out starts anew. */
const CALLERS = 50_000;
/** How long Redis is left alone after a failure. */
const PAUSE_MS = 1_000;
const REDIS_PREFIX = 'muster:rl:';

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
  /** A limit of its own, for what needs a tighter one. Servers share the count of the same `name` and key. */
  create(options: { name: string; max: number; key: (request: FastifyRequest) => string }): Limit;
}

/** The address as it is counted: IPv6 by its /64, which one subscriber has to itself. */
export function addressKey(request: FastifyRequest): string {
  // An injected upgrade has no address.
  return normalizeIP(request.ip ?? '', 64);
}

/**
 * Registers the rate limits: counted per user, and for callers without a good credential per address; by all servers on one
 * Redis together, and in this process alone where there is none or while it is away.
 */
export async function rateLimits(
  app: FastifyInstance,
  config: Config,
  redis: RedisConnection | undefined,
): Promise<RateLimits> {
  const store = counterStore(redis && sharedCounts(redis, app.log));
  await app.register(rateLimit, { global: false, timeWindow: WINDOW_MS, store });

  const create: RateLimits['create'] = ({ name, max, key }) => {
    const count = app.createRateLimit({
      max,
      timeWindow: WINDOW_MS,
      keyGenerator: (request) => `${name}:${key(request)}`,
    });
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
  const normal = create({ name: 'normal', max: config.RATE_LIMIT_PER_MINUTE, key: caller });
  const activity = create({ name: 'activity', max: config.RATE_LIMIT_ACTIVITY_PER_MINUTE, key: caller });
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
    badCredential: create({ name: 'bad-credential', max: config.RATE_LIMIT_PER_MINUTE, key: addressKey }),
    create,
  };
}

type AskRedis = (ask: (redis: RedisConnection) => Promise<WindowCount>) => Promise<WindowCount | undefined>;

/** Asks Redis; answers undefined when it does not answer, or did not within the last second. Never rejects. */
function sharedCounts(redis: RedisConnection, log: FastifyBaseLogger): AskRedis {
  let failing = false;
  let askAgainAt = 0;
  return async (ask) => {
    if (failing) {
      if (performance.now() < askAgainAt) return undefined;
      askAgainAt = performance.now() + PAUSE_MS;
    }
    try {
      const counted = await ask(redis);
      if (failing) log.info('rate limits are counted in Redis again');
      failing = false;
      return counted;
    } catch (error) {
      if (!failing) log.warn({ err: error }, 'rate limits are counted by each process while Redis does not answer');
      failing = true;
      askAgainAt = performance.now() + PAUSE_MS;
      return undefined;
    }
  };
}

type Callback = (error: Error | null, counted?: { current: number; ttl: number }) => void;

/** The store that @fastify/rate-limit asks for: a class, of which it makes a child for every limit. */
function counterStore(shared: AskRedis | undefined) {
  return class Store {
    readonly #here = localCounts();

    incr(key: string, callback: Callback, windowMs: number): void {
      const count = async () => {
        const counted = await shared?.((redis) => redis.increment(REDIS_PREFIX + key, windowMs));
        if (!counted) return this.#here.increment(key, windowMs);
        this.#here.learn(key, counted);
        return counted;
      };
      count().then(({ count, leftMs }) => callback(null, { current: count, ttl: leftMs }), callback);
    }

    read(key: string, callback: Callback): void {
      const count = async () =>
        (await shared?.((redis) => redis.readCount(REDIS_PREFIX + key))) ?? this.#here.read(key);
      count().then(({ count, leftMs }) => callback(null, { current: count, ttl: leftMs }), callback);
    }

    child(): Store {
      return new Store();
    }
  };
}

/** Counts in this process. When there are too many keys, the window that began first is forgotten. */
function localCounts() {
  const windows = new Map<string, { count: number; endsAt: number }>();
  const read = (key: string): WindowCount => {
    const { count, endsAt } = windows.get(key) ?? { count: 0, endsAt: 0 };
    const leftMs = endsAt - performance.now();
    return leftMs > 0 ? { count, leftMs } : { count: 0, leftMs: 0 };
  };
  const learn = (key: string, { count, leftMs }: WindowCount) => {
    const now = performance.now();
    // A window keeps its place, a new one goes to the end: those in front are over first.
    if (read(key).count === 0) windows.delete(key);
    windows.set(key, { count, endsAt: now + leftMs });
    for (const [first, { endsAt }] of windows) {
      if (endsAt > now && windows.size <= CALLERS) break;
      windows.delete(first);
    }
  };
  return {
    read,
    /** Takes over what was counted elsewhere. */
    learn,
    increment(key: string, windowMs: number): WindowCount {
      const { count, leftMs } = read(key);
      const counted = { count: count + 1, leftMs: count === 0 ? windowMs : leftMs };
      learn(key, counted);
      return counted;
    },
  };
}
