import { changedFields, recordAudits } from '../audit/record.ts';
import type { Database, Tx } from '../db/database.ts';
import { cancelOpenExecutions } from '../executions/executions.ts';
import { QUEUE_TOPIC, queueDetail } from '../executions/queue.ts';
import { emitEvents, type NewEvent } from '../realtime/events.ts';
import { parseCron } from '../schedule/cron.ts';
import { resolveDue, type Tick } from '../schedule/misfire.ts';
import { countOccurrences, nextOccurrence } from '../schedule/occurrences.ts';
import { calendarEvent, type Task, taskStatusUpdate } from '../tasks/task-events.ts';

// How time becomes work.
//
// A batch is one transaction: it takes due tasks with SKIP LOCKED, so that any number of processes share the work without
// waiting for each other; it decides for every due tick what becomes of it; and it writes the ticks (occurrences), the
// runs (executions) and each task's next time. Two things keep a tick from firing twice. The task row is locked while its
// next time moves, so nobody else sees the old one. And a tick is a row under UNIQUE (task_id, scheduled_for): a run is
// only made from a tick whose row this very statement inserted, so even a wrong next time cannot repeat one.
//
// What is due is decided by the database's clock, `now()` of the transaction, never by the host's.
//
// Rates, 10,000 due of 100,000: one transaction each 11 s, batches of 500 0.9 s. Larger batches gain nothing and hold the
// event loop and the row locks longer.

const BATCH = 500;

/** How many missed ticks of one task `fire_all` runs. */
const MAX_CATCH_UP = 100;
/** How many runs may wait behind an unfinished one under `queue_all`. */
const MAX_QUEUED = 100;

interface DueRow {
  id: number;
  user_id: number;
  project_id: number | null;
  name: string | null;
  skill_name: string;
  schedule_cron: string | null;
  timezone: string;
  next_run_at: Date;
  status: Task['status'];
  overlap_policy: Task['overlapPolicy'];
  misfire_policy: Task['misfirePolicy'];
  now: Date;
  open_run: number | null;
  running: boolean;
  queued: number;
}

/** The due ones, longest due first. Served by tasks_due_idx; the look at open runs by executions_task_open_idx. */
const DUE = {
  name: 'scheduler-due',
  text: `
    with due as (
      select id, user_id, project_id, name, skill_name, schedule_cron, timezone, next_run_at, status, overlap_policy,
        misfire_policy
      from tasks where next_run_at <= now() order by next_run_at, id limit $1 for no key update skip locked
    )
    select due.*, now() as now, coalesce(o.running, false) as running, coalesce(o.queued, 0)::int as queued, o.open_run
    from due left join lateral (
      select min(e.id) as open_run, bool_or(e.status = 'running') as running,
        count(*) filter (where e.status = 'queued') as queued
      from executions e where e.task_id = due.id and e.status in ('queued', 'running')
    ) o on true`,
};

/** What becomes of one tick: its verdict, and the run it starts, if it does. */
interface Decision {
  task_id: number;
  scheduled_for: string;
  verdict: Tick['verdict'] | 'skipped_overlap';
  fire: boolean;
  /** The run waits until the ones before it have ended. */
  wait: boolean;
  blocked_by: number | null;
}

/** Ticks first; runs only of ticks that this statement inserted; then the tasks' next times. */
const WRITE = {
  name: 'scheduler-write',
  text: `
    with decided as (
      select * from jsonb_to_recordset($1) as d(
        task_id bigint, scheduled_for timestamptz, verdict text, fire boolean, wait boolean, blocked_by bigint)
    ), ticks as (
      insert into occurrences (task_id, user_id, scheduled_for, verdict, blocked_by)
      select d.task_id, t.user_id, d.scheduled_for, d.verdict, d.blocked_by
      from decided d join tasks t on t.id = d.task_id
      on conflict on constraint occurrences_tick_key do nothing
      returning id, task_id, scheduled_for
    ), runs as (
      insert into executions (task_id, user_id, trigger, occurrence_id, scheduled_for, skill_name, params, priority,
        timeout_seconds, pinned_agent_id, required_capabilities, available_at)
      select t.id, t.user_id, 'schedule', k.id, k.scheduled_for, t.skill_name, t.params, t.priority,
        t.timeout_seconds, t.agent_id, t.required_capabilities, case when d.wait then null else now() end
      from ticks k
      join decided d on d.task_id = k.task_id and d.scheduled_for = k.scheduled_for and d.fire
      join tasks t on t.id = k.task_id
      order by k.scheduled_for, k.id
      returning id, task_id, scheduled_for, available_at
    ), moved as (
      update tasks t set next_run_at = n.next_run_at, status = n.status
      from jsonb_to_recordset($2) as n(task_id bigint, next_run_at timestamptz, status text)
      where t.id = n.task_id
    )
    select id, task_id, scheduled_for, available_at is not null as available from runs order by id`,
};

/**
 * Fires one batch of due tasks; answers how many tasks were due, and whether there may be more.
 */
export async function fireDue(db: Database): Promise<{ tasks: number; more: boolean }> {
  return db.transaction(async (tx) => {
    const { rows } = await tx.query<DueRow>({ ...DUE, values: [BATCH] });
    if (rows.length > 0) await fire(tx, rows);
    return { tasks: rows.length, more: rows.length === BATCH };
  });
}

async function fire(tx: Tx, rows: readonly DueRow[]): Promise<void> {
  const decisions: Decision[] = [];
  const moves: { task_id: number; next_run_at: string | null; status: Task['status'] }[] = [];
  const after = new Map<number, DueRow & { next: Date | null; previous: Task['status'] }>();
  for (const row of rows) {
    const { ticks, next } = dueTicks(row);
    const decided = decide(row, ticks);
    decisions.push(...decided);
    if (row.overlap_policy === 'cancel_previous' && row.open_run !== null && decided.some((d) => d.fire)) {
      await cancelOpenExecutions(tx, null, facts(row, row.status, row.next_run_at));
    }
    const nextRunAt = next === undefined ? null : new Date(next);
    // A task that has no further time and starts nothing now has missed its only one.
    const over = nextRunAt === null && row.open_run === null && !decided.some((d) => d.fire);
    const status = over && row.status === 'pending' ? 'failed' : row.status;
    moves.push({ task_id: row.id, next_run_at: nextRunAt?.toISOString() ?? null, status });
    after.set(row.id, { ...row, status, next: nextRunAt, previous: row.status });
  }
  const { rows: runs } = await tx.query<NewRun>({
    ...WRITE,
    values: [JSON.stringify(decisions), JSON.stringify(moves)],
  });
  tell(tx, after, runs);
}

/** The due ticks of a task with their verdicts, and its next time. */
function dueTicks(row: DueRow): { ticks: readonly Tick[]; next: number | undefined } {
  const cron = row.schedule_cron === null ? undefined : parseCron(row.schedule_cron);
  return resolveDue({
    nextAfter: (ms) => (cron ? nextOccurrence(cron, row.timezone, ms)?.scheduledFor : undefined),
    countBetween: (from, until) => (cron ? countOccurrences(cron, row.timezone, from, until) : 0),
    dueAt: row.next_run_at.getTime(),
    now: row.now.getTime(),
    policy: row.misfire_policy,
    maxLatenessMs: null,
    maxCatchUp: MAX_CATCH_UP,
  });
}

/** Applies the overlap policy to ticks that would run, in their order: each one that runs is in the way of the next. */
function decide(row: DueRow, ticks: readonly Tick[]): Decision[] {
  let open = row.open_run !== null;
  let queued = row.queued;
  return ticks.map(({ scheduledFor, verdict }) => {
    const tick = { task_id: row.id, scheduled_for: new Date(scheduledFor).toISOString(), blocked_by: null };
    if (verdict !== 'fired' && verdict !== 'late') return { ...tick, verdict, fire: false, wait: false };
    const fires = mayFire(row.overlap_policy, open, queued);
    if (!fires) return { ...tick, verdict: 'skipped_overlap', fire: false, wait: false, blocked_by: row.open_run };
    const wait = open && row.overlap_policy !== 'allow';
    const blocked_by = wait ? row.open_run : null;
    open = true;
    queued += 1;
    return { ...tick, verdict, fire: true, wait, blocked_by };
  });
}

function mayFire(policy: Task['overlapPolicy'], open: boolean, queued: number): boolean {
  switch (policy) {
    case 'skip':
      return !open;
    case 'queue_one':
      return queued === 0;
    case 'queue_all':
      return queued < MAX_QUEUED;
    case 'cancel_previous':
    case 'allow':
      return true;
  }
}

interface NewRun {
  id: number;
  task_id: number;
  scheduled_for: Date;
  available: boolean;
}

function tell(
  tx: Tx,
  tasks: ReadonlyMap<number, DueRow & { next: Date | null; previous: Task['status'] }>,
  runs: readonly NewRun[],
): void {
  recordAudits(
    tx,
    null,
    runs.map((run) => ({
      operation: 'CREATE',
      entityType: 'execution',
      entityId: run.id,
      ownerId: tasks.get(run.task_id)?.user_id ?? null,
      changedFields: changedFields(null, {
        taskId: run.task_id,
        trigger: 'schedule',
        status: 'queued',
        scheduledFor: run.scheduled_for,
      }),
    })),
  );
  const events: NewEvent[] = [];
  const runsOf = new Map<number, typeof runs>();
  for (const run of runs) runsOf.set(run.task_id, [...(runsOf.get(run.task_id) ?? []), run]);
  for (const row of tasks.values()) {
    const task = facts(row, row.status, row.next);
    const started = runsOf.get(row.id) ?? [];
    for (const run of started) {
      events.push(
        taskStatusUpdate(task, { previousStatus: row.previous, executionId: run.id, executionStatus: 'queued' }),
      );
      if (run.available) tx.ring(QUEUE_TOPIC, queueDetail(task));
    }
    // Nothing was started, but calendars must learn of the next time, or that there is none.
    if (started.length === 0) events.push(taskStatusUpdate(task, { previousStatus: row.previous }));
    if (row.schedule_cron !== null) events.push(calendarEvent('updated', task));
  }
  emitEvents(tx, events);
}

/** What events tell of a task. */
function facts(row: DueRow, status: Task['status'], nextRunAt: Date | null) {
  return {
    id: row.id,
    userId: row.user_id,
    projectId: row.project_id,
    name: row.name,
    skillName: row.skill_name,
    timezone: row.timezone,
    scheduleCron: row.schedule_cron,
    status,
    nextRunAt,
  };
}
