import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { RUNS, TICKS } from '../../src/scheduler/retention.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, until } from '../support/work.ts';

// A sweep comes at the start of a process: what is dated back by SQL is swept by the next server on the same database.

let database: Awaited<ReturnType<typeof createTestDatabase>>;
let server: TestServer;
beforeAll(async () => {
  database = await createTestDatabase();
  server = await startServer({ databaseUrl: database.url });
});
afterAll(async () => {
  await server?.stop();
  await database?.drop();
});

const rows = async <T extends object>(text: string, values: unknown[] = []): Promise<T[]> =>
  (await server.db.query<T & Record<string, unknown>>({ text, values })).rows;
const ids = async (text: string, values: unknown[]) =>
  (await rows<{ id: number }>(text, values)).map(({ id }) => Number(id)).toSorted((a, b) => a - b);
const runsOf = (taskId: number) => ids('select id from executions where task_id = $1', [taskId]);
const ticksOf = (taskId: number) => ids('select id from occurrences where task_id = $1', [taskId]);

/** A run of a task that was made, and unless it is open ended, so many days ago. */
async function run(taskId: number, days: number, fields: Record<string, unknown> = {}): Promise<number> {
  const { status = 'success', trigger = 'manual', ended_days = days, ...more } = fields;
  const open = status === 'queued';
  const columns = Object.keys(more);
  const [row] = await rows<{ id: number }>(
    `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds, status,
       created_at, ended_at${columns.map((name) => `, ${name}`).join('')})
     select id, user_id, $6, now(), skill_name, '{}', 1, 60, $2, now() - $3 * interval '1 day',
       case when $4 then null else now() - $5 * interval '1 day' end${columns.map((_, i) => `, $${i + 7}`).join('')}
     from tasks where id = $1 returning id`,
    [taskId, status, days, open, ended_days, trigger, ...Object.values(more)],
  );
  return Number(row?.id);
}

async function tick(taskId: number, days: number, at = `now() - interval '${days} days'`): Promise<number> {
  const [row] = await rows<{ id: number }>(
    `insert into occurrences (task_id, user_id, scheduled_for, verdict, created_at)
     select id, user_id, ${at}, 'fired', now() - $2 * interval '1 day' from tasks where id = $1 returning id`,
    [taskId, days],
  );
  return Number(row?.id);
}

/** Starts a server that sweeps, and stops it when `gone` no longer are. */
async function sweep(env: Record<string, string>, gone: () => Promise<number>): Promise<void> {
  const sweeper = await startServer({ databaseUrl: database.url, env });
  try {
    await until(gone, (left) => left === 0, 60);
  } finally {
    await sweeper.stop();
  }
}
const left = (table: string, id: number) => async () => (await rows(`select from ${table} where id = $1`, [id])).length;

describe('retention', () => {
  test('deletes runs that ended 90 days ago with all that is theirs, and keeps what is younger or open', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call);
    const old = await run(task.id, 91);
    await rows(`insert into execution_output (execution_id, starts_at, length, text) values ($1, 0, 1, 'x')`, [old]);
    await rows(
      `insert into orphan_results (execution_id, user_id, lease_token, status)
       select id, user_id, gen_random_uuid(), 'success' from executions where id = $1`,
      [old],
    );
    const kept = [
      await run(task.id, 89),
      await run(task.id, 200, { status: 'queued' }),
      // It waited for long, and ended the other day.
      await run(task.id, 200, { ended_days: 1 }),
    ];
    const retried = await run(task.id, 200, { status: 'failed', cause: 'agent_failed' });
    const replayed = await run(task.id, 200);
    kept.push(
      retried,
      replayed,
      await run(task.id, 100, { status: 'queued', trigger: 'retry', retry_of: retried }),
      await run(task.id, 100, { status: 'queued', trigger: 'replay', replay_of: replayed }),
    );
    const last = await run(task.id, 90.5);
    await sweep({}, left('executions', last));
    expect(await runsOf(task.id)).toEqual(kept.toSorted((a, b) => a - b));
    expect(await rows('select from execution_output where execution_id = $1', [old])).toEqual([]);
    expect(await rows('select from orphan_results where execution_id = $1', [old])).toEqual([]);
  });

  test('deletes ticks after 30 days, but for one that keeps a paused one-off from firing again', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call, { schedule_cron: '0 0 1 1 *' });
    const old = await tick(task.id, 31);
    const young = await tick(task.id, 29);
    const once = await makeTask(call, { run_at: '2099-01-01T00:00:00Z' });
    await call('POST', `/tasks/${once.id}/pause`);
    await rows(`update tasks set run_at = date_trunc('day', now()) - interval '60 days' where id = $1`, [once.id]);
    const fired = await tick(once.id, 60, `date_trunc('day', now()) - interval '60 days'`);
    await sweep({}, left('occurrences', old));
    expect(await ticksOf(task.id)).toEqual([young]);
    expect(await ticksOf(once.id)).toEqual([fired]);
    expect((await call('POST', `/tasks/${once.id}/resume`)).body).toMatchObject({ next_run_at: null });
    expect(await runsOf(once.id)).toEqual([]);
  });

  test('goes on past what must stay, batch after batch', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call);
    await rows(
      `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds,
         status, created_at, ended_at)
       select t.id, t.user_id, 'manual', now(), 's', '{}', 1, 60, case when n <= 1500 then 'queued' else 'success' end,
         now() - interval '300 days' + n * interval '1 second',
         case when n > 1500 then now() - interval '299 days' end
       from tasks t, generate_series(1, 4000) n where t.id = $1`,
      [task.id],
    );
    await sweep({}, async () => (await runsOf(task.id)).length - 1500);
    const [open] = await rows<{ n: number }>(
      `select count(*)::int as n from executions where task_id = $1 and status = 'queued'`,
      [task.id],
    );
    expect(open).toEqual({ n: 1500 });
  });

  test('takes the days from the configuration; 0 keeps for ever', async () => {
    const { call } = await server.newUser();
    const task = await makeTask(call);
    const oldRun = await run(task.id, 5_000);
    const oldTick = await tick(task.id, 9);
    const youngTick = await tick(task.id, 7);
    await sweep({ RETENTION_EXECUTIONS_DAYS: '0', RETENTION_OCCURRENCES_DAYS: '8' }, left('occurrences', oldTick));
    expect(await runsOf(task.id)).toEqual([oldRun]);
    expect(await ticksOf(task.id)).toEqual([youngTick]);
  });

  test('leaves the metrics of agents as they were', async () => {
    const { call } = await server.newUser();
    const agent = await makeAgent(call);
    const task = await makeTask(call, { max_attempts: 1 });
    for (const status of ['success', 'success', 'failed']) {
      await call('POST', `/tasks/${task.id}/run`);
      await complete(call, await agent.claimOne(), { status });
    }
    const metrics = async () => {
      const { success_rate, runs, failures, p95_ms } = (await call('GET', `/agents/${agent.id}`)).body;
      return { success_rate, runs, failures, p95_ms };
    };
    const before = await metrics();
    expect(before.success_rate).toBeCloseTo(2 / 3);
    await rows(
      `update executions set created_at = now() - interval '100 days', ended_at = now() - interval '99 days' where task_id = $1`,
      [task.id],
    );
    await sweep({}, async () => (await runsOf(task.id)).length);
    expect(await metrics()).toEqual(before);
  });

  test('is served by indexes', async () => {
    const { call, id } = await server.newUser();
    const task = await makeTask(call);
    await rows(
      `insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds,
         status, created_at, ended_at)
       select $1, $2, 'manual', now(), 's', '{}', 1, 60, 'success', now() - n * interval '4 minutes', now()
       from generate_series(1, 20000) n`,
      [task.id, id],
    );
    await rows(
      `insert into occurrences (task_id, user_id, scheduled_for, verdict, created_at)
       select $1, $2, now() - n * interval '4 minutes', 'fired', now() - n * interval '4 minutes' from generate_series(1, 20000) n`,
      [task.id, id],
    );
    await server.db.pool.query('analyze executions, occurrences');
    for (const [statement, index] of [
      [RUNS, 'executions_created_idx'],
      [TICKS, 'occurrences_created_idx'],
    ] as const) {
      const plan = await rows<{ 'QUERY PLAN': string }>(`explain ${statement.text}`, [50, new Date(0), 0, 1_000]);
      const text = plan.map((line) => line['QUERY PLAN']).join('\n');
      expect(text).toContain(index);
      expect(text).not.toMatch(/Seq Scan on (executions|occurrences)/);
    }
  });
});
