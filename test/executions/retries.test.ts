import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { EXECUTION_CAUSES } from '../../src/db/schema.ts';
import { type Ended, nextAttempt, type RetryRules } from '../../src/executions/retry.ts';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { type ClaimedRun, complete, makeAgent, makeTask, until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

const runNow = async (taskId: number, call: Caller = user.call) =>
  (await call('POST', `/tasks/${taskId}/run`)).body.id as number;
const taskOf = async (id: number) => (await user.call('GET', `/tasks/${id}`)).body;
const execution = async (id: number) => (await user.call('GET', `/executions/${id}`)).body;
const runsOf = async (taskId: number) =>
  (await user.call('GET', `/executions?task_id=${taskId}&sort_order=asc`)).body.executions;
const fail = (run: ClaimedRun, more: Record<string, unknown> = {}) =>
  complete(user.call, run, { status: 'failed', ...more });
/** The lease ends now, and the reaper takes the run back. */
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

describe('the rules', () => {
  const rules = fc.record<RetryRules>({
    maxAttempts: fc.integer({ min: 1, max: 20 }),
    maxLostLeases: fc.option(fc.integer({ min: 0, max: 20 })),
    retryBackoffSeconds: fc.integer({ min: 0, max: 3_600 }),
  });

  test.each([
    // cause, attempt, lost before, max_attempts, max_lost_leases: whether there is a next attempt
    ['agent_failed', 1, 0, 1, null, false],
    ['agent_failed', 1, 0, 2, null, true],
    ['agent_failed', 2, 0, 2, null, false],
    ['agent_failed', 2, 1, 2, null, true],
    ['run_timeout', 3, 1, 2, null, false],
    ['lease_lost', 1, 0, 1, null, false],
    ['lease_lost', 1, 0, 1, 1, true],
    ['lease_lost', 2, 1, 3, null, true],
    ['lease_lost', 3, 2, 3, null, false],
    ['lease_lost', 5, 0, 3, null, true],
    ['cancelled', 1, 0, 20, 20, false],
    ['queue_expired', 1, 0, 20, 20, false],
    [null, 1, 0, 20, 20, false],
  ] as const)(
    '%s at attempt %i after %i lost leases, of %i and %s: %s',
    (cause, attempt, lostLeases, maxAttempts, maxLostLeases, again) => {
      const rule = { maxAttempts, maxLostLeases, retryBackoffSeconds: 10 };
      expect(nextAttempt({ cause, attempt, lostLeases }, rule, {}, Math.random) !== undefined).toBe(again);
    },
  );

  test('whatever the order of ends, each budget is used up by its own kind and by no other, and every fire ends', () => {
    fc.assert(
      fc.property(
        rules,
        fc.infiniteStream(fc.constantFrom('agent_failed', 'run_timeout', 'lease_lost')),
        (rule, causes) => {
          const lostAllowed = rule.maxLostLeases ?? rule.maxAttempts - 1;
          let [failures, lost] = [0, 0];
          let ended: Ended = { cause: null, attempt: 1, lostLeases: 0 };
          for (const cause of causes) {
            ended = { ...ended, cause };
            if (cause === 'lease_lost') lost += 1;
            else failures += 1;
            const next = nextAttempt(ended, rule, {}, () => 0.5);
            expect(next !== undefined).toBe(cause === 'lease_lost' ? lost <= lostAllowed : failures < rule.maxAttempts);
            if (!next) break;
            expect(next.lostLeases).toBe(lost);
            // The backoff goes by failures alone.
            const ceiling = Math.min(3_600_000, rule.retryBackoffSeconds * 1_000 * 2 ** (failures - 1));
            expect(next.delayMs).toBe(cause === 'lease_lost' ? 0 : Math.floor(ceiling / 2));
            ended = { cause: null, attempt: ended.attempt + 1, lostLeases: next.lostLeases };
          }
          expect(failures + lost).toBe(ended.attempt);
          expect(ended.attempt).toBeLessThanOrEqual(rule.maxAttempts + lostAllowed);
        },
      ),
    );
  });

  test('what the agent wishes goes before the backoff, never beyond a budget, and never for a lost lease', () => {
    fc.assert(
      fc.property(
        rules,
        fc.constantFrom(...EXECUTION_CAUSES, null),
        fc.integer({ min: 1, max: 20 }),
        fc.integer({ min: 0, max: 86_400 }),
        (rule, cause, attempt, retryAfterSeconds) => {
          const ended = { cause, attempt, lostLeases: 0 };
          const plain = nextAttempt(ended, rule, {}, Math.random);
          const wished = nextAttempt(ended, rule, { retryAfterSeconds }, Math.random);
          const never = nextAttempt(ended, rule, { nonRetryable: true, retryAfterSeconds }, Math.random);
          expect(wished === undefined).toBe(plain === undefined);
          const lost = cause === 'lease_lost';
          if (wished) expect(wished.delayMs).toBe(lost ? 0 : retryAfterSeconds * 1_000);
          expect(never).toEqual(lost ? plain : undefined);
        },
      ),
    );
  });
});

describe('a failed run', () => {
  test('is not tried again when its agent says that it would fail again', async () => {
    const task = await makeTask(user.call, { max_attempts: 5 });
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    const run = await agent.claimOne([task.skill_name]);
    expect((await fail(run, { non_retryable: true })).body.cause).toBe('agent_failed');
    expect(await runsOf(task.id)).toHaveLength(1);
    expect(await taskOf(task.id)).toMatchObject({ status: 'failed', consecutive_failures: 1 });
  });

  test('is tried again when its agent says, to the second, instead of after the backoff', async () => {
    const task = await makeTask(user.call, { max_attempts: 3, retry_backoff_seconds: 0 });
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    const ended = (await fail(await agent.claimOne([task.skill_name]), { retry_after_seconds: 3_600 })).body;
    const [, retry] = await runsOf(task.id);
    expect(Date.parse(retry.available_at) - Date.parse(ended.ended_at)).toBe(3_600_000);
    expect(await agent.claim({ skills: [task.skill_name] })).toEqual([]);
    expect(await taskOf(task.id)).toMatchObject({ consecutive_failures: 0 });
  });

  test('is what the wishes go with; elsewhere they are refused by their name, and nothing changes', async () => {
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    const run = await agent.claimOne([task.skill_name]);
    for (const [report, field] of [
      [{ status: 'success', retry_after_seconds: 5 }, 'retry_after_seconds'],
      [{ status: 'success', non_retryable: true }, 'non_retryable'],
      [{ status: 'failed', retry_after_seconds: 86_401 }, 'retry_after_seconds'],
      [{ status: 'failed', retry_after_seconds: 0.5 }, 'retry_after_seconds'],
      [{ status: 'failed', non_retryable: 'yes' }, 'non_retryable'],
      [{ status: 'success', result: 'x'.repeat(65_535) }, 'result'],
    ] as const) {
      const answer = await complete(user.call, run, report);
      expect(answer).toMatchObject({ status: 400, body: { errors: [{ path: `body.${field}` }] } });
    }
    expect((await execution(run.execution_id)).status).toBe('running');
    expect((await complete(user.call, run, { status: 'success', non_retryable: false })).status).toBe(200);
  });

  test('and a lost lease draw on budgets of their own, and the attempts are counted through', async () => {
    const task = await makeTask(user.call, { max_attempts: 2, max_lost_leases: 2, retry_backoff_seconds: 0 });
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    const claim = () => agent.claimOne([task.skill_name]);
    await lose(await claim());
    await lose(await claim());
    await fail(await claim());
    const last = await claim();
    expect(last.attempt).toBe(4);
    expect(await execution(last.execution_id)).toMatchObject({ lost_leases: 2 });
    await fail(last);
    const runs = await runsOf(task.id);
    expect(runs.map((run: { cause: string }) => run.cause)).toEqual([
      'lease_lost',
      'lease_lost',
      'agent_failed',
      'agent_failed',
    ]);
    expect(await taskOf(task.id)).toMatchObject({ status: 'failed', consecutive_failures: 1 });
  });

  test('is over when one lease more was lost than may be', async () => {
    const task = await makeTask(user.call, { max_attempts: 5, max_lost_leases: 0 });
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    await lose(await agent.claimOne([task.skill_name]));
    expect(await runsOf(task.id)).toHaveLength(1);
    expect(await taskOf(task.id)).toMatchObject({ status: 'failed', consecutive_failures: 1 });
  });
});

describe('how a task does', () => {
  const backlog = async (task: { id: number; skill_name: string }, ends: readonly ('success' | 'failed')[]) => {
    const agent = await makeAgent(user.call);
    for (const status of ends) {
      await runNow(task.id);
      expect((await complete(user.call, await agent.claimOne([task.skill_name]), { status })).status).toBe(200);
    }
  };

  test('is counted by fires: failures in a row until a success, which is dated', async () => {
    const task = await makeTask(user.call, { max_attempts: 1 });
    await backlog(task, ['failed', 'failed']);
    expect(await taskOf(task.id)).toMatchObject({ consecutive_failures: 2, last_success_at: null });
    await backlog(task, ['success']);
    const after = await taskOf(task.id);
    const runs = await runsOf(task.id);
    expect(after).toMatchObject({
      consecutive_failures: 0,
      last_success_at: runs.at(-1).ended_at,
      status: 'completed',
    });
    expect(after.version).toBe(task.version);
  });

  test('is not changed by attempts that are tried again, by cancelled runs, or by what agents do of their own accord', async () => {
    const task = await makeTask(user.call, { max_attempts: 2, retry_backoff_seconds: 0 });
    const agent = await makeAgent(user.call);
    await runNow(task.id);
    await fail(await agent.claimOne([task.skill_name]));
    const retry = await agent.claimOne([task.skill_name]);
    await user.call('POST', `/executions/${retry.execution_id}/cancel`);
    expect((await fail(retry)).body.status).toBe('cancelled');
    for (const status of ['success', 'failed'] as const) {
      await user.call('POST', '/agents/activity', { agent_id: agent.id, task_id: task.id, status });
    }
    expect(await taskOf(task.id)).toMatchObject({ consecutive_failures: 0, last_success_at: null });
  });

  test('sets when the next success is expected, and ends being overdue', async () => {
    const task = await makeTask(user.call, { expect_success_within_seconds: 600 });
    await server.db.query({
      text: `update tasks set overdue_at = null, overdue_since = now() - interval '1 day' where id = $1`,
      values: [task.id],
    });
    await backlog(task, ['success']);
    const { rows } = await server.db.query<{ overdue_at: Date; last_success_at: Date }>({
      text: 'select overdue_at, last_success_at from tasks where id = $1',
      values: [task.id],
    });
    expect(rows[0]?.overdue_at.getTime()).toBe((rows[0]?.last_success_at.getTime() ?? 0) + 600_000);
    expect(await taskOf(task.id)).toMatchObject({ overdue_since: null });
    // A paused task is not waited for.
    const paused = await makeTask(user.call, { expect_success_within_seconds: 600, schedule_cron: '0 0 1 1 *' });
    await user.call('POST', `/tasks/${paused.id}/pause`);
    await backlog(paused, ['success']);
    const { rows: none } = await server.db.query<{ overdue_at: Date | null }>({
      text: 'select overdue_at from tasks where id = $1',
      values: [paused.id],
    });
    expect(none[0]?.overdue_at).toBeNull();
  });

  test('pauses it when it has failed as often in a row as it may, which is audited and told', async () => {
    const task = await makeTask(user.call, {
      max_attempts: 1,
      pause_after_failures: 2,
      schedule_cron: '0 0 1 1 *',
      expect_success_within_seconds: 600,
    });
    await backlog(task, ['failed']);
    expect(await taskOf(task.id)).toMatchObject({ status: 'pending', consecutive_failures: 1 });
    await backlog(task, ['failed']);
    const after = await taskOf(task.id);
    expect(after).toMatchObject({
      status: 'disabled',
      pause_reason: 'failures',
      next_run_at: null,
      consecutive_failures: 2,
      version: task.version + 1,
    });
    const { rows } = await server.db.query<{ quiet_at: Date; overdue_at: Date | null }>({
      text: 'select quiet_at, overdue_at from tasks where id = $1',
      values: [task.id],
    });
    expect(rows[0]?.quiet_at.toISOString()).toBe(task.next_run_at);
    expect(rows[0]?.overdue_at).toBeNull();
    const audit = await user.call('GET', `/audit?entity_type=task&entity_id=${task.id}&operation=UPDATE`);
    expect(audit.body.entries[0]).toMatchObject({
      user_id: null,
      changed_fields: {
        status: { old: 'pending', new: 'disabled' },
        pause_reason: { old: null, new: 'failures' },
        next_run_at: { old: task.next_run_at, new: null },
      },
    });
    const events = await until(
      async () =>
        (
          await server.db.query<{ type: string; data: string }>({
            text: `select type, data from events where task_id = $1 order by event_id desc limit 4`,
            values: [task.id],
          })
        ).rows.map(({ type, data }) => ({ type, data: JSON.parse(data) })),
      ([newest]) => newest?.type === 'calendar_event_deleted',
    );
    expect(events).toMatchObject([
      { type: 'calendar_event_deleted', data: { start_time: task.next_run_at } },
      { type: 'task_status_update', data: { status: 'disabled', previous_status: 'pending', next_run_at: null } },
      { type: 'agent_activity_update', data: { action: 'failed' } },
      { type: 'task_status_update', data: { execution_status: 'failed' } },
    ]);
    // Paused, it stays so, whatever is run of it by hand.
    await backlog(task, ['failed', 'success']);
    expect(await taskOf(task.id)).toMatchObject({
      status: 'disabled',
      version: after.version,
      consecutive_failures: 0,
    });
  });

  test('pauses a task that only runs when it is asked to, too', async () => {
    const task = await makeTask(user.call, { max_attempts: 1, pause_after_failures: 1 });
    await backlog(task, ['failed']);
    expect(await taskOf(task.id)).toMatchObject({ status: 'disabled', pause_reason: 'failures' });
  });
});

test('a result of any JSON comes back as it was sent, and in lists only while it is small', async () => {
  const task = await makeTask(user.call);
  const agent = await makeAgent(user.call);
  const values = [{ rows: [1, { a: null }] }, [], 'text', '5', 'null', '{"a":1}', '', 0, -1.5, true, false, null];
  for (const result of values) {
    const id = await runNow(task.id);
    const run = await agent.claimOne([task.skill_name]);
    const done = await complete(user.call, run, { status: 'success', result });
    expect(done).toMatchObject({ status: 200, body: { result } });
    expect((await execution(id)).result).toEqual(result);
    expect((await runsOf(task.id)).at(-1).result).toEqual(result);
  }
  const id = await runNow(task.id);
  const large = { text: 'x'.repeat(60_000) };
  await complete(user.call, await agent.claimOne([task.skill_name]), {
    status: 'failed',
    non_retryable: true,
    result: large,
  });
  expect((await execution(id)).result).toEqual(large);
  expect((await runsOf(task.id)).at(-1)).toMatchObject({ id, result: null });
  const body = { agent_id: agent.id, task_id: task.id, status: 'success', result: { a: '1' } };
  const activity = await user.call('POST', '/agents/activity', body);
  expect((await execution(activity.body.execution_id)).result).toEqual({ a: '1' });
});

test('a lease lasts as long as the task says, at the claim, at a heartbeat, and for retries', async () => {
  const task = await makeTask(user.call, { heartbeat_timeout_seconds: 600, retry_backoff_seconds: 0 });
  const agent = await makeAgent(user.call);
  await runNow(task.id);
  // A later change of the task changes no run that was asked for.
  await user.call('PUT', `/tasks/${task.id}`, { heartbeat_timeout_seconds: 5 });
  for (const attempt of [1, 2]) {
    const run = await agent.claimOne([task.skill_name]);
    expect(run.attempt).toBe(attempt);
    const row = await execution(run.execution_id);
    expect(Date.parse(row.lease_expires_at) - Date.parse(row.started_at)).toBe(600_000);
    const beat = await user.call('POST', `/executions/${run.execution_id}/heartbeat`, { lease_token: run.lease_token });
    expect(Date.parse(beat.body.lease_expires_at)).toBeGreaterThan(Date.parse(run.lease_expires_at));
    await fail(run);
  }
});
