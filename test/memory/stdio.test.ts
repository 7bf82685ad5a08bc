import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { startMemoryServer } from '../support/memory-server.ts';
import { startProgram } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';

// The official memory server, from npm, over stdio.

const program = join(
  dirname(createRequire(import.meta.url).resolve('@modelcontextprotocol/server-memory/package.json')),
  'dist/index.js',
);
let folder: string;
let file: string;
let env: Record<string, string>;
let server: TestServer | undefined;

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'muster-memory-'));
  file = join(folder, 'memory.jsonl');
  env = {
    MEMORY_MCP_TRANSPORT: 'stdio',
    MEMORY_MCP_PROFILE: 'server-memory',
    MEMORY_MCP_COMMAND: process.execPath,
    // It says its process id first, so that the test can kill it.
    MEMORY_MCP_ARGS: JSON.stringify([
      '--input-type=module',
      '-e',
      `import { writeFileSync } from 'node:fs';
       writeFileSync(${JSON.stringify(join(folder, 'pid'))}, String(process.pid));
       await import(${JSON.stringify(pathToFileURL(program).href)});`,
    ]),
    MEMORY_MCP_ENV: JSON.stringify({ MEMORY_FILE_PATH: file }),
    MEMORY_MCP_RESET_TIMEOUT_MS: '300',
    MEMORY_MCP_HEALTH_INTERVAL_MS: '300',
  };
});
afterEach(async () => {
  await server?.stop();
  server = undefined;
  await rm(folder, { recursive: true, force: true });
});

const entities = async () =>
  (await readFile(file, 'utf8').catch(() => ''))
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line) as { name: string; observations: string[] });

test('stores, finds, and goes on after the server was killed', async () => {
  server = await startServer({ env });
  const { call } = await server.newUser();
  const health = async () => (await call('GET', '/memory/health')).body;
  await until(health, ({ last_check }) => last_check !== null);
  const store = (content: string) => call('POST', '/memory/store', { content, intent: 'research' });
  expect((await store('Whales sing in the deep.')).body).toMatchObject({ storage: 'memory_mcp', status: 'success' });
  const found = await call('POST', '/memory/search', { query: 'whales sing' });
  expect(found.body).toMatchObject({ source: 'memory_mcp', degraded: false });
  expect(found.body.results[0]).toMatchObject({ content: 'Whales sing in the deep.', source: 'memory_mcp' });

  process.kill(Number(await readFile(join(folder, 'pid'), 'utf8')), 'SIGKILL');
  await store('Dolphins whistle.');
  await until(
    async () => (await entities()).map(({ observations }) => observations[0]),
    (all) => all.includes('Dolphins whistle.'),
  );
  await until(health, ({ backlog, breaker_state }) => backlog === 0 && breaker_state === 'closed');
  const names = (await entities()).map(({ name }) => name);
  expect(new Set(names).size).toBe(names.length);
});

test('memory:check says what it saw, and fails when nothing is there', async () => {
  const well = startProgram('src/memory/memory-command.ts', { folder, args: ['check'], env });
  expect(await well.exited, well.out() + well.err()).toBe(0);
  expect(well.out()).toMatch(
    /Connect: ok.*Tools: create_entities,.*Store the canary muster-.*: ok.*Find the canary: ok/s,
  );
  const bad = startProgram('src/memory/memory-command.ts', {
    folder,
    args: ['check'],
    env: { ...env, MEMORY_MCP_ARGS: JSON.stringify([join(folder, 'none.js')]) },
  });
  expect(await bad.exited).toBe(1);
  expect(bad.out()).toMatch(/Connect: FAILED/);
  const none = startProgram('src/memory/memory-command.ts', { folder, args: ['check'] });
  expect(await none.exited).toBe(2);
  expect(none.err()).toContain('MEMORY_MCP_TRANSPORT');
  const kind = { ...env, MEMORY_MCP_PROFILE: 'nothing' };
  const unknown = startProgram('src/memory/memory-command.ts', { folder, args: ['check'], env: kind });
  expect(await unknown.exited).toBe(2);
  expect(unknown.err()).toContain('server-memory');
});

test('memory:reindex fills a server that has lost everything, memory:replay revives what was given up', async () => {
  const remote = await startMemoryServer();
  const over = {
    ...env,
    MEMORY_MCP_TRANSPORT: 'streamable-http',
    MEMORY_MCP_URL: remote.url,
    MEMORY_CAPTURE: 'none',
    MEMORY_MCP_HEALTH_INTERVAL_MS: '3600000',
  };
  try {
    server = await startServer({ env: over });
    const { call } = await server.newUser();
    for (let i = 0; i < 30; i++) await call('POST', '/memory/store', { content: `fact ${i}`, intent: 'research' });
    expect(remote.kept).toHaveLength(30);
    remote.kept.length = 0;
    const command = { folder, env: { ...over, DATABASE_URL: server.databaseUrl } };
    const reindex = startProgram('src/memory/memory-command.ts', { ...command, args: ['reindex'] });
    expect(await reindex.exited, reindex.out() + reindex.err()).toBe(0);
    expect(reindex.out()).toMatch(/Every memory \(30\).*Waiting: 0/s);
    expect(new Set(remote.kept.map(({ key }) => key)).size).toBe(30);
    await server.db.query({
      text: `insert into memory_outbox (memory_id, attempts, dead_at, last_error) select id, 12, now(), 'it said no' from memories limit 2`,
    });
    const replay = startProgram('src/memory/memory-command.ts', { ...command, args: ['replay'] });
    expect(await replay.exited, replay.err()).toBe(0);
    expect(replay.out()).toMatch(/given up after 12 tries: it said no.*Memories that are sent again: 2/s);
  } finally {
    await server?.stop();
    server = undefined;
    await remote.kill();
  }
});
