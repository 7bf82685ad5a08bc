import { randomUUID } from 'node:crypto';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import { type Loop, startLoop } from '../platform/loop.ts';
import { emitEvents } from '../realtime/events.ts';
import { databaseNow } from '../tasks/next-times.ts';
import { type BreakerState, createBreaker } from './breaker.ts';
import { countCalls, createCounts } from './counts.ts';
import { LinkError } from './link.ts';
import { type Memory, outgoing } from './memories.ts';
import { MEMORY_TOPIC, sendAgain, sendDue, sendMemories, turnMs } from './outbox.ts';
import type { Remote } from './remote.ts';
import { createSample } from './sample.ts';

// The memory server as this process sees it: behind its breaker, looked at every half minute, and sent what waits.
//
// A server may say that it stored and not have done so, or lose what it had. Where it can be asked by name, each look also
// asks for what it took since the last one (of much, an even sample). Is anything missing, everything that it took since
// then is sent again: what it has by then stays one (the profiles that can be asked by name store a name once). What was
// taken while a look was under way belongs to the next; whatever is sent again is looked for again when it has arrived. So
// a lie about a few memories is found, whichever of them came last, and whether the server lied the first time or when it
// got them again.

const SEND_EVERY_MS = 5_000;
/** How many memories a look asks for at the most. */
const LOOKED_FOR = 25;
const LOST = 'It says that it stored a memory, and does not have it.';

/** Puts the breaker before a server, and makes the loops that look at it and send to it. */
export function createServerAccess(
  plain: Remote,
  { db, bus, logger, config }: { db: Database; bus: Bus; logger: Logger; config: Config },
) {
  const { MEMORY_MCP_STORE_TIMEOUT_MS: storeMs, MEMORY_MCP_SEARCH_TIMEOUT_MS: searchMs } = config;
  const turn = turnMs(storeMs, searchMs);
  const counts = createCounts();
  let answeredAt: number | undefined;
  const remote = countCalls(plain, counts, () => {
    answeredAt = performance.now();
  });
  let lastCheck: Date | null = null;
  let changedAt: Date | null = null;
  let stopped = false;
  // Until when the server is known to have kept what it took, by the database's clock; one memory that it had then; and what
  // it took since.
  let verifiedAt: Date | undefined;
  let known: Memory | undefined;
  const taken = createSample<Memory>(LOOKED_FOR);

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
      counts.changes[state]++;
      logger[state === 'closed' ? 'info' : 'warn']({ state, reason }, 'the breaker before the memory server changed');
      if (state === 'closed') sender?.wake();
      if (!stopped)
        void tell(db, state).catch((error: unknown) =>
          logger.warn({ err: error }, 'a change of the breaker was not told'),
        );
    },
    onRefusal: (operation) => {
      counts.calls[operation].refused_open++;
    },
  });

  /** Asks for what the server took; when something of it is gone, all that it took since it was known to keep is sent again. */
  const verify = async () => {
    // What arrives from here on is for the next look. By whatever clock but the database's, some could be missed.
    const { things, undo } = taken.take();
    try {
      const looked = known ? [known, ...things] : things;
      if (looked.length === 0) return;
      const at = await databaseNow(db);
      const missing = await remote.missing(looked.map((memory) => ({ ...outgoing(memory), memory })));
      if (missing.length === 0) {
        // One that was sent before may be settled after.
        verifiedAt = new Date(at.getTime() - turn);
        known = looked.at(-1);
        return;
      }
      const ids = missing.map(({ memory }) => memory.id);
      const count = await sendAgain(db, verifiedAt ?? at, ids);
      known = undefined;
      logger.error(
        { count },
        'the memory server has lost what it took: it gets it again. If older ones are gone too: npm run memory:reindex',
      );
    } catch (error) {
      undo();
      throw error;
    }
    bus.ring(MEMORY_TOPIC);
    throw new LinkError(LOST);
  };
  let warm = false;
  const look = async () => {
    verifiedAt ??= new Date((await databaseNow(db)).getTime() - turn);
    if (breaker.state() === 'closed') {
      try {
        // The first call may load a model, for which no caller should wait.
        if (!warm) await remote.tools();
        await remote.ping(warm ? undefined : config.MEMORY_MCP_WARMUP_TIMEOUT_MS);
        warm = true;
        if (asksByName) await verify();
      } catch (error) {
        // What the database did says nothing of the server.
        if (!(error instanceof LinkError)) throw error;
        if (!stopped) breaker.failed(error);
      } finally {
        lastCheck = new Date();
      }
    }
    return config.MEMORY_MCP_HEALTH_INTERVAL_MS;
  };
  const send = async () => {
    if (breaker.state() !== 'closed') return SEND_EVERY_MS;
    const { arrived, more } = await sendDue({ db, remote, breaker }, turn);
    taken.add(arrived);
    return more ? 0 : arrived.length > 0 ? 1_000 : SEND_EVERY_MS;
  };
  let watcher: Loop | undefined;
  let sender: Loop | undefined;
  const off = bus.on(MEMORY_TOPIC, () => sender?.wake());

  return {
    counts,
    start() {
      watcher = startLoop((error) => logger.error({ err: error }, 'the memory server could not be looked at'), look);
      sender = startLoop((error) => logger.error({ err: error }, 'memories could not be sent yet'), send);
    },
    mineForMs: storeMs + 5_000,
    ready: () => breaker.state() === 'closed',
    breaker: () => breaker.state(),
    seen: () => ({ lastCheck, lastError: breaker.state() === 'closed' ? null : breaker.lastError(), changedAt }),
    /** How long ago the server last answered this process, whatever it was asked; null when it never did. */
    silentForSeconds: () =>
      answeredAt === undefined ? null : Math.max(0, Math.round((performance.now() - answeredAt) / 1000)),
    async deliver(memory: Memory): Promise<boolean> {
      try {
        // New as it is, it cannot have arrived before.
        const arrived = await sendMemories({ db, remote, breaker }, [{ memory, ambiguous: false }]);
        taken.add(arrived);
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
        return await breaker.call('search', () => remote.search(query, limit));
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

/** Tells everybody who follows events of memories how the breaker is, in the name of the first admin. */
async function tell(db: Database, state: BreakerState): Promise<void> {
  await db.transaction(async (tx) => {
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
