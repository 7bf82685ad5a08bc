import { setImmediate } from 'node:timers/promises';
import type { Queryable } from '../db/database.ts';
import type { VERDICTS } from '../db/schema.ts';
import type { Occurrence } from '../schedule/occurrences.ts';
import { recurrence } from '../schedule/recurrence.ts';
import { databaseNow, spreadOf } from './next-times.ts';
import type { Task } from './task-events.ts';

// Every time at which an owner's tasks fired or will fire in a window, soonest first, up to a number.
//
// The past is read from the ticks that were recorded: what the schedules of today would say of it may never have happened.
// The future is computed. A million tasks have few different schedules (a time of day, a zone, what clock changes do), so
// those are found first,
// by a loose scan that hops through the index from one to the next; their times are merged soonest first; and the tasks of
// a schedule are fetched when its first time comes up, several schedules at once. So the cost goes with the number of
// schedules and of entries, and not with the number of tasks. Between slices of the work others get their turn.

export interface CalendarEntry {
  taskId: number;
  title: string;
  /** Its nominal time. */
  startTime: Date;
  /** When it runs: later by the task's place in its spread. The same for what is past, which is known by its nominal time. */
  effectiveAt: Date;
  timezone: string;
  scheduleCron: string | null;
  projectId: number | null;
  skillName: string;
  /** `planned`, or what became of it. */
  status: 'planned' | (typeof VERDICTS)[number];
  /** What a clock change does to it. */
  note?: string | undefined;
}

interface TaskRow {
  id: number;
  title: string;
  timezone: string;
  schedule_cron: string | null;
  project_id: number | null;
  skill_name: string;
  starts_at: Date | null;
  ends_at: Date | null;
  spread_seconds: number;
  /** How many more ticks may run; null without a limit. */
  runs_left: number | null;
}

/** How long one slice of the work may hold the event loop. */
const SLICE_MS = 5;
/** How many schedules' tasks one query fetches: more each time, since few schedules may have all the tasks, or many one each. */
const MOST_AHEAD = 64;

const FIELDS = `t.id, coalesce(t.name, t.skill_name) as title, t.timezone, t.schedule_cron, t.project_id, t.skill_name,
  t.starts_at, t.ends_at, t.spread_seconds, t.max_runs - t.fired_count as runs_left`;
const MATCHES = '($2::bigint is null or t.project_id = $2) and ($3::text is null or t.skill_name = $3)';

/** Served by occurrences_owner_idx. */
const PAST = {
  name: 'calendar-past',
  text: `
    select ${FIELDS}, o.scheduled_for, o.verdict from occurrences o join tasks t on t.id = o.task_id
    where o.user_id = $1 and ${MATCHES} and o.scheduled_for >= $4 and o.scheduled_for < $5
    order by o.scheduled_for, t.id limit $6`,
};

/** One-offs to come. Served by tasks_owner_next_run_idx. */
const ONCE = {
  name: 'calendar-once',
  text: `
    select ${FIELDS}, t.next_run_at from tasks t
    where t.user_id = $1 and ${MATCHES} and t.status <> 'deleted' and t.schedule_cron is null
      and coalesce(t.next_run_at, 'infinity'::timestamptz) >= $4 and coalesce(t.next_run_at, 'infinity'::timestamptz) < $5
    order by coalesce(t.next_run_at, 'infinity'::timestamptz), t.id limit $6`,
};

/** The different schedules of an owner. Served by tasks_owner_schedule_idx: each step finds the first one behind the last. */
const SCHEDULES = {
  name: 'calendar-schedules',
  text: `
    with recursive step(schedule_cron, timezone, gap, fold) as (
      (select schedule_cron, timezone, coalesce(dst_gap, ''), coalesce(dst_fold, '') from tasks
        where user_id = $1 and schedule_cron is not null and next_run_at is not null
        order by schedule_cron, timezone, coalesce(dst_gap, ''), coalesce(dst_fold, '') limit 1)
      union all
      select n.schedule_cron, n.timezone, n.gap, n.fold from step s cross join lateral (
        select t.schedule_cron, t.timezone, coalesce(dst_gap, '') as gap, coalesce(dst_fold, '') as fold from tasks t
        where t.user_id = $1 and t.schedule_cron is not null and t.next_run_at is not null
          and (t.schedule_cron, t.timezone, coalesce(dst_gap, ''), coalesce(dst_fold, ''))
            > (s.schedule_cron, s.timezone, s.gap, s.fold)
        order by t.schedule_cron, t.timezone, coalesce(dst_gap, ''), coalesce(dst_fold, '') limit 1
      ) n
    ) select schedule_cron, timezone, nullif(gap, '') as gap, nullif(fold, '') as fold from step`,
};

/** The tasks of some schedules, so many of each at the most. Served by tasks_owner_schedule_idx. */
const TASKS = {
  name: 'calendar-tasks',
  text: `
    select s.place, t.* from unnest($4::text[], $5::text[], $6::text[], $7::text[])
      with ordinality s(schedule_cron, timezone, gap, fold, place)
    cross join lateral (
      select ${FIELDS} from tasks t
      where t.user_id = $1 and ${MATCHES} and t.schedule_cron = s.schedule_cron and t.timezone = s.timezone
        and coalesce(t.dst_gap, '') = coalesce(s.gap, '') and coalesce(t.dst_fold, '') = coalesce(s.fold, '')
        and t.schedule_cron is not null and t.next_run_at is not null
      order by t.id limit $8
    ) t`,
};

/** What the times of tasks come from. */
interface Timing {
  schedule_cron: string;
  timezone: string;
  gap: Task['dstGap'];
  fold: Task['dstFold'];
}

/** A schedule whose times are being gone through. */
interface Course {
  timing: Timing;
  times: Generator<Occurrence, void, undefined>;
  next: Occurrence;
  tasks?: TaskRow[];
}

/** The first `limit` entries of a window; `truncated` when there are more. */
export async function calendar(
  q: Queryable,
  wish: {
    userId: number;
    from: Date;
    to: Date;
    projectId?: number | undefined;
    skillName?: string | undefined;
    limit: number;
  },
): Promise<{ entries: CalendarEntry[]; truncated: boolean }> {
  const { userId, from, to, projectId = null, skillName = null, limit } = wish;
  const now = await databaseNow(q);
  const filter = [userId, projectId, skillName];
  const most = limit + 1;
  const entries: CalendarEntry[] = [];
  if (from < now) {
    const { rows } = await q.query<TaskRow & { scheduled_for: Date; verdict: CalendarEntry['status'] }>({
      ...PAST,
      values: [...filter, from, to < now ? to : now, most],
    });
    entries.push(...rows.map((row) => entry(row, row.scheduled_for, row.verdict)));
  }
  const start = from > now ? from : now;
  if (start < to && entries.length < most) {
    const once = await q.query<TaskRow & { next_run_at: Date }>({ ...ONCE, values: [...filter, start, to, most] });
    const planned = await recurring(q, filter, start, to, most - entries.length);
    planned.push(...once.rows.map((row) => entry(row, row.next_run_at, 'planned')));
    planned.sort((a, b) => a.startTime.getTime() - b.startTime.getTime() || a.taskId - b.taskId);
    entries.push(...planned);
  }
  return { entries: entries.slice(0, limit), truncated: entries.length > limit };
}

async function recurring(
  q: Queryable,
  filter: readonly (number | string | null)[],
  from: Date,
  to: Date,
  most: number,
): Promise<CalendarEntry[]> {
  const { rows } = await q.query<Timing & Record<string, unknown>>({ ...SCHEDULES, values: [filter[0]] });
  const slice = slices();
  const courses: Course[] = [];
  for (const timing of rows) {
    const { schedule_cron: expression, timezone, gap: dstGap, fold: dstFold } = timing;
    const ticks = recurrence({ expression, timezone, dstGap, dstFold });
    const times = ticks.between(from.getTime(), to.getTime());
    const first = times.next();
    if (!first.done) courses.push({ timing, times, next: first.value });
    await slice();
  }
  courses.sort(bySooner);

  const entries: CalendarEntry[] = [];
  let ahead = 1;
  for (let course = courses[0]; course && entries.length < most; course = courses[0]) {
    if (!course.tasks) {
      await fetchTasks(q, filter, courses.filter(({ tasks }) => !tasks).slice(0, ahead), most - entries.length);
      ahead = Math.min(2 * ahead, MOST_AHEAD);
    }
    const { scheduledFor, note } = course.next;
    for (const task of course.tasks ?? []) {
      if (takesPlace(task, scheduledFor)) entries.push(entry(task, new Date(scheduledFor), 'planned', note));
    }
    const following = course.times.next();
    courses.shift();
    // With filters a schedule may have no task left: it need not be gone through.
    if (!following.done && course.tasks && course.tasks.length > 0) {
      course.next = following.value;
      courses.splice(place(courses, course), 0, course);
    }
    await slice();
  }
  return entries;
}

/** Whether a task has this time of its schedule, which other tasks have too; counts it if so. */
function takesPlace(task: TaskRow, scheduledFor: number): boolean {
  if (task.starts_at && scheduledFor < task.starts_at.getTime()) return false;
  if (task.ends_at && scheduledFor >= task.ends_at.getTime()) return false;
  if (task.runs_left === null) return true;
  task.runs_left -= 1;
  return task.runs_left >= 0;
}

const bySooner = (a: Course, b: Course) => a.next.scheduledFor - b.next.scheduledFor;

/** Where a course belongs in the ordered list. */
function place(courses: readonly Course[], course: Course): number {
  let [low, high] = [0, courses.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (bySooner(courses[middle] ?? course, course) <= 0) low = middle + 1;
    else high = middle;
  }
  return low;
}

async function fetchTasks(
  q: Queryable,
  filter: readonly (number | string | null)[],
  courses: readonly Course[],
  most: number,
): Promise<void> {
  const { rows } = await q.query<TaskRow & { place: number }>({
    ...TASKS,
    values: [
      ...filter,
      courses.map(({ timing }) => timing.schedule_cron),
      courses.map(({ timing }) => timing.timezone),
      courses.map(({ timing }) => timing.gap),
      courses.map(({ timing }) => timing.fold),
      most,
    ],
  });
  for (const course of courses) course.tasks = [];
  for (const { place, ...task } of rows) courses[place - 1]?.tasks?.push(task);
}

/** Lets others run whenever a slice of the work has taken its time. */
export function slices(): () => Promise<void> {
  let began = performance.now();
  return async () => {
    if (performance.now() - began < SLICE_MS) return;
    await setImmediate();
    began = performance.now();
  };
}

const entry = (task: TaskRow, startTime: Date, status: CalendarEntry['status'], note?: string): CalendarEntry => ({
  taskId: task.id,
  title: task.title,
  startTime,
  effectiveAt:
    status === 'planned'
      ? new Date(
          startTime.getTime() +
            spreadOf({ id: task.id, scheduleCron: task.schedule_cron, spreadSeconds: task.spread_seconds }),
        )
      : startTime,
  timezone: task.timezone,
  scheduleCron: task.schedule_cron,
  projectId: task.project_id,
  skillName: task.skill_name,
  status,
  note,
});
