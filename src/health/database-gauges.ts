import type pg from 'pg';
import { Gauge, type Registry } from 'prom-client';
import { type Database, sqlState } from '../db/database.ts';
import { AGENT_STATUSES } from '../db/schema.ts';
import { backlog } from '../memory/outbox.ts';

// What only the database knows, asked for when somebody scrapes: in turn on one connection, so that a scrape is no load.

/** For so long all of them together; what is not there by then is left out. */
const LIMIT_MS = 1_000;

// By executions_available_idx and executions_lease_idx.
const RUNS = {
  name: 'metrics-runs',
  text: `
    select
      (select count(*)::int from executions where status = 'queued') as queued,
      (select count(*)::int from executions where status = 'running') as running,
      (select coalesce(extract(epoch from now() - min(available_at)), 0)::float8 from executions
        where status = 'queued' and available_at <= now()) as lag`,
};
// By tasks_due_idx.
const DUE = {
  name: 'metrics-due',
  text: `
    select coalesce(extract(epoch from now() - min(next_run_at)), 0)::float8 as lag from tasks
    where next_run_at is not null and next_run_at <= now()`,
};
// A table that is emptied all the time.
const EVENTS = { name: 'metrics-events', text: 'select count(*)::int as waiting from event_outbox' };
// The table is read: agents are few.
const AGENTS = {
  name: 'metrics-agents',
  text: 'select status, count(*)::int as count from agents where deleted_at is null group by status',
};

/** Makes the gauges; `look` sets those that Postgres answers for within a second, and leaves out the others. Never throws. */
export function createDatabaseGauges(db: Database, registers: Registry[]): { look(): Promise<void> } {
  const gauge = (name: string, help: string, label?: string) =>
    new Gauge({ name, help, labelNames: label === undefined ? [] : [label], registers });
  const up = gauge('muster_database_up', 'Whether Postgres answered within a second.');
  const runs = gauge('muster_runs', 'Runs that wait for an agent, and that agents are at.', 'status');
  const queueLag = gauge(
    'muster_run_queue_lag_seconds',
    'How long the oldest run that may be taken has waited for it.',
  );
  const fireLag = gauge('muster_schedule_lag_seconds', 'How long the oldest task that is due has not been fired.');
  const events = gauge('muster_events_waiting', 'Events that have not been delivered yet.');
  const agents = gauge('muster_agents', 'Agents by status.', 'status');
  const waiting = gauge('muster_memory_outbox_waiting', 'Memories that wait for the memory server.');
  const dead = gauge('muster_memory_outbox_dead', 'Memories that were given up: npm run memory:replay.');
  const age = gauge('muster_memory_outbox_oldest_age_seconds', 'How long the oldest of them has waited; 0 for none.');
  // How each is left out: emptied, a gauge without labels would say 0.
  const labelled = [runs, agents];
  const plain = [queueLag, fireLag, events, waiting, dead, age];

  const first = async <R extends pg.QueryResultRow>(statement: pg.QueryConfig): Promise<R> => {
    const { rows } = await db.query<R>(statement);
    if (!rows[0]) throw new Error(`${statement.name} answered no row.`);
    return rows[0];
  };
  /** Each asks, and answers what sets the gauges. */
  const questions: (() => Promise<() => void>)[] = [
    async () => {
      const { queued, running, lag } = await first<{ queued: number; running: number; lag: number }>(RUNS);
      return () => {
        runs.set({ status: 'queued' }, queued);
        runs.set({ status: 'running' }, running);
        queueLag.set(lag);
      };
    },
    async () => {
      const { lag } = await first<{ lag: number }>(DUE);
      return () => fireLag.set(lag);
    },
    async () => {
      const { waiting: count } = await first<{ waiting: number }>(EVENTS);
      return () => events.set(count);
    },
    async () => {
      const { rows } = await db.query<{ status: string; count: number }>(AGENTS);
      return () => {
        for (const status of AGENT_STATUSES) {
          agents.set({ status }, rows.find((row) => row.status === status)?.count ?? 0);
        }
      };
    },
    async () => {
      const found = await backlog(db);
      return () => {
        waiting.set(found.waiting);
        dead.set(found.dead);
        age.set(found.oldestSeconds);
      };
    },
  ];

  // A question that is still out from an earlier look: as long as it is, no other is asked, so that a database that hangs
  // costs one connection.
  let asking: Promise<void> | undefined;
  return {
    async look() {
      const answers: (() => void)[] = [];
      let reached = false;
      let timer: NodeJS.Timeout | undefined;
      let over = false;
      if (!asking) {
        const ask = async () => {
          await db.query({ name: 'health', text: 'select 1' });
          reached = true;
          for (const question of questions) {
            if (over) return;
            try {
              answers.push(await question());
            } catch (error) {
              // One that Postgres refuses is left out; a Postgres that is gone, with all that follow.
              if (sqlState(error) === undefined) throw error;
            }
          }
        };
        asking = ask()
          .catch(() => {
            reached = false;
          })
          .finally(() => {
            asking = undefined;
          });
        const limit = new Promise<void>((resolve) => {
          timer = setTimeout(resolve, LIMIT_MS);
        });
        await Promise.race([asking, limit]);
        clearTimeout(timer);
        over = true;
      }
      for (const each of labelled) each.reset();
      for (const each of plain) each.remove();
      up.set(reached ? 1 : 0);
      if (reached) for (const set of answers) set();
    },
  };
}
