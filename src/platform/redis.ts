import { Redis } from 'ioredis';
import type { Logger } from './logger.ts';

/** A Redis that may be away: nothing waits for it longer than a moment, and nothing is lost with it. */
export interface RedisConnection {
  /** Resolves when Redis answers; rejects at once while it is away, and after 150 ms when it hangs. */
  ping(): Promise<void>;
  close(): Promise<void>;
}

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
    async close() {
      redis.disconnect();
    },
  };
}
