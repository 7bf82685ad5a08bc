// npm run bench:memory: what the memory costs. Store and search with a Memory MCP server that is well, away and hanging,
// against bare calls of the SDK's client and the SQL alone; how long it takes to be left alone and to get what it missed; and
// search in Postgres with 50,000 and a million memories (BENCH_MEMORIES for the larger number).

import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { createDatabase } from '../src/db/database.ts';
import { searchPostgres } from '../src/memory/memories.ts';
import { silentBus } from '../src/platform/bus.ts';
import { startMemoryServer } from '../test/support/memory-server.ts';
import { type BenchDatabase, benchDatabase, benchServer, benchUser, createTable, post, quantile } from './support.ts';

const PORT = 18_081;
const CALLS = 400;
const BACKLOG = 1_000;
const LARGE = Number(process.env['BENCH_MEMORIES'] ?? 1_000_000);
const SEARCHES = 100;
const table = createTable();

/** How long each of `count` calls takes, one after the other, in milliseconds. */
async function timed(count: number, act: (i: number) => Promise<unknown>): Promise<number[]> {
  const times: number[] = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    await act(i);
    times.push(performance.now() - start);
  }
  return times;
}

function tell(what: string, ours: number[], floor?: number[], goal?: string): void {
  table.row(`${what} p50, ms`, quantile(ours, 0.5), floor && quantile(floor, 0.5), goal);
  table.row(`${what} p99, ms`, quantile(ours, 0.99), floor && quantile(floor, 0.99));
}

async function withServer(database: BenchDatabase): Promise<void> {
  const remote = await startMemoryServer();
  const { key } = await benchUser(database.pool);
  const server = await benchServer(database.url, PORT, {
    MEMORY_MCP_TRANSPORT: 'streamable-http',
    MEMORY_MCP_URL: remote.url,
    MEMORY_MCP_PROFILE: 'server-memory',
    MEMORY_MCP_SEARCH_TIMEOUT_MS: '2000',
    MEMORY_MCP_RESET_TIMEOUT_MS: '1000',
    MEMORY_CAPTURE: 'none',
  });
  const api = `${server.url}/api/v1/memory`;
  const health = async () =>
    (await (await fetch(`${api}/health`, { headers: { authorization: `Bearer ${key}` } })).json()) as {
      breaker_state: string;
      backlog: number;
      last_check: string | null;
    };
  const until = async (so: (now: Awaited<ReturnType<typeof health>>) => boolean) => {
    const start = performance.now();
    while (!so(await health())) await new Promise((done) => setTimeout(done, 10));
    return performance.now() - start;
  };
  const store = (i: number) =>
    post(`${api}/store`, key, { content: `fact ${i} of apples and pears`, intent: 'research' });
  const search = (i: number) => post(`${api}/search`, key, { query: `fact ${i}` });
  const client = new Client({ name: 'bench', version: '1' });
  try {
    await until(({ last_check }) => last_check !== null);
    const transport = new StreamableHTTPClientTransport(new URL(remote.url));
    await client.connect(transport as Parameters<Client['connect']>[0]);
    const bareStore = (i: number) =>
      client.callTool({
        name: 'create_entities',
        arguments: {
          entities: [{ name: `bare-${i}`, entityType: 'x', observations: [`fact ${i} of apples and pears`] }],
        },
      });
    const bareSearch = (i: number) => client.callTool({ name: 'search_nodes', arguments: { query: `fact ${i}` } });
    await timed(50, store);
    await timed(50, bareStore);
    tell('store, server well', await timed(CALLS, store), await timed(CALLS, bareStore));
    tell('search, server well', await timed(CALLS, search), await timed(CALLS, bareSearch));
    await client.close();

    await remote.kill();
    const start = performance.now();
    while ((await health()).breaker_state === 'closed') await store(0);
    table.row('killed → open under stores, ms', performance.now() - start);
    tell('search, breaker open', await timed(CALLS, search));
    const open = await timed(BACKLOG, store);
    tell('store, breaker open', open);
    await remote.restart();
    await until(({ breaker_state }) => breaker_state === 'closed');
    const took = await until(({ backlog }) => backlog === 0);
    table.row('sent after a return, memories/s', BACKLOG / (took / 1000), undefined, '200');

    remote.fault = 'hang';
    const hang = await timed(6, search);
    table.row('search during a hang, longest, ms', Math.max(...hang), undefined, '2000 + Postgres');
    tell('search during a hang, breaker open', hang.slice(3));
  } finally {
    await server.stop();
    await remote.kill();
  }
}

/** Memories of a hundred owners, of 12 words out of 5,000; the first words are common, as in a language. */
async function seed({ pool }: BenchDatabase, count: number): Promise<number> {
  const indexes = ['memories_search_idx', 'memories_trigram_idx'];
  const { rows: made } = await pool.query<{ indexdef: string }>(
    `select indexdef from pg_indexes where indexname = any($1)`,
    [indexes],
  );
  await pool.query(`drop index ${indexes.join(', ')}`);
  await pool.query(
    `insert into users (email, role) select 'owner' || i || '@example.com', 'user' from generate_series(1, 100) i`,
  );
  const { rows } = await pool.query<{ first: string }>(`select min(id) as first from users where email like 'owner%'`);
  const first = Number(rows[0]?.first);
  for (let from = 1; from <= count; from += 100_000) {
    await pool.query(
      `insert into memories (user_id, intent, content, tags, delivered_at, created_at)
       select $1::bigint + i % 100, 'analysis',
         (select string_agg(word, ' ') from (
            select 'w' || substr(md5(floor(5000 * power(random(), 3))::text), 1, 7) as word
            from generate_series(1, 12 + i * 0)) words),
         '{"who":{"user_id":1,"agent_id":null,"agent_name":null,"agent_category":null,"capabilities":[]},"project":{"project_id":null,"project_name":null,"task_id":null,"task_name":null}}',
         now(), now() - ($3::int - i) * interval '1 second'
       from generate_series($2::int, $3::int) i`,
      [first, from, Math.min(from + 99_999, count)],
    );
  }
  for (const { indexdef } of made) await pool.query(indexdef);
  await pool.query('vacuum analyze memories');
  return first;
}

async function inPostgres(database: BenchDatabase, count: number): Promise<void> {
  const first = await seed(database, count);
  const { createHash, randomBytes } = await import('node:crypto');
  const key = `muster_${randomBytes(32).toString('base64url')}`;
  await database.pool.query(
    `insert into api_keys (user_id, name, prefix, key_hash, scopes) values ($1, 'bench', $2, $3, '{read,write,agent}')`,
    [first, key.slice(0, 12), createHash('sha256').update(key).digest('hex')],
  );
  const db = createDatabase(database.pool, silentBus);
  const server = await benchServer(database.url, PORT, { MEMORY_CAPTURE: 'none' });
  const word = (n: number) => `w${createHash('md5').update(String(n)).digest('hex').slice(0, 7)}`;
  const kinds: [string, (i: number) => string][] = [
    ['two rare words', (i) => `${word(3_000 + i)} ${word(4_000 + i)}`],
    ['a common and a rare word', (i) => `${word(0)} ${word(2_000 + i)}`],
    ['two common words', (i) => `${word(i % 5)} ${word(10 + (i % 5))}`],
    ['a mistyped word', (i) => `${word(3_000 + i).slice(0, -1)}z`],
  ];
  try {
    for (const [what, query] of kinds) {
      const ask = (i: number) => post(`${server.url}/api/v1/memory/search`, key, { query: query(i) });
      const alone = (i: number) => searchPostgres(db, { query: query(i), scope: first, filter: {}, limit: 10 });
      const everybody = (i: number) => searchPostgres(db, { query: query(i), scope: null, filter: {}, limit: 10 });
      await timed(10, ask);
      await timed(10, alone);
      tell(`${count} memories: ${what}`, await timed(SEARCHES, ask), await timed(SEARCHES, alone), '1.3');
      if (what !== 'a mistyped word') tell(`${count} memories: ${what}, of all owners`, await timed(10, everybody));
    }
  } finally {
    await server.stop();
  }
}

const database = await benchDatabase();
try {
  await withServer(database);
  for (const count of [50_000, LARGE]) {
    await database.clear();
    await inPostgres(database, count);
  }
  table.print(1);
} finally {
  await database.stop();
}
