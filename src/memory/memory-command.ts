import { setTimeout as sleep } from 'node:timers/promises';
import { readConfig } from '../config.ts';
import { createDatabase, type Database, sqlState } from '../db/database.ts';
import { silentBus } from '../platform/bus.ts';
import { withConfiguredDatabase } from '../platform/configured-database.ts';
import { createLogger } from '../platform/logger.ts';
import { createPool } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';
import { LinkError } from './link.ts';
import { backlog, queueAll, reviveDead } from './outbox.ts';
import { createRemote } from './remote.ts';
import { canaryOf } from './server.ts';

// npm run memory:check:   connects to the Memory MCP server, lists its tools, stores a canary and finds it again.
// npm run memory:replay:  shows the memories that were given up, and lets servers send them again.
// npm run memory:reindex: has every memory sent again, to a server that is new or has lost what it had.
// The last two work on the database; a running Muster sends.

const USAGE = 'Usage: npm run memory:check | memory:replay | memory:reindex';
const BATCH = 1_000;
const FIND_TRIES = 10;

async function check(): Promise<number> {
  const config = readConfig();
  let noise = '';
  const remote = createRemote(config, (text) => {
    noise = text;
  });
  if (!remote) throw new StartupError('No Memory MCP server is configured: set MEMORY_MCP_TRANSPORT.');
  const timed = async <T>(what: string, act: () => Promise<T>): Promise<T> => {
    const start = performance.now();
    try {
      const result = await act();
      console.log(`${what}: ok, ${Math.round(performance.now() - start)} ms`);
      return result;
    } catch (error) {
      console.log(`${what}: FAILED after ${Math.round(performance.now() - start)} ms: ${(error as Error).message}`);
      if (noise !== '') console.log(`  It said last: ${noise.trim()}`);
      throw error;
    }
  };
  try {
    console.log(`Profile ${config.MEMORY_MCP_PROFILE} over ${config.MEMORY_MCP_TRANSPORT}.`);
    const tools = await timed('Connect', () => remote.tools());
    if (config.MEMORY_MCP_TRANSPORT !== 'rest') {
      console.log(`Tools: ${tools.join(', ')}`);
      const { store, search, find, health } = remote.profile;
      const missing = [store, search, find, health].flatMap((call) =>
        call && !tools.includes(call.tool) ? call.tool : [],
      );
      if (missing.length > 0) console.log(`The profile calls tools that it does not have: ${missing.join(', ')}`);
    }
    await timed('Look at it', () => remote.ping(config.MEMORY_MCP_WARMUP_TIMEOUT_MS));
    const canary = canaryOf();
    await timed(`Store the canary ${canary.key}`, () => remote.store(canary));
    if (remote.profile.search.unjoinable) {
      console.log('What it finds cannot be led back to what was stored: Muster sends to it, and searches in Postgres.');
      return 0;
    }
    await timed('Find the canary', async () => {
      for (let attempt = 1; !(await remote.has(canary)); attempt++) {
        if (attempt === FIND_TRIES) throw new LinkError('It says that it stored the canary, and does not find it.');
        await sleep(1_000);
      }
    });
    return 0;
  } catch (error) {
    if (error instanceof LinkError) return 1;
    throw error;
  } finally {
    await remote.close();
  }
}

async function replay(db: Database): Promise<number> {
  const { rows } = await db.query<{ memory_id: number; user_id: number; attempts: number; last_error: string | null }>({
    text: `
      select o.memory_id, m.user_id, o.attempts, o.last_error from memory_outbox o join memories m on m.id = o.memory_id
      where o.dead_at is not null order by o.dead_at limit 100`,
  });
  for (const { memory_id, user_id, attempts, last_error } of rows) {
    console.log(
      `Memory ${memory_id} of user ${user_id}: given up after ${attempts} tries: ${last_error ?? 'no error'}`,
    );
  }
  console.log(`Memories that are sent again: ${await reviveDead(db)}.`);
  return 0;
}

async function reindex(db: Database): Promise<number> {
  let queued = 0;
  for (let last = 0; ; ) {
    const next = await queueAll(db, last, BATCH);
    if (next.queued === 0) break;
    last = next.last;
    queued += next.queued;
    console.log(`Queued: ${queued}`);
  }
  console.log(`Every memory (${queued}) waits to be sent by a running Muster. Ctrl-C ends this look, not the sending.`);
  for (let before = -1; ; ) {
    const { waiting, dead } = await backlog(db);
    if (waiting !== before) console.log(`Waiting: ${waiting}${dead > 0 ? `, given up: ${dead}` : ''}`);
    if (waiting === 0) return dead > 0 ? 1 : 0;
    before = waiting;
    await sleep(1_000);
  }
}

async function main(): Promise<number> {
  const [verb] = process.argv.slice(2);
  if (verb === 'check') return check();
  const act = verb === 'replay' ? replay : verb === 'reindex' ? reindex : undefined;
  if (!act) throw new StartupError(USAGE);
  const config = readConfig();
  if (act === reindex && config.MEMORY_MCP_TRANSPORT === undefined) {
    throw new StartupError('No Memory MCP server is configured: set MEMORY_MCP_TRANSPORT.');
  }
  return withConfiguredDatabase(config, USAGE, async (url) => {
    const pool = createPool({ url, size: 2, name: 'muster-memory', logger: createLogger('warn', false) });
    try {
      return await act(createDatabase(pool, silentBus));
    } finally {
      await pool.end();
    }
  });
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    const state = sqlState(error);
    const text =
      state !== undefined
        ? `Postgres refuses (SQLSTATE ${state}): start the server once, and see its log.`
        : (error as Error).message;
    process.stderr.write(`${text}\n`);
    process.exitCode = 2;
  },
);
