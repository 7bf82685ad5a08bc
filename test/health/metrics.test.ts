import { afterEach, describe, expect, test, vi } from 'vitest';
import { type MemoryServer, startMemoryServer } from '../support/memory-server.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { type Answer, startServer, type TestServer } from '../support/server.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';
import { makeAgent, makeTask, unique, until } from '../support/work.ts';

// GET /metrics: what Prometheus reads. A sample is asked for by its name and labels as they stand in the text.

vi.setConfig({ testTimeout: 200_000 });

let server: TestServer;
const closers: (() => unknown)[] = [];
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

async function begin(env: Record<string, string> = {}, databaseUrl?: string) {
  server = await startServer({ env, ...(databaseUrl === undefined ? {} : { databaseUrl }) });
  closers.push(server.stop);
}

const scrape = (of = server, credential?: string) => of.as(credential)('GET', '//metrics');

/** The samples of a scrape: each line that is no comment is a name, labels and a number, else it fails. */
function samplesOf({ status, body }: Answer): Map<string, number> {
  expect(status).toBe(200);
  const samples = new Map<string, number>();
  for (const line of (body as string).split('\n')) {
    if (line === '' || /^# (HELP|TYPE) [a-z0-9_]+ .+$/.test(line)) continue;
    const [, name = '', value = ''] =
      /^([a-z_][a-zA-Z0-9_]*(?:\{(?:[a-z_]+="[^"]*",?)+\})?) (-?[\d.e+-]+|[+-]Inf|Nan)$/.exec(line) ?? [];
    expect(name, line).not.toBe('');
    expect(samples.has(name), line).toBe(false);
    samples.set(name, Number(value));
  }
  return samples;
}

/** Scrapes until the samples are so; what is answered may be a second old. */
const untilSamples = (satisfied: (samples: Map<string, number>) => boolean) =>
  until(async () => samplesOf(await scrape()), satisfied, 60);
const untilSample = (name: string, value: number) => untilSamples((samples) => samples.get(name) === value);

test('tells requests by the pattern of their route, and the process, in the text that Prometheus reads', async () => {
  await begin();
  const user = await server.newUser();
  const task = await makeTask(user.call);
  await user.call('GET', `/tasks/${task.id}`);
  await user.call('GET', '/tasks/999999999');
  await user.call('GET', '/nowhere/at/all');
  const answer = await scrape();
  expect(answer.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8');
  const of = (route: string, status: string) =>
    `muster_http_request_duration_seconds_count{method="GET",route="${route}",status="${status}"}`;
  const samples = await untilSamples((all) => all.get(of('none', '4xx')) === 1);
  expect(samples.get(of('/api/v1/tasks/:id', '2xx'))).toBe(1);
  expect(samples.get(of('/api/v1/tasks/:id', '4xx'))).toBe(1);
  expect(samples.get('muster_info{version="0.0.0-test",worker="0"}')).toBe(1);
  expect(samples.get('process_resident_memory_bytes')).toBeGreaterThan(1_000_000);
  expect(samples.get('muster_memory_searches_total{source="postgresql"}')).toBe(0);
  expect([...samples.keys()].some((name) => name.startsWith('muster_memory_breaker'))).toBe(false);
});

test('tells what the database holds', async () => {
  await begin();
  const user = await server.newUser();
  const agent = await makeAgent(user.call);
  const task = await makeTask(user.call, { overlap_policy: 'allow' });
  for (let i = 0; i < 3; i++) await user.call('POST', `/tasks/${task.id}/run`);
  await agent.claimOne([task.skill_name]);
  await server.db.query({
    text: `update executions set available_at = now() - interval '1 hour' where status = 'queued'`,
  });
  const samples = await untilSample('muster_runs{status="running"}', 1);
  expect(samples.get('muster_runs{status="queued"}')).toBe(2);
  expect(samples.get('muster_agents{status="busy"}')).toBe(1);
  expect(samples.get('muster_agents{status="offline"}')).toBe(0);
  expect(samples.get('muster_database_up')).toBe(1);
  expect(samples.get('muster_schedule_lag_seconds')).toBeGreaterThanOrEqual(0);
  await untilSamples((all) => (all.get('muster_run_queue_lag_seconds') ?? 0) >= 3_600);
  await untilSample('muster_events_waiting', 0);
});

test('tells how the memory server does, and each change of the breaker', async () => {
  const remote: MemoryServer = await startMemoryServer();
  closers.push(() => remote.kill().catch(() => {}));
  await begin({
    MEMORY_MCP_TRANSPORT: 'streamable-http',
    MEMORY_MCP_URL: remote.url,
    MEMORY_MCP_PROFILE: 'memory-mcp-triple-system',
    MEMORY_MCP_HEALTH_INTERVAL_MS: '3600000',
    MEMORY_MCP_RESET_TIMEOUT_MS: '3600000',
    MEMORY_CAPTURE: 'none',
  });
  const { call } = await server.newUser();
  await until(async () => (await server.admin('GET', '/memory/health')).body.last_check, Boolean);
  const store = () => call('POST', '/memory/store', { content: unique('a memory'), intent: 'analysis' });
  const search = () => call('POST', '/memory/search', { query: 'memory' });
  expect((await store()).body.storage).toBe('memory_mcp');
  expect((await search()).body.source).toBe('memory_mcp');
  const well = await untilSample('muster_memory_searches_total{source="memory_mcp"}', 1);
  expect(well.get('muster_memory_breaker_state{state="closed"}')).toBe(1);
  expect(well.get('muster_memory_calls_total{operation="store",outcome="ok"}')).toBe(1);
  expect(well.get('muster_memory_calls_total{operation="search",outcome="ok"}')).toBe(1);
  expect(well.get('muster_memory_calls_total{operation="ping",outcome="ok"}')).toBe(1);
  expect(well.get('muster_memory_breaker_changes_total{state="open"}')).toBe(0);

  remote.fault = 'status-500';
  for (let i = 0; i < 4; i++) expect((await search()).body.source).toBe('postgresql');
  await store();
  await server.db.query({ text: `update memory_outbox set created_at = now() - interval '1 hour'` });
  const broken = await untilSamples((all) => (all.get('muster_memory_outbox_oldest_age_seconds') ?? 0) >= 3_600);
  expect(broken.get('muster_memory_outbox_waiting')).toBe(1);
  expect(broken.get('muster_memory_outbox_dead')).toBe(0);
  expect(broken.get('muster_memory_breaker_state{state="closed"}')).toBe(0);
  expect(broken.get('muster_memory_breaker_state{state="open"}')).toBe(1);
  expect(broken.get('muster_memory_breaker_changes_total{state="open"}')).toBe(1);
  expect(broken.get('muster_memory_calls_total{operation="search",outcome="failed"}')).toBe(3);
  expect(broken.get('muster_memory_calls_total{operation="search",outcome="refused_open"}')).toBe(1);
  expect(broken.get('muster_memory_searches_total{source="postgresql"}')).toBe(4);
});

test.each<['cut' | 'swallow', string]>([
  ['cut', 'refuses connections'],
  ['swallow', 'takes what it is told and says nothing'],
])('%s: without what only a Postgres knows that %s, and with it again when that is back', async (failure) => {
  const database = await createTestDatabase();
  closers.push(database.drop);
  const proxy = await createTcpProxy(database.url);
  closers.push(proxy.close);
  await begin({}, proxy.url);
  await untilSample('muster_database_up', 1);
  proxy[failure]();
  const without = await untilSample('muster_database_up', 0);
  expect(
    [...without.keys()].filter((name) => /^muster_(runs|run_|schedule|events|agents|memory_out)/.test(name)),
  ).toEqual([]);
  expect(without.get('process_resident_memory_bytes')).toBeGreaterThan(0);
  await proxy.restore();
  const back = await untilSample('muster_database_up', 1);
  expect(back.get('muster_runs{status="queued"}')).toBe(0);
});

test('holds nothing that anybody sent, and its labels do not grow with what is sent', async () => {
  await begin();
  const canary = 'canary-5e0c1f';
  const user = await server.newUser();
  await makeAgent(user.call, { name: canary });
  const task = await makeTask(user.call, { name: canary, skill_name: canary, params: { canary } });
  await server.as(`muster_${canary}`)('GET', `/tasks/${task.id}?search=${canary}`);
  await server.as(undefined)('GET', `//${canary}/${canary}?token=${user.token}`);
  await user.call('POST', '/memory/store', { content: canary, intent: 'analysis' });
  const lines = async () => ((await scrape()).body as string).split('\n').length;
  await untilSamples((all) => [...all.keys()].some((name) => name.includes('/memory/store')));
  const before = await lines();
  for (let i = 0; i < 50; i++) {
    await user.call('GET', `/tasks/${task.id + i}`);
    await server.as(undefined)('GET', `//${canary}/${i}`);
  }
  const of = 'muster_http_request_duration_seconds_count{method="GET",route="none",status="4xx"}';
  await untilSample(of, 51);
  const { body } = await scrape();
  // A line for each bucket of what is new, 200 and 404 of a task; not of each of the hundred calls.
  expect((await lines()) - before).toBeLessThan(200);
  for (const secret of [canary, user.email, user.token, server.adminKey, new URL(server.databaseUrl).pathname]) {
    expect(body).not.toContain(secret);
  }
});

test('servers in one process count for themselves', async () => {
  await begin();
  const other = await startServer();
  closers.push(other.stop);
  const { call } = await server.newUser();
  await call('GET', '/projects');
  const of = 'muster_http_request_duration_seconds_count{method="GET",route="/api/v1/projects",status="2xx"}';
  await untilSample(of, 1);
  expect(samplesOf(await scrape(other)).has(of)).toBe(false);
});

describe('METRICS', () => {
  test('off: there are none', async () => {
    await begin({ METRICS: 'off' });
    expect(await scrape()).toMatchObject({ status: 404, body: { status: 404 } });
    expect((await scrape(server, server.adminKey)).status).toBe(404);
  });

  test('token: for admins alone, by an API key or an access token', async () => {
    await begin({ METRICS: 'token' });
    const nobody = await scrape();
    expect(nobody.status).toBe(401);
    expect(nobody.headers.get('www-authenticate')).toMatch(/^Bearer/);
    expect((await scrape(server, 'muster_guess')).status).toBe(401);
    const user = await server.newUser();
    expect((await scrape(server, user.token)).status).toBe(403);
    const key = (await user.call('POST', '/auth/api-keys', { name: 'all' })).body.key as string;
    expect((await scrape(server, key)).status).toBe(403);
    expect(samplesOf(await scrape(server, server.adminKey)).get('muster_database_up')).toBe(1);
    await server.db.query({ text: `update users set role = 'admin' where id = $1`, values: [user.id] });
    const login = { email: user.email, password: user.password };
    const { body } = await server.as(undefined)('POST', '/auth/login', login);
    expect((await scrape(server, body.access_token)).status).toBe(200);
  });
});
