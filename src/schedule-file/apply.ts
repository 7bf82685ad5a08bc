import { holdAgent } from '../agents/agents.ts';
import type { User } from '../auth/users.ts';
import type { Tx } from '../db/database.ts';
import { API_KEY_SCOPES } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { Problem } from '../http/problem.ts';
import { setScheduleKey } from '../tasks/schedule-key.ts';
import type { Task } from '../tasks/task-events.ts';
import { createTask, deleteTask, pauseTask, resumeTask, updateTask } from '../tasks/tasks.ts';
import { type Entry, inFile, toCreate, toUpdate } from './fields.ts';
import type { Fault, ScheduleFile } from './file.ts';
import { isSettled, type Known, type Pairing, type Step } from './plan.ts';
import type { State } from './state.ts';

/** Thrown when a task is not as the plan saw it. */
class Stale extends Error {}

/**
 * Does the steps of a plan without conflicts, each as the owner of its task. Answers what was refused, all of it: then the
 * transaction must be undone. 'stale': a task has changed since it was read, and the plan holds no more.
 */
export async function applySteps(
  tx: Tx,
  file: ScheduleFile,
  state: State,
  steps: readonly Step[],
): Promise<Fault[] | 'stale'> {
  // Before any task: locks go agent → task (executions/lease.ts).
  const agents = new Set(steps.flatMap((step) => ('entry' in step ? (state.idsOf(step.entry).agent ?? []) : [])));
  for (const id of [...agents].sort((a, b) => a - b)) await holdAgent(tx, id);
  const faults: Fault[] = [];
  for (const step of steps) {
    try {
      await applyStep(tx, state, step);
    } catch (error) {
      if (error instanceof Stale) return 'stale';
      if (!(error instanceof Problem)) throw error;
      if (error.kind === 'precondition-failed' || error.kind === 'not-found') return 'stale';
      const key = 'entry' in step ? step.entry.key : (step.task.key ?? '');
      faults.push(...faultsOf(file, key, error));
    }
  }
  return faults;
}

function faultsOf(file: ScheduleFile, key: string, problem: Problem): Fault[] {
  if (!problem.errors) return [{ line: file.lineOf(key), where: key, message: problem.message.replace(/\.$/, '') }];
  return inFile(problem.errors).map(({ path, message }) => ({
    line: file.lineOf(key, path),
    where: `${key}.${path}`,
    message,
  }));
}

async function applyStep(tx: Tx, state: State, step: Step): Promise<void> {
  switch (step.kind) {
    case 'create': {
      for (const task of step.forget) await tie(tx, task, null);
      return create(tx, actorFor(state, step.entry.owner), step.entry, state.idsOf(step.entry));
    }
    case 'pair':
      if (isSettled(step)) return;
      return change(tx, actorFor(state, step.entry.owner), step, state.idsOf(step.entry));
    case 'delete': {
      const { id, version, owner } = step.task;
      return tie(tx, await deleteTask(tx, actorFor(state, owner), id, [version]), null);
    }
    case 'forget':
      return tie(tx, step.task, null);
    case 'gone':
    case 'edited':
    case 'orphan':
  }
}

type Ids = ReturnType<State['idsOf']>;

async function create(tx: Tx, actor: Actor, entry: Entry, ids: Ids): Promise<void> {
  let task = await createTask(tx, actor, toCreate(entry.fields, ids));
  if (entry.fields['status'] === 'paused') task = await pauseTask(tx, actor, task.id);
  await tie(tx, task, { key: entry.key, base: entry.fields });
}

async function change(tx: Tx, actor: Actor, { entry, task, changes, base }: Pairing, ids: Ids): Promise<void> {
  let now: Pick<Task, 'id' | 'version'> = task;
  const wanted = Object.fromEntries(changes.map(({ field, file }) => [field, file]));
  const body = toUpdate(wanted, ids);
  if (body) now = await updateTask(tx, actor, task.id, body, [task.version]);
  const { status } = wanted;
  if (status !== undefined) {
    const after = await (status === 'paused' ? pauseTask : resumeTask)(tx, actor, task.id);
    if (after.version > now.version + 1) throw new Stale();
    now = after;
  }
  await tie(tx, now, { key: entry.key, base });
}

async function tie(
  tx: Tx,
  task: Pick<Known, 'id' | 'version'>,
  to: Parameters<typeof setScheduleKey>[2],
): Promise<void> {
  if (!(await setScheduleKey(tx, task, to))) throw new Stale();
}

/** Whoever has the entry: what may be done is what its owner may, whoever runs the program. */
function actorFor({ owners }: State, email: string): Actor {
  const owner: User | undefined = owners.get(email);
  if (!owner) throw new Error(`There is no user ${email}.`);
  return {
    userId: owner.id,
    role: 'user',
    scopes: API_KEY_SCOPES,
    ip: 'local',
    userAgent: 'schedule:sync',
    requestId: 'schedule:sync',
  };
}
