import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { PICK_OF_ALL, PICK_OF_FREE_OWNER, PICK_OF_LIMITED_OWNER } from '../../src/executions/pick.ts';
import { QUEUE_TOPIC, queueDetail } from '../../src/executions/queue.ts';
import { type Bus, createBus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { type ClaimedRun, complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

// Limits hold exactly whoever claims, on however many servers, and hide nothing; shared agents are fair between owners.

let server: TestServer;
let second: TestServer;
/** What the servers rang for agents that wait for work. */
const heard: (string | undefined)[] = [];
let ears: Bus;
/** The second start made a new key, which goes for both. */
let admin: Caller;
beforeAll(async () => {
  server = await startServer();
  second = await startServer({ databaseUrl: server.databaseUrl });
  admin = server.as(second.adminKey);
  const { pool } = second.db;
  ears = await createBus({ pool, directUrl: server.databaseUrl, logger: createLogger('silent', false) });
  ears.on(QUEUE_TOPIC, (detail) => heard.push(detail));
});
afterAll(async () => {
  await ears?.close();
  await second?.stop();
  await server?.stop();
});

const put = (call: Caller, body: Record<string, unknown>, headers?: Record<string, string>) =>
  call('PUT', '/concurrency-limits', body, headers);

/** Queues runs of a new task; answers their ids. */
async function queue(user: { id: number; call: Caller }, count: number, fields: Record<string, unknown> = {}) {
  const task = await makeTask(user.call, fields);
  const { rows } = await server.db.query<{ id: number }>({
    text: `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds,
        available_at)
      select t.id, t.user_id, 'manual', now(), t.skill_name, '{}', t.priority, 3600, now() - interval '1 second'
      from tasks t, generate_series(1, $2::int) where t.id = $1 returning id`,
    values: [task.id, count],
  });
  return rows.map(({ id }) => id);
}

/** The same agent, called at the other server. */
const elsewhere = (call: Caller, agentId: number) => ({
  async claim(wish: Record<string, unknown> = {}): Promise<ClaimedRun[]> {
    const { status, body } = await call('POST', `/agents/${agentId}/claim`, { max: 1, wait_ms: 0, ...wish });
    if (status !== 200) throw new Error(`claim answered ${status}: ${JSON.stringify(body)}`);
    return body.executions;
  },
});

describe('the calls', () => {
  test('make, change, list and remove limits, and do nothing where nothing changes', async () => {
    const user = await server.newUser();
    const skill = unique('skill');
    const made = await put(user.call, { skill_name: skill, max_running: 2 });
    expect(made).toMatchObject({
      status: 201,
      body: { user_id: user.id, skill_name: skill, max_running: 2, running: 0, version: 1 },
    });
    expect(made.headers.get('etag')).toBe('"1"');
    const { id } = made.body;
    expect(made.headers.get('location')).toBe(`/api/v1/concurrency-limits/${id}`);
    const same = await put(user.call, { skill_name: skill, max_running: 2 });
    expect(same).toMatchObject({ status: 200, body: made.body });
    const changed = await put(user.call, { skill_name: skill, max_running: 3 }, { 'if-match': '"1"' });
    expect(changed).toMatchObject({ status: 200, body: { id, max_running: 3, version: 2 } });
    expect((await put(user.call, { skill_name: skill, max_running: 4 }, { 'if-match': '"1"' })).status).toBe(412);
    expect((await put(user.call, { max_running: 4 }, { 'if-match': '"1"' })).status).toBe(412);
    const all = await put(user.call, { max_running: 9 });
    expect(all).toMatchObject({ status: 201, body: { skill_name: null, max_running: 9 } });
    expect((await put(user.call, { skill_name: null, max_running: 9 })).body).toEqual(all.body);

    const agent = await makeAgent(user.call);
    await queue(user, 1, { skill_name: skill });
    await queue(user, 1);
    expect(await agent.claim({ max: 10 })).toHaveLength(2);
    const { body } = await user.call('GET', '/concurrency-limits');
    expect(body).toMatchObject({
      total: 2,
      concurrency_limits: [
        { id: all.body.id, running: 2 },
        { id, running: 1 },
      ],
    });
    expect((await user.call('DELETE', `/concurrency-limits/${id}`, undefined, { 'if-match': '"1"' })).status).toBe(412);
    expect((await user.call('DELETE', `/concurrency-limits/${id}`)).status).toBe(204);
    expect((await user.call('GET', `/concurrency-limits/${id}`)).status).toBe(404);

    const audit = await user.call('GET', `/audit?entity_type=concurrency_limit&entity_id=${id}`);
    expect(audit.body.entries).toMatchObject([
      { operation: 'DELETE', changed_fields: { max_running: { old: 3, new: null } } },
      { operation: 'UPDATE', changed_fields: { max_running: { old: 2, new: 3 } } },
      { operation: 'CREATE', changed_fields: { max_running: { old: null, new: 2 }, skill_name: { new: skill } } },
    ]);
    expect(audit.body.entries).toHaveLength(3);
  });

  test('let users limit their own runs and admins those of everybody', async () => {
    const user = await server.newUser();
    const stranger = await server.newUser();
    expect((await put(stranger.call, { max_running: 0, user_id: user.id })).status).toBe(403);
    const made = await put(admin, { max_running: 5, user_id: user.id });
    expect(made).toMatchObject({ status: 201, body: { user_id: user.id } });
    expect((await put(user.call, { max_running: 5, user_id: user.id })).body).toEqual(made.body);
    const missing = await put(admin, { max_running: 5, user_id: 999_999_999 });
    expect(missing).toMatchObject({ status: 400, body: { errors: [{ path: 'body.user_id' }] } });
    const { body } = await admin('GET', `/concurrency-limits?user_id=${user.id}`);
    expect(body.concurrency_limits).toEqual([made.body]);
    expect((await stranger.call('GET', '/concurrency-limits')).body.total).toBe(0);
    for (const method of ['GET', 'DELETE']) {
      expect((await stranger.call(method, `/concurrency-limits/${made.body.id}`)).status).toBe(403);
    }
  });

  test('refuse more limits than claims can read at each turn', async () => {
    const user = await server.newUser();
    await server.db.query({
      text: `insert into concurrency_limits (user_id, skill_name, max_running)
        select $1, 's' || i, 1 from generate_series(1, 100) i`,
      values: [user.id],
    });
    expect((await put(user.call, { max_running: 1 })).status).toBe(409);
    expect((await put(user.call, { skill_name: 's7', max_running: 2 })).status).toBe(200);
  });
});

describe('what is under way', () => {
  test.each([
    ['own agents', false],
    ['shared agents', true],
  ])(
    'never passes the limits of an owner and of a skill under concurrent claims of %s on two servers',
    async (_who, shared) => {
      const user = await server.newUser();
      const [a, b] = [unique('a'), unique('b')];
      const skills = [a, b];
      await put(user.call, { skill_name: a, max_running: 2 });
      await put(user.call, { max_running: 4 });
      await queue(user, 20, { skill_name: a, priority: 'critical' });
      await queue(user, 20, { skill_name: b });
      const key = shared ? second.adminKey : user.token;
      const call = server.as(key);
      const agents = await Promise.all(Array.from({ length: 5 }, () => makeAgent(call, shared ? { shared } : {})));
      const there = agents.map(({ id }) => elsewhere(second.as(key), id));
      let ended = 0;
      let most = { a: 0, all: 0 };
      const work = async (agent: { claim(wish: Record<string, unknown>): Promise<ClaimedRun[]> }) => {
        while (ended < 40) {
          for (const run of await agent.claim({ max: 3, skills, wait_ms: 100 })) {
            const { rows } = await server.db.query<{ a: number; all: number }>({
              text: `select count(*) filter (where skill_name = $2)::int as a, count(*)::int as all from executions
              where user_id = $1 and status = 'running'`,
              values: [user.id, a],
            });
            const [now = { a: 0, all: 0 }] = rows;
            most = { a: Math.max(most.a, now.a), all: Math.max(most.all, now.all) };
            expect((await complete(call, run)).status).toBe(200);
            ended += 1;
          }
        }
      };
      // Twenty claims at a time: of five agents, twice at each server.
      await Promise.all([...agents, ...agents, ...there, ...there].map(work));
      expect(ended).toBe(40);
      expect(most.a).toBeLessThanOrEqual(2);
      expect(most.all).toBeLessThanOrEqual(4);
    },
  );

  test('is taken up to the limit at once, and no further', async () => {
    const user = await server.newUser();
    const [a, b] = [unique('a'), unique('b')];
    await put(user.call, { skill_name: a, max_running: 2 });
    await put(user.call, { max_running: 5 });
    await queue(user, 200, { skill_name: a, priority: 'critical' });
    const others = await queue(user, 10, { skill_name: b, priority: 'low' });
    const agent = await makeAgent(user.call);
    const claimed = await agent.claim({ max: 100 });
    expect(claimed.map((run) => run.skill_name)).toEqual([a, a, b, b, b]);
    expect(claimed.slice(2).map((run) => run.execution_id)).toEqual(others.slice(0, 3));
    expect(await agent.claim({ max: 100 })).toEqual([]);
    // What ended makes room for one, of the skill that has room.
    expect((await complete(user.call, claimed[4] as ClaimedRun)).status).toBe(200);
    expect((await agent.claim({ max: 100 })).map((run) => run.skill_name)).toEqual([b]);
  });

  test('keeps its priorities under a limit', async () => {
    const user = await server.newUser();
    await put(user.call, { max_running: 3 });
    const ids: Record<string, number | undefined> = {};
    for (const priority of ['low', 'critical', 'medium', 'high']) [ids[priority]] = await queue(user, 1, { priority });
    const agent = await makeAgent(user.call);
    const claimed = await agent.claim({ max: 100 });
    expect(claimed.map((run) => run.execution_id)).toEqual([ids['critical'], ids['high'], ids['medium']]);
  });
});

describe('an agent that waits', () => {
  test('gets nothing under a limit of 0, and looks at once when that is raised or removed', async () => {
    const user = await server.newUser();
    const limit = (await put(user.call, { max_running: 0 })).body;
    await queue(user, 2);
    const agent = await makeAgent(user.call);
    expect(await agent.claim()).toEqual([]);
    const waiting = agent.claim({ wait_ms: 30_000 });
    await put(user.call, { max_running: 1 });
    expect(await waiting).toHaveLength(1);
    expect(await agent.claim()).toEqual([]);
    const again = agent.claim({ wait_ms: 30_000 });
    expect((await user.call('DELETE', `/concurrency-limits/${limit.id}`)).status).toBe(204);
    expect(await again).toHaveLength(1);
  });

  test.each([
    ['of the skill', true],
    ['of the owner', false],
  ])('is rung when a run ends under a limit %s', async (_which, bySkill) => {
    const user = await server.newUser();
    const [first, next] = bySkill ? (['same', 'same'] as const) : (['one', 'other'] as const);
    await queue(user, 1, { skill_name: first });
    await queue(user, 1, { skill_name: next });
    await put(user.call, { ...(bySkill ? { skill_name: first } : {}), max_running: 1 });
    const agent = await makeAgent(user.call);
    const [run] = await agent.claim({ skills: [first] });
    if (!run) throw new Error('Nothing to claim.');
    // The limit itself has rung, too.
    const detail = queueDetail({ userId: user.id, skillName: bySkill ? first : null });
    const rung = () =>
      until(
        async () => heard,
        (details) => details.includes(detail),
      );
    await rung();
    heard.length = 0;
    expect((await complete(user.call, run)).status).toBe(200);
    await rung();
    expect(await agent.claim({ wait_ms: 30_000, skills: [next] })).toHaveLength(1);
  });
});

describe('a shared agent', () => {
  test('serves the owner with the fewest runs under way first, whatever the queue and the priorities of others', async () => {
    const [greedy, modest] = [await server.newUser(), await server.newUser()];
    const skill = unique('skill');
    await queue(greedy, 500, { skill_name: skill, priority: 'critical' });
    const few = await queue(modest, 5, { skill_name: skill, priority: 'low' });
    const agent = await makeAgent(admin, { shared: true });
    const claimed: number[] = [];
    for (let i = 0; i < 10; i++) {
      claimed.push(...(await agent.claim({ skills: [skill] })).map((run) => run.execution_id));
    }
    expect(claimed).toHaveLength(10);
    expect(few.filter((id) => !claimed.includes(id))).toEqual([]);
    // At once, too: as many of one as of the other, by priority among equals.
    const more = await queue(modest, 20, { skill_name: skill, priority: 'low' });
    const batch = (await agent.claim({ skills: [skill], max: 10 })).map((run) => run.execution_id);
    expect(batch.filter((id) => more.includes(id))).toEqual(more.slice(0, 5));
  });

  test('passes over owners and skills at their limits, and keeps to those of each owner', async () => {
    const [limited, free] = [await server.newUser(), await server.newUser()];
    const [a, b] = [unique('a'), unique('b')];
    await put(limited.call, { skill_name: a, max_running: 1 });
    await put(limited.call, { max_running: 2 });
    await queue(limited, 50, { skill_name: a, priority: 'critical' });
    await queue(limited, 50, { skill_name: b, priority: 'low' });
    await queue(free, 50, { skill_name: a });
    const agent = await makeAgent(admin, { shared: true });
    for (let i = 0; i < 4; i++) expect(await agent.claim({ skills: [a, b], max: 5 })).toHaveLength(5);
    const of = async (userId: number) =>
      (
        await server.db.query<{ skill_name: string }>({
          text: `select skill_name from executions where user_id = $1 and status = 'running' order by skill_name`,
          values: [userId],
        })
      ).rows.map(({ skill_name }) => skill_name);
    expect(await of(limited.id)).toEqual([a, b]);
    expect(await of(free.id)).toHaveLength(18);
  });

  test('takes the last free place of an owner from nobody', async () => {
    const owners = await Promise.all(Array.from({ length: 4 }, () => server.newUser()));
    const skill = unique('skill');
    for (const owner of owners) {
      await put(owner.call, { max_running: 1 });
      await queue(owner, 20, { skill_name: skill });
    }
    const agents = await Promise.all(Array.from({ length: 8 }, () => makeAgent(admin, { shared: true })));
    const claims = await Promise.all(
      agents.flatMap(({ id, claim }) => [
        claim({ skills: [skill] }),
        elsewhere(second.admin, id).claim({ skills: [skill], max: 2 }),
      ]),
    );
    const running = async () =>
      (
        await server.db.query<{ n: number }>({
          text: `select count(*)::int as n from executions where skill_name = $1 and status = 'running' group by user_id`,
          values: [skill],
        })
      ).rows.map(({ n }) => n);
    expect(await running()).toEqual([1, 1, 1, 1]);
    expect(claims.flat()).toHaveLength(4);
  });
});

test('a limit that is made while claims go on holds for all that come after its answer', async () => {
  const user = await server.newUser();
  await queue(user, 1_000);
  const agents = await Promise.all(Array.from({ length: 6 }, () => makeAgent(user.call, { max_concurrency: 1_000 })));
  let answered = false;
  const running = async () => (await user.call('GET', '/executions?status=running&limit=1')).body.total as number;
  const claiming = agents.map(async ({ id, claim }, i) => {
    const ask = i % 2 === 0 ? claim : elsewhere(second.as(user.token), id).claim;
    for (let after = 0; after < 3; ) {
      const runs = await ask();
      if (answered) after += 1;
      if (after > 1) expect(runs).toEqual([]);
    }
  });
  await until(running, (n) => n > 5);
  expect((await put(user.call, { max_running: 1 })).status).toBe(201);
  const before = await running();
  answered = true;
  await Promise.all(claiming);
  expect(await running()).toBe(before);
});

describe('the plan of a claim', () => {
  const owners = 20;
  beforeAll(async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    await server.db.query({
      text: `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds,
          available_at)
        select $1, 1000000 + i % ${owners}, 'manual', now(), 'planned', '{}', i % 4, 60, now() from generate_series(1, 20000) i`,
      values: [task.id],
    });
    await server.db.query({ text: 'analyze executions' });
  });

  test.each([
    ['of an owner without limits', PICK_OF_FREE_OWNER, [1_000_000], []],
    ['of an owner with limits', PICK_OF_LIMITED_OWNER, [1_000_000], []],
    ['of a shared agent', PICK_OF_ALL, [0.5], [[]]],
  ])('%s walks a queue by its index and reads little of it', async (_whose, pick, from, held) => {
    const client = await server.db.pool.connect();
    try {
      await client.query('begin');
      // As LOCK_AGENT sets it.
      await client.query('set local enable_sort = off');
      const text = `${pick.replaceAll('$9', '$7')} select * from picked`;
      const { rows } = await client.query<{ 'QUERY PLAN': [{ Plan: PlanNode }] }>(
        `explain (analyze, format json) ${text}`,
        [1, ...from, 1, 10, ['planned'], [], ...held],
      );
      const nodes = nodesOf(rows[0]?.['QUERY PLAN'][0].Plan).filter((node) => node['Relation Name'] === 'executions');
      expect(nodes.length).toBeGreaterThan(1);
      for (const node of nodes) {
        // A bitmap's index stands below it.
        const index = node['Index Name'] ?? node.Plans?.[0]?.['Index Name'];
        expect(index, JSON.stringify(node)).toMatch(/queue_idx|running_idx|lease_idx|pkey/);
        expect(node['Actual Rows'] * node['Actual Loops']).toBeLessThanOrEqual(1_000);
      }
    } finally {
      await client.query('rollback');
      client.release();
    }
  });
});

interface PlanNode {
  'Relation Name'?: string;
  'Index Name'?: string;
  'Actual Rows': number;
  'Actual Loops': number;
  Plans?: PlanNode[];
}
const nodesOf = (plan: PlanNode | undefined): PlanNode[] =>
  plan ? [plan, ...(plan.Plans ?? []).flatMap(nodesOf)] : [];
