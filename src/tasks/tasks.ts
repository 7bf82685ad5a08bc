import { isDeepStrictEqual } from 'node:util';
import { eq, sql } from 'drizzle-orm';
import { type Agent, holdAgent } from '../agents/agents.ts';
import type { Tx } from '../db/database.ts';
import { insertInto, rowsOf } from '../db/rows.ts';
import { PRIORITIES, tasks } from '../db/schema.ts';
import { cancelQueuedExecutions, enqueueExecution, hasRunningExecution } from '../executions/executions.ts';
import type { Execution } from '../executions/schemas.ts';
import type { Actor } from '../http/access.ts';
import { requireVersion } from '../http/etag.ts';
import { conflict, invalid } from '../http/problem.ts';
import { moveTask } from '../projects/move-task.ts';
import { tellChanges } from './changes.ts';
import { pausedTicks, recordTicks } from './ledger.ts';
import { databaseNow, nextGap, nextRun, overdueFrom, quietWhilePaused, type Schedule, spreadOf } from './next-times.ts';
import { hasTicked, lockTask } from './queries.ts';
import type { CreateTask, UpdateTask } from './schemas.ts';
import type { Task } from './task-events.ts';
import { taskTransition } from './task-state.ts';

const taskOf = rowsOf(tasks);
/** A new task: what its creator gives, and where that puts it. */
const insertTask = insertInto(tasks, [
  'userId',
  'nextRunAt',
  'name',
  'skillName',
  'projectId',
  'params',
  'priority',
  'scheduleCron',
  'timezone',
  'runAt',
  'dstGap',
  'dstFold',
  'startsAt',
  'endsAt',
  'spreadSeconds',
  'maxRuns',
  'overlapPolicy',
  'misfirePolicy',
  'maxLatenessSeconds',
  'maxAttempts',
  'maxLostLeases',
  'retryBackoffSeconds',
  'timeoutSeconds',
  'queueTtlSeconds',
  'heartbeatTimeoutSeconds',
  'pauseAfterFailures',
  'expectSuccessWithinSeconds',
  'overdueAt',
  'quietAt',
  'agentId',
  'requiredCapabilities',
]);

// What can be done with a task. Each function works in the transaction it is given: the row, locked before it is changed,
// its audit entry and its events are written together or not at all. What changes nothing writes nothing.
//
// `next_run_at` is the one column that the scheduler fires by. It is set here when a schedule is given or resumed, by the
// scheduler at each tick, and it is null while a task is paused, deleted, on demand, or has no further time. `quiet_at` is
// when there is something to note though nothing runs (scheduler/quiet.ts), `overdue_at` when its success is missed.

/** How far in the past a one-off may be: what passes between a client's clock and ours. It is then due at once. */
const PAST_TOLERANCE_MS = 60_000;

/** The columns besides the schedule itself whose change gives a task with a schedule new ticks. */
const TIMING = ['timezone', 'dstGap', 'dstFold', 'startsAt', 'endsAt', 'maxRuns'] as const satisfies (keyof Task)[];

/** Creates a task of the caller's and sets its next time. Throws a 400 that names the field it cannot take. */
export async function createTask(tx: Tx, actor: Actor, input: CreateTask): Promise<Task> {
  const timing = {
    // Its place in its spread goes by its id, which it does not have yet.
    id: 0,
    spreadSeconds: 0,
    scheduleCron: input.schedule_cron,
    timezone: input.timezone,
    dstGap: input.dst_gap,
    dstFold: input.dst_fold,
    startsAt: input.starts_at ?? null,
    endsAt: input.ends_at ?? null,
    runAt: input.run_at ?? null,
    maxRuns: input.max_runs,
    firedCount: 0,
  };
  const expected = { expectSuccessWithinSeconds: input.expect_success_within_seconds };
  const onDemand = timing.scheduleCron === null && timing.runAt === null;
  const now = onDemand && expected.expectSuccessWithinSeconds === null ? null : await databaseNow(tx);
  if (now) checkSchedule(timing, now);
  if (input.agent_id !== null) checkAgent(await holdAgent(tx, input.agent_id), actor.userId, input.agent_id);
  await moveTask(tx, actor.userId, null, input.project_id);
  const { rows } = await tx.query(
    insertTask({
      ...columns(input),
      skillName: input.skill_name,
      userId: actor.userId,
      nextRunAt: now && nextRun(timing, now.getTime()),
      quietAt: now && nextGap(timing, now.getTime()),
      overdueAt: now && overdueFrom(expected, now),
    }),
  );
  if (!rows[0]) throw new Error('The insert answered no row.');
  const inserted = taskOf(rows[0]);
  const task = now && inserted.spreadSeconds > 0 ? await takePlace(tx, inserted, now) : inserted;
  tellChanges(tx, actor, 'CREATE', [{ before: null, after: task }]);
  return task;
}

/** Moves the next times of a new task to its place in its spread, now that it has an id. */
async function takePlace(tx: Tx, task: Task, now: Date): Promise<Task> {
  const [moved] = await tx.orm
    .update(tasks)
    .set({ nextRunAt: nextRun(task, now.getTime()), quietAt: nextGap(task, now.getTime()) })
    .where(eq(tasks.id, task.id))
    .returning();
  if (!moved) throw new Error('The update answered no row.');
  return moved;
}

/**
 * Changes the fields of a task that are given and differ. A new schedule sets its next time, and a task that had ended
 * waits again; a paused one stays paused. `expected` are the versions of which the task must have one, else it is a 412.
 */
export async function updateTask(
  tx: Tx,
  actor: Actor,
  id: number,
  input: UpdateTask,
  expected: readonly number[] | undefined,
): Promise<Task> {
  // Before the task: locks go agent → task (executions/lease.ts).
  const agent = input.agent_id == null ? undefined : await holdAgent(tx, input.agent_id);
  const before = await lockTask(tx, actor, id);
  requireVersion('task', before, expected);
  const changes = differing(before, columns(input));
  if (Object.keys(changes).length === 0) return before;

  const wanted = { ...before, ...changes };
  await moveTask(tx, before.userId, before.projectId, wanted.projectId);
  if (changes.agentId != null) checkAgent(agent, before.userId, changes.agentId);
  const rescheduled = changes.scheduleCron !== undefined || changes.runAt !== undefined;
  const timed = rescheduled || (wanted.scheduleCron !== null && TIMING.some((name) => changes[name] !== undefined));
  const spread = changes.spreadSeconds !== undefined && wanted.scheduleCron !== null;
  const now = timed || spread || changes.expectSuccessWithinSeconds !== undefined ? await databaseNow(tx) : null;
  if (now && timed) {
    checkSchedule(wanted, now, Object.keys(changes));
    if (changes.runAt && (await hasTicked(tx, id, changes.runAt))) {
      throw invalid('body.run_at', `is a time at which this task has run; to run it again now, POST /tasks/${id}/run`);
    }
  }
  if (now && (timed || spread)) {
    // Until now it ticked as it was.
    recordTicks(tx, [{ task: before, ticks: pausedTicks(before, now) }]);
    Object.assign(changes, timesOf(before, wanted, now, timed));
    if (changes.nextRunAt) changes.status = taskTransition(before.status, 'scheduled') ?? before.status;
  }
  if (now && changes.expectSuccessWithinSeconds !== undefined) {
    changes.overdueAt = before.status === 'disabled' ? null : overdueFrom(wanted, now);
    changes.overdueSince = null;
  }
  const after = await write(tx, before, changes);
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
}

/** The next times of a task whose schedule or spread is changed. With another spread alone, its next tick stays what it is. */
function timesOf(before: Task, wanted: Task, now: Date, timed: boolean): Pick<Task, 'nextRunAt' | 'quietAt'> {
  const moved = spreadOf(wanted) - spreadOf(before);
  const shifted = (time: Date | null) => time && new Date(time.getTime() + moved);
  if (!timed && before.status !== 'disabled') {
    return { nextRunAt: shifted(before.nextRunAt), quietAt: shifted(before.quietAt) };
  }
  const next = nextRun(wanted, now.getTime());
  if (before.status !== 'disabled') return { nextRunAt: next, quietAt: nextGap(wanted, now.getTime()) };
  return { nextRunAt: null, quietAt: quietWhilePaused(wanted, next, before.pauseUntil) };
}

/** Deletes a task softly and cancels what is queued of it; an agent that is at a run of it finishes. */
export async function deleteTask(
  tx: Tx,
  actor: Actor,
  id: number,
  expected: readonly number[] | undefined,
): Promise<Task> {
  const before = await lockTask(tx, actor, id);
  requireVersion('task', before, expected);
  const status = taskTransition(before.status, 'deleted') ?? before.status;
  const after = await write(tx, before, {
    status,
    nextRunAt: null,
    quietAt: null,
    overdueAt: null,
    overdueSince: null,
    pauseReason: null,
    pauseUntil: null,
  });
  await moveTask(tx, before.userId, before.projectId, null);
  tellChanges(tx, actor, 'DELETE', [{ before, after }]);
  await cancelQueuedExecutions(tx, actor, [after]);
  return after;
}

/** Queues a run of the task now, whatever its schedule, paused or not; `params` stand in for the task's in this run. */
export async function runTask(
  tx: Tx,
  actor: Actor,
  id: number,
  params: Record<string, unknown> | undefined,
): Promise<Execution> {
  const task = await lockTask(tx, actor, id);
  return enqueueExecution(tx, task, { trigger: 'manual', actor, params });
}

/**
 * Pauses a task: nothing fires until it is resumed, or until `until`; its ticks meanwhile are noted as paused. What is queued
 * or under way goes on. A paused task gets the new end of its pause. Throws a 409 for a task that has ended and so has
 * nothing to pause, a 400 for an end that has passed.
 */
export async function pauseTask(tx: Tx, actor: Actor, id: number, until: Date | null = null): Promise<Task> {
  const before = await lockTask(tx, actor, id);
  const now = until === null ? null : await databaseNow(tx);
  if (until && now && until <= now) throw invalid('body.until', 'must lie in the future');
  const paused = { pauseReason: 'manual' as const, pauseUntil: until };
  if (before.status === 'disabled') return pauseAgain(tx, actor, before, paused);
  const status = taskTransition(before.status, 'paused');
  if (!status) {
    throw conflict(`The task ${id} is ${before.status} and has no further run to pause: give it a new time instead.`);
  }
  const quietAt = quietWhilePaused(before, before.nextRunAt, until);
  const after = await write(tx, before, {
    ...paused,
    status,
    nextRunAt: null,
    quietAt,
    overdueAt: null,
    overdueSince: null,
  });
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
}

/** Pauses a task that is paused: by hand from now on, so that it stays so when its project is restored, and until the new end. */
async function pauseAgain(
  tx: Tx,
  actor: Actor,
  before: Task,
  paused: Pick<Task, 'pauseReason' | 'pauseUntil'>,
): Promise<Task> {
  const same = before.pauseUntil?.getTime() === paused.pauseUntil?.getTime();
  if (same && before.pauseReason === 'manual') return before;
  const now = await databaseNow(tx);
  recordTicks(tx, [{ task: before, ticks: pausedTicks(before, now) }]);
  const quietAt = quietWhilePaused(before, nextRun(before, now.getTime() - spreadOf(before) - 1), paused.pauseUntil);
  const after = await write(tx, before, { ...paused, quietAt });
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
}

/**
 * Resumes a paused task; one that is not paused stays as it is. A schedule goes on with its next time from now: ticks that
 * fell into the pause are noted as paused, and not made up for. A one-off whose time passed in the pause is due at once, and
 * as a tick that was missed: its misfire_policy decides whether it still runs (unless it is `skip`, it does). One that had
 * fired before the pause does not fire again.
 */
export async function resumeTask(tx: Tx, actor: Actor, id: number): Promise<Task> {
  const before = await lockTask(tx, actor, id);
  const running = before.status === 'disabled' && (await hasRunningExecution(tx, id));
  const status = taskTransition(before.status, running ? 'resumed_running' : 'resumed');
  if (!status) return before;
  const fired = before.runAt !== null && (await hasTicked(tx, id, before.runAt));
  const now = await databaseNow(tx);
  recordTicks(tx, [{ task: before, ticks: pausedTicks(before, new Date(now.getTime() + 1)) }]);
  const after = await write(tx, before, { status, ...resumed(before, now, fired) });
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
}

/** The columns of a task that goes on from now; `fired`: its one time has been. */
export function resumed(before: Task, now: Date, fired: boolean) {
  const from = now.getTime() - spreadOf(before);
  return {
    nextRunAt: fired ? null : nextRun(before, from),
    quietAt: nextGap(before, from),
    overdueAt: overdueFrom(before, now),
    pauseReason: null,
    pauseUntil: null,
    consecutiveFailures: 0,
  };
}

/** The fields of a body as columns; what was not given is undefined. */
function columns(input: UpdateTask) {
  return {
    name: input.name,
    skillName: input.skill_name,
    projectId: input.project_id,
    params: input.params,
    priority: input.priority && PRIORITIES.indexOf(input.priority),
    scheduleCron: input.schedule_cron,
    timezone: input.timezone,
    runAt: input.run_at,
    dstGap: input.dst_gap,
    dstFold: input.dst_fold,
    startsAt: input.starts_at,
    endsAt: input.ends_at,
    spreadSeconds: input.spread_seconds,
    maxRuns: input.max_runs,
    overlapPolicy: input.overlap_policy,
    misfirePolicy: input.misfire_policy,
    maxLatenessSeconds: input.max_lateness_seconds,
    maxAttempts: input.max_attempts,
    maxLostLeases: input.max_lost_leases,
    retryBackoffSeconds: input.retry_backoff_seconds,
    timeoutSeconds: input.timeout_seconds,
    queueTtlSeconds: input.queue_ttl_seconds,
    heartbeatTimeoutSeconds: input.heartbeat_timeout_seconds,
    pauseAfterFailures: input.pause_after_failures,
    expectSuccessWithinSeconds: input.expect_success_within_seconds,
    agentId: input.agent_id,
    requiredCapabilities: input.required_capabilities,
  };
}

/** Of the columns that are given, those that differ from the row's. Objects are equal whatever the order of their keys. */
function differing(row: Task, given: { [K in keyof Task]?: Task[K] | undefined }): Partial<Task> {
  const plain = (value: unknown): unknown => JSON.parse(JSON.stringify(value));
  const changed = Object.entries(given).filter(
    ([key, value]) => value !== undefined && !isDeepStrictEqual(plain(value), plain(row[key as keyof Task])),
  );
  return Object.fromEntries(changed);
}

/** Throws a 400 for a new schedule that cannot be; of `changed` columns, the one that it is due to. */
function checkSchedule(
  schedule: Schedule & Pick<Task, 'maxRuns' | 'firedCount'>,
  now: Date,
  changed: readonly string[] = [],
): void {
  const { scheduleCron, runAt, startsAt, endsAt, maxRuns, firedCount } = schedule;
  if (scheduleCron !== null && runAt !== null) {
    throw invalid('body.run_at', 'cannot stand beside schedule_cron: leave one of them out, or set it to null');
  }
  if (startsAt && endsAt && startsAt >= endsAt) throw invalid('body.ends_at', 'must be later than starts_at');
  if (scheduleCron !== null && nextRun(schedule, now.getTime()) === null) {
    if (maxRuns !== null && firedCount >= maxRuns) {
      throw invalid('body.max_runs', `must be more than ${firedCount}, since so many ticks have run`);
    }
    const unbound = nextRun({ ...schedule, startsAt: null, endsAt: null }, now.getTime()) === null;
    if (unbound) throw invalid('body.schedule_cron', 'never fires again');
    throw invalid(
      changed.includes('startsAt') && !changed.includes('endsAt') ? 'body.starts_at' : 'body.ends_at',
      'leaves no tick between starts_at, or now, and ends_at; to stop the task, pause or delete it',
    );
  }
  if (runAt !== null && runAt.getTime() < now.getTime() - PAST_TOLERANCE_MS) {
    throw invalid('body.run_at', 'has passed; leave it out and run the task now by POST /tasks/{id}/run');
  }
}

function checkAgent(agent: Agent | undefined, ownerId: number, agentId: number): void {
  if (agent && (agent.userId === ownerId || agent.shared)) return;
  // The same for agents of others and for none, so nobody learns which exist.
  throw invalid('body.agent_id', `there is no agent ${agentId} of this task's owner, nor a shared one`);
}

async function write(tx: Tx, before: Task, changes: Partial<Task>): Promise<Task> {
  const [after] = await tx.orm
    .update(tasks)
    .set({ ...changes, version: before.version + 1, updatedAt: sql`now()` })
    .where(eq(tasks.id, before.id))
    .returning();
  if (!after) throw new Error('The update answered no row.');
  return after;
}
