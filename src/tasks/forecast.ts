import { z } from 'zod';
import type { Queryable } from '../db/database.ts';
import { invalid } from '../http/problem.ts';
import { id, idText, instant, integerText, time } from '../http/validation.ts';
import { type Forecast, forecast, type Planned } from '../schedule/forecast.ts';
import type { Recurrence } from '../schedule/recurrence.ts';
import { slices } from './calendar.ts';
import { databaseNow, recurrenceOf, type Schedule, spreadOf } from './next-times.ts';
import type { Task } from './task-events.ts';

// What an owner's schedules will ask of its agents: the times at which its active tasks run, each for as long as 95 % of
// their latest runs took, laid over each other (schedule/forecast.ts). It is bounded: of more fires than can be looked at,
// the window is made shorter, and the answer says where it ends.

const MAX_DAYS = 7;
const MAX_TASKS = 1_000;
const MAX_FIRES = 50_000;
/** How long before the window a run may have started that is still counted in it, and how many of a task. */
const LOOK_BACK_MS = 3_600_000;
const MAX_BACK = 1_000;
const MAX_COLLISIONS = 500;
const MAX_COLLIDING = 20;
/** How long a run takes of which nothing is known. */
const DEFAULT_DURATION_MS = 60_000;
const MINUTE = 60_000;

export const forecastQuery = z.strictObject({
  from: instant.optional().meta({ description: 'The start of the window; now unless given, and not before.' }),
  to: instant.optional().meta({
    description: `Its end, at most ${MAX_DAYS} days later; a day later unless given.`,
  }),
  capacity: integerText(1, 1_000_000).optional().meta({
    description: 'How many runs can go at once; unless given, as many as the live agents of the owner may hold.',
  }),
  project_id: idText.optional(),
  user_id: idText.optional().meta({ description: 'Whose tasks; another than yourself: admins only.' }),
});
export type ForecastQuery = z.output<typeof forecastQuery>;

const totals = z.object({
  peak: z.int().meta({ description: 'The most that run at once.' }),
  minutes_over_capacity: z.int(),
  collisions: z.int().meta({ description: 'Minutes in which two tasks or more start.' }),
});

export const forecastAnswer = z
  .object({
    from: time,
    to: time.meta({ description: 'Earlier than asked for when there is too much in the window.' }),
    truncated: z.boolean().meta({ description: 'Not all of the window, or not all of the tasks, were looked at.' }),
    capacity: z.int().nullable().meta({ description: 'Null: not given, and no agent of the owner is live.' }),
    capacity_from: z.enum(['given', 'agents']),
    ...totals.shape,
    minutes: z
      .array(z.object({ minute: time, starts: z.int(), running: z.int() }))
      .meta({ description: 'The minutes in which something starts or runs, with the most that run at once in each.' }),
    collision_minutes: z
      .array(z.object({ minute: time, tasks: z.int(), task_ids: z.array(id) }))
      .meta({ description: `The first ${MAX_COLLISIONS} of them, with ${MAX_COLLIDING} tasks each at the most.` }),
    proposals: z
      .array(
        z.object({
          task_id: id,
          shift_seconds: z.int().meta({ description: 'By how much later it would have to start.' }),
          peak_after: z.int().meta({ description: 'The peak with this and the proposals before it made.' }),
        }),
      )
      .meta({
        description: 'The smallest shift of each task that leaves nothing over capacity and nothing colliding.',
      }),
    after: totals.meta({ description: 'With all proposals made.' }),
    stuck_task_ids: z.array(id).meta({ description: 'Tasks for which no shift does.' }),
    proposals_complete: z
      .boolean()
      .meta({ description: 'False when the search ended before every task was looked at.' }),
    tasks: z.array(
      z.object({
        task_id: id,
        title: z.string(),
        skill_name: z.string(),
        starts: z.int(),
        duration_ms: z.int().meta({ description: 'What 95 % of its runs took no longer than.' }),
        duration_from: z.enum(['task', 'skill', 'default']).meta({
          description: `Its own last 200 runs within 30 days, else those of its skill, else ${DEFAULT_DURATION_MS / 1_000} s.`,
        }),
        n: z.int().meta({ description: 'Of how many runs.' }),
      }),
    ),
  })
  .meta({ id: 'Forecast' });

type TaskRow = Schedule &
  Pick<
    Task,
    'skillName' | 'nextRunAt' | 'maxRuns' | 'firedCount' | 'overlapPolicy' | 'timeoutSeconds' | 'createdAt'
  > & {
    title: string;
  };

/** What runs next first. Served by tasks_owner_next_run_idx. */
const TASKS = {
  name: 'forecast-tasks',
  text: `
    select id, coalesce(name, skill_name) as title, skill_name as "skillName", schedule_cron as "scheduleCron", timezone,
      dst_gap as "dstGap", dst_fold as "dstFold", starts_at as "startsAt", ends_at as "endsAt",
      spread_seconds as "spreadSeconds", run_at as "runAt", next_run_at as "nextRunAt", max_runs as "maxRuns",
      fired_count as "firedCount", overlap_policy as "overlapPolicy", timeout_seconds as "timeoutSeconds",
      created_at as "createdAt"
    from tasks
    where user_id = $1 and status <> 'deleted' and coalesce(next_run_at, 'infinity'::timestamptz) < $2
      and ($3::bigint is null or project_id = $3)
    order by coalesce(next_run_at, 'infinity'::timestamptz), id limit $4`,
};

/** Of runs that were begun and came to an end; the newest of a condition, so many at the most, whatever became of them. */
const took = (condition: string, newest: number) => `
  select skill_name, created_at, (extract(epoch from ended_at - started_at) * 1000)::float8 as ms from (
    select skill_name, created_at, started_at, ended_at, status from executions
    where ${condition} and created_at > now() - interval '30 days' order by created_at desc, id desc limit ${newest}
  ) newest where status in ('success', 'failed', 'timeout') and started_at is not null`;

/** Served by executions_task_idx. */
const BY_TASK = {
  name: 'forecast-by-task',
  text: `
    select w.id as task_id, d.p95, d.n from unnest($1::bigint[]) w(id) cross join lateral (
      select percentile_disc(0.95) within group (order by ms) as p95, count(*)::int as n from (
        ${took('task_id = w.id', 1_000)} order by created_at desc limit 200
      ) last
    ) d where d.n > 0`,
};

/** Of the owner's newest runs, since there is no order of a skill's. Served by executions_owner_created_idx. */
const BY_SKILL = {
  name: 'forecast-by-skill',
  text: `
    select skill_name, percentile_disc(0.95) within group (order by ms) as p95, count(*)::int as n from (
      select skill_name, ms, row_number() over (partition by skill_name order by created_at desc) as place
      from (${took('user_id = $1', 5_000)}) took
    ) placed where place <= 200 group by skill_name`,
};

/** Served by agents_owner_created_idx. */
const CAPACITY = {
  name: 'forecast-capacity',
  text: `
    select sum(max_concurrency)::int as capacity from agents
    where user_id = $1 and deleted_at is null and status not in ('offline', 'error') and not draining`,
};

/** A task with what is known of it. */
interface Known {
  task: TaskRow;
  /** Undefined for a one-off. */
  ticks: Recurrence | undefined;
  /** How much later than its ticks it runs. */
  offset: number;
  durationMs: number;
  durationFrom: 'task' | 'skill' | 'default';
  n: number;
}

/** The forecast for the tasks of an owner; a 400 for a window that is none, is over, or is too long. */
export async function forecastTasks(
  q: Queryable,
  userId: number,
  query: ForecastQuery,
): Promise<z.input<typeof forecastAnswer>> {
  const now = (await databaseNow(q)).getTime();
  const from = Math.max(now, query.from?.getTime() ?? now);
  const asked = query.to?.getTime() ?? from + 86_400_000;
  if (asked <= from || asked > from + MAX_DAYS * 86_400_000) {
    throw invalid('query.to', `must be later than from and than now, by at most ${MAX_DAYS} days`);
  }
  const slice = slices();
  const { tasks, more } = await knownTasks(q, userId, new Date(asked), query.project_id);
  const until = await windowThatFits(tasks, from, asked, slice);
  const planned: Planned[] = [];
  for (const known of tasks) planned.push(await plan(known, from, until, slice));
  const capacity =
    query.capacity ?? (await q.query<{ capacity: number | null }>({ ...CAPACITY, values: [userId] })).rows[0]?.capacity;
  const found = await inSlices(forecast(planned, { from, until, capacity: capacity ?? undefined }), slice);
  return {
    from: iso(from),
    to: iso(until),
    truncated: more || until < asked,
    capacity: capacity ?? null,
    capacity_from: query.capacity === undefined ? 'agents' : 'given',
    ...totalsView(found.before),
    minutes: found.minutes.map(({ at, starts, running }) => ({ minute: iso(at), starts, running })),
    collision_minutes: found.collisions.slice(0, MAX_COLLISIONS).map(({ at, ids }) => ({
      minute: iso(at),
      tasks: ids.length,
      task_ids: ids.slice(0, MAX_COLLIDING),
    })),
    proposals: found.shifts.map(({ id, shiftSeconds, peakAfter }) => ({
      task_id: id,
      shift_seconds: shiftSeconds,
      peak_after: peakAfter,
    })),
    after: totalsView(found.after),
    stuck_task_ids: found.stuck,
    proposals_complete: found.complete,
    tasks: tasks.map(({ task, durationMs, durationFrom, n }, i) => ({
      task_id: task.id,
      title: task.title,
      skill_name: task.skillName,
      starts: planned[i]?.starts.filter((start) => start >= from).length ?? 0,
      duration_ms: durationMs,
      duration_from: durationFrom,
      n,
    })),
  };
}

const iso = (ms: number) => new Date(ms).toISOString();

const totalsView = ({ peak, minutesOver, collisions }: Forecast['before']) => ({
  peak,
  minutes_over_capacity: minutesOver,
  collisions,
});

/** Takes the steps of some work, and lets others run between them. */
async function inSlices<T>(work: Generator<void, T, void>, slice: () => Promise<void>): Promise<T> {
  for (let step = work.next(); ; step = work.next()) {
    if (step.done) return step.value;
    await slice();
  }
}

/** The active tasks that run before `to`, and how long each takes. */
async function knownTasks(
  q: Queryable,
  userId: number,
  to: Date,
  projectId: number | undefined,
): Promise<{ tasks: Known[]; more: boolean }> {
  const { rows } = await q.query<TaskRow>({ ...TASKS, values: [userId, to, projectId ?? null, MAX_TASKS + 1] });
  const tasks = rows.slice(0, MAX_TASKS);
  const ids = tasks.map((task) => task.id);
  const own = await q.query<{ task_id: number; p95: number; n: number }>({ ...BY_TASK, values: [ids] });
  const byTask = new Map(own.rows.map((row) => [row.task_id, row]));
  const others = byTask.size < ids.length;
  const ofSkills = others
    ? (await q.query<{ skill_name: string; p95: number; n: number }>({ ...BY_SKILL, values: [userId] })).rows
    : [];
  const bySkill = new Map(ofSkills.map((row) => [row.skill_name, row]));
  return {
    more: rows.length > MAX_TASKS,
    tasks: tasks.map((task) => {
      const [mine, ofSkill] = [byTask.get(task.id), bySkill.get(task.skillName)];
      const found = mine ?? ofSkill;
      return {
        task,
        ticks: recurrenceOf(task),
        offset: spreadOf(task),
        durationMs: Math.min(Math.max(1, Math.round(found?.p95 ?? DEFAULT_DURATION_MS)), task.timeoutSeconds * 1_000),
        durationFrom: mine ? 'task' : ofSkill ? 'skill' : 'default',
        n: found?.n ?? 0,
      };
    }),
  };
}

/** The end of the window, moved forward by whole minutes until no more fires lie in it than can be looked at. */
async function windowThatFits(
  tasks: readonly Known[],
  from: number,
  to: number,
  slice: () => Promise<void>,
): Promise<number> {
  const fires = async (until: number) => {
    let count = 0;
    for (const { ticks, offset } of tasks) {
      count += ticks ? ticks.count(from - offset, until - offset) : 1;
      await slice();
    }
    return count;
  };
  if ((await fires(to)) <= MAX_FIRES) return to;
  let [fits, tooMany] = [1, Math.ceil((to - from) / MINUTE)];
  while (tooMany - fits > 1) {
    const middle = (fits + tooMany) >> 1;
    if ((await fires(from + middle * MINUTE)) <= MAX_FIRES) fits = middle;
    else tooMany = middle;
  }
  return Math.min(to, from + fits * MINUTE);
}

/** When a task starts in the window, and before it if it may still run then. */
async function plan(known: Known, from: number, until: number, slice: () => Promise<void>): Promise<Planned> {
  const { task, ticks, offset, durationMs } = known;
  const alone = task.overlapPolicy !== 'allow';
  const planned = { id: task.id, durationMs, alone };
  if (!ticks) {
    const at = Math.max(from, task.nextRunAt?.getTime() ?? from);
    return { ...planned, starts: at < until ? [at] : [] };
  }
  const since = Math.max(from - Math.min(durationMs, LOOK_BACK_MS), task.createdAt.getTime());
  const starts = startsBefore(ticks, since - offset, from - offset, alone).map((tick) => tick + offset);
  let left = task.maxRuns === null ? Number.POSITIVE_INFINITY : task.maxRuns - task.firedCount;
  for (const { scheduledFor } of ticks.between(from - offset, until - offset)) {
    if (left-- <= 0) break;
    starts.push(scheduledFor + offset);
    await slice();
  }
  return { ...planned, starts };
}

/** The ticks from `since` to before `until`: the last one where no more than one runs at once, else the last of them. */
function startsBefore(ticks: Recurrence, since: number, until: number, alone: boolean): number[] {
  if (!alone) {
    const count = ticks.count(since, until);
    const from = count > MAX_BACK ? Math.floor(until - ((until - since) * MAX_BACK) / count) : since;
    return Array.from(ticks.between(from, until), ({ scheduledFor }) => scheduledFor);
  }
  // In steps back, or a schedule of every second would be gone through for its last tick.
  for (let step = MINUTE; ; step *= 4) {
    const from = Math.max(since, until - step);
    const found = Array.from(ticks.between(from, until), ({ scheduledFor }) => scheduledFor).slice(-1);
    if (found.length > 0 || from <= since) return found;
  }
}
