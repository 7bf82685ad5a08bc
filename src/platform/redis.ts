import { Redis } from 'ioredis';
import type { Logger } from './logger.ts';

/** What was counted in a window, and how many milliseconds are left of that. */
export interface WindowCount {
  count: number;
  leftMs: number;
}

/**
 * A Redis that may be away: nothing waits for it longer than a moment, and nothing is lost with it. Every call rejects at
 * once while there is no connection, and after 150 ms when Redis hangs; then it may have happened or not.
 */
export interface RedisConnection {
  /** Resolves when Redis answers. */
  ping(): Promise<void>;
  /** Adds one to the count of `key`, which begins a window of `windowMs` when there is none. */
  increment(key: string, windowMs: number): Promise<WindowCount>;
  /** The count of `key`; 0 when it has no window. */
  readCount(key: string): Promise<WindowCount>;
  close(): Promise<void>;
}

/** Scripts, so that no key is left without an end by a fault between two commands. Any Redis since 2.6 runs them. */
const INCREMENT = `
  local count = redis.call('INCR', KEYS[1])
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 then
    left = tonumber(ARGV[1])
    redis.call('PEXPIRE', KEYS[1], left)
  end
  return {count, left}`;
const READ_COUNT = `return {tonumber(redis.call('GET', KEYS[1]) or 0), math.max(0, redis.call('PTTL', KEYS[1]))}`;

/**
 * Connects to Redis, and again after every loss. Commands fail at once while there is no connection: ioredis would queue
 * them without bound and wait for ever.
 */
export function connectRedis(url: string, logger: Logger): RedisConnection {
  const redis = new Redis(url, {
    enableOfflineQueue: false,
    maxRetriesPerRequest: 1,
    commandTimeout: 150,
    connectTimeout: 500,
    retryStrategy: (tries) => Math.min(tries * 100, 2_000),
  });
  let away = false;
  redis.on('error', (error: Error) => {
    // One line an outage, not one a try.
    if (!away) logger.warn({ err: error }, 'Redis is away');
    away = true;
  });
  redis.on('ready', () => {
    if (away) logger.info('Redis is back');
    away = false;
  });
  return {
    async ping() {
      await redis.ping();
    },
    async increment(key, windowMs) {
      return windowCount(await redis.eval(INCREMENT, 1, key, windowMs));
    },
    async readCount(key) {
      return windowCount(await redis.eval(READ_COUNT, 1, key));
    },
    async close() {
      redis.disconnect();
    },
  };
}

function windowCount(reply: unknown): WindowCount {
  const [count, leftMs] = Array.isArray(reply) ? (reply as unknown[]) : [];
  if (typeof count !== 'number' || typeof leftMs !== 'number') throw new Error('Redis answered something else.');
  return { count, leftMs };
}
