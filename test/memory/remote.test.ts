import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterEach, beforeEach, describe, expect, onTestFinished, test } from 'vitest';
import { readConfig } from '../../src/config.ts';
import { reviveDead } from '../../src/memory/outbox.ts';
import { createRemote } from '../../src/memory/remote.ts';
import { canaryOf } from '../../src/memory/server.ts';
import { type Fault, type MemoryServer, startMemoryServer } from '../support/memory-server.ts';
import { haveRedis, redisOnPort } from '../support/redis.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, unique, until } from '../support/work.ts';

// R16: the memory with a Memory MCP server that does everything wrong there is. It speaks MCP over Streamable HTTP.

let remote: MemoryServer;
let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;

const env = (url: string, more: Record<string, string> = {}) => ({
  MEMORY_MCP_TRANSPORT: 'streamable-http',
  MEMORY_MCP_URL: url,
  MEMORY_MCP_PROFILE: 'memory-mcp-triple-system',
  // Long enough for a server that is well on a machine that is not.
  MEMORY_MCP_SEARCH_TIMEOUT_MS: '5000',
  MEMORY_MCP_STORE_TIMEOUT_MS: '5000',
  MEMORY_MCP_HEALTH_INTERVAL_MS: '3600000',
  MEMORY_MCP_RESET_TIMEOUT_MS: '300',
  MEMORY_CAPTURE: 'none',
  ...more,
});

/** For servers that do not answer. */
const IMPATIENT = { MEMORY_MCP_SEARCH_TIMEOUT_MS: '1500', MEMORY_MCP_STORE_TIMEOUT_MS: '1500' };

async function begin(more: Record<string, string> = {}, fault: Fault = 'none') {
  remote = await startMemoryServer();
  remote.fault = fault;
  const rest = more['MEMORY_MCP_TRANSPORT'] === 'rest';
  server = await startServer({ env: env(rest ? new URL(remote.url).origin : remote.url, more) });
  user = await server.newUser();
  await until(async () => (await health()).last_check, Boolean);
}
const health = async () => (await server.admin('GET', '/memory/health')).body;
const store = (content: string) => user.call('POST', '/memory/store', { content, intent: 'analysis' });
const search = (query: string, more: object = {}) => user.call('POST', '/memory/search', { query, ...more });
const texts = (answer: { body: { results: { content: string }[] } }) =>
  answer.body.results.map(({ content }) => content);
const allDelivered = () =>
  until(health, ({ backlog, breaker_state }) => backlog === 0 && breaker_state === 'closed', 60);
/** The keys of what the server keeps, without the canary. */
const keys = () => remote.kept.map(({ key }) => key).filter((key) => !key.includes('00000000-0000'));

afterEach(async () => {
  await remote?.kill().catch(() => {});
  await server?.stop();
});

describe('a server that is well', () => {
  beforeEach(() => begin());

  test('gets each memory at once, flat, and finds it', async () => {
    const task = await makeTask(user.call, { name: 'Sweep' });
    const { body } = await user.call('POST', '/memory/store', {
      content: 'The floor was swept with a new broom.',
      intent: 'implementation',
      task_id: task.id,
    });
    expect(body).toMatchObject({ storage: 'memory_mcp', status: 'success' });
    expect(remote.kept).toHaveLength(1);
    const { metadata } = remote.kept[0] ?? { metadata: {} };
    expect(Object.values(metadata).every((value) => ['string', 'number'].includes(typeof value))).toBe(true);
    expect(metadata).toMatchObject({
      task_id: task.id,
      why: 'implementation',
      who: `user-${user.id}`,
      project: 'none',
    });
    const found = await search('new broom');
    expect(found.body).toMatchObject({ source: 'memory_mcp', degraded: false, age_seconds: 0 });
    expect(found.body.results[0]).toMatchObject({ memory_id: body.memory_id, source: 'memory_mcp' });
    expect((await server.admin('GET', '//health')).body).toMatchObject({ memory_mcp: 'ok', status: 'healthy' });
  });

  test('never shows a memory of somebody else, whatever it answers', async () => {
    const other = await server.newUser();
    const theirs = await other.call('POST', '/memory/store', {
      content: 'the secret password is swordfish',
      intent: 'research',
    });
    remote.kept.push({ key: 'foreign', text: 'secret password of another system', metadata: { memory_id: 'foreign' } });
    const mine = await store('my own secret');
    const { body } = await search('secret password');
    expect(body.source).toBe('memory_mcp');
    expect(body.results.map(({ memory_id }: { memory_id: number }) => memory_id)).toEqual([mine.body.memory_id]);
    const admin = await server.admin('POST', '/memory/search', { query: 'secret password' });
    expect(admin.body.results.map(({ memory_id }: { memory_id: number }) => memory_id)).toContain(
      theirs.body.memory_id,
    );
  });

  test('an activity report says that it is stored there', async () => {
    await server.stop();
    server = await startServer({ env: env(remote.url, { MEMORY_CAPTURE: 'activity' }) });
    user = await server.newUser();
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call);
    const report = { agent_id: agent.id, task_id: task.id, status: 'success', output: 'all is clean' };
    const { body } = await user.call('POST', '/agents/activity', report);
    expect(body).toMatchObject({ stored_in_memory_mcp: true });
    expect(remote.kept[0]?.text).toContain('all is clean');
  });

  test('when it is started again, its lost session is made anew without a failure', async () => {
    await store('before');
    await remote.kill();
    await remote.restart();
    expect((await store('after')).body.storage).toBe('memory_mcp');
    expect((await health()).breaker_state).toBe('closed');
  });
});

const FAULTS: Fault[] = ['hang', 'status-500', 'garbage', 'half', 'unauthorized', 'error-text', 'huge'];

describe.each(FAULTS)('a server with the fault “%s”', (fault) => {
  beforeEach(() => begin(fault === 'hang' ? IMPATIENT : {}));

  test('is left alone after the third failure; everything is served meanwhile, and arrives once when it is well', async () => {
    await store('The first memory, of apples.');
    remote.fault = fault;
    for (let i = 1; i <= 3; i++) {
      const answer = await search('apples');
      expect(answer.status).toBe(200);
      expect(answer.body).toMatchObject({ source: 'postgresql', degraded: true, age_seconds: expect.any(Number) });
      expect(texts(answer)).toEqual(['The first memory, of apples.']);
      if (i < 3) expect((await health()).breaker_state).toBe('closed');
    }
    expect((await health()).breaker_state).not.toBe('closed');
    expect((await server.admin('GET', '//health')).body).toMatchObject({ memory_mcp: 'away', status: 'degraded' });
    const calls = remote.calls.search;
    const meanwhile = await store('The second memory, of pears.');
    expect(meanwhile).toMatchObject({ status: 201, body: { storage: 'postgresql_fallback', status: 'degraded' } });
    expect(texts(await search('pears'))).toEqual(['The second memory, of pears.']);
    expect(remote.calls.search - calls).toBeLessThanOrEqual(2); // The probes'.
    remote.fault = 'none';
    await allDelivered(); // Nobody calls meanwhile but for the look at /memory/health, which asks the server nothing.
    expect(remote.kept.map(({ text }) => text)).toEqual([
      'The first memory, of apples.',
      'The second memory, of pears.',
    ]);
    expect((await search('pears')).body).toMatchObject({ source: 'memory_mcp', degraded: false });
  });
});

test('an answer without the server says since when that has been away, and null of one that never answered', {
  timeout: 200_000,
}, async () => {
  await begin({}, 'status-500');
  await store('The first memory, of apples.');
  expect((await search('apples')).body).toMatchObject({ degraded: true, age_seconds: null, results: [{}] });
  const task = await makeTask(user.call, { name: 'Apples' });
  const history = async () => (await user.call('GET', `/tasks/${task.id}/history?related=true`)).body;
  expect(await history()).toMatchObject({ source: 'postgresql_fallback', degraded: true, age_seconds: null });
  remote.fault = 'none';
  await until(
    async () => (await search('apples')).body,
    ({ degraded, age_seconds }) => !degraded && age_seconds === 0,
    60,
  );
  await remote.kill();
  await until(
    async () => (await search('apples')).body,
    ({ degraded, age_seconds }) => degraded && age_seconds >= 1,
    60,
  );
  expect((await history()).age_seconds).toBeGreaterThanOrEqual(1);
  expect((await user.call('GET', `/tasks/${task.id}/history`)).body).toMatchObject({ degraded: false, age_seconds: 0 });
});

test('a server over plain REST gets the key in its own header, is left alone while it fails, and gets what it missed', async () => {
  await begin({
    MEMORY_MCP_TRANSPORT: 'rest',
    MEMORY_MCP_PROFILE: 'memory-mcp-triple-system-rest',
    MEMORY_MCP_API_KEY: 'open sesame',
  });
  expect((await store('quinces are hard')).body.storage).toBe('memory_mcp');
  expect(remote.headers).toMatchObject({ 'x-mcp-api-key': 'open sesame' });
  expect((await search('quinces')).body).toMatchObject({ source: 'memory_mcp', results: [{ source: 'memory_mcp' }] });
  remote.fault = 'half';
  for (let i = 0; i < 3; i++) expect((await search('quinces')).body).toMatchObject({ degraded: true, results: [{}] });
  expect((await health()).breaker_state).not.toBe('closed');
  expect((await store('medlars are soft')).body.status).toBe('degraded');
  remote.fault = 'none';
  await allDelivered();
  expect(remote.kept.map(({ text }) => text)).toEqual(['quinces are hard', 'medlars are soft']);
});

test('what a server stored although it answered too late is not sent twice', async () => {
  await begin(IMPATIENT);
  remote.fault = 'slow';
  const answers = await Promise.all(['one plum', 'two plums', 'three plums'].map(store));
  expect(answers.map(({ body }) => body.status)).toEqual(['degraded', 'degraded', 'degraded']);
  remote.fault = 'none';
  await allDelivered();
  expect(new Set(keys()).size).toBe(3);
  expect(keys()).toHaveLength(3);
});

describe('a server that says that it stored and did not is found out, and gets everything again', {
  timeout: 200_000,
}, () => {
  test('while it goes on to lie, and when it is well', async () => {
    await begin({ MEMORY_MCP_PROFILE: 'server-memory', MEMORY_MCP_HEALTH_INTERVAL_MS: '200' });
    await store('kept');
    remote.fault = 'lie';
    await store('lost one');
    await store('lost two');
    // More stores than there were: it was found out, and lied again.
    await until(
      async () => remote.calls.store,
      (count) => count > 3,
      60,
    );
    remote.fault = 'none';
    await until(
      async () => keys().length,
      (count) => count === 3,
      60,
    );
    await allDelivered();
    expect(remote.kept.map(({ text }) => text)).toEqual(expect.arrayContaining(['kept', 'lost one', 'lost two']));
  });

  test('also when it kept the latest', async () => {
    await begin({ MEMORY_MCP_PROFILE: 'server-memory', MEMORY_MCP_HEALTH_INTERVAL_MS: '1500' });
    remote.fault = 'lie';
    await store('lost');
    remote.fault = 'none';
    await store('kept');
    await until(
      async () => keys().length,
      (count) => count === 2,
      60,
    );
    await allDelivered();
    expect(new Set(remote.kept.map(({ text }) => text))).toEqual(new Set(['lost', 'kept']));
  });

  test('also when the look for it failed at first', async () => {
    await begin({ MEMORY_MCP_PROFILE: 'server-memory', MEMORY_MCP_HEALTH_INTERVAL_MS: '200' });
    remote.fault = 'lie';
    await store('lost');
    remote.fault = 'status-500';
    await until(health, ({ breaker_state }) => breaker_state !== 'closed', 60);
    remote.fault = 'none';
    await until(
      async () => keys().length,
      (count) => count === 1,
      60,
    );
    await allDelivered();
  });
});

test.each(['memory-mcp-triple-system', 'server-memory'])(
  '1,000 memories through a kill and a restart of a server of %s: each arrives once',
  async (profile) => {
    await begin({ MEMORY_MCP_PROFILE: profile });
    const write = async (from: number, to: number) => {
      for (let i = from; i < to; i += 20) {
        const answers = await Promise.all(Array.from({ length: 20 }, (_, k) => store(`memory number ${i + k}`)));
        expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([201]));
      }
    };
    const writing = write(0, 600);
    await until(
      async () => keys().length,
      (count) => count > 200,
      60,
    );
    await remote.kill();
    await writing;
    await until(health, ({ breaker_state }) => breaker_state !== 'closed');
    await write(600, 800);
    await remote.restart();
    await write(800, 1_000);
    await allDelivered();
    expect(keys()).toHaveLength(1_000);
    expect(new Set(keys()).size).toBe(1_000);
    expect((await health()).dead_letters).toBe(0);
  },
  120_000,
);

test.runIf(haveRedis())(
  'the history of a task comes from the server, and from the last copy in Redis while that is away',
  async () => {
    const redis = await redisOnPort();
    redis.start();
    onTestFinished(() => redis.stop());
    await begin({ REDIS_URL: redis.url });
    await until(
      async () => (await server.admin('GET', '//health')).body.redis,
      (state) => state === 'ok',
    );
    const task = await makeTask(user.call, { name: 'Harvest apricots' });
    const like = await makeTask(user.call, { name: 'Harvest' });
    await user.call('POST', '/memory/store', {
      content: 'harvest of apricots was rich',
      intent: 'analysis',
      task_id: like.id,
    });
    const history = async () => (await user.call('GET', `/tasks/${task.id}/history?related=true`)).body;
    const live = await history();
    expect(live).toMatchObject({ source: 'memory_mcp', degraded: false, age_seconds: 0 });
    expect(live.related_memories).toHaveLength(1);
    await remote.kill();
    const stale = await history();
    expect(stale).toMatchObject({ source: 'redis_cache_stale', degraded: true });
    expect(stale.related_memories[0]).toMatchObject({ ...live.related_memories[0], source: 'redis_cache' });
    expect(stale.related_tasks.map(({ id }: { id: number }) => id)).toEqual([like.id]);
    const other = await makeTask(user.call, { name: 'Harvest apricots again' });
    const fresh = (await user.call('GET', `/tasks/${other.id}/history?related=true`)).body;
    expect(fresh).toMatchObject({ source: 'postgresql_fallback', degraded: true });
  },
);

test('a server that says as an error that it has a memory already is believed', async () => {
  remote = await startMemoryServer();
  const link = createRemote(readConfig(env(remote.url, { MEMORY_MCP_PROFILE: 'mcp-memory-service' }), '/'));
  if (!link) throw new Error('There is no remote.');
  const canary = canaryOf();
  for (let i = 0; i < 2; i++) await link.store(canary);
  expect(remote.kept.map(({ key }) => key)).toEqual([canary.key]);
  remote.fault = 'error-text';
  await expect(link.store(canaryOf())).resolves.toBeUndefined(); // It has the text.
  await expect(link.store({ ...canary, content: 'another' })).rejects.toThrow(/broken/);
  await link.close();
});

test('a change of the breaker is an event', async () => {
  await begin();
  remote.fault = 'status-500';
  for (let i = 0; i < 3; i++) await search('x');
  const told = async () =>
    (
      await server.db.query<{ data: string }>({
        text: `select data from events where topic = 'memory' order by event_id`,
      })
    ).rows.map(({ data }) => JSON.parse(data).breaker_state as string);
  await until(told, (states) => states.includes('open'));
  remote.fault = 'none';
  await until(told, (states) => states.at(-1) === 'closed');
});

test('a memory that is given up is kept, shown and sent again when asked for', async () => {
  await begin();
  const { body } = await store('unlucky');
  remote.kept.length = 0;
  await server.db.query({
    text: `insert into memory_outbox (memory_id, dead_at, last_error) values ($1, now(), 'it said no')`,
    values: [body.memory_id],
  });
  expect(await health()).toMatchObject({ backlog: 0, dead_letters: 1 });
  expect(await reviveDead(server.db)).toBe(1);
  await until(
    async () => keys().length,
    (count) => count === 1,
  );
  expect(await health()).toMatchObject({ dead_letters: 0 });
});

describe('leaks', () => {
  // None that the SDK's own server answers: that one keeps something of every call, in this process too.
  const FAILURES: (Fault | 'refused')[] = ['status-500', 'garbage', 'half', 'unauthorized', 'refused'];

  test('ten thousand failing calls leave no socket, no timer and no memory behind', async () => {
    const away = await startMemoryServer();
    await away.kill();
    remote = await startMemoryServer();
    const link = createRemote(readConfig(env(remote.url), '/'));
    const nowhere = createRemote(readConfig(env(away.url), '/'));
    if (!link || !nowhere) throw new Error('There is no remote.');
    const fail = async (count: number) => {
      let failed = 0;
      for (const fault of FAILURES) {
        if (fault !== 'refused') remote.fault = fault;
        const target = fault === 'refused' ? nowhere : link;
        const worker = async () => {
          for (let i = 0; i < count / FAILURES.length / 20; i++) await target.search('x', 1).catch(() => failed++);
        };
        await Promise.all(Array.from({ length: 20 }, worker));
      }
      remote.fault = 'none';
      expect(await link.search(unique('x'), 1)).toEqual([]);
      return failed;
    };
    const resources = () => process.getActiveResourcesInfo().filter((name) => /TCP|Timeout/.test(name)).length;
    const heapMegabytes = () => {
      collectGarbage();
      return process.memoryUsage().heapUsed / 1024 / 1024;
    };
    expect(await fail(1_000)).toBe(1_000);
    const before = { sockets: await remote.connections(), resources: resources(), heap: heapMegabytes() };
    expect(await fail(10_000)).toBe(10_000);
    await until(
      () => remote.connections(),
      (count) => count <= before.sockets + 3,
      60,
    );
    await until(
      async () => resources(),
      (count) => count <= before.resources + 6,
      60,
    );
    // A kilobyte a call would be ten.
    await until(
      async () => heapMegabytes() - before.heap,
      (grown) => grown < 4,
      60,
    );
    await Promise.all([link.close(), nowhere.close()]);
  }, 240_000);
});

/** Collects everything that can be, now. */
function collectGarbage(): void {
  setFlagsFromString('--expose-gc');
  runInNewContext('gc')();
}
