import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import type { Logger } from '../platform/logger.ts';

// What was long ago is deleted: runs with their output, and ticks. Metrics of agents are counted apart and outlive them.
//
// A sweep goes through what is older than the limit, oldest first and each row once, a batch a statement: so what must stay
// (a run that nobody took, one that a retry waits for) is passed over and not met again by the next batch, and no statement
// holds its locks for long. Any number of processes sweep at once: each leaves the rows that another one is at.

const BATCH = 1_000;
const SWEEP_EVERY_MS = 600_000;
/** Between two batches, so that a backlog of millions is worked off without taking the database from others. */
const PAUSE_MS = 20;

/**
 * Runs that ended so long ago, unless an open run was made of them. Those before the cursor are behind us. Served by
 * executions_created_idx; the look at open runs by executions_task_open_idx.
 */
export const RUNS = {
  name: 'retention-executions',
  text: `
    with aged as materialized (
      select id, created_at, task_id, ended_at from executions
      where created_at < now() - $1::int * interval '1 day' and (created_at, id) > ($2::timestamptz, $3::bigint)
      order by created_at, id limit $4
    ), free as (
      select e.id from executions e where e.id = any(array(
        select a.id from aged a where a.ended_at < now() - $1::int * interval '1 day' and not exists (
          select from executions o where o.task_id = a.task_id and o.status in ('queued', 'running')
            and (o.retry_of = a.id or o.replay_of = a.id))))
      for update skip locked
    ), gone as (
      delete from executions where id = any(array(select id from free)) returning id
    )
    select (select count(*)::int from gone) as deleted, created_at, id from aged order by created_at desc, id desc limit 1`,
};

/**
 * Ticks that had their verdict so long ago; but that of a paused one-off stays, since it is what keeps the task from firing
 * again when it is resumed. Served by occurrences_created_idx.
 */
export const TICKS = {
  name: 'retention-occurrences',
  text: `
    with aged as materialized (
      select id, created_at, task_id, scheduled_for from occurrences
      where created_at < now() - $1::int * interval '1 day' and created_at >= $2::timestamptz
        and (created_at, id) > ($2::timestamptz, $3::bigint)
      order by created_at, id limit $4
    ), free as (
      select o.id from occurrences o where o.id = any(array(
        select a.id from aged a where not exists (
          select from tasks t where t.id = a.task_id and t.run_at = a.scheduled_for and t.status = 'disabled')))
      for update skip locked
    ), gone as (
      delete from occurrences where id = any(array(select id from free)) returning id
    )
    select (select count(*)::int from gone) as deleted, created_at, id from aged order by created_at desc, id desc limit 1`,
};

/** What is swept: a statement, for how many days its rows are kept, and how far the sweep has come. */
interface Sweep {
  what: string;
  statement: typeof RUNS;
  days: number;
  cursor: { at: Date; id: number };
  deleted: number;
}

const START = { at: new Date(0), id: 0 };

/** Makes the turn of the loop that keeps runs and ticks no longer than the configuration says. */
export function retention({
  db,
  logger,
  config,
}: {
  db: Database;
  logger: Logger;
  config: Pick<Config, 'RETENTION_EXECUTIONS_DAYS' | 'RETENTION_OCCURRENCES_DAYS'>;
}): () => Promise<number> {
  const sweeps: Sweep[] = [
    { what: 'runs', statement: RUNS, days: config.RETENTION_EXECUTIONS_DAYS, cursor: START, deleted: 0 },
    { what: 'ticks', statement: TICKS, days: config.RETENTION_OCCURRENCES_DAYS, cursor: START, deleted: 0 },
  ].filter(({ days }) => days > 0);
  let at = 0;
  return async () => {
    const sweep = sweeps[at];
    if (!sweep) {
      at = 0;
      return SWEEP_EVERY_MS;
    }
    if (await step(db, sweep)) return PAUSE_MS;
    const { what, days, deleted } = sweep;
    if (deleted > 0) logger.info({ deleted, days }, `deleted ${what} that are kept no longer`);
    Object.assign(sweep, { cursor: START, deleted: 0 });
    at += 1;
    return 0;
  };
}

/** One batch; answers whether there may be more. */
async function step(db: Database, sweep: Sweep): Promise<boolean> {
  const { rows } = await db.query<{ deleted: number; created_at: Date; id: number }>({
    ...sweep.statement,
    values: [sweep.days, sweep.cursor.at, sweep.cursor.id, BATCH],
  });
  const [last] = rows;
  if (!last) return false;
  sweep.deleted += last.deleted;
  sweep.cursor = { at: last.created_at, id: last.id };
  return true;
}
