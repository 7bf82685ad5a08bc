import { and, asc, eq, gt, gte, inArray, lt, type SQL, sql } from 'drizzle-orm';
import { z } from 'zod';
import type { Queryable, Tx } from '../db/database.ts';
import { EXECUTION_STATUSES, executions, tasks } from '../db/schema.ts';
import { type Actor, mayAccess, ownedBy } from '../http/access.ts';
import { id, instant } from '../http/validation.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { cancelExecution } from './executions.ts';
import { notReplayable, queueReplays } from './replay.ts';
import type { Execution } from './schemas.ts';

// One deed to many runs, in one transaction. A run that it cannot be done to is no reason to leave the others: the answer
// says of each what became of it. Locks go task → run as everywhere (lease.ts); queued runs, which a claim may hold when it
// comes to their tasks, are taken with SKIP LOCKED, and one that an agent is taking at this moment is left to it.

const ACTIONS = ['cancel', 'replay'] as const;
const MOST = 1_000;

const filter = z
  .strictObject({
    task_id: id,
    agent_id: id,
    project_id: id,
    status: z.enum(EXECUTION_STATUSES),
    skill_name: z.string().regex(/^[a-zA-Z0-9_-]{1,255}$/, { error: 'must be 1 to 255 letters, digits, _ or -' }),
    from: instant.meta({ description: 'Made not before this.' }),
    to: instant.meta({ description: 'Made before this.' }),
    after_id: id.meta({ description: 'Only runs with a larger id: where the call before left off.' }),
  })
  .partial();

export const bulkRunsBody = z
  .strictObject({
    action: z.enum(ACTIONS, { error: `must be ${ACTIONS.join(' or ')}` }).meta({
      description:
        'cancel: what is queued is cancelled, what is under way asked to stop. replay: what has ended is run again.',
    }),
    ids: z
      .array(id)
      .min(1)
      .max(MOST)
      .refine((ids) => new Set(ids).size === ids.length, { error: 'must not name a run twice' })
      .optional(),
    filter: filter
      .refine(({ after_id, ...fields }) => Object.values(fields).some((value) => value !== undefined), {
        error: 'must have at least one field besides after_id, since an empty filter would mean every run',
      })
      .optional()
      .meta({
        description: `The first ${MOST} by id that it lets through, of those that the action is for: open ones to cancel, ended ones to replay.`,
      }),
    dry_run: z.boolean().default(false).meta({ description: 'Only say what would happen.' }),
  })
  .superRefine((body, context) => {
    if ((body.ids === undefined) !== (body.filter === undefined)) return;
    context.addIssue({ code: 'custom', path: ['ids'], message: 'must be given, or filter, but not both' });
  })
  .meta({
    'x-examples': {
      replay: {
        summary: 'What failed in an outage, once more',
        value: {
          action: 'replay',
          filter: { status: 'failed', from: '2026-11-22T09:00:00Z', to: '2026-11-22T11:00:00Z' },
          dry_run: true,
        },
      },
    },
  });
export type BulkRunsBody = z.output<typeof bulkRunsBody>;

export const bulkRunsAnswer = z
  .object({
    action: z.enum(ACTIONS),
    dry_run: z.boolean(),
    matched: z.int().meta({ description: 'How many runs there are: named, or let through by the filter.' }),
    changed: z.int().meta({ description: 'How many of them were cancelled or replayed, or would be.' }),
    remaining: z
      .int()
      .meta({ description: 'How many the filter lets through beyond those of this answer: go on with after_id.' }),
    results: z.array(
      z.object({
        execution_id: id,
        result: z.enum(['changed', 'unchanged', 'not_found', 'forbidden', 'conflict']),
        new_execution_id: id.optional().meta({ description: 'The run that was queued.' }),
        detail: z.string().optional(),
      }),
    ),
  })
  .meta({ id: 'BulkRunsAnswer' });

type Result = z.input<typeof bulkRunsAnswer>['results'][number];

interface Found {
  id: number;
  task_id: number;
  user_id: number;
  status: Execution['status'];
  cancel_requested: boolean;
  task_deleted: boolean;
}

/** Served by the primary keys. */
const FIND = {
  name: 'runs-bulk-find',
  text: `
    select e.id, e.task_id, e.user_id, e.status, e.cancel_requested, t.status = 'deleted' as task_deleted
    from executions e join tasks t on t.id = e.task_id where e.id = any($1::bigint[])`,
};

/** Cancels or replays many runs, in rising order of their ids. */
export async function bulkExecutions(
  tx: Tx,
  actor: Actor,
  body: BulkRunsBody,
): Promise<z.input<typeof bulkRunsAnswer>> {
  const { action, dry_run } = body;
  const { ids, matched } = body.ids
    ? { ids: body.ids.toSorted((a, b) => a - b), matched: body.ids.length }
    : await matchingRuns(tx, actor, action, body.filter ?? {});
  const { rows } = await tx.query<Found>({ ...FIND, values: [ids] });
  const found = new Map(rows.map((run) => [run.id, run]));
  const results = new Map<number, Omit<Result, 'execution_id'>>();
  for (const id of ids) {
    const run = found.get(id);
    if (!run) results.set(id, { result: 'not_found' });
    else if (!mayAccess(actor, run.user_id)) results.set(id, { result: 'forbidden' });
    else results.set(id, foresee(action, run));
  }
  const doable = ids.flatMap((id) => (results.get(id)?.result === 'changed' ? (found.get(id) ?? []) : []));
  if (!dry_run && doable.length > 0) {
    const done = await (action === 'cancel' ? cancelAll : replayAll)(tx, actor, doable);
    for (const [id, result] of done) results.set(id, result);
  }
  const list = ids.flatMap((id) => {
    const result = results.get(id);
    return result ? [{ execution_id: id, ...result }] : [];
  });
  const changed = list.filter(({ result }) => result === 'changed').length;
  return { action, dry_run, matched, changed, remaining: matched - ids.length, results: list };
}

/** What would become of a run in that state. */
function foresee(action: BulkRunsBody['action'], run: Found): Pick<Result, 'result' | 'detail'> {
  if (action === 'replay') {
    const detail = notReplayable(run.id, run.status, run.task_deleted);
    return detail === undefined ? { result: 'changed' } : { result: 'conflict', detail };
  }
  if (run.status === 'queued') return { result: 'changed' };
  if (run.status === 'running') return { result: run.cancel_requested ? 'unchanged' : 'changed' };
  if (run.status === 'cancelled') return { result: 'unchanged' };
  return {
    result: 'conflict',
    detail: `The execution ${run.id} has ended (${run.status}): there is nothing to cancel.`,
  };
}

type Done = [id: number, result: Omit<Result, 'execution_id'>];

async function cancelAll(tx: Tx, actor: Actor, runs: readonly Found[]): Promise<Done[]> {
  await lockTasks(
    tx,
    runs.map(({ task_id }) => task_id),
  );
  const ids = runs.map(({ id }) => id);
  const held = new Set<number>();
  for (const lock of [
    `status = 'running' order by id for update`,
    `status = 'queued' order by id for update skip locked`,
  ]) {
    const { rows } = await tx.query<{ id: number }>({
      text: `select id from executions where id = any($1::bigint[]) and ${lock}`,
      values: [ids],
    });
    for (const { id } of rows) held.add(id);
  }
  const done: Done[] = [];
  for (const id of ids) {
    if (held.has(id)) {
      await cancelExecution(tx, actor, id);
      done.push([id, { result: 'changed' }]);
    } else {
      const detail = `The execution ${id} was taken or ended at this moment: look at it, and try again.`;
      done.push([id, { result: 'conflict', detail }]);
    }
  }
  return done;
}

async function replayAll(tx: Tx, actor: Actor, runs: readonly Found[]): Promise<Done[]> {
  const locked = await lockTasks(
    tx,
    runs.map(({ task_id }) => task_id),
  );
  const alive = runs.filter(({ task_id }) => locked.get(task_id)?.status !== 'deleted');
  const made = await queueReplays(
    tx,
    actor,
    locked,
    alive.map(({ id }) => id),
  );
  const byOriginal = new Map(made.map((run) => [run.replayOf, run.id]));
  return runs.map(({ id, status }): Done => {
    const replay = byOriginal.get(id);
    if (replay !== undefined) return [id, { result: 'changed', new_execution_id: replay }];
    return [id, { result: 'conflict', detail: notReplayable(id, status, true) }];
  });
}

/** The runs that an action is for and a filter lets through, lowest id first, so many at the most; and how many there are. */
async function matchingRuns(
  q: Queryable,
  actor: Actor,
  action: BulkRunsBody['action'],
  { task_id, agent_id, project_id, status, skill_name, from, to, after_id }: z.output<typeof filter>,
): Promise<{ ids: number[]; matched: number }> {
  const meant = action === 'cancel' ? [`queued`, `running`] : [`success`, `failed`, `timeout`, `cancelled`];
  const ofProject = (project: number): SQL =>
    inArray(executions.taskId, q.orm.select({ id: tasks.id }).from(tasks).where(eq(tasks.projectId, project)));
  const where = and(
    // Written out, so that the planner sees that the partial indexes apply.
    sql`${executions.status} in (${sql.raw(meant.map((one) => `'${one}'`).join(', '))})`,
    ownedBy(actor, executions.userId),
    task_id === undefined ? undefined : eq(executions.taskId, task_id),
    agent_id === undefined ? undefined : eq(executions.agentId, agent_id),
    project_id === undefined ? undefined : ofProject(project_id),
    status === undefined ? undefined : eq(executions.status, status),
    skill_name === undefined ? undefined : eq(executions.skillName, skill_name),
    from === undefined ? undefined : gte(executions.createdAt, from),
    to === undefined ? undefined : lt(executions.createdAt, to),
    after_id === undefined ? undefined : gt(executions.id, after_id),
  );
  const rows = await q.orm
    .select({ id: executions.id })
    .from(executions)
    .where(where)
    .orderBy(asc(executions.id))
    .limit(MOST);
  return {
    ids: rows.map(({ id }) => id),
    matched: rows.length < MOST ? rows.length : await q.orm.$count(executions, where),
  };
}
