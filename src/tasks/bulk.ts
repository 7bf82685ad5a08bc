import { asc, inArray } from 'drizzle-orm';
import { z } from 'zod';
import type { Tx } from '../db/database.ts';
import { tasks } from '../db/schema.ts';
import { cancelExecution, openExecutionsOf } from '../executions/executions.ts';
import { type Actor, mayAccess } from '../http/access.ts';
import { Problem } from '../http/problem.ts';
import { id } from '../http/validation.ts';
import { lockTask, matchingTasks } from './queries.ts';
import { createTaskBody, runTaskParams, taskQuery } from './schemas.ts';
import type { Task } from './task-events.ts';
import { taskTransition } from './task-state.ts';
import { deleteTask, pauseTask, resumeTask, runTask } from './tasks.ts';

// One deed to many tasks, in one transaction: either all that can be done of it happens, or nothing does. A task that it
// cannot be done to is no reason to leave the others: the answer says of each what became of it.

const ACTIONS = ['pause', 'resume', 'delete', 'run', 'cancel'] as const;
const MOST = 1_000;

const { status, search } = taskQuery.shape;
const { skill_name } = createTaskBody.shape;

export const bulkBody = z
  .strictObject({
    action: z.enum(ACTIONS, { error: `must be ${ACTIONS.join(', ')}` }).meta({
      description: 'cancel: the queued runs of the tasks are cancelled, and those under way asked to stop.',
    }),
    ids: z
      .array(id)
      .min(1)
      .max(MOST)
      .refine((ids) => new Set(ids).size === ids.length, { error: 'must not name a task twice' })
      .optional(),
    filter: z
      .strictObject({ status, skill_name, project_id: id, agent_id: id, search })
      .partial()
      .refine((filter) => Object.values(filter).some((value) => value !== undefined), {
        error: 'must have at least one field, since an empty filter would mean every task',
      })
      .optional()
      .meta({ description: `The same as of GET /tasks; the first ${MOST} by id that it lets through.` }),
    params: runTaskParams.optional().meta({ description: 'For run: instead of those of each task.' }),
    dry_run: z.boolean().default(false).meta({ description: 'Only say what would happen.' }),
  })
  .superRefine((body, context) => {
    if ((body.ids === undefined) === (body.filter === undefined)) {
      context.addIssue({ code: 'custom', path: ['ids'], message: 'must be given, or filter, but not both' });
    }
    if (body.params !== undefined && body.action !== 'run') {
      context.addIssue({ code: 'custom', path: ['params'], message: 'goes with the action run alone' });
    }
  })
  .meta({ examples: [{ action: 'pause', filter: { skill_name: 'report', status: 'pending' }, dry_run: true }] });
export type BulkBody = z.output<typeof bulkBody>;

const RESULTS = ['changed', 'unchanged', 'not_found', 'forbidden', 'conflict'] as const;

export const bulkAnswer = z
  .object({
    action: z.enum(ACTIONS),
    dry_run: z.boolean(),
    matched: z.int().meta({ description: 'How many tasks there are: named, or let through by the filter.' }),
    changed: z.int().meta({ description: 'How many of them were changed, or would be.' }),
    remaining: z.int().meta({ description: 'How many the filter lets through beyond those of this answer.' }),
    results: z.array(
      z.object({
        task_id: id,
        result: z.enum(RESULTS),
        execution_id: id.optional().meta({ description: 'The run that was queued.' }),
        detail: z.string().optional(),
      }),
    ),
  })
  .meta({ id: 'BulkAnswer' });

type Result = z.input<typeof bulkAnswer>['results'][number];

/** Does one thing to many tasks, in rising order of their ids, so that two who do never wait for each other. */
export async function bulkTasks(tx: Tx, actor: Actor, body: BulkBody): Promise<z.input<typeof bulkAnswer>> {
  const { action, dry_run } = body;
  const { ids, matched } = body.ids
    ? { ids: body.ids.toSorted((a, b) => a - b), matched: body.ids.length }
    : await matchingTasks(tx, actor, body.filter ?? {}, MOST);
  const found = await tx.orm
    .select({ id: tasks.id, userId: tasks.userId, status: tasks.status })
    .from(tasks)
    .where(inArray(tasks.id, ids))
    .orderBy(asc(tasks.id));
  const byId = new Map(found.map((task) => [task.id, task]));
  const open = action === 'cancel' ? await openExecutionsOf(tx, ids) : new Map<number, number[]>();
  const results: Result[] = [];
  for (const taskId of ids) {
    const task = byId.get(taskId);
    if (!task || task.status === 'deleted') results.push({ task_id: taskId, result: 'not_found' });
    else if (!mayAccess(actor, task.userId)) results.push({ task_id: taskId, result: 'forbidden' });
    else {
      const runs = open.get(taskId) ?? [];
      const result = dry_run ? foresee(action, task.status, runs) : await apply(tx, actor, body, taskId, runs);
      results.push({ task_id: taskId, ...result });
    }
  }
  const changed = results.filter(({ result }) => result === 'changed').length;
  return { action, dry_run, matched, changed, remaining: matched - ids.length, results };
}

/** What would become of a task in that state. */
function foresee(action: BulkBody['action'], status: Task['status'], runs: readonly number[]): Pick<Result, 'result'> {
  switch (action) {
    case 'pause':
      if (status === 'disabled') return { result: 'unchanged' };
      return { result: taskTransition(status, 'paused') ? 'changed' : 'conflict' };
    case 'resume':
      return { result: status === 'disabled' ? 'changed' : 'unchanged' };
    case 'cancel':
      return { result: runs.length > 0 ? 'changed' : 'unchanged' };
    case 'delete':
    case 'run':
      return { result: 'changed' };
  }
}

async function apply(
  tx: Tx,
  actor: Actor,
  { action, params }: BulkBody,
  id: number,
  runs: readonly number[],
): Promise<Omit<Result, 'task_id'>> {
  try {
    if (action === 'run') {
      return { result: 'changed', execution_id: (await runTask(tx, actor, id, params)).id };
    }
    if (action === 'delete') {
      await deleteTask(tx, actor, id, undefined);
      return { result: 'changed' };
    }
    if (action === 'cancel') {
      for (const run of runs) await cancelExecution(tx, actor, run);
      return { result: runs.length > 0 ? 'changed' : 'unchanged' };
    }
    const { version: before } = await lockTask(tx, actor, id);
    const { version: after } = await (action === 'pause' ? pauseTask(tx, actor, id) : resumeTask(tx, actor, id));
    return { result: after === before ? 'unchanged' : 'changed' };
  } catch (error) {
    // Thrown before anything of the task was written: the others go on.
    if (!(error instanceof Problem)) throw error;
    if (error.status === 409) return { result: 'conflict', detail: error.message };
    if (error.status === 404) return { result: 'not_found' };
    throw error;
  }
}
