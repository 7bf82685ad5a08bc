import { z } from 'zod';
import type { Config } from '../config.ts';
import type { Database, Tx } from '../db/database.ts';
import type { Actor } from '../http/access.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import { type Loop, startLoop } from '../platform/loop.ts';
import type { RedisConnection } from '../platform/redis.ts';
import type { Task } from '../tasks/task-events.ts';
import type { BreakerState } from './breaker.ts';
import { captureEvents } from './capture.ts';
import type { Counts } from './counts.ts';
import {
  type FoundMemory,
  type Memory,
  type MemoryFilter,
  memoriesByKey,
  type NewMemory,
  remoteKey,
  type Scope,
  scopeOf,
  searchPostgres,
  writeMemories,
} from './memories.ts';
import { backlog, MEMORY_TOPIC } from './outbox.ts';
import { createRemote } from './remote.ts';
import { MEMORY_SOURCES, type SearchMemory } from './schemas.ts';
import { createServerAccess } from './server.ts';

// The memory of Muster: rows in Postgres, and a Memory MCP server as an index over them that may be away at any time.

/** How many more hits than wanted are asked for: a server knows nothing of owners and filters. */
const OVERFETCH = 4;
const MAX_HITS = 100;
const CAPTURE_EVERY_MS = 1_000;
const COPY_SECONDS = 86_400;

export interface SearchOutcome {
  found: FoundMemory[];
  source: FoundMemory['source'];
  degraded: boolean;
  /**
   * How old what was found is: 0 from the server, or where Postgres is the memory; the age of a copy; and of the rest how long
   * ago the server last answered, null when it never did.
   */
  ageSeconds: number | null;
}

export interface Memories {
  /** Writes a memory in `tx`, to be sent by `deliver` right after the commit. */
  write(tx: Tx, memory: NewMemory): Promise<Memory | undefined>;
  /** Sends what was written just now; answers whether the server has it. Never throws. */
  deliver(memory: Memory): Promise<boolean>;
  /** Whether there is a server that should have everything. */
  readonly remote: boolean;
  search(actor: Pick<Actor, 'userId' | 'role'>, wish: SearchMemory): Promise<SearchOutcome>;
  /** What is remembered of work like that of a task, by others than itself. */
  related(task: Task, limit: number): Promise<SearchOutcome>;
  health(): Promise<MemoryHealth>;
  /** What this process did, for /metrics. */
  figures(): MemoryFigures;
  /** The same in a word, without looking into the database. */
  state(): 'ok' | 'away' | 'disabled';
  captures(what: string): boolean;
  start(): void;
  stop(): Promise<void>;
}

export interface MemoryHealth {
  breaker: BreakerState | null;
  available: boolean;
  lastCheck: Date | null;
  lastError: string | null;
  changedAt: Date | null;
  waiting: number;
  dead: number;
  oldest: Date | null;
}

export interface MemoryFigures {
  /** Undefined where there is no server. */
  server: (Counts & { breaker: BreakerState }) | undefined;
  searches: Record<FoundMemory['source'], number>;
}

/**
 * Makes the memory; `start` begins to remember and to send. Throws StartupError for a configuration that leads nowhere; a
 * server that is away is no error.
 */
export function createMemory(deps: {
  db: Database;
  bus: Bus;
  redis: RedisConnection | undefined;
  logger: Logger;
  config: Config;
}): Memories {
  const { db, redis, logger, config } = deps;
  const remote = createRemote(config, (text) => logger.debug({ said: text }, 'the memory server says'));
  const server = remote && createServerAccess(remote, deps);
  const searches = Object.fromEntries(MEMORY_SOURCES.map((source) => [source, 0])) as MemoryFigures['searches'];
  const what = config.MEMORY_CAPTURE;
  let capturer: Loop | undefined;

  const fromPostgres = (scope: Scope, wish: SearchMemory, filter: MemoryFilter) =>
    searchPostgres(db, { query: wish.query, scope, filter, limit: wish.limit });

  const search = async (scope: Scope, wish: SearchMemory): Promise<SearchOutcome> => {
    const filter = { projectId: wish.project_id, taskId: wish.task_id, intent: wish.intent };
    const near = fromPostgres(scope, wish, filter);
    const hits = server?.search(wish.query, Math.min(MAX_HITS, wish.limit * OVERFETCH));
    const [found, told] = await Promise.all([near, hits]);
    const best: FoundMemory[] = [];
    if (told) {
      const known = await memoriesByKey(
        db,
        told.map(({ key }) => key),
        scope,
        filter,
      );
      for (const { key, score } of told) {
        const memory = known.get(key);
        if (memory) best.push({ memory, score, source: 'memory_mcp' });
      }
    }
    // What the server has yet to get, and what it did not think of.
    const seen = new Set(best.map(({ memory }) => memory.id));
    const rest = found.filter(({ memory }) => !seen.has(memory.id));
    const undelivered = rest.filter(({ memory }) => memory.deliveredAt === null);
    const room = Math.max(0, wish.limit - best.length - undelivered.length);
    const others = rest.filter(({ memory }) => memory.deliveredAt !== null).slice(0, told ? room : wish.limit);
    const degraded = server !== undefined && !told && !remote?.profile.search.unjoinable;
    return {
      found: [...best, ...undelivered, ...others]
        .filter(({ score }) => score >= wish.min_score)
        .sort((a, b) => b.score - a.score || b.memory.id - a.memory.id)
        .slice(0, wish.limit),
      source: told ? 'memory_mcp' : 'postgresql',
      degraded,
      ageSeconds: degraded ? server.silentForSeconds() : 0,
    };
  };
  const counted = (outcome: SearchOutcome): SearchOutcome => {
    searches[outcome.source]++;
    return outcome;
  };

  const copyKey = (task: Task) => `memory_mcp:task:${task.id}`;
  return {
    remote: remote !== undefined,
    start() {
      capturer = startLoop(
        (error) => logger.error({ err: error }, 'what happened could not be remembered yet'),
        async () => ((await captureEvents(db, what, remote !== undefined)) ? 0 : CAPTURE_EVERY_MS),
      );
      server?.start();
    },
    captures: (kind) => what.includes(kind),
    async write(tx, memory) {
      const mine = server?.ready() ? server.mineForMs : 0;
      const [written] = await writeMemories(tx, [memory], { queued: remote !== undefined, mineForMs: mine });
      if (written && mine === 0 && remote) tx.ring(MEMORY_TOPIC);
      return written;
    },
    deliver: async (memory) => (server?.ready() ? server.deliver(memory) : false),
    search: async (actor, wish) => counted(await search(scopeOf(actor), wish)),
    async related(task, limit) {
      const query = `${task.name ?? ''} ${task.skillName.replace(/[-_./]+/g, ' ')}`
        .trim()
        .slice(0, 1_000)
        .toWellFormed();
      const wish = { query, limit: limit + 5, min_score: 0 };
      // In the memory of the task's owner, whoever looks.
      const outcome = await search(task.userId, wish);
      const others = ({ memory }: FoundMemory) => memory.taskId !== task.id;
      if (outcome.source === 'memory_mcp') {
        const copy = {
          at: Date.now(),
          hits: outcome.found.map(({ memory, score }) => ({ key: remoteKey(memory.key), score })),
        };
        await redis?.keep(copyKey(task), JSON.stringify(copy), COPY_SECONDS).catch(() => {});
      } else if (outcome.degraded) {
        const copy = await readCopy(redis, copyKey(task));
        if (copy) {
          const known = await memoriesByKey(
            db,
            copy.hits.map(({ key }) => key),
            task.userId,
          );
          const found = copy.hits.flatMap(({ key, score }): FoundMemory[] => {
            const memory = known.get(key);
            return memory ? [{ memory, score, source: 'redis_cache' }] : [];
          });
          const ageSeconds = Math.max(0, Math.round((Date.now() - copy.at) / 1000));
          return counted({
            found: found.filter(others).slice(0, limit),
            source: 'redis_cache',
            degraded: true,
            ageSeconds,
          });
        }
      }
      return counted({ ...outcome, found: outcome.found.filter(others).slice(0, limit) });
    },
    async health() {
      const { waiting, dead, oldest } = await backlog(db);
      const seen = server?.seen() ?? { lastCheck: null, lastError: null, changedAt: null };
      return {
        breaker: server?.breaker() ?? null,
        available: server?.ready() ?? false,
        ...seen,
        waiting,
        dead,
        oldest,
      };
    },
    figures: () => ({ server: server && { ...server.counts, breaker: server.breaker() }, searches }),
    state: () => (server ? (server.ready() ? 'ok' : 'away') : 'disabled'),
    async stop() {
      await capturer?.stop();
      await server?.stop();
    },
  };
}

const copyShape = z.object({
  at: z.number(),
  hits: z.array(z.object({ key: z.string().regex(/^muster-[0-9a-f-]{36}$/), score: z.number() })),
});
type Copy = z.output<typeof copyShape>;

async function readCopy(redis: RedisConnection | undefined, key: string): Promise<Copy | undefined> {
  try {
    const text = await redis?.read(key);
    return text == null ? undefined : copyShape.parse(JSON.parse(text));
  } catch {
    return undefined; // Away, or something else under our key: Postgres knows.
  }
}
