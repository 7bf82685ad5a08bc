import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { z } from 'zod';
import type { Logger } from '../platform/logger.ts';
import type { RedisConnection } from '../platform/redis.ts';
import type { Deliveries } from './deliveries.ts';

// Who serves how many connections: each process tells it in Redis every few seconds, for as long as it lives and a little
// longer. Without Redis a process knows of itself alone.

const KEY = '{muster:ws}';
const TELL_EVERY_MS = 5_000;
const FORGET_AFTER_SECONDS = 15;

const workerShape = z.object({
  id: z.string(),
  host: z.string(),
  pid: z.int(),
  connections: z.int(),
  users: z.int(),
});
export type Worker = z.output<typeof workerShape>;

/** Tells of this process, and answers what is known of all. */
export function announceWorker(
  { redis, logger }: { redis: RedisConnection | undefined; logger: Logger },
  deliveries: Deliveries,
): { list(): Promise<{ all: Worker[]; redis: 'ok' | 'away' | 'disabled' }>; close(): void } {
  const id = randomUUID();
  const self = (): Worker => {
    const { connections, users } = deliveries.counts();
    return { id, host: hostname(), pid: process.pid, connections, users };
  };
  const exchange = async (from: RedisConnection) => {
    const told = await from.exchange(KEY, id, JSON.stringify(self()), FORGET_AFTER_SECONDS);
    return told.flatMap((text) => read(text) ?? []);
  };
  const timer =
    redis &&
    setInterval(() => {
      exchange(redis).catch((error: unknown) => logger.debug({ err: error }, 'the count of connections was not told'));
    }, TELL_EVERY_MS).unref();
  if (redis) exchange(redis).catch(() => {});
  return {
    async list() {
      if (!redis) return { all: [self()], redis: 'disabled' };
      try {
        return { all: (await exchange(redis)).sort((a, b) => (a.id < b.id ? -1 : 1)), redis: 'ok' };
      } catch {
        return { all: [self()], redis: 'away' };
      }
    },
    close() {
      clearInterval(timer);
      redis?.withdraw(KEY, id).catch(() => {});
    },
  };
}

/** What another process told, maybe one of another version. */
function read(text: string): Worker | undefined {
  try {
    return workerShape.safeParse(JSON.parse(text)).data;
  } catch {
    return undefined;
  }
}
