import { randomUUID } from 'node:crypto';
import type { Config } from '../config.ts';
import type { Database, Tx } from '../db/database.ts';
import type { Actor } from '../http/access.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import { type Loop, startLoop } from '../platform/loop.ts';
import type { RedisConnection } from '../platform/redis.ts';
import { emitEvents } from '../realtime/events.ts';
import { databaseNow } from '../tasks/next-times.ts';
import type { Task } from '../tasks/task-events.ts';
import { type BreakerState, createBreaker } from './breaker.ts';
import { captureEvents } from './capture.ts';
import { LinkError } from './link.ts';
import {
  type FoundMemory,
  type Memory,
  type MemoryFilter,
  memoriesByKey,
  type NewMemory,
  outgoing,
  remoteKey,
  type Scope,
  scopeOf,
  searchPostgres,
  writeMemories,
} from './memories.ts';
import { backlog, MEMORY_TOPIC, sendAgain, sendDue, sendMemories, turnMs } from './outbox.ts';
import { createRemote, type Remote } from './remote.ts';
import type { SearchMemory } from './schemas.ts';

// The memory of Muster: rows in Postgres, and a Memory MCP server as an index over them that may be away at any time.

/** How many more hits than wanted are asked for: a server knows nothing of owners and filters. */
const OVERFETCH = 4;
const MAX_HITS = 100;
const CAPTURE_EVERY_MS = 1_000;
const SEND_EVERY_MS = 5_000;
const COPY_SECONDS = 86_400;
const LOST = 'It says that it stored a memory, and does not have it.';

export interface SearchOutcome {
  found: FoundMemory[];
  source: 'memory_mcp' | 'postgresql' | 'redis_cache';
  degraded: boolean;
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
  related(task: Task, limit: number): Promise<SearchOutcome & { ageSeconds: number }>;
  health(): Promise<MemoryHealth>;
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
  const server = remote && startRemote(remote, deps);
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
    return {
      found: [...best, ...undelivered, ...others]
        .filter(({ score }) => score >= wish.min_score)
        .sort((a, b) => b.score - a.score || b.memory.id - a.memory.id)
        .slice(0, wish.limit),
      source: told ? 'memory_mcp' : 'postgresql',
      degraded: server !== undefined && !told && !remote?.profile.search.unjoinable,
    };
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
    search: (actor, wish) => search(scopeOf(actor), wish),
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
          return { found: found.filter(others).slice(0, limit), source: 'redis_cache', degraded: true, ageSeconds };
        }
      }
      return { ...outcome, found: outcome.found.filter(others).slice(0, limit), ageSeconds: 0 };
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
    state: () => (server ? (server.ready() ? 'ok' : 'away') : 'disabled'),
    async stop() {
      await capturer?.stop();
      await server?.stop();
    },
  };
}

interface Copy {
  at: number;
  hits: { key: string; score: number }[];
}

async function readCopy(redis: RedisConnection | undefined, key: string): Promise<Copy | undefined> {
  try {
    const text = await redis?.read(key);
    return text == null ? undefined : (JSON.parse(text) as Copy);
  } catch {
    return undefined; // Away, or something else under our key: Postgres knows.
  }
}

/** The server behind its breaker, the look at it, and the outbox that is sent to it. */
function startRemote(
  remote: Remote,
  { db, bus, logger, config }: { db: Database; bus: Bus; logger: Logger; config: Config },
) {
  const { MEMORY_MCP_STORE_TIMEOUT_MS: storeMs, MEMORY_MCP_SEARCH_TIMEOUT_MS: searchMs } = config;
  const turn = turnMs(storeMs, searchMs);
  let lastCheck: Date | null = null;
  let changedAt: Date | null = null;
  let stopped = false;
  // What the server is known to have kept; and the last memory that it said it took.
  let verifiedAt: Date | undefined;
  let latest: Memory | undefined;

  // Only then does it mean something that a memory is not found.
  const asksByName = remote.profile.find !== undefined && !remote.profile.async;

  /** A server that answers but keeps nothing is no memory: something is stored, once, and looked for. */
  const canary = outgoing(canaryMemory);
  const probe = async () => {
    await remote.ping();
    if (!asksByName || (await remote.has(canary))) return;
    await remote.store(canary);
    if (!(await remote.has(canary))) throw new LinkError(LOST);
  };
  const breaker = createBreaker({
    resetMs: config.MEMORY_MCP_RESET_TIMEOUT_MS,
    timeoutMs: Math.max(storeMs, searchMs) + 1_000,
    probe,
    onChange(state, reason) {
      changedAt = new Date();
      logger[state === 'closed' ? 'info' : 'warn']({ state, reason }, 'the breaker before the memory server changed');
      if (state === 'closed') sender?.wake();
      if (!stopped)
        void tell(state).catch((error: unknown) => logger.warn({ err: error }, 'a change of the breaker was not told'));
    },
  });
  const tell = (state: BreakerState) =>
    db.transaction(async (tx) => {
      const { rows } = await tx.query<{ id: number }>({
        name: 'memory-first-admin',
        text: `select min(id) as id from users where role = 'admin' having min(id) is not null`,
      });
      const [admin] = rows;
      if (!admin) return;
      emitEvents(tx, [
        {
          type: 'memory_status_update',
          userId: admin.id,
          shared: true,
          data: { breaker_state: state, degraded: state !== 'closed' },
        },
      ]);
    });

  /** Whether the server still has what it took last; if not, what it took since it was known to is sent again. */
  const verify = async () => {
    const memory = latest;
    if (!memory || !asksByName) return;
    // What is sent at this moment is not verified yet, and by whatever clock but the database's it could be missed.
    const at = await databaseNow(db);
    if (await remote.has(outgoing(memory))) {
      verifiedAt = new Date(at.getTime() - turn);
      return;
    }
    latest = undefined;
    const count = await sendAgain(db, verifiedAt ?? new Date(0));
    logger.error({ count }, 'the memory server has lost what it took: it gets it again');
    bus.ring(MEMORY_TOPIC);
    throw new LinkError(LOST);
  };
  let warm = false;
  const look = async () => {
    verifiedAt ??= await databaseNow(db);
    if (breaker.state() === 'closed') {
      try {
        // The first call may load a model, for which no caller should wait.
        if (!warm) await remote.tools();
        await remote.ping(warm ? undefined : config.MEMORY_MCP_WARMUP_TIMEOUT_MS);
        warm = true;
        await verify();
      } catch (error) {
        if (!stopped) breaker.failed(error);
      }
      lastCheck = new Date();
    }
    return config.MEMORY_MCP_HEALTH_INTERVAL_MS;
  };
  const send = async () => {
    if (breaker.state() !== 'closed') return SEND_EVERY_MS;
    const { arrived, more } = await sendDue({ db, remote, breaker }, turn);
    latest = arrived.at(-1) ?? latest;
    return more ? 0 : arrived.length > 0 ? 1_000 : SEND_EVERY_MS;
  };
  let watcher: Loop | undefined;
  let sender: Loop | undefined;
  const off = bus.on(MEMORY_TOPIC, () => sender?.wake());

  return {
    start() {
      watcher = startLoop((error) => logger.error({ err: error }, 'the memory server could not be looked at'), look);
      sender = startLoop((error) => logger.error({ err: error }, 'memories could not be sent yet'), send);
    },
    mineForMs: storeMs + 5_000,
    ready: () => breaker.state() === 'closed',
    breaker: () => breaker.state(),
    seen: () => ({ lastCheck, lastError: breaker.state() === 'closed' ? null : breaker.lastError(), changedAt }),
    async deliver(memory: Memory): Promise<boolean> {
      try {
        // New as it is, it cannot have arrived before.
        const arrived = await sendMemories({ db, remote, breaker }, [{ memory, ambiguous: false }]);
        latest = arrived.at(-1) ?? latest;
        return arrived.length > 0;
      } catch (error) {
        logger.warn({ err: error }, 'a memory waits in the outbox');
        return false;
      }
    },
    /** The hits of the server; undefined when it cannot be asked. Never throws. */
    async search(query: string, limit: number) {
      if (remote.profile.search.unjoinable) return undefined;
      try {
        return await breaker.call(() => remote.search(query, limit));
      } catch {
        return undefined; // The breaker counts and tells.
      }
    },
    async stop() {
      stopped = true;
      off();
      breaker.shutdown();
      await remote.close();
      await Promise.all([watcher?.stop(), sender?.stop()]);
    },
  };
}

const canaryMemory: Memory = {
  id: 0,
  key: '00000000-0000-4000-8000-000000000000',
  userId: 0,
  agentId: null,
  projectId: null,
  taskId: null,
  executionId: null,
  kind: 'note',
  intent: 'testing',
  content: 'A canary of Muster: it shows that this memory server keeps what it is given.',
  metadata: {},
  tags: {
    who: { user_id: 0, agent_id: null, agent_name: 'muster', agent_category: null, capabilities: [] },
    project: { project_id: null, project_name: null, task_id: null, task_name: null },
  },
  deliveredAt: null,
  createdAt: new Date(0),
};

/** A memory that only shows that a server keeps what it gets; with a key of its own unless it is the one for all times. */
export const canaryOf = (key: string = randomUUID()) => outgoing({ ...canaryMemory, key, createdAt: new Date() });
