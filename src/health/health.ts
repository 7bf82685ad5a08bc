import type { Database } from '../db/database.ts';
import type { Bus } from '../platform/bus.ts';
import type { RedisConnection } from '../platform/redis.ts';

const CHECK_TIMEOUT_MS = 1_000;
const CACHE_MS = 1_000;

/** So many stand for that many or more: what is told here must not cost more the worse things are. */
const MOST_OVERDUE = 10_000;
/** Served by tasks_overdue_since_idx. */
const OVERDUE = {
  name: 'health-overdue',
  text: `
    select count(*)::int as n from (
      select from tasks where overdue_since is not null and status <> 'deleted' limit ${MOST_OVERDUE}) overdue`,
};

type State = 'ok' | 'away' | 'disabled';

export interface Health {
  status: 'healthy' | 'degraded' | 'unhealthy';
  database: State;
  redis: State;
  memory_mcp: State;
  /** How many tasks did not succeed in time; null when that cannot be told. */
  overdue_tasks: number | null;
  checks: Record<string, { status: State; took_ms: number }>;
}

/**
 * Checks what the server stands on. Each check has a second, runs at most once a second however often it is asked for,
 * and never throws: probing is cheap and cannot hang.
 */
export function createHealthChecks({
  db,
  bus,
  redis,
  memory,
}: {
  db: Database;
  bus: Bus;
  redis: RedisConnection | undefined;
  memory: { state(): State };
}): () => Promise<Health> {
  let running: Promise<Health> | undefined;
  let madeAt = Number.NEGATIVE_INFINITY;

  const measure = async (check: () => Promise<unknown>): Promise<{ status: State; took_ms: number }> => {
    const start = performance.now();
    let timer: NodeJS.Timeout | undefined;
    const timeout = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error('timeout')), CHECK_TIMEOUT_MS);
    });
    let status: State = 'ok';
    try {
      await Promise.race([check(), timeout]);
    } catch {
      status = 'away';
    } finally {
      clearTimeout(timer);
    }
    return { status, took_ms: Math.round(performance.now() - start) };
  };

  const look = async (): Promise<Health> => {
    let overdue: number | null = null;
    const [database, cache, counted] = await Promise.all([
      measure(() => db.query({ name: 'health', text: 'select 1' })),
      redis ? measure(() => redis.ping()) : { status: 'disabled' as const, took_ms: 0 },
      measure(async () => {
        overdue = (await db.query<{ n: number }>(OVERDUE)).rows[0]?.n ?? null;
      }),
    ]);
    const notifications = { status: bus.connected() ? ('ok' as const) : ('away' as const), took_ms: 0 };
    const unhealthy = database.status === 'away';
    const memoryServer = memory.state();
    const degraded = [notifications.status, cache.status, memoryServer].includes('away');
    return {
      status: unhealthy ? 'unhealthy' : degraded ? 'degraded' : 'healthy',
      database: database.status,
      redis: cache.status,
      memory_mcp: memoryServer,
      overdue_tasks: overdue,
      checks: { database, notifications, overdue_tasks: counted, ...(redis ? { redis: cache } : {}) },
    };
  };

  return () => {
    const now = performance.now();
    if (!running || now - madeAt > CACHE_MS) {
      madeAt = now;
      running = look();
    }
    return running;
  };
}
