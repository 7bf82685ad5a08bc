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
import { parseCron } from '../schedule/cron.ts';
import { nextOccurrence } from '../schedule/occurrences.ts';
import { tellChanges } from './changes.ts';
import { databaseNow, hasTicked, lockTask } from './queries.ts';
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
// `next_run_at` is the one column that the scheduler looks at. It is set here when a schedule is given or resumed, by the
// scheduler at each tick, and it is null while a task is paused, deleted, on demand, or has no further time.

/** How far in the past a one-off may be: what passes between a client's clock and ours. It is then due at once. */
const PAST_TOLERANCE_MS = 60_000;

/** The columns that decide when a task runs. */
type Schedule = Pick<Task, 'scheduleCron' | 'timezone' | 'runAt'>;

/** Creates a task of the caller's and sets its next time. Throws a 400 that names the field it cannot take. */
export async function createTask(tx: Tx, actor: Actor, input: CreateTask): Promise<Task> {
  const schedule = { scheduleCron: input.schedule_cron, timezone: input.timezone, runAt: input.run_at ?? null };
  const onDemand = schedule.scheduleCron === null && schedule.runAt === null;
  const now = onDemand ? null : await databaseNow(tx);
  if (now) checkSchedule(schedule, now);
  if (input.agent_id !== null) checkAgent(await holdAgent(tx, input.agent_id), actor.userId, input.agent_id);
  await moveTask(tx, actor.userId, null, input.project_id);
  const nextRunAt = now && firstRun(schedule, now);
  const overdueAt = null;
  const quietAt = null;
  const { rows } = await tx.query(
    insertTask({ ...columns(input), skillName: input.skill_name, userId: actor.userId, nextRunAt, overdueAt, quietAt }),
  );
  if (!rows[0]) throw new Error('The insert answered no row.');
  const task = taskOf(rows[0]);
  tellChanges(tx, actor, 'CREATE', [{ before: null, after: task }]);
  return task;
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
  const zoneMatters = changes.timezone !== undefined && wanted.scheduleCron !== null;
  if (changes.scheduleCron !== undefined || changes.runAt !== undefined || zoneMatters) {
    const now = await databaseNow(tx);
    checkSchedule(wanted, now);
    if (changes.runAt && (await hasTicked(tx, id, changes.runAt))) {
      throw invalid('body.run_at', `is a time at which this task has run; to run it again now, POST /tasks/${id}/run`);
    }
    if (before.status !== 'disabled') changes.nextRunAt = firstRun(wanted, now);
    if (changes.nextRunAt) changes.status = taskTransition(before.status, 'scheduled') ?? before.status;
  }
  const after = await write(tx, before, changes);
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
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
  const after = await write(tx, before, { status, nextRunAt: null, pauseReason: null });
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
 * Pauses a task: nothing fires until it is resumed. What is queued or under way goes on. Throws a 409 for a task that has
 * ended and so has nothing to pause.
 */
export async function pauseTask(tx: Tx, actor: Actor, id: number): Promise<Task> {
  const before = await lockTask(tx, actor, id);
  // Paused with its project and then by hand: by hand counts, and it stays paused when the project is restored.
  if (before.status === 'disabled') return before.pauseReason === 'project' ? unmark(tx, before) : before;
  const status = taskTransition(before.status, 'paused');
  if (!status) {
    throw conflict(`The task ${id} is ${before.status} and has no further run to pause: give it a new time instead.`);
  }
  const after = await write(tx, before, { status, nextRunAt: null, pauseReason: 'manual' });
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
}

/**
 * Resumes a paused task; one that is not paused stays as it is. A schedule goes on with its next time from now: ticks that
 * fell into the pause are not made up for. A one-off whose time passed in the pause is due at once, and as a tick that was
 * missed: its misfire_policy decides whether it still runs (unless it is `skip`, it does). One that had fired before the
 * pause does not fire again.
 */
export async function resumeTask(tx: Tx, actor: Actor, id: number): Promise<Task> {
  const before = await lockTask(tx, actor, id);
  const running = before.status === 'disabled' && (await hasRunningExecution(tx, id));
  const status = taskTransition(before.status, running ? 'resumed_running' : 'resumed');
  if (!status) return before;
  const fired = before.runAt !== null && (await hasTicked(tx, id, before.runAt));
  const nextRunAt = fired ? null : firstRun(before, await databaseNow(tx));
  const after = await write(tx, before, { status, nextRunAt, pauseReason: null });
  tellChanges(tx, actor, 'UPDATE', [{ before, after }]);
  return after;
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

/** The first time after `now`; a one-off's time as it is; null for a task that runs on demand. */
export function firstRun({ scheduleCron, timezone, runAt }: Schedule, now: Date): Date | null {
  if (scheduleCron === null) return runAt;
  const next = nextOccurrence(parseCron(scheduleCron), timezone, now.getTime());
  return next ? new Date(next.scheduledFor) : null;
}

/** Throws a 400 for a new schedule that cannot be. */
function checkSchedule(schedule: Schedule, now: Date): void {
  const { scheduleCron, runAt } = schedule;
  if (scheduleCron !== null && runAt !== null) {
    throw invalid('body.run_at', 'cannot stand beside schedule_cron: leave one of them out, or set it to null');
  }
  if (scheduleCron !== null && firstRun(schedule, now) === null) {
    throw invalid('body.schedule_cron', 'never fires again');
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

/** Takes back the mark of a pause with the project; no change that a version, the log or an event would tell of. */
async function unmark(tx: Tx, task: Task): Promise<Task> {
  await tx.orm.update(tasks).set({ pauseReason: 'manual' }).where(eq(tasks.id, task.id));
  return { ...task, pauseReason: 'manual' };
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
