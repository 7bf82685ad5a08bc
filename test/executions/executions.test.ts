import { request } from 'node:http';
import { sql } from 'drizzle-orm';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { LEASE_SECONDS: '2', AGENT_OFFLINE_AFTER_SECONDS: '5' } });
});
afterAll(() => server?.stop());

const execution = async (id: number) => (await server.admin('GET', `/executions/${id}`)).body;

describe('claim', () => {
  test('leases a queued run with everything the agent needs', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { params: { city: 'Köln' }, timeout_seconds: 77 });
    const agent = await makeAgent(user.call);
    const asked = await user.call('POST', `/tasks/${task.id}/run`);
    expect(asked.status).toBe(202);

    const run = await agent.claimOne();
    expect(run).toMatchObject({
      execution_id: asked.body.id,
      task_id: task.id,
      skill_name: task.skill_name,
      params: { city: 'Köln' },
      attempt: 1,
      timeout_seconds: 77,
    });
    expect(Date.parse(run.lease_expires_at)).toBeGreaterThan(Date.parse(run.scheduled_for));
    expect(await execution(run.execution_id)).toMatchObject({ status: 'running', agent_id: agent.id });
    expect((await user.call('GET', `/tasks/${task.id}`)).body.status).toBe('running');
    expect(await agent.claim()).toEqual([]);
    expect((await complete(user.call, run)).status).toBe(200);
  });

  test('waits for work and gets it when it comes', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    const waiting = agent.claim({ wait_ms: 20_000 });
    await user.call('POST', `/tasks/${task.id}/run`);
    expect(await waiting).toHaveLength(1);
  });

  test('answers an empty list when the wait is over', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    expect(await agent.claim({ wait_ms: 50 })).toEqual([]);
  });

  test('gives the highest priority first, then whoever waits longest', async () => {
    const user = await server.newUser();
    const ids: Record<string, number> = {};
    for (const priority of ['low', 'critical', 'medium', 'high']) {
      const task = await makeTask(user.call, { priority });
      ids[priority] = (await user.call('POST', `/tasks/${task.id}/run`)).body.id;
    }
    const second = await makeTask(user.call, { priority: 'critical' });
    const later = (await user.call('POST', `/tasks/${second.id}/run`)).body.id;
    const agent = await makeAgent(user.call);
    const claimed = await agent.claim({ max: 100 });
    expect(claimed.map((run) => run.execution_id)).toEqual([ids.critical, later, ids.high, ids.medium, ids.low]);
  });

  test('gives only what the agent may do: skill, pin, capabilities, owner', async () => {
    const user = await server.newUser();
    const stranger = await server.newUser();
    const other = await makeAgent(user.call);
    const skill = unique('skill');
    const wanted = await makeTask(user.call, { skill_name: skill, required_capabilities: ['gpu', 'docker'] });
    for (const [call, fields] of [
      [user.call, { skill_name: unique('other') }],
      [user.call, { skill_name: skill, agent_id: other.id }],
      [user.call, { skill_name: skill, required_capabilities: ['gpu', 'tpu'] }],
      [stranger.call, { skill_name: skill }],
    ] as const) {
      const task = await makeTask(call, fields);
      await call('POST', `/tasks/${task.id}/run`);
    }
    await user.call('POST', `/tasks/${wanted.id}/run`);
    const agent = await makeAgent(user.call, { capabilities: ['docker', 'gpu', 'x'] });
    const claimed = await agent.claim({ max: 100, skills: [skill] });
    expect(claimed.map((run) => run.task_id)).toEqual([wanted.id]);
  });

  test('a shared agent runs the tasks of everybody, and its owner reports on them', async () => {
    const user = await server.newUser();
    const skill = unique('skill');
    const task = await makeTask(user.call, { skill_name: skill });
    await user.call('POST', `/tasks/${task.id}/run`);
    expect((await user.call('POST', '/agents', { name: 'x', shared: true })).status).toBe(403);
    const agent = await makeAgent(server.admin, { shared: true });
    const [run] = await agent.claim({ skills: [skill] });
    expect(run?.task_id).toBe(task.id);
    if (run) expect((await complete(server.admin, run)).status).toBe(200);
  });

  test('never gives an agent more than its max_concurrency, however many claims it sends at once', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    for (let i = 0; i < 10; i++) await user.call('POST', `/tasks/${task.id}/run`);
    const agent = await makeAgent(user.call, { max_concurrency: 3 });
    const claims = await Promise.all(Array.from({ length: 8 }, () => agent.claim({ max: 2 })));
    expect(claims.flat()).toHaveLength(3);
  });

  test('two agents never get the same run', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    await Promise.all(Array.from({ length: 40 }, () => user.call('POST', `/tasks/${task.id}/run`)));
    const agents = await Promise.all(Array.from({ length: 4 }, () => makeAgent(user.call)));
    const claims = await Promise.all(agents.flatMap((agent) => [1, 2, 3].map(() => agent.claim({ max: 5 }))));
    const ids = claims.flat().map((run) => run.execution_id);
    expect(new Set(ids).size).toBe(ids.length);
    expect(ids.length).toBe(40);
  });

  test('a run claimed for a caller that has gone is queued again at once', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    // The response can only be lost between claim and answer: hold the claim at the agent's row, then go.
    const holder = await server.db.pool.connect();
    try {
      await holder.query('begin');
      await holder.query('select from agents where id = $1 for update', [agent.id]);
      const asked = await user.call('POST', `/tasks/${task.id}/run`);
      const body = JSON.stringify({ max: 1, wait_ms: 0 });
      const call = request(`${server.url}/api/v1/agents/${agent.id}/claim`, {
        method: 'POST',
        headers: {
          authorization: `Bearer ${user.token}`,
          'content-type': 'application/json',
          'content-length': body.length,
        },
      });
      call.on('error', () => {});
      call.end(body);
      await until(
        async () =>
          (
            await server.db.query<{ n: number }>({
              text: `select count(*)::int as n from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
            })
          ).rows[0]?.n ?? 0,
        (n) => n > 0,
      );
      call.destroy();
      await holder.query('commit');
      await until(
        () => execution(asked.body.id),
        (run) => run.status === 'queued',
        5,
      );
      const run = await agent.claimOne();
      expect(run.execution_id).toBe(asked.body.id);
      expect(run.attempt).toBe(1);
    } finally {
      holder.release();
    }
  });

  test('refuses what is out of bounds, by its name', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    const bad: [Record<string, unknown>, string][] = [
      [{ max: 0 }, 'body.max'],
      [{ max: 101 }, 'body.max'],
      [{ wait_ms: 30_001 }, 'body.wait_ms'],
      [{ skills: ['a b'] }, 'body.skills.0'],
      [{ maximum: 1 }, 'body.maximum'],
    ];
    for (const [body, path] of bad) {
      const answer = await user.call('POST', `/agents/${agent.id}/claim`, body);
      expect(answer.status).toBe(400);
      expect(answer.body.errors[0].path).toBe(path);
    }
    const stranger = await server.newUser();
    expect((await stranger.call('POST', `/agents/${agent.id}/claim`, {})).status).toBe(403);
    expect((await user.call('POST', '/agents/999999999/claim', {})).status).toBe(404);
  });
});

describe('heartbeat', () => {
  test('extends the lease, keeps the progress, and tells of a cancel', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    const path = `/executions/${run.execution_id}`;
    const beat = await user.call('POST', `${path}/heartbeat`, {
      lease_token: run.lease_token,
      progress: { percent: 40, message: 'halfway' },
    });
    expect(beat).toMatchObject({ status: 200, body: { cancel_requested: false } });
    expect(Date.parse(beat.body.lease_expires_at)).toBeGreaterThan(Date.parse(run.lease_expires_at));
    expect((await execution(run.execution_id)).progress).toEqual({ percent: 40, message: 'halfway' });

    const cancel = await user.call('POST', `${path}/cancel`);
    expect(cancel).toMatchObject({ status: 200, body: { status: 'running', cancel_requested: true } });
    const told = await user.call('POST', `${path}/heartbeat`, { lease_token: run.lease_token });
    expect(told.body.cancel_requested).toBe(true);
    expect((await complete(user.call, run, { status: 'failed', error: 'stopped' })).body).toMatchObject({
      status: 'cancelled',
      cause: 'cancelled',
    });
    const all = await user.call('GET', `/executions?task_id=${task.id}`);
    expect(all.body.executions).toHaveLength(1);
  });

  test('a lease that was lost is refused and nothing changes', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { heartbeat_timeout_seconds: 60 });
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    const wrong = { lease_token: '00000000-0000-4000-8000-000000000000' };
    const before = await execution(run.execution_id);
    expect((await user.call('POST', `/executions/${run.execution_id}/heartbeat`, wrong)).status).toBe(409);
    expect((await complete(user.call, { ...run, ...wrong })).status).toBe(409);
    expect(await execution(run.execution_id)).toEqual(before);
    const stranger = await server.newUser();
    expect((await complete(stranger.call, run)).status).toBe(403);
    expect((await stranger.call('POST', `/executions/${run.execution_id}/cancel`)).status).toBe(403);
    expect((await stranger.call('GET', `/executions/${run.execution_id}`)).status).toBe(403);
    expect((await complete(user.call, run)).status).toBe(200);
  });
});

describe('complete', () => {
  test('ends the run once: a second report is refused', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    const done = await complete(user.call, run, { status: 'success', output: 'all good' });
    expect(done).toMatchObject({ status: 200, body: { status: 'success', output_text: 'all good', cause: null } });
    expect(done.body.duration_ms).toBeGreaterThanOrEqual(0);
    expect((await complete(user.call, run, { status: 'failed' })).status).toBe(409);
    expect((await execution(run.execution_id)).status).toBe('success');
    expect((await user.call('GET', `/tasks/${task.id}`)).body.status).toBe('completed');
    const cancel = await user.call('POST', `/executions/${run.execution_id}/cancel`);
    expect(cancel.status).toBe(409);
  });

  test('keeps the end of an output that is too long, cut between characters', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    const output = `x${'€'.repeat(400_000)}end`;
    const done = await complete(user.call, run, { status: 'success', output });
    expect(done.status).toBe(200);
    expect(done.body.output_truncated).toBe(true);
    expect(Buffer.byteLength(done.body.output_text)).toBeLessThanOrEqual(1_048_576);
    expect(output.endsWith(done.body.output_text)).toBe(true);
    const list = await user.call('GET', `/executions?task_id=${task.id}`);
    expect(list.body.executions[0].output_preview).toHaveLength(4_096);
    expect(list.body.executions[0]).not.toHaveProperty('output_text');
  });

  test('whatever a command prints, the event of its end stays within 16 KiB', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    for (const [output, atLeast] of [
      ['\u0001'.repeat(50_000), 1_000],
      ['😀'.repeat(20_000), 3_000],
      ['plain'.repeat(10), 50],
    ] as const) {
      const task = await makeTask(user.call, { max_attempts: 1 });
      await user.call('POST', `/tasks/${task.id}/run`);
      await complete(user.call, await agent.claimOne(), { status: 'failed', output, error: output });
      const [event] = await until(
        async () =>
          (
            await server.db.query<{ data: string }>({
              text: `select data from events where task_id = $1 and data like '%"failed"%' order by event_id`,
              values: [task.id],
            })
          ).rows,
        (rows) => rows.length > 0,
      );
      expect(Buffer.byteLength(event?.data ?? '')).toBeLessThan(16_000);
      const data = JSON.parse(event?.data ?? '{}');
      expect(output.endsWith(data.output)).toBe(true);
      expect(data.output.length).toBeGreaterThanOrEqual(atLeast);
      expect(data.output_truncated).toBe(output.length > 100);
    }
  });

  test('a failed run is tried again after its backoff, until max_attempts', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { max_attempts: 3, retry_backoff_seconds: 0 });
    const agent = await makeAgent(user.call);
    const first = (await user.call('POST', `/tasks/${task.id}/run`)).body.id;
    const attempts: number[] = [];
    for (let i = 0; i < 3; i++) {
      const run = await agent.claimOne();
      attempts.push(run.attempt);
      expect((await complete(user.call, run, { status: 'failed', error: 'boom' })).body.cause).toBe('agent_failed');
    }
    expect(attempts).toEqual([1, 2, 3]);
    expect(await agent.claim({ wait_ms: 100 })).toEqual([]);
    const { executions } = (await user.call('GET', `/executions?task_id=${task.id}&sort_order=asc`)).body;
    expect(executions.map((run: { status: string }) => run.status)).toEqual(['failed', 'failed', 'failed']);
    expect(executions[0].id).toBe(first);
    expect(executions[1]).toMatchObject({ trigger: 'retry', retry_of: first });
    expect((await user.call('GET', `/tasks/${task.id}`)).body.status).toBe('failed');
  });

  test('a retry whose backoff has not ended is not given out, and comes when it has', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { max_attempts: 2, retry_backoff_seconds: 1 });
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    await complete(user.call, await agent.claimOne(), { status: 'failed' });
    const retry = await agent.claimOne();
    const [first] = (await user.call('GET', `/executions?task_id=${task.id}&sort_order=asc`)).body.executions;
    const row = await execution(retry.execution_id);
    expect(retry.attempt).toBe(2);
    expect(Date.parse(row.started_at)).toBeGreaterThanOrEqual(Date.parse(row.available_at) - 1);
    expect(Date.parse(row.available_at) - Date.parse(first.ended_at)).toBeLessThanOrEqual(1_001);
  });

  test('is audited with who reported it, and told in the same transaction', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    await complete(user.call, run, { status: 'success', output: 'ok' });
    const audit = await server.db.query({
      text: `select operation, user_id, changed_fields from audit_log where entity_type = 'execution' and entity_id = $1 order by id`,
      values: [run.execution_id],
    });
    expect(audit.rows).toEqual([
      expect.objectContaining({ operation: 'CREATE', user_id: user.id }),
      {
        operation: 'UPDATE',
        user_id: user.id,
        changed_fields: { status: { old: 'queued', new: 'running' }, agent_id: { old: null, new: agent.id } },
      },
      {
        operation: 'UPDATE',
        user_id: user.id,
        changed_fields: { status: { old: 'running', new: 'success' } },
      },
    ]);
    const events = await until(
      async () =>
        (
          await server.db.query<{ data: string }>({
            text: `select data from events where task_id = $1 and type = 'task_status_update' order by event_id`,
            values: [task.id],
          })
        ).rows.map((row) => JSON.parse(row.data)),
      (rows) => rows.length >= 4,
    );
    expect(events.map((event) => [event.status, event.execution_status])).toEqual([
      ['pending', undefined],
      ['pending', 'queued'],
      ['running', 'running'],
      ['completed', 'success'],
    ]);
    expect(events.at(-1)).toMatchObject({ output: 'ok', agent_id: agent.id, previous_status: 'running' });
  });
});

describe('the reaper', () => {
  test('offers the run of a silent agent again, once, and refuses its late report', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const [dead, alive] = [await makeAgent(user.call), await makeAgent(user.call)];
    await user.call('POST', `/tasks/${task.id}/run`);
    const lost = await dead.claimOne();
    const again = await alive.claimOne();
    expect(again).toMatchObject({ task_id: task.id, attempt: 2 });
    expect(await execution(lost.execution_id)).toMatchObject({ status: 'failed', cause: 'lease_lost' });
    expect((await complete(user.call, lost)).status).toBe(409);
    expect((await complete(user.call, again)).status).toBe(200);
    const { executions } = (await user.call('GET', `/executions?task_id=${task.id}`)).body;
    expect(executions.filter((run: { status: string }) => run.status === 'success')).toHaveLength(1);
  });

  test('ends a run that outlives its timeout, though its agent goes on with heartbeats', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call, { timeout_seconds: 1, max_attempts: 1 });
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    // The deadline and its grace pass at once: what is left of the lease is all that heartbeats can get.
    await server.db.orm.execute(
      sql`update executions set deadline_at = now() - interval '9 seconds' where id = ${run.execution_id}`,
    );
    const beat = () => user.call('POST', `/executions/${run.execution_id}/heartbeat`, { lease_token: run.lease_token });
    await until(beat, (answer) => answer.status === 409, 10);
    const ended = await until(
      () => execution(run.execution_id),
      (row) => row.status !== 'running',
      10,
    );
    expect(ended).toMatchObject({ status: 'timeout', cause: 'run_timeout' });
    expect((await user.call('GET', `/tasks/${task.id}`)).body.status).toBe('failed');
  });

  test('ends a cancelled run whose agent does not answer', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    await user.call('POST', `/executions/${run.execution_id}/cancel`);
    const ended = await until(
      () => execution(run.execution_id),
      (row) => row.status !== 'running',
      10,
    );
    expect(ended.status).toBe('cancelled');
    expect((await user.call('GET', `/executions?task_id=${task.id}`)).body.executions).toHaveLength(1);
  });

  test('leaves a run alone that nobody can run, and one whose lease is kept', async () => {
    const user = await server.newUser();
    const waiting = await makeTask(user.call);
    const asked = (await user.call('POST', `/tasks/${waiting.id}/run`)).body.id;
    await server.db.orm.execute(
      sql`update executions set created_at = now() - interval '30 days', available_at = now() - interval '30 days' where id = ${asked}`,
    );
    const kept = await makeTask(user.call, { skill_name: 'kept' });
    await user.call('POST', `/tasks/${kept.id}/run`);
    const agent = await makeAgent(user.call);
    const run = await agent.claimOne(['kept']);
    const end = performance.now() + 4_000;
    while (performance.now() < end) {
      const beat = await user.call('POST', `/executions/${run.execution_id}/heartbeat`, {
        lease_token: run.lease_token,
      });
      expect(beat.status).toBe(200);
      await server.db.query({ text: 'select pg_sleep(0.3)' });
    }
    expect((await execution(asked)).status).toBe('queued');
    expect((await complete(user.call, run)).status).toBe(200);
  });

  test('marks an agent that was silent for too long as offline, and its next sign of life brings it back', async () => {
    const user = await server.newUser();
    const agent = await makeAgent(user.call);
    await server.db.orm.execute(
      sql`update agents set last_active_at = now() - interval '1 hour' where id = ${agent.id}`,
    );
    const status = async () =>
      (
        await server.db.query<{ status: string }>({
          text: 'select status from agents where id = $1',
          values: [agent.id],
        })
      ).rows[0]?.status;
    await until(status, (value) => value === 'offline', 10);
    expect((await user.call('POST', `/agents/${agent.id}/heartbeat`)).body.status).toBe('idle');
  });
});

describe('cancel', () => {
  test('a queued run ends at once, and cancelling it again changes nothing', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    const { body: run } = await user.call('POST', `/tasks/${task.id}/run`);
    const first = await user.call('POST', `/executions/${run.id}/cancel`);
    expect(first).toMatchObject({ status: 200, body: { status: 'cancelled' } });
    const second = await user.call('POST', `/executions/${run.id}/cancel`);
    expect(second).toMatchObject({ status: 200, body: first.body });
    const audit = await server.db.query({
      text: `select from audit_log where entity_type = 'execution' and entity_id = $1 and operation = 'UPDATE'`,
      values: [run.id],
    });
    expect(audit.rows).toHaveLength(1);
    const agent = await makeAgent(user.call);
    expect(await agent.claim()).toEqual([]);
  });
});

describe('lists', () => {
  test('pages by cursor hold every run once, and a cursor of another query is refused', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    for (let i = 0; i < 7; i++) await user.call('POST', `/tasks/${task.id}/run`);
    const seen: number[] = [];
    let cursor = '';
    do {
      const { body } = await user.call('GET', `/executions?task_id=${task.id}&limit=3${cursor && `&cursor=${cursor}`}`);
      expect(body.total).toBe(7);
      seen.push(...body.executions.map((run: { id: number }) => run.id));
      cursor = body.next_cursor ?? '';
    } while (cursor);
    expect(new Set(seen).size).toBe(7);
    expect(seen).toEqual(seen.toSorted((a, b) => b - a));
    const { body } = await user.call('GET', `/executions?task_id=${task.id}&limit=3&total=false`);
    expect(body.total).toBeNull();
    const refused = await user.call('GET', `/executions?limit=3&cursor=${body.next_cursor}`);
    expect(refused).toMatchObject({ status: 400, body: { errors: [{ path: 'query.cursor' }] } });
    const stranger = await server.newUser();
    expect((await stranger.call('GET', '/executions')).body).toMatchObject({ executions: [], total: 0 });
  });
});

test('the largest lists stay small, whatever the runs hold', async () => {
  const user = await server.newUser();
  const task = await makeTask(user.call, { params: { a: 'x'.repeat(60_000) } });
  const agent = await makeAgent(user.call);
  await server.db.query({
    text: `insert into executions (task_id, user_id, agent_id, trigger, scheduled_for, skill_name, params, priority,
        timeout_seconds, status, ended_at, output_text, error_text)
      select $1, $2, $3, 'manual', now(), 's', jsonb_build_object('a', repeat('x', 60000)), 1, 60, 'failed', now(),
        repeat('o', 65536), repeat('e', 65536) from generate_series(1, 500)`,
    values: [task.id, user.id, agent.id],
  });
  for (const path of [
    `/executions?limit=100`,
    `/tasks/${task.id}?history_limit=500`,
    `/agents/${agent.id}?history_limit=500`,
  ]) {
    const { status, body } = await user.call('GET', path);
    expect(status).toBe(200);
    const runs = body.executions ?? body.execution_history;
    expect(JSON.stringify(body).length, path).toBeLessThan(4 * 1_048_576);
    expect(runs[0]).toMatchObject({ params: null, error_text: 'e'.repeat(1_024), output_preview: 'o'.repeat(4_096) });
  }
  const [{ id }] = (await user.call('GET', '/executions?limit=1')).body.executions;
  const { body: whole } = await user.call('GET', `/executions/${id}`);
  expect(whole.params.a).toHaveLength(60_000);
  expect(whole.error_text).toHaveLength(65_536);
});
