import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { wilson } from '../../src/agents/metrics.ts';
import { LOCKS } from '../../src/platform/locks.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
});

const get = async (path: string) => (await user.call('GET', path)).body;
const names = (body: { agents: { name: string }[] }) => body.agents.map(({ name }) => name).toSorted();
const register = async (fields: object, call = user.call) =>
  (await call('POST', '/agents', { name: unique('agent'), ...fields })).body;
async function eventsOf(agentId: number): Promise<{ action: string; status: string }[]> {
  const { rows } = await server.db.query<{ data: string }>({
    text: `select data from (select event_id as at, data, agent_id, type from events
      union all select 9e15 + id, data, agent_id, type from event_outbox) e
      where type = 'agent_activity_update' and agent_id = $1 order by at`,
    values: [agentId],
  });
  return rows.map(({ data }) => JSON.parse(data));
}

/** Makes a call that needs an agent's row while `statement` holds it, and lets it go once the call waits for it. */
async function whileHeld(statement: string, id: number, call: () => ReturnType<typeof user.call>) {
  return server.db.transaction(async (tx) => {
    await tx.query({ text: statement, values: [id] });
    const answer = call();
    await until(
      () =>
        server.db.pool.query(
          `select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
        ),
      ({ rows }) => rows.length > 0,
    );
    return { answer };
  });
}

/** A long poll that has found its agent, so that what is done to the agent next happens to a poll under way. */
const startPoll = (id: number) =>
  whileHeld('select from agents where id = $1 for no key update', id, () =>
    user.call('POST', `/agents/${id}/claim`, { wait_ms: 30_000 }),
  );

describe('the registry', () => {
  test('lists by type, status and capabilities, and the total agrees with the page', async () => {
    await register({ name: 'a', type: 'coder', capabilities: ['ts', 'sql'] });
    await register({ name: 'b', type: 'tester', capabilities: ['ts'] });
    const c = await register({ name: 'c', type: 'coder', capabilities: ['go'] });
    await user.call('POST', `/agents/${c.id}/heartbeat`, { status: 'error' });
    for (const [query, expected] of [
      ['', ['a', 'b', 'c']],
      ['?type=coder', ['a', 'c']],
      ['?status=error', ['c']],
      ['?capabilities=ts', ['a', 'b']],
      ['?capabilities=sql,go', ['a', 'c']],
      ['?capabilities=ts,sql&match=all', ['a']],
      ['?capabilities=ts,go&match=all', []],
      ['?capabilities=ts&type=tester', ['b']],
    ] as const) {
      const body = await get(`/agents${query}`);
      expect(names(body), query).toEqual(expected);
      expect(body.total, query).toBe(expected.length);
    }
    expect(await get('/agents')).toMatchObject({ limit: 100 });
    for (const query of ['type=spy', 'status=gone', 'capabilities=', 'match=some', 'limit=1001', 'x=1']) {
      expect((await user.call('GET', `/agents?${query}`)).status, query).toBe(400);
    }
  });

  test('goes page by page in each order', async () => {
    for (const name of ['b', 'c', 'a']) await register({ name });
    for (const [query, expected] of [
      ['sort_by=name', ['a', 'b', 'c']],
      ['sort_by=name&sort_order=desc', ['c', 'b', 'a']],
      ['sort_by=created_at', ['a', 'c', 'b']],
      ['sort_by=last_active_at', ['a', 'c', 'b']],
      ['sort_by=last_active_at&sort_order=asc', ['b', 'c', 'a']],
    ] as const) {
      const seen: string[] = [];
      let cursor = '';
      do {
        const page = await get(`/agents?${query}&limit=1${cursor && `&cursor=${cursor}`}`);
        seen.push(page.agents[0].name);
        cursor = page.next_cursor ?? '';
      } while (cursor);
      expect(seen).toEqual(expected);
    }
  });

  test('shows shared agents to everybody, with nobody else’s runs', async () => {
    const shared = await register({ shared: true }, server.admin);
    const own = await register({});
    const other = await server.newUser();
    const skill = unique('skill');
    for (const { call } of [user, other]) {
      const task = await makeTask(call, { skill_name: skill });
      await call('POST', `/tasks/${task.id}/run`);
    }
    const { body } = await server.admin('POST', `/agents/${shared.id}/claim`, { skills: [skill] });
    await server.admin('PUT', `/agents/${shared.id}`, { max_concurrency: 5 });
    const more = await server.admin('POST', `/agents/${shared.id}/claim`, { skills: [skill] });
    expect([...body.executions, ...more.body.executions]).toHaveLength(2);
    expect(names(await get('/agents?shared=true'))).toContain(shared.name);
    expect(names(await get('/agents?shared=false'))).toEqual([own.name]);
    const seen = await get(`/agents/${shared.id}`);
    expect(seen.execution_history).toHaveLength(1);
    expect((await server.admin('GET', `/agents/${shared.id}`)).body.execution_history).toHaveLength(2);
    expect((await user.call('PUT', `/agents/${shared.id}`, { type: 'coder' })).status).toBe(403);
    expect((await other.call('GET', `/agents/${own.id}`)).status).toBe(403);
    expect((await user.call('GET', '/agents/999999')).status).toBe(404);
  });

  test('changes what differs, at the version that was asked for', async () => {
    const { id, name, version } = await register({ type: 'coder' });
    const put = await user.call('PUT', `/agents/${id}`, { capabilities: ['ts'] }, { 'if-match': `"${version}"` });
    expect(put).toMatchObject({ status: 200, body: { capabilities: ['ts'], version: version + 1, type: 'coder' } });
    expect(put.headers.get('etag')).toBe(`"${version + 1}"`);
    expect((await user.call('PUT', `/agents/${id}`, { name }, {})).body.version).toBe(version + 1);
    expect((await user.call('PUT', `/agents/${id}`, { type: 'tester' }, { 'if-match': '"1"' })).status).toBe(412);
    const { name: taken } = await register({});
    expect((await user.call('PUT', `/agents/${id}`, { name: taken })).status).toBe(409);
    expect((await user.call('PUT', `/agents/${id}`, { shared: true })).status).toBe(403);
    for (const [body, path] of [
      [{}, 'body'],
      [{ max_concurrency: 0 }, 'body.max_concurrency'],
      [{ capabilities: ['a', 'a'] }, 'body.capabilities'],
      [{ status: 'idle' }, 'body.status'],
    ] as const) {
      const answer = await user.call('PUT', `/agents/${id}`, body);
      expect(answer.status).toBe(400);
      expect(answer.body.errors[0].path).toBe(path);
    }
  });

  test('forgets an agent, but not while something is pinned to it, and lets it report what it is at', async () => {
    const agent = await makeAgent(user.call);
    const skill = unique('skill');
    const pinned = await makeTask(user.call, { agent_id: agent.id, skill_name: skill });
    expect((await user.call('DELETE', `/agents/${agent.id}`)).body.detail).toMatch(/tasks: 1/);
    await user.call('POST', `/tasks/${pinned.id}/run`);
    const run = await agent.claimOne([skill]);
    await user.call('PUT', `/tasks/${pinned.id}`, { agent_id: null });
    expect((await user.call('DELETE', `/agents/${agent.id}`, undefined, { 'if-match': '"7"' })).status).toBe(412);
    expect((await user.call('DELETE', `/agents/${agent.id}`)).status).toBe(204);
    for (const [method, path, body] of [
      ['GET', ''],
      ['PUT', '', { type: 'coder' }],
      ['DELETE', ''],
      ['POST', '/claim', {}],
      ['POST', '/heartbeat'],
      ['POST', '/drain'],
    ] as const) {
      expect((await user.call(method, `/agents/${agent.id}${path}`, body)).status).toBe(404);
    }
    expect((await complete(user.call, run)).status).toBe(200);
    expect((await eventsOf(agent.id)).map(({ action }) => action)).toContain('deleted');
  });

  test('ends the polls of an agent that is removed', async () => {
    const agent = await makeAgent(user.call);
    const poll = await startPoll(agent.id);
    expect((await user.call('DELETE', `/agents/${agent.id}`)).status).toBe(204);
    expect(await poll.answer).toMatchObject({ status: 200, body: { draining: true, executions: [] } });
  });

  test('offers what a removed agent failed at to others, though it was pinned to it', async () => {
    const [gone, other] = [await makeAgent(user.call), await makeAgent(user.call)];
    const skill = unique('skill');
    const task = await makeTask(user.call, { agent_id: gone.id, skill_name: skill, retry_backoff_seconds: 1 });
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await gone.claimOne([skill]);
    await user.call('PUT', `/tasks/${task.id}`, { agent_id: null });
    expect((await user.call('DELETE', `/agents/${gone.id}`)).status).toBe(204);
    expect((await complete(user.call, run, { status: 'failed' })).status).toBe(200);
    expect(await other.claimOne([skill])).toMatchObject({ task_id: task.id, attempt: 2 });
  });
});

test('a task is never pinned to an agent that is removed at the same time', async () => {
  for (let round = 0; round < 10; round++) {
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call);
    const [made, pinned, removed] = await Promise.all([
      user.call('POST', '/tasks', { skill_name: 'x', agent_id: agent.id }),
      user.call('PUT', `/tasks/${task.id}`, { agent_id: agent.id }),
      user.call('DELETE', `/agents/${agent.id}`),
    ]);
    if (removed.status === 204) expect([made.status, pinned.status]).toEqual([400, 400]);
    else expect(removed.status).toBe(409);
  }
});

describe('drain', () => {
  test('ends waiting polls, gives nothing more, and ends itself when resumed', async () => {
    const agent = await makeAgent(user.call);
    const poll = await startPoll(agent.id);
    expect((await user.call('POST', `/agents/${agent.id}/drain`)).body).toMatchObject({ draining: true });
    expect((await poll.answer).body).toEqual({ draining: true, executions: [] });
    const task = await makeTask(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    expect(await agent.claim()).toEqual([]);
    const again = await user.call('POST', '/agents', { name: (await get(`/agents/${agent.id}`)).name });
    expect(again.body.draining).toBe(true);
    expect((await user.call('POST', `/agents/${agent.id}/resume`)).body).toMatchObject({ draining: false });
    expect(await agent.claim()).toHaveLength(1);
  });
});

describe('who gets a run', () => {
  test('as many as max_concurrency says now, however many ask at once', async () => {
    const agent = await makeAgent(user.call, { max_concurrency: 2 });
    const skill = unique('skill');
    const task = await makeTask(user.call, { skill_name: skill });
    for (let i = 0; i < 8; i++) await user.call('POST', `/tasks/${task.id}/run`);
    const claimed = (await Promise.all(Array.from({ length: 6 }, () => agent.claim({ max: 5 })))).flat();
    expect(claimed).toHaveLength(2);
    await user.call('PUT', `/agents/${agent.id}`, { max_concurrency: 5 });
    expect(await agent.claim({ max: 100 })).toHaveLength(3);
    await user.call('PUT', `/agents/${agent.id}`, { max_concurrency: 1 });
    for (const run of claimed) await complete(user.call, run);
    expect(await agent.claim({ max: 100 })).toEqual([]);
  });

  test('the pinned one, and of others those that can do what it asks', async () => {
    const skill = unique('skill');
    const [able, other] = [await makeAgent(user.call, { capabilities: ['gpu', 'x'] }), await makeAgent(user.call)];
    const [needs, pinned] = [
      await makeTask(user.call, { skill_name: skill, required_capabilities: ['gpu'] }),
      await makeTask(user.call, { skill_name: skill, agent_id: other.id }),
    ];
    for (const { id } of [needs, pinned]) await user.call('POST', `/tasks/${id}/run`);
    expect((await other.claim({ max: 10 })).map(({ task_id }) => task_id)).toEqual([pinned.id]);
    expect((await able.claim({ max: 10 })).map(({ task_id }) => task_id)).toEqual([needs.id]);
  });
});

test('an agent that falls silent goes offline, and comes back with a heartbeat, with an event each', async () => {
  const { id } = await register({});
  await server.db.query({
    text: `update agents set last_active_at = now() - interval '1 hour' where id = $1`,
    values: [id],
  });
  await until(
    () => get(`/agents/${id}`),
    ({ status }) => status === 'offline',
  );
  await user.call('POST', `/agents/${id}/heartbeat`);
  expect((await get(`/agents/${id}`)).status).toBe('idle');
  expect((await eventsOf(id)).map(({ action, status }) => [action, status])).toEqual([
    ['registered', 'idle'],
    ['offline', 'offline'],
    ['heartbeat', 'idle'],
  ]);
});

test('a heartbeat that meets the mark of being offline tells that the agent is back', async () => {
  const { id } = await register({});
  const beat = await whileHeld(`update agents set status = 'offline' where id = $1`, id, () =>
    user.call('POST', `/agents/${id}/heartbeat`),
  );
  expect((await beat.answer).body.status).toBe('idle');
  expect((await eventsOf(id)).map(({ action }) => action)).toEqual(['registered', 'heartbeat']);
});

describe('metrics', () => {
  test('tell successes, each kind of failure, and durations', async () => {
    const agent = await makeAgent(user.call);
    expect(await get(`/agents/${agent.id}`)).toMatchObject({
      success_rate: null,
      avg_duration_ms: null,
      runs_last_24h: 0,
      metrics: { n: 0, confidence_low: null },
    });
    const skill = unique('skill');
    const task = await makeTask(user.call, { skill_name: skill, max_attempts: 1, overlap_policy: 'allow' });
    const claim = async () => {
      await user.call('POST', `/tasks/${task.id}/run`);
      return agent.claimOne([skill]);
    };
    for (let i = 0; i < 3; i++) await complete(user.call, await claim());
    await complete(user.call, await claim(), { status: 'failed', error: 'no' });
    const age = (id: number, columns: string) =>
      server.db.query({ text: `update executions set ${columns} where id = $1`, values: [id] });
    const [lost, late, cancelled] = [await claim(), await claim(), await claim()];
    await age(lost.execution_id, `lease_expires_at = now() - interval '1 second'`);
    await age(
      late.execution_id,
      `lease_expires_at = now() - interval '1 second', deadline_at = now() - interval '9 seconds'`,
    );
    await user.call('POST', `/executions/${cancelled.execution_id}/cancel`);
    await complete(user.call, cancelled, { status: 'failed' });
    const body = await until(
      () => get(`/agents/${agent.id}`),
      ({ metrics }) => metrics.failures.lease_lost === 1 && metrics.failures.run_timeout === 1,
    );
    const { low, high } = wilson(3, 6);
    expect(body).toMatchObject({
      success_rate: 0.5,
      runs_last_24h: 7,
      metrics: {
        window_hours: 720,
        n: 6,
        successes: 3,
        success_rate: 0.5,
        confidence_low: low,
        confidence_high: high,
        failures: { agent_failed: 1, lease_lost: 1, run_timeout: 1, cancelled: 1 },
      },
    });
    expect(body.execution_history).toHaveLength(7);
    expect((await get(`/agents/${agent.id}?history_limit=0`)).execution_history).toEqual([]);
  });

  test('percentiles are within 5 %, and only the window counts', async () => {
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call);
    // What agents report of their own accord says how long it took, so the durations are known.
    for (let i = 1; i <= 40; i++) {
      const duration_ms = i * 100;
      await user.call('POST', '/agents/activity', {
        agent_id: agent.id,
        task_id: task.id,
        status: 'success',
        duration_ms,
      });
    }
    const { avg_duration_ms: average, p50_duration_ms: p50, p95_duration_ms: p95 } = await get(`/agents/${agent.id}`);
    expect(average).toBe(2_050);
    expect(Math.abs(p50 / 2_000 - 1)).toBeLessThanOrEqual(0.05);
    expect(Math.abs(p95 / 3_800 - 1)).toBeLessThanOrEqual(0.05);
    await server.db.query({
      text: `update agent_stats_hourly set hour = hour - interval '3 days' where agent_id = $1`,
      values: [agent.id],
    });
    expect(await get(`/agents/${agent.id}?window_hours=48`)).toMatchObject({ success_rate: null, runs_last_24h: 0 });
    expect(await get(`/agents/${agent.id}?window_hours=96`)).toMatchObject({ success_rate: 1, runs_last_24h: 0 });
    expect((await user.call('GET', `/agents/${agent.id}?window_hours=0`)).status).toBe(400);
    // A minute's slack, for the turn of an hour between the two calls.
    const move = (hours: number) =>
      server.db.query({
        text: `update agent_stats_hourly set hour = date_trunc('hour', now() - $2 * interval '1 hour' + interval '1 minute', 'UTC')
          where agent_id = $1`,
        values: [agent.id, hours],
      });
    await move(1);
    expect(await get(`/agents/${agent.id}?window_hours=1`)).toMatchObject({ success_rate: 1, runs_last_24h: 40 });
    await move(24);
    expect(await get(`/agents/${agent.id}?window_hours=22`)).toMatchObject({ success_rate: null, runs_last_24h: 40 });
  });

  test('the interval of Wilson, by known values', () => {
    expect(wilson(0, 10).low).toBe(0);
    expect(wilson(0, 10).high).toBeCloseTo(0.2775, 3);
    expect(wilson(8, 10).low).toBeCloseTo(0.4902, 3);
    expect(wilson(8, 10).high).toBeCloseTo(0.9433, 3);
  });
});

describe('POST /agents/activity', () => {
  const report = (fields: object) => user.call('POST', '/agents/activity', fields);

  test('a run from its start to its end', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call)];
    const ids = { agent_id: agent.id, task_id: task.id };
    const started = await report({ ...ids, status: 'running' });
    expect(started).toMatchObject({
      status: 201,
      body: { ...ids, status: 'running', stored_in_memory_mcp: false, broadcasted_via_websocket: true },
    });
    const { execution_id } = started.body;
    expect(await get(`/executions/${execution_id}`)).toMatchObject({
      status: 'running',
      trigger: 'activity',
      agent_id: agent.id,
    });
    expect((await get(`/tasks/${task.id}`)).status).toBe('running');
    expect((await get(`/agents/${agent.id}`)).status).toBe('busy');
    const ended = await report({ ...ids, execution_id, status: 'success', output: 'done', duration_ms: 1_500 });
    expect(ended.body).toMatchObject({ execution_id, status: 'success', broadcasted_via_websocket: true });
    expect(await get(`/executions/${execution_id}`)).toMatchObject({
      status: 'success',
      output_text: 'done',
      duration_ms: 1_500,
    });
    expect((await get(`/tasks/${task.id}`)).status).toBe('completed');
    expect((await get(`/agents/${agent.id}`)).status).toBe('idle');
    expect((await report({ ...ids, execution_id, status: 'success' })).status).toBe(409);
  });

  test('what failed or took too long is a failure, and is not tried again', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call, { max_attempts: 5 })];
    const ids = { agent_id: agent.id, task_id: task.id };
    for (const [status, cause] of [
      ['failed', 'agent_failed'],
      ['timeout', 'run_timeout'],
    ]) {
      const { body } = await report({ ...ids, status, error: 'no' });
      expect(await get(`/executions/${body.execution_id}`)).toMatchObject({ status, cause, error_text: 'no' });
    }
    expect((await get(`/executions?task_id=${task.id}`)).total).toBe(2);
  });

  test('shows that an agent is back that had been offline', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call)];
    const ids = { agent_id: agent.id, task_id: task.id };
    const leave = () => user.call('POST', `/agents/${agent.id}/heartbeat`, { status: 'offline' });
    await leave();
    await report({ ...ids, status: 'success' });
    expect((await get(`/agents/${agent.id}`)).status).toBe('idle');
    const { body } = await report({ ...ids, status: 'running' });
    await leave();
    await report({ ...ids, status: 'running', execution_id: body.execution_id });
    expect((await get(`/agents/${agent.id}`)).status).toBe('busy');
    expect((await eventsOf(agent.id)).map(({ action, status }) => [action, status])).toEqual([
      ['registered', 'idle'],
      ['heartbeat', 'offline'],
      ['heartbeat', 'idle'],
      ['success', 'idle'],
      ['running', 'busy'],
      ['heartbeat', 'offline'],
      ['heartbeat', 'busy'],
    ]);
  });

  test('a run that nobody ends is ended by its task’s timeout', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call, { timeout_seconds: 1 })];
    const { body } = await report({ agent_id: agent.id, task_id: task.id, status: 'running' });
    const run = await until(
      () => get(`/executions/${body.execution_id}`),
      ({ status }) => status !== 'running',
    );
    expect(run).toMatchObject({ status: 'timeout', cause: 'run_timeout' });
    expect((await get(`/executions?task_id=${task.id}`)).total).toBe(1);
  });

  test('names what it cannot take, the same for what is not there and what is not yours', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call)];
    const stranger = await server.newUser();
    const [theirAgent, theirTask] = [await makeAgent(stranger.call), await makeTask(stranger.call)];
    const good = { agent_id: agent.id, task_id: task.id, status: 'success' };
    for (const [fields, path] of [
      [{ agent_id: theirAgent.id }, 'body.agent_id'],
      [{ agent_id: 99_999_999 }, 'body.agent_id'],
      [{ task_id: theirTask.id }, 'body.task_id'],
      [{ task_id: 99_999_999 }, 'body.task_id'],
      [{ status: 'cancelled' }, 'body.status'],
      [{ duration_ms: -1 }, 'body.duration_ms'],
    ] as const) {
      const answer = await report({ ...good, ...fields });
      expect(answer).toMatchObject({ status: 400, body: { errors: [{ path }] } });
    }
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne([task.skill_name]);
    const leased = await report({ ...good, execution_id: run.execution_id });
    expect(leased).toMatchObject({ status: 409, body: { detail: expect.stringMatching(/lease_token/) } });
    expect((await complete(user.call, run)).status).toBe(200);

    const theirs = await stranger.call('POST', '/agents/activity', {
      agent_id: theirAgent.id,
      task_id: theirTask.id,
      status: 'running',
    });
    const own = await report({ ...good, status: 'running' });
    const [otherAgent, otherTask] = [await makeAgent(user.call), await makeTask(user.call)];
    for (const fields of [
      { execution_id: 99_999_999 },
      { execution_id: theirs.body.execution_id },
      { execution_id: own.body.execution_id, agent_id: otherAgent.id },
      { execution_id: own.body.execution_id, task_id: otherTask.id },
    ]) {
      const { status, body } = await report({ ...good, ...fields });
      expect(status).toBe(409);
      expect(body.detail).toMatch(/is at no execution/);
    }
    expect((await get(`/executions/${own.body.execution_id}`)).status).toBe('running');
  });

  test('does not say that it was broadcast when it was not', async () => {
    const [agent, task] = [await makeAgent(user.call), await makeTask(user.call)];
    const client = await server.db.pool.connect();
    try {
      await client.query('begin');
      await client.query('select pg_advisory_xact_lock($1, $2)', [...LOCKS.relayOrder]);
      const held = await report({ agent_id: agent.id, task_id: task.id, status: 'success' });
      expect(held).toMatchObject({ status: 201, body: { broadcasted_via_websocket: false } });
    } finally {
      await client.query('rollback');
      client.release();
    }
  });
});
