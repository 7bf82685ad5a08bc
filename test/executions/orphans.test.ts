import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { type ClaimedRun, complete, makeAgent, makeTask, until } from '../support/work.ts';

// Late results: reports under a lease that the reaper took away.

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let agent: Awaited<ReturnType<typeof makeAgent>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
  agent = await makeAgent(user.call);
});
afterAll(() => server?.stop());

const execution = async (id: number) => (await user.call('GET', `/executions/${id}`)).body;
const taskOf = async (id: number) => (await user.call('GET', `/tasks/${id}`)).body;
const orphansOf = async (id: number) =>
  (await user.call('GET', `/executions/${id}/orphan-results`)).body.orphan_results;
const adopt = (id: number, key?: string) =>
  user.call('POST', `/orphan-results/${id}/adopt`, undefined, key === undefined ? {} : { 'idempotency-key': key });

/** A run whose agent was lost. */
async function lostRun(fields: Record<string, unknown> = {}): Promise<ClaimedRun> {
  const task = await makeTask(user.call, { params: { a: 1 }, ...fields });
  await user.call('POST', `/tasks/${task.id}/run`);
  const run = await agent.claimOne([task.skill_name]);
  await lose(run);
  return run;
}
async function lose(run: ClaimedRun): Promise<void> {
  await server.db.query({
    text: `update executions set lease_expires_at = now() - interval '1 second' where id = $1`,
    values: [run.execution_id],
  });
  await until(
    () => execution(run.execution_id),
    (row) => row.status !== 'running',
  );
}
/** The same, with its late report. */
async function orphan(report: Record<string, unknown> = {}, fields: Record<string, unknown> = {}) {
  const run = await lostRun(fields);
  const late = await complete(user.call, run, { status: 'success', ...report });
  expect(late.status).toBe(409);
  const [kept] = await orphansOf(run.execution_id);
  return { run, kept };
}

describe('a late report', () => {
  test('is refused and changes nothing of the run, and is kept, once', async () => {
    const run = await lostRun();
    const before = await execution(run.execution_id);
    const late = await complete(user.call, run, { status: 'success', output: 'all of it', result: { n: 1 } });
    expect(late.status).toBe(409);
    const orphans = await orphansOf(run.execution_id);
    expect(orphans).toMatchObject([
      {
        execution_id: run.execution_id,
        task_id: run.task_id,
        agent_id: agent.id,
        status: 'success',
        output_preview: 'all of it',
        result: { n: 1 },
        adopted_by: null,
      },
    ]);
    expect(late.body.detail).toContain(`orphan result ${orphans[0].id}`);
    const again = await complete(user.call, run, { status: 'failed', error: 'other' });
    expect(again.status).toBe(409);
    expect(again.body.detail).toContain(`orphan result ${orphans[0].id}`);
    expect(await orphansOf(run.execution_id)).toEqual(orphans);
    expect(await execution(run.execution_id)).toEqual(before);
    expect((await user.call('GET', '/orphan-results?limit=100')).body.orphan_results).toContainEqual(orphans[0]);
    const audit = await user.call('GET', `/audit?entity_type=orphan_result&entity_id=${orphans[0].id}`);
    expect(audit.body.entries).toMatchObject([{ operation: 'CREATE', user_id: user.id }]);
  });

  test('without an output is about what was streamed', async () => {
    const task = await makeTask(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne([task.skill_name]);
    const { lease_token } = run;
    await user.call('POST', `/executions/${run.execution_id}/output`, { lease_token, text: 'streamed' });
    await lose(run);
    await complete(user.call, run);
    expect(await orphansOf(run.execution_id)).toMatchObject([{ output_preview: 'streamed' }]);
  });

  test('is not kept when the run ended in another way, or was never the caller’s', async () => {
    const task = await makeTask(user.call, { max_attempts: 1 });
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne([task.skill_name]);
    await complete(user.call, run);
    const second = await complete(user.call, run, { status: 'failed' });
    expect(second.status).toBe(409);
    expect(second.body.detail).not.toContain('orphan');
    const lost = await lostRun();
    const wrong = { ...lost, lease_token: '00000000-0000-4000-8000-000000000000' };
    expect((await complete(user.call, wrong)).body.detail).not.toContain('orphan');
    const stranger = await server.newUser();
    expect((await complete(stranger.call, lost)).status).toBe(403);
    for (const { execution_id } of [run, lost]) expect(await orphansOf(execution_id)).toEqual([]);
  });

  test('is its owner’s alone to see and to adopt', async () => {
    const { run, kept } = await orphan();
    const stranger = await server.newUser();
    expect((await stranger.call('GET', '/orphan-results')).body).toMatchObject({ orphan_results: [], total: 0 });
    expect((await stranger.call('GET', `/executions/${run.execution_id}/orphan-results`)).status).toBe(403);
    expect((await stranger.call('POST', `/orphan-results/${kept.id}/adopt`)).status).toBe(403);
    expect((await user.call('POST', '/orphan-results/999999999/adopt')).status).toBe(404);
  });
});

describe('adopting', () => {
  test('makes a run of the late result, in place of the retry that waits, and the task has succeeded', async () => {
    const { run, kept } = await orphan(
      { output: 'all of it', result: ['5'] },
      { expect_success_within_seconds: 600, max_attempts: 3 },
    );
    const before = (await user.call('GET', `/executions?task_id=${run.task_id}`)).body.executions;
    expect(before[0]).toMatchObject({ trigger: 'retry', status: 'queued' });
    const answer = await adopt(kept.id);
    expect(answer.status).toBe(201);
    const lost = await execution(run.execution_id);
    expect(answer.body).toMatchObject({
      trigger: 'adopted',
      status: 'success',
      cause: null,
      retry_of: run.execution_id,
      attempt: 1,
      agent_id: agent.id,
      task_id: run.task_id,
      params: { a: 1 },
      scheduled_for: lost.scheduled_for,
      started_at: lost.started_at,
      output_text: 'all of it',
      result: ['5'],
    });
    expect(answer.headers.get('location')).toBe(`/api/v1/executions/${answer.body.id}`);
    expect(await execution(answer.body.id)).toEqual(answer.body);
    expect(await execution(before[0].id)).toMatchObject({ status: 'cancelled', cause: 'cancelled' });
    expect(await agent.claim({ skills: [run.skill_name] })).toEqual([]);
    expect(await taskOf(run.task_id)).toMatchObject({ status: 'completed', last_success_at: answer.body.ended_at });
    expect((await orphansOf(run.execution_id))[0].adopted_by).toBe(answer.body.id);
    expect((await user.call('GET', '/orphan-results?adopted=false&limit=100')).body.orphan_results).not.toContainEqual(
      expect.objectContaining({ id: kept.id }),
    );
    const entries = async (type: string, id: number) =>
      (await user.call('GET', `/audit?entity_type=${type}&entity_id=${id}`)).body.entries;
    expect(await entries('execution', answer.body.id)).toMatchObject([{ operation: 'CREATE', user_id: user.id }]);
    expect((await entries('orphan_result', kept.id))[0]).toMatchObject({
      changed_fields: { adopted_by: { old: null, new: answer.body.id } },
    });
    const told = await until(
      async () =>
        (
          await server.db.query<{ data: string }>({
            text: `select data from events where task_id = $1 and type = 'task_status_update' order by event_id desc limit 2`,
            values: [run.task_id],
          })
        ).rows.map(({ data }) => JSON.parse(data)),
      ([newest]) => newest?.execution_status === 'success',
    );
    expect(told).toMatchObject([
      { execution_id: answer.body.id, status: 'completed', output: 'all of it' },
      { execution_id: before[0].id, execution_status: 'cancelled' },
    ]);
  });

  test('happens once, and by one key once however often it is sent', async () => {
    const { run, kept } = await orphan();
    const [first, second] = [await adopt(kept.id, 'adopt-1'), await adopt(kept.id, 'adopt-1')];
    expect([first.status, second.status]).toEqual([201, 201]);
    expect(second.body).toEqual(first.body);
    expect(second.headers.get('idempotency-replayed')).toBe('true');
    const third = await adopt(kept.id);
    expect(third.status).toBe(409);
    expect(third.body.detail).toContain(`as execution ${first.body.id}`);
    const { executions } = (await user.call('GET', `/executions?task_id=${run.task_id}`)).body;
    expect(executions.filter(({ trigger }: { trigger: string }) => trigger === 'adopted')).toHaveLength(1);
  });

  test('is refused while an agent is at a retry, and when the fire has succeeded', async () => {
    const { run, kept } = await orphan();
    const retry = await agent.claimOne([run.skill_name]);
    const refused = await adopt(kept.id);
    expect(refused.status).toBe(409);
    expect(refused.body.detail).toContain(`Execution ${retry.execution_id} is a retry`);
    await lose(retry);
    // The retry of the retry is of the same fire.
    const last = await agent.claimOne([run.skill_name]);
    expect((await adopt(kept.id)).status).toBe(409);
    await complete(user.call, last);
    const over = await adopt(kept.id);
    expect(over.status).toBe(409);
    expect(over.body.detail).toContain(`Execution ${last.execution_id} of the same fire has succeeded`);
  });

  test('a success of another fire of the task is in nobody’s way', async () => {
    const { run, kept } = await orphan({}, { max_lost_leases: 0 });
    await user.call('POST', `/tasks/${run.task_id}/run`);
    await complete(user.call, await agent.claimOne([run.skill_name]));
    expect((await adopt(kept.id)).status).toBe(201);
  });

  test('a failure ends the fire: it counts unless it was counted, and is not tried again', async () => {
    const waiting = await orphan({ status: 'failed', error: 'no data' }, { max_attempts: 5 });
    const adopted = await adopt(waiting.kept.id);
    expect(adopted.body).toMatchObject({ status: 'failed', cause: 'agent_failed', error_text: 'no data' });
    expect(await taskOf(waiting.run.task_id)).toMatchObject({ status: 'failed', consecutive_failures: 1 });
    expect(await agent.claim({ skills: [waiting.run.skill_name] })).toEqual([]);

    const over = await orphan({ status: 'failed' }, { max_lost_leases: 0 });
    expect(await taskOf(over.run.task_id)).toMatchObject({ consecutive_failures: 1 });
    expect((await adopt(over.kept.id)).status).toBe(201);
    expect(await taskOf(over.run.task_id)).toMatchObject({ consecutive_failures: 1 });
  });

  test('a success makes good what had failed', async () => {
    const { run, kept } = await orphan({}, { max_lost_leases: 0 });
    expect(await taskOf(run.task_id)).toMatchObject({ status: 'failed', consecutive_failures: 1 });
    await adopt(kept.id);
    expect(await taskOf(run.task_id)).toMatchObject({ status: 'completed', consecutive_failures: 0 });
  });

  test('two who adopt at the same time do it once', async () => {
    const { kept } = await orphan();
    const answers = await Promise.all([adopt(kept.id), adopt(kept.id), adopt(kept.id)]);
    expect(answers.map(({ status }) => status).toSorted()).toEqual([201, 409, 409]);
  });
});
