import type { Database } from '../db/database.ts';
import { MEMORY_INTENTS } from '../db/schema.ts';
import type { Execution } from '../executions/schemas.ts';
import { durationMs } from '../executions/schemas.ts';
import { type NewMemory, writeMemories } from './memories.ts';
import { MEMORY_TOPIC } from './outbox.ts';

// What Muster remembers by itself. It follows the events, which tell of every run that ends and every task that changes, in
// order and once: what is remembered costs those who report nothing, and a crash in between loses nothing.

const BATCH = 500;
const OUTPUT_CHARACTERS = 2_000;
const PARAMS_CHARACTERS = 500;

interface Told {
  execution_id?: number;
  execution_status?: string;
  status: string;
  previous_status: string | null;
  skill_name: string;
}

type Ended = Pick<
  Execution,
  | 'id'
  | 'userId'
  | 'taskId'
  | 'agentId'
  | 'status'
  | 'trigger'
  | 'skillName'
  | 'params'
  | 'startedAt'
  | 'endedAt'
  | 'attempt'
> & { output: string | null; error: string | null };

/** Remembers what the next events tell of; answers whether there may be more. */
export async function captureEvents(db: Database, what: readonly string[], queued: boolean): Promise<boolean> {
  return db.transaction(async (tx) => {
    const { rows: cursors } = await tx.query<{ last: number }>({
      name: 'memory-cursor',
      text: `select last_event_id as last from memory_cursor where id = 1 for update skip locked`,
    });
    const [cursor] = cursors;
    if (!cursor) {
      // It begins now; or another process is at it.
      await tx.query({
        name: 'memory-cursor-begin',
        text: `insert into memory_cursor (id, last_event_id) select 1, coalesce(max(event_id), 0) from events on conflict do nothing`,
      });
      return false;
    }
    const { rows: events } = await tx.query<{
      event_id: number;
      user_id: number;
      task_id: number | null;
      type: string;
      data: string;
    }>({
      name: 'memory-events',
      text: `select event_id, user_id, task_id, type, data from events where event_id > $1 order by event_id limit ${BATCH}`,
      values: [cursor.last],
    });
    const last = events.at(-1);
    if (!last) return false;
    const ended: number[] = [];
    const all: NewMemory[] = [];
    for (const event of events) {
      if (event.type !== 'task_status_update') continue;
      const told = JSON.parse(event.data) as Told;
      if (told.execution_id !== undefined) {
        if (/^(success|failed|timeout)$/.test(told.execution_status ?? '')) ended.push(told.execution_id);
      } else if (what.includes('tasks') && told.status !== told.previous_status) {
        all.push({
          userId: event.user_id,
          agentId: null,
          projectId: null,
          taskId: event.task_id,
          kind: 'task_change',
          intent: 'planning',
          content: told.previous_status
            ? `The task ${event.task_id} (${told.skill_name}) went from ${told.previous_status} to ${told.status}.`
            : `The task ${event.task_id} (${told.skill_name}) was created: ${told.status}.`,
        });
      }
    }
    if (what.includes('executions') && ended.length > 0) {
      const { rows } = await tx.query<Record<string, unknown>>({
        name: 'memory-executions',
        text: `
          select id, user_id as "userId", task_id as "taskId", agent_id as "agentId", status, trigger, skill_name as "skillName",
            params, started_at as "startedAt", ended_at as "endedAt", attempt,
            right(output_text, ${OUTPUT_CHARACTERS}) as output, right(error_text, ${OUTPUT_CHARACTERS}) as error
          from executions where id = any($1::bigint[]) and trigger <> 'activity' and status in ('success', 'failed', 'timeout')`,
        values: [ended],
      });
      all.push(...rows.map((row) => runMemory(row as unknown as Ended, 'execution')));
    }
    const written = await writeMemories(tx, all, { queued, mineForMs: 0 });
    tx.write({
      name: 'memory-cursor-move',
      text: `update memory_cursor set last_event_id = $1 where id = 1`,
      values: [last.event_id],
    });
    if (queued && written.length > 0) tx.ring(MEMORY_TOPIC);
    return events.length === BATCH;
  });
}

/** What is remembered of a run that ended: what ran, how it went, and the end of what it said. */
export function runMemory(run: Ended, kind: 'execution' | 'activity'): NewMemory {
  const took = durationMs(run);
  const params = JSON.stringify(run.params);
  const { intent } = run.params;
  const lines = [
    `Ran ${run.skillName}: ${run.status}${took === null ? '' : ` in ${(took / 1000).toFixed(1)} s`}${run.attempt > 1 ? `, attempt ${run.attempt}` : ''}.`,
    ...(params === '{}' ? [] : [`Params: ${params.slice(0, PARAMS_CHARACTERS).toWellFormed()}`]),
    ...(run.error ? [`Error: ${run.error}`] : []),
    ...(run.output ? [`Output: ${run.output}`] : []),
  ];
  return {
    userId: run.userId,
    agentId: run.agentId,
    projectId: null,
    taskId: run.taskId,
    executionId: run.id,
    kind,
    // A task may say by its params why it is run.
    intent: MEMORY_INTENTS.find((known) => known === intent) ?? 'implementation',
    content: lines.join('\n').toWellFormed(),
    metadata: { skill: run.skillName, outcome: run.status },
  };
}

/** What is remembered of what an agent reported of its own accord; undefined while it goes on. */
export function activityMemory(run: Execution): NewMemory | undefined {
  if (run.status === 'running' || run.status === 'queued') return undefined;
  const end = (text: string | null) => text?.slice(-OUTPUT_CHARACTERS).toWellFormed() ?? null;
  return runMemory({ ...run, output: end(run.outputText), error: end(run.errorText) }, 'activity');
}
