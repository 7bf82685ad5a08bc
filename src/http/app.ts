import type {
  FastifyBaseLogger,
  FastifyInstance,
  RawReplyDefaultExpression,
  RawRequestDefaultExpression,
  RawServerDefault,
} from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import type { RedisConnection } from '../platform/redis.ts';
import type { RateLimits } from './rate-limit.ts';

/** The Fastify instance as routes see it: their zod schemas type the request. */
export type App = FastifyInstance<
  RawServerDefault,
  RawRequestDefaultExpression,
  RawReplyDefaultExpression,
  FastifyBaseLogger,
  ZodTypeProvider
>;

/** What the nouns stand on. */
export interface Deps {
  config: Config;
  db: Database;
  bus: Bus;
  /** Undefined where no Redis is configured. */
  redis: RedisConnection | undefined;
  logger: Logger;
  limits: RateLimits;
}
