import type { Queryable, Tx } from '../db/database.ts';
import type { Actor } from '../http/access.ts';
import { conflict } from '../http/problem.ts';
import { emitEvents } from '../realtime/events.ts';
import { taskStatusUpdate } from '../tasks/task-events.ts';
import type { TaskStatus } from '../tasks/task-state.ts';
import { requireExecution } from './executions.ts';
import { type Execution, MAX_OUTPUT_BYTES } from './schemas.ts';

// Output that is sent while a run goes on, and how all of it is read.
//
// What was sent is counted in characters (code points, as Postgres counts), and a piece says where it begins: one that comes
// twice, since its answer was lost, is known by that and left out. Of one run the first MAX_OUTPUT_BYTES are kept, in a few
// rows of PIECE_BYTES or more however small the pieces are; when the run ends, they become its output_text, unless the
// report has one of its own. A retry is another run, so pieces of two agents never mix.

/** Pieces are put together up to this size. What it costs is that it is written again as often as it grows. */
const PIECE_BYTES = 8_192;
/** What the column that counts can hold. */
const MAX_CHARACTERS = 2_147_483_647;

/** Fenced by the token, and locked so that two pieces of a run come one after the other. */
const HOLD = {
  name: 'output-hold',
  text: `
    select e.streamed_length, e.task_id, e.user_id, e.agent_id, e.skill_name, t.project_id, t.status as task_status, t.next_run_at
    from executions e join tasks t on t.id = e.task_id
    where e.id = $1 and e.lease_token = $2 and e.status = 'running' for no key update of e`,
};

/** The last row, and how much there is in all. Served by the primary key. */
const LAST = {
  name: 'output-last',
  text: `
    select starts_at, length, octet_length(text) as bytes, (sum(octet_length(text)) over ())::int as all_bytes
    from execution_output where execution_id = $1 order by starts_at desc limit 1`,
};
const ADD = {
  name: 'output-add',
  text: `insert into execution_output (execution_id, starts_at, length, text) values ($1, $2, $3, $4)`,
};
const GROW = {
  name: 'output-grow',
  text: `update execution_output set length = length + $3::int, text = text || $4 where execution_id = $1 and starts_at = $2`,
};
const COUNT = {
  name: 'output-count',
  text: `update executions set streamed_length = $2 where id = $1`,
};

interface Held {
  streamed_length: number;
  task_id: number;
  user_id: number;
  agent_id: number;
  skill_name: string;
  project_id: number | null;
  task_status: TaskStatus;
  next_run_at: Date | null;
}

/**
 * Appends to what the agent has sent of a run's output, and tells of it. `offset` is where the piece begins; of one that
 * was known in part only the rest is new. Throws a 409 for a gap, naming the offset that is expected, and for a lease that
 * is not the caller's. Answers where the next piece begins, and whether some of the output is not kept.
 */
export async function appendOutput(
  tx: Tx,
  actor: Actor,
  id: number,
  piece: { leaseToken: string; text: string; offset?: number | undefined },
): Promise<{ nextOffset: number; truncated: boolean }> {
  await requireExecution(tx, actor, id);
  const { rows } = await tx.query<Held>({ ...HOLD, values: [id, piece.leaseToken] });
  const [run] = rows;
  if (!run) throw conflict(`The lease on execution ${id} is not yours any more: stop the work and claim again.`);
  const { streamed_length: known } = run;
  const offset = piece.offset ?? known;
  if (offset > known) {
    throw conflict(`The output of execution ${id} is known up to ${known}: send what follows with offset ${known}.`);
  }
  const last = await tx.query<{ starts_at: number; length: number; bytes: number; all_bytes: number }>({
    ...LAST,
    values: [id],
  });
  const tail = last.rows[0] ?? { starts_at: 0, length: 0, bytes: PIECE_BYTES, all_bytes: 0 };
  // What was left out once leaves no place for what follows.
  const whole = tail.starts_at + tail.length === known;
  const fresh = skip(piece.text, known - offset);
  if (fresh === '') return { nextOffset: known, truncated: !whole };

  const kept = whole ? head(fresh, MAX_OUTPUT_BYTES - tail.all_bytes) : '';
  if (kept !== '') {
    const length = characters(kept);
    const grows = tail.bytes + Buffer.byteLength(kept) <= PIECE_BYTES;
    tx.write(
      grows ? { ...GROW, values: [id, tail.starts_at, length, kept] } : { ...ADD, values: [id, known, length, kept] },
    );
  }
  const nextOffset = Math.min(MAX_CHARACTERS, known + characters(fresh));
  tx.write({ ...COUNT, values: [id, nextOffset] });
  const { task_status: status } = run;
  emitEvents(tx, [
    taskStatusUpdate(
      {
        id: run.task_id,
        userId: run.user_id,
        projectId: run.project_id,
        skillName: run.skill_name,
        status,
        nextRunAt: run.next_run_at,
      },
      {
        previousStatus: status,
        executionId: id,
        executionStatus: 'running',
        agentId: run.agent_id,
        output: fresh,
        outputTruncated: kept !== fresh,
      },
    ),
  ]);
  return { nextOffset, truncated: kept !== fresh };
}

/** How many characters (code points) a text has. */
function characters(text: string): number {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** A text without its first `count` characters. */
function skip(text: string, count: number): string {
  let at = 0;
  for (const character of text) {
    if (count-- <= 0) break;
    at += character.length;
  }
  return text.slice(at);
}

/** The beginning of a text, at most `maxBytes` bytes of UTF-8, cut between characters. */
function head(text: string, maxBytes: number): string {
  const bytes = Buffer.from(text, 'utf8');
  if (bytes.length <= maxBytes) return text;
  let end = Math.max(0, maxBytes);
  while (end > 0 && ((bytes[end] ?? 0) & 0b1100_0000) === 0b1000_0000) end--;
  return bytes.toString('utf8', 0, end);
}

/** The end of a text, at most MAX_OUTPUT_BYTES of UTF-8, cut between characters. */
export function cut(text: string | undefined): { text: string; truncated: boolean } | undefined {
  if (text === undefined) return undefined;
  const bytes = Buffer.from(text, 'utf8');
  if (bytes.length <= MAX_OUTPUT_BYTES) return { text, truncated: false };
  let start = bytes.length - MAX_OUTPUT_BYTES;
  while (((bytes[start] ?? 0) & 0b1100_0000) === 0b1000_0000) start++;
  return { text: bytes.toString('utf8', start), truncated: true };
}

/**
 * Makes what was streamed of a run that has just ended its output, unless its report had one; the pieces have served then.
 * No more can come: whoever sends one waits for this transaction, and finds the run ended.
 */
export async function keepStreamed(tx: Tx, run: Execution): Promise<Execution> {
  if (run.streamedLength === 0) return run;
  const { rows } = await tx.query<{ starts_at: number; text: string }>({
    name: 'output-take',
    text: `delete from execution_output where execution_id = $1 returning starts_at, text`,
    values: [run.id],
  });
  if (run.outputText !== null) return run;
  const outputText = rows
    .toSorted((a, b) => a.starts_at - b.starts_at)
    .map(({ text }) => text)
    .join('');
  const outputTruncated = run.outputTruncated || characters(outputText) < run.streamedLength;
  tx.write({
    name: 'output-keep',
    text: `update executions set output_text = $2, output_truncated = $3 where id = $1`,
    values: [run.id, outputText, outputTruncated],
  });
  return { ...run, outputText, outputTruncated };
}

/** The rows that hold some of a range, or the range of the whole, in characters. Served by the primary keys. */
const RANGE = {
  name: 'output-range',
  text: `
    select e.status in ('queued', 'running') as open,
      coalesce(char_length(e.output_text), (
        select o.starts_at + o.length from execution_output o where o.execution_id = e.id order by o.starts_at desc limit 1
      ), 0) as length,
      coalesce(substring(e.output_text from $2::int + 1 for $3::int), (
        select substring(string_agg(o.text, '' order by o.starts_at) from $2::int - min(o.starts_at) + 1 for $3::int)
        from execution_output o
        where o.execution_id = e.id and o.starts_at < $2::bigint + $3::int and o.starts_at + o.length > $2::int
      ), '') as text
    from executions e where e.id = $1`,
};

/**
 * A range of a run's output, counted in characters, while the run goes on and after; by the owner rule of the run. `complete`
 * says that the run has ended, so that nothing follows what is there.
 */
export async function readOutput(
  q: Queryable,
  actor: Actor,
  id: number,
  range: { offset: number; limit: number },
): Promise<{ text: string; nextOffset: number; length: number; complete: boolean }> {
  await requireExecution(q, actor, id);
  const { rows } = await q.query<{ open: boolean; length: number; text: string }>({
    ...RANGE,
    values: [id, range.offset, range.limit],
  });
  const { open, length, text } = rows[0] ?? { open: false, length: 0, text: '' };
  return { text, length, nextOffset: range.offset + characters(text), complete: !open };
}
