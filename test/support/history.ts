import { expect } from 'vitest';
import { verifyDatabase } from '../../src/audit/verify.ts';
import { createDatabase, type Database } from '../../src/db/database.ts';
import { silentBus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { createPool } from '../../src/platform/postgres.ts';
import type { Report } from './crew.ts';
import { processesIn, type Started } from './processes.ts';
import { until } from './work.ts';

// What every proof against faults ends with, whatever it broke. Acknowledged is in the database; the database holds nothing
// that was not attempted; rows, audit log and events tell the same story; nothing is left over: no run, no transaction, no
// process, and no error in a log that nobody expected.

/** What a test asked for, and what was acknowledged, as it wrote it down itself. */
export interface History {
  /** The names of the tasks whose making was tried. */
  attempted: Set<string>;
  /** Those that were acknowledged, with their ids. */
  tasks: Map<string, number>;
}

export const newHistory = (): History => ({ attempted: new Set(), tasks: new Map() });

/** Each one a promise, and a query for the rows that break it. */
const PROMISES: [promise: string, text: string][] = [
  [
    'every run has ended',
    `select id, task_id, status, available_at, lease_expires_at from executions where status in ('queued', 'running')`,
  ],
  [
    'an attempt follows one that failed, as the only one, and none is beyond max_attempts',
    `select e.id, e.attempt, t.max_attempts, p.status as before from executions e join tasks t on t.id = e.task_id
     left join executions p on p.id = e.retry_of
     where e.attempt > t.max_attempts or e.attempt <> coalesce(p.attempt, 0) + 1 or p.status not in ('failed', 'timeout')
       or (select count(*) from executions n where n.retry_of = e.id) > 1`,
  ],
  [
    'a run that failed with attempts left was tried again',
    `select e.id, e.attempt, e.cause from executions e join tasks t on t.id = e.task_id
     where e.status in ('failed', 'timeout') and e.attempt < t.max_attempts and not e.cancel_requested
       and t.status not in ('disabled', 'deleted') and not exists (select from executions n where n.retry_of = e.id)`,
  ],
  [
    'a tick that fired has one run, and a run of a tick has one that fired',
    `select o.task_id, o.scheduled_for, o.verdict, count(e.id) as runs from occurrences o
     left join executions e on e.occurrence_id = o.id and e.trigger = 'schedule' and e.scheduled_for = o.scheduled_for
     group by o.id having count(e.id) <> (o.verdict in ('fired', 'late'))::int
     union all
     select e.task_id, e.scheduled_for, 'none', 1 from executions e
     where e.trigger = 'schedule' and not exists (select from occurrences o where o.id = e.occurrence_id)`,
  ],
  [
    'no task, agent or count tells of a run otherwise than the run does',
    `select 'task' as what, t.id, t.status from tasks t
     where (t.status = 'running') <> exists (select from executions e where e.task_id = t.id and e.status = 'running')
       and t.status not in ('disabled', 'deleted')
     union all
     select 'agent', a.id, a.status from agents a
     where a.status = 'busy' and not exists (select from executions e where e.agent_id = a.id and e.status = 'running')
     union all
     select 'count', a.id, null from agents a
     where (select coalesce(sum(runs), 0) from agent_stats_hourly s where s.agent_id = a.id)
       <> (select count(*) from executions e where e.agent_id = a.id and e.ended_at is not null)`,
  ],
  [
    'the audit log has one beginning and one end of every run, and no gap between',
    `with entries as (
       select entity_id as run, operation, changed_fields->'status'->>'old' as old, changed_fields->'status'->>'new' as new,
         lag(changed_fields->'status'->>'new') over (partition by entity_id order by id) as before
       from audit_log where entity_type = 'execution' and changed_fields ? 'status'
     ), told as (
       select run, count(*) filter (where operation = 'CREATE') as begun,
         count(*) filter (where new not in ('queued', 'running')) as ended,
         bool_or(old is distinct from before) as gap, array_agg(new) as states
       from entries group by run
     )
     select e.id, e.status, told.* from executions e left join told on told.run = e.id
     where told.run is null or begun <> 1 or gap or ended <> (e.status not in ('queued', 'running'))::int
       or not e.status = any(states)`,
  ],
  [
    'events tell of one beginning and one end of every run, in this order',
    `with told as (
       select (data::jsonb->>'execution_id')::bigint as run, array_agg(data::jsonb->>'execution_status' order by event_id) as states
       from events where type = 'task_status_update' and data::jsonb ? 'execution_id' group by 1
     )
     select e.id, e.status, told.states from executions e left join told on told.run = e.id
     where told.run is null or states[1] <> 'queued' or states[array_length(states, 1)] <> e.status
       or (select count(*) from unnest(states) s where s not in ('queued', 'running'))
         <> (e.status not in ('queued', 'running'))::int`,
  ],
];

/** Runs that are at work longer than anything allows: their timeout, a lease and ten seconds. */
export const STUCK = `
  select id, task_id, started_at, lease_expires_at from executions where status = 'running'
    and (lease_expires_at < now() - interval '10 seconds'
      or started_at < now() - (timeout_seconds + 2 + 10) * interval '1 second')`;

/** A look at the database past the servers, for as long as a test runs; undisturbed by restarts of Postgres. */
export function openDatabase(url: string): { db: Database; rows: Rows; close(): Promise<void> } {
  const pool = createPool({ url, size: 3, name: 'checker', logger: createLogger('silent', false) });
  const db = createDatabase(pool, silentBus);
  return {
    db,
    rows: async (text, values = []) => (await db.query<never>({ text, values })).rows,
    close: () => pool.end(),
  };
}
// biome-ignore lint/suspicious/noExplicitAny: rows of every shape, which tests assert on.
export type Rows = <T = any>(text: string, values?: unknown[]) => Promise<T[]>;

const WRONG_IN_LOGS = /uncaught|unhandled|nobody handled|panic|MaxListeners|"level":60/i;

/** Checks it all, stops the servers in order, and that nothing of them is left. */
export async function checkHistory(world: {
  database: { db: Database; rows: Rows };
  history: History;
  reports?: Iterable<Report>;
  /** All the server processes there ever were; those that live are stopped. */
  servers: readonly Started[];
  /** Where every process of the test works. */
  folder: string;
}): Promise<void> {
  const { history } = world;
  const { rows } = world.database;
  await until(
    async () =>
      (await rows(`select (select count(*) from event_outbox) + (select count(*) from audit_pending) as n`))[0].n,
    (waiting) => waiting === 0,
    30,
  );
  for (const [promise, text] of PROMISES) expect([promise, await rows(`${text} limit 5`)]).toEqual([promise, []]);

  const tasks = new Map(
    (await rows('select id, name from tasks')).map(({ id, name }) => [name as string, id as number]),
  );
  const runs = new Map(
    (await rows('select id, status, output_text from executions')).map((run) => [run.id as number, run]),
  );
  for (const [name, id] of history.tasks) expect([name, tasks.get(name)]).toEqual([name, id]);
  for (const name of tasks.keys()) expect(history.attempted).toContain(name);
  checkReports([...(world.reports ?? [])], runs);

  const { faults } = await verifyDatabase(world.database.db, {});
  expect(faults).toEqual([]);
  await until(
    () =>
      rows(`select pid, state, left(query, 80) as query from pg_stat_activity
        where datname = current_database() and application_name like 'muster%' and state <> 'idle'`),
    (busy) => busy.length === 0,
  );

  for (const { child } of world.servers) child.kill('SIGTERM');
  for (const { exited } of world.servers) expect([0, 'SIGKILL']).toContain(await exited);
  for (const server of world.servers) {
    const wrong = `${server.out()}\n${server.err()}`.split('\n').filter((line) => WRONG_IN_LOGS.test(line));
    expect(wrong).toEqual([]);
  }
  await until(
    () => processesIn(world.folder),
    (left) => left.length === 0,
  );
}

/**
 * A report that was taken is in the row, with the output that only this lease's holder knew; a row that has one was
 * reported; and one that was refused for good left nothing.
 */
function checkReports(
  reports: readonly Report[],
  runs: Map<number, { status: string; output_text: string | null }>,
): void {
  const sent = new Set(reports.map(({ token }) => token));
  for (const { execution, token, answers } of reports) {
    const run = runs.get(execution);
    const last = answers.at(-1);
    if (last === 200) {
      expect([execution, run?.status, run?.output_text]).toEqual([execution, 'success', token]);
    } else if (last === 409) {
      // After a try that got no answer, the refusal may be of what that one did.
      if (answers.length === 1) expect([execution, run?.output_text]).not.toEqual([execution, token]);
    } else {
      // Killed before the answer came, or it was no answer; anything else would be a surprise.
      expect([undefined, 0, 500, 502, 503, 504]).toContain(last);
    }
    expect(answers).not.toContain(500);
  }
  for (const [id, { status, output_text: output }] of runs) {
    if (status === 'success' && reports.length > 0) expect([id, sent.has(output ?? '')]).toEqual([id, true]);
  }
}
