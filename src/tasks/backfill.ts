import { z } from 'zod';
import type { Tx } from '../db/database.ts';
import { tellQueued } from '../executions/queued.ts';
import type { Actor } from '../http/access.ts';
import { conflict, invalid } from '../http/problem.ts';
import { id, instant, time, toTime } from '../http/validation.ts';
import { emitEvents } from '../realtime/events.ts';
import { newTick, ticksDecided } from './ledger.ts';
import { databaseNow, recurrenceOf, spreadOf } from './next-times.ts';
import { lockTask } from './queries.ts';
import { runTaskParams } from './schemas.ts';
import type { Task } from './task-events.ts';

// Making up for ticks of the past: those that nobody fired, that were skipped, that failed, or that lie before the task was
// made. The task is locked, so neither the scheduler nor another backfill looks at its ticks meanwhile; and a run is made
// only for a tick that has none that is open or succeeded. So the same backfill twice makes nothing the second time.

/** How many ticks one call makes up for: what one transaction writes at once. */
const MOST = 1_000;

export const backfillBody = z
  .strictObject({
    from: instant.meta({ description: 'The first time to make up for.' }),
    to: instant.meta({ description: 'The ticks before this; not in the future.' }),
    dry_run: z.boolean().default(false).meta({ description: 'Only say what would happen.' }),
    params: runTaskParams.optional().meta({ description: 'For these runs, instead of those of the task.' }),
  })
  .superRefine(({ from, to }, context) => {
    if (!(from instanceof Date && to instanceof Date) || from < to) return;
    context.addIssue({ code: 'custom', path: ['to'], message: 'must be later than from' });
  })
  .meta({
    'x-examples': {
      day: { summary: 'A day', value: { from: '2026-11-22T00:00:00Z', to: '2026-11-23T00:00:00Z', dry_run: true } },
    },
  });

export const backfillAnswer = z
  .object({
    task_id: id,
    from: time,
    to: time,
    dry_run: z.boolean(),
    matched: z.int().meta({ description: 'How many ticks the schedule has between the two.' }),
    created: z.int().meta({ description: 'For how many of them a run was queued, or would be.' }),
    skipped: z.int().meta({ description: 'How many have a run that is open or succeeded.' }),
    runs: z.array(
      z.object({
        scheduled_for: time,
        execution_id: id.optional().meta({ description: 'The run that was queued, or that is there.' }),
        result: z.enum(['created', 'exists']),
      }),
    ),
  })
  .meta({ id: 'Backfill' });

/** The newest run of each tick that is open or succeeded; what was asked for by hand is no tick's. Served by executions_task_idx. */
const COVERED = {
  name: 'backfill-covered',
  text: `
    select distinct on (scheduled_for) scheduled_for, id from executions
    where task_id = $1 and created_at >= $2 and scheduled_for = any($3::timestamptz[])
      and status in ('queued', 'running', 'success') and trigger not in ('manual', 'activity')
    order by scheduled_for, id desc`,
};

/** Served by executions_task_open_idx. */
const OPEN = {
  name: 'backfill-open',
  text: `select exists (select from executions where task_id = $1 and status in ('queued', 'running')) as open`,
};

/**
 * A tick that had its verdict keeps it; one that had none was late. Then a run of each, in their order, of which the first $4
 * need not wait for the one before. Served by occurrences_tick_key.
 */
const WRITE = {
  name: 'backfill-write',
  text: `
    with wanted as (
      select w.tick, w.n from unnest($2::timestamptz[]) with ordinality w(tick, n)
    ), made as (
      insert into occurrences (task_id, user_id, scheduled_for, verdict, cause)
      select t.id, t.user_id, w.tick, 'late', 'backfill' from wanted w join tasks t on t.id = $1
      on conflict on constraint occurrences_tick_key do nothing
      returning id, scheduled_for
    ), ticks as (
      select id, scheduled_for from made
      union all
      select id, scheduled_for from occurrences where task_id = $1 and scheduled_for = any($2::timestamptz[])
    )
    insert into executions (task_id, user_id, trigger, occurrence_id, scheduled_for, skill_name, params, priority,
      timeout_seconds, heartbeat_timeout_seconds, pinned_agent_id, required_capabilities, available_at, expires_at)
    select t.id, t.user_id, 'backfill', k.id, w.tick, t.skill_name, coalesce($3::jsonb, t.params), t.priority,
      t.timeout_seconds, t.heartbeat_timeout_seconds, t.agent_id, t.required_capabilities,
      case when w.n <= $4::int then now() end,
      case when w.n <= $4::int then now() + t.queue_ttl_seconds * interval '1 second' end
    from wanted w join ticks k on k.scheduled_for = w.tick join tasks t on t.id = $1
    order by w.n
    returning id, scheduled_for, available_at is not null as available, occurrence_id in (select id from made) as noted`,
};

/**
 * Queues a run for each tick of the task between two times that has none which is open or succeeded; a paused task's too.
 * With `overlap_policy` allow they are offered at once, else one after the other, behind what is open. Throws a 400 for a
 * window that reaches into the future or holds too many ticks, a 409 for a task that has no schedule.
 */
export async function backfillTask(
  tx: Tx,
  actor: Actor,
  taskId: number,
  body: z.output<typeof backfillBody>,
): Promise<z.input<typeof backfillAnswer>> {
  const task = await lockTask(tx, actor, taskId);
  const now = await databaseNow(tx);
  const { from, to, dry_run, params } = body;
  if (to > now) throw invalid('body.to', `must not be in the future; it is ${toTime(now)}`);
  const ticks = ticksBetween(task, from.getTime(), to.getTime(), now.getTime());
  const { rows } = await tx.query<{ scheduled_for: Date; id: number }>({ ...COVERED, values: [taskId, from, ticks] });
  const runs = new Map(rows.map((row) => [row.scheduled_for.getTime(), row.id]));
  const missing = ticks.filter((tick) => !runs.has(tick.getTime()));
  const created = dry_run ? new Map<number, number>() : await queue(tx, actor, task, missing, params);
  return {
    task_id: taskId,
    from: toTime(from),
    to: toTime(to),
    dry_run,
    matched: ticks.length,
    created: missing.length,
    skipped: ticks.length - missing.length,
    runs: ticks.map((tick) => {
      const exists = runs.get(tick.getTime());
      const run = exists ?? created.get(tick.getTime());
      return {
        scheduled_for: toTime(tick),
        ...(run === undefined ? {} : { execution_id: run }),
        result: exists === undefined ? ('created' as const) : ('exists' as const),
      };
    }),
  };
}

/** The ticks in [from, to) whose turn has come: one that its spread has run later than now is still the scheduler's. */
function ticksBetween(task: Task, from: number, to: number, now: number): Date[] {
  const until = Math.min(to, now - spreadOf(task) + 1);
  const ticks = recurrenceOf(task);
  if (!ticks) {
    if (!task.runAt) {
      throw conflict(`The task ${task.id} runs on demand and has no ticks: queue a run by POST /tasks/${task.id}/run.`);
    }
    const at = task.runAt.getTime();
    return from <= at && at < until ? [task.runAt] : [];
  }
  const count = ticks.count(from, until);
  if (count > MOST) {
    throw invalid(
      'body.to',
      `makes it ${count} ticks; at most ${MOST} are made up for in one call: take shorter windows`,
    );
  }
  return [...ticks.between(from, until)].map(({ scheduledFor }) => new Date(scheduledFor));
}

/** Queues the runs and tells of them; answers the run of each tick (ms). */
async function queue(
  tx: Tx,
  actor: Actor,
  task: Task,
  ticks: readonly Date[],
  params: Record<string, unknown> | undefined,
): Promise<Map<number, number>> {
  if (ticks.length === 0) return new Map();
  const { rows: found } = await tx.query<{ open: boolean }>({ ...OPEN, values: [task.id] });
  const atOnce = task.overlapPolicy === 'allow' ? ticks.length : found[0]?.open ? 0 : 1;
  const { rows } = await tx.query<{ id: number; scheduled_for: Date; available: boolean; noted: boolean }>({
    ...WRITE,
    values: [task.id, ticks, params ? JSON.stringify(params) : null, atOnce],
  });
  const runs = rows.toSorted((a, b) => a.id - b.id);
  tellQueued(
    tx,
    actor,
    runs.map(({ id, scheduled_for: scheduledFor, available }) => ({
      task,
      run: { id, userId: task.userId, skillName: task.skillName, trigger: 'backfill', scheduledFor, available },
    })),
  );
  const noted = runs.flatMap(({ id, scheduled_for, noted }) =>
    noted ? [{ ...newTick(scheduled_for.getTime(), 'late', { cause: 'backfill' }), execution_id: id }] : [],
  );
  if (noted.length > 0) emitEvents(tx, [ticksDecided(task, noted)]);
  return new Map(runs.map((run) => [run.scheduled_for.getTime(), run.id]));
}
