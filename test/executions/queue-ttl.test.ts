import { afterAll, beforeAll, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, until } from '../support/work.ts';

// How long a run waits for an agent.

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

const execution = async (id: number) => (await user.call('GET', `/executions/${id}`)).body;
const runNow = async (taskId: number) => (await user.call('POST', `/tasks/${taskId}/run`)).body;
const ended = (id: number) =>
  until(
    () => execution(id),
    (run) => run.status !== 'queued',
  );
const ttl = (run: { available_at: string; expires_at: string }) =>
  Date.parse(run.expires_at) - Date.parse(run.available_at);

test('a run that no agent takes in time is cancelled, which is audited and told, and is nobody’s failure', async () => {
  const task = await makeTask(user.call, { queue_ttl_seconds: 1, pause_after_failures: 1 });
  const run = await runNow(task.id);
  expect(ttl(run)).toBe(1_000);
  expect(await ended(run.id)).toMatchObject({
    status: 'cancelled',
    cause: 'queue_expired',
    error_text: 'No agent took it within 1 s.',
    agent_id: null,
  });
  const agent = await makeAgent(user.call);
  expect(await agent.claim({ skills: [task.skill_name] })).toEqual([]);
  const after = (await user.call('GET', `/tasks/${task.id}`)).body;
  expect(after).toMatchObject({ status: 'failed', consecutive_failures: 0 });
  const audit = await user.call('GET', `/audit?entity_type=execution&entity_id=${run.id}&operation=UPDATE`);
  expect(audit.body.entries).toMatchObject([
    {
      user_id: null,
      changed_fields: { status: { old: 'queued', new: 'cancelled' }, cause: { old: null, new: 'queue_expired' } },
    },
  ]);
  const told = await until(
    async () =>
      (
        await server.db.query<{ data: string }>({
          text: `select data from events where task_id = $1 order by event_id desc limit 1`,
          values: [task.id],
        })
      ).rows.map(({ data }) => JSON.parse(data))[0],
    (event) => event?.execution_status === 'cancelled',
  );
  expect(told).toMatchObject({ execution_id: run.id, error: 'No agent took it within 1 s.' });
});

test('one that was taken in time, and one of a task without such a limit, are left alone', async () => {
  const [limited, patient] = [await makeTask(user.call, { queue_ttl_seconds: 2_000 }), await makeTask(user.call)];
  const taken = await runNow(limited.id);
  const waiting = await runNow(patient.id);
  expect(waiting.expires_at).toBeNull();
  const agent = await makeAgent(user.call);
  const run = await agent.claimOne([limited.skill_name]);
  await server.db.query({
    text: `update executions set expires_at = now() - interval '1 hour' where id = $1`,
    values: [taken.id],
  });
  // Another one that has expired is ended: the reaper has been here by then.
  const late = await runNow((await makeTask(user.call, { queue_ttl_seconds: 1 })).id);
  await ended(late.id);
  expect((await execution(taken.id)).status).toBe('running');
  expect((await execution(waiting.id)).status).toBe('queued');
  expect((await complete(user.call, run)).status).toBe(200);
});

test('a retry waits from the end of its backoff on', async () => {
  const task = await makeTask(user.call, { queue_ttl_seconds: 60 });
  const agent = await makeAgent(user.call);
  await runNow(task.id);
  await complete(user.call, await agent.claimOne([task.skill_name]), { status: 'failed', retry_after_seconds: 3_600 });
  const [retry] = (await user.call('GET', `/executions?task_id=${task.id}`)).body.executions;
  expect(retry).toMatchObject({ trigger: 'retry', status: 'queued' });
  expect(ttl(retry)).toBe(60_000);
});

test('a run that waits for another one begins to wait for an agent when it has its turn, and gives it on', async () => {
  const task = await makeTask(user.call, { queue_ttl_seconds: 1, overlap_policy: 'queue_all' });
  const first = await runNow(task.id);
  const { rows } = await server.db.query<{ id: number }>({
    text: `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds, expires_at)
      select task_id, user_id, 'schedule', scheduled_for, skill_name, params, priority, timeout_seconds, now() - interval '1 hour'
      from executions, generate_series(1, 2) where id = $1 returning id`,
    values: [first.id],
  });
  const [second = 0, third = 0] = rows.map(({ id }) => id);
  for (const id of [first.id, second, third]) await ended(id);
  const [one, two, three] = [await execution(first.id), await execution(second), await execution(third)];
  for (const run of [one, two, three]) {
    expect(run).toMatchObject({ status: 'cancelled', cause: 'queue_expired' });
    expect(ttl(run)).toBe(1_000);
  }
  expect(two.available_at).toBe(one.ended_at);
  expect(three.available_at).toBe(two.ended_at);
});

test('an agent’s metrics have no failures of a kind that no agent can have', async () => {
  const agent = await makeAgent(user.call);
  const { metrics } = (await user.call('GET', `/agents/${agent.id}`)).body;
  expect(Object.keys(metrics.failures)).toEqual(['agent_failed', 'lease_lost', 'run_timeout', 'cancelled']);
});
