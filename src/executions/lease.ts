import { agentActivity } from '../agents/agent-events.ts';
import { type Agent, lockAgents } from '../agents/agents.ts';
import { changedFields, recordAudits } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { rowsOf } from '../db/rows.ts';
import { agents } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { emitEvents } from '../realtime/events.ts';
import { lockTasks } from '../tasks/locked-tasks.ts';
import { taskStatusUpdate } from '../tasks/task-events.ts';
import type { TaskStatus } from '../tasks/task-state.ts';
import { LOCK_AGENT, LOCK_OWNERS, PICK_OF_ALL, PICK_OF_FREE_OWNER, PICK_OF_LIMITED_OWNER } from './pick.ts';
import { QUEUE_TOPIC, queueDetail } from './queue.ts';
import { settle } from './settle.ts';

// Leases.
//
// A claim gives an agent a run until `lease_expires_at`, under a fencing token made for this one claim. It lasts as long as
// the task says (heartbeat_timeout_seconds), else LEASE_SECONDS. Heartbeats move the end; when it passes, the reaper
// (scheduler/reaper.ts) takes the run back. Whatever an agent says of a run is one UPDATE that asks for `status = 'running'`
// and its token: who lost the lease matches no row and changes nothing. What it then reports is kept apart (orphans.ts).
// A lease never outlasts the run's deadline by more than a grace, in which the agent may still say that it ran out of time.
//
// Locks are taken in one order everywhere, agent → claims of an owner → limits → task → run, and those of one kind by rising
// id. The exception is the claim, which holds queued runs when it comes to their tasks; whoever else wants queued runs takes
// them with SKIP LOCKED. The claims of an owner (pick.ts) are locked by claims and by who changes limits, who wants nothing
// after the limits.

/** How long after its deadline an agent may still report. */
export const DEADLINE_GRACE_SECONDS = 10;

export interface Claimed {
  executionId: number;
  taskId: number;
  skillName: string;
  params: Record<string, unknown>;
  attempt: number;
  scheduledFor: Date;
  leaseToken: string;
  leaseExpiresAt: Date;
  timeoutSeconds: number;
}

interface ClaimedRow {
  id: number;
  task_id: number;
  user_id: number;
  skill_name: string;
  params: Record<string, unknown>;
  attempt: number;
  scheduled_for: Date;
  lease_token: string;
  lease_expires_at: Date;
  timeout_seconds: number;
  project_id: number | null;
  next_run_at: Date | null;
  previous_status: TaskStatus;
  task_status: TaskStatus;
}

/** A claim of the runs that `pick` finds (pick.ts). */
const claimStatement = (name: string, pick: string) => ({
  name,
  text: `${pick}, taken as (
      update executions e set
        status = 'running', agent_id = $1, lease_token = gen_random_uuid(), started_at = now(),
        deadline_at = now() + e.timeout_seconds * interval '1 second',
        lease_expires_at = now()
          + least(coalesce(e.heartbeat_timeout_seconds, $7::int), e.timeout_seconds + $8::int) * interval '1 second'
      from picked where e.id = picked.id
      returning e.*
    ), locked as (
      select t.id, t.status, t.project_id, t.next_run_at from tasks t
      where t.id in (select task_id from taken) order by t.id for no key update
    ), started as (
      update tasks t set
        last_run_at = now(),
        status = case when locked.status in ('pending', 'completed', 'failed') then 'running' else locked.status end
      from locked where t.id = locked.id
      returning t.id, t.status as task_status, locked.status as previous_status, t.project_id, t.next_run_at
    ), busy as (
      update agents set status = 'busy', last_active_at = now() where id = $1 and exists (select from taken)
    )
    select taken.id, taken.task_id, taken.user_id, taken.skill_name, taken.params, taken.attempt, taken.scheduled_for,
      taken.lease_token, taken.lease_expires_at, taken.timeout_seconds,
      started.project_id, started.next_run_at, started.previous_status, started.task_status
    from taken join started on started.id = taken.task_id
    order by taken.priority desc, taken.available_at, taken.id`,
});
const agentOf = rowsOf(agents);
const CLAIM_OF_FREE_OWNER = claimStatement('claim-own', PICK_OF_FREE_OWNER);
const CLAIM_OF_LIMITED_OWNER = claimStatement('claim-own-limited', PICK_OF_LIMITED_OWNER);
const CLAIM_OF_ALL = claimStatement('claim-shared', PICK_OF_ALL);

/** What an agent asks for. */
interface Wish {
  max: number;
  skills?: readonly string[] | undefined;
  leaseSeconds: number;
}

/**
 * Leases up to `max` runs to an agent, as many as its max_concurrency and the limits of their owners leave free, by what the
 * registry says of it now; none when there are none. `closed` says that there will be none: it drains, or was removed;
 * `outrun` that there were some, and others took them first: another transaction may have more luck.
 */
export async function claimExecutions(
  tx: Tx,
  actor: Actor,
  agentId: number,
  wish: Wish,
): Promise<{ claimed: Claimed[]; closed: boolean; outrun: boolean }> {
  const locked = await tx.query<Record<string, unknown> & { limited: boolean }>({ ...LOCK_AGENT, values: [agentId] });
  const agent = locked.rows[0] && agentOf(locked.rows[0]);
  if (!agent || agent.draining) return { claimed: [], closed: true, outrun: false };
  const { rows, outrun } = await take(tx, agent, locked.rows[0]?.limited ?? false, wish);
  if (rows.length === 0) return { claimed: [], closed: false, outrun };
  recordTaking(tx, actor, rows, { status: 'queued', agentId: null }, { status: 'running', agentId });
  emitEvents(
    tx,
    rows.flatMap((row) => [
      taskStatusUpdate(
        {
          id: row.task_id,
          userId: row.user_id,
          projectId: row.project_id,
          skillName: row.skill_name,
          status: row.task_status,
          nextRunAt: row.next_run_at,
        },
        {
          previousStatus: row.previous_status,
          executionId: row.id,
          executionStatus: 'running',
          agentId: agent.id,
        },
      ),
      agentActivity({ ...agent, status: 'busy' }, 'claimed', { taskId: row.task_id, executionId: row.id }),
    ]),
  );
  const claimed = rows.map((row) => ({
    executionId: row.id,
    taskId: row.task_id,
    skillName: row.skill_name,
    params: row.params,
    attempt: row.attempt,
    scheduledFor: row.scheduled_for,
    leaseToken: row.lease_token,
    leaseExpiresAt: row.lease_expires_at,
    timeoutSeconds: row.timeout_seconds,
  }));
  return { claimed, closed: false, outrun: false };
}

/** Takes the runs themselves. `limited` says that the owner of some of them may have limits. */
async function take(
  tx: Tx,
  agent: Agent,
  limited: boolean,
  wish: Wish,
): Promise<{ rows: ClaimedRow[]; outrun: boolean }> {
  const { max, skills = null, leaseSeconds } = wish;
  const from = agent.shared ? Math.random() : agent.userId;
  const asked = (left: number) => [agent.id, from, left, agent.maxConcurrency, skills, agent.capabilities];
  let held: number[] = [];
  if (agent.shared && limited) {
    const owners = await tx.query<{ user_id: number }>({ ...LOCK_OWNERS, values: asked(max) });
    held = owners.rows.map(({ user_id }) => user_id);
  }
  const statement = agent.shared ? CLAIM_OF_ALL : limited ? CLAIM_OF_LIMITED_OWNER : CLAIM_OF_FREE_OWNER;
  const rows: ClaimedRow[] = [];
  for (;;) {
    const taken = await tx.query<ClaimedRow>({
      ...statement,
      values: [...asked(max - rows.length), leaseSeconds, DEADLINE_GRACE_SECONDS, ...(agent.shared ? [held] : [])],
    });
    rows.push(...taken.rows);
    // A skill that has come to its limit may have stood before others.
    if (!limited || taken.rows.length === 0 || rows.length === max) break;
  }
  return { rows, outrun: rows.length === 0 && held.length > 0 };
}

/**
 * Gives back runs that were claimed for a caller who had gone before the answer reached it: queued again at once, as if
 * never taken, instead of waiting a whole lease.
 */
export async function returnClaims(tx: Tx, actor: Actor, agent: Agent, claimed: readonly Claimed[]): Promise<void> {
  const locked = (await lockAgents(tx, [agent.id])).get(agent.id);
  const tasks = await lockTasks(
    tx,
    claimed.map((run) => run.taskId),
  );
  const { rows } = await tx.query<{ id: number; task_id: number; user_id: number; skill_name: string }>({
    text: `
      update executions e set status = 'queued', agent_id = null, lease_token = null, lease_expires_at = null,
        started_at = null, deadline_at = null
      from unnest($1::bigint[], $2::uuid[]) as c(id, token)
      where e.id = c.id and e.lease_token = c.token and e.status = 'running'
      returning e.id, e.task_id, e.user_id, e.skill_name`,
    values: [claimed.map((run) => run.executionId), claimed.map((run) => run.leaseToken)],
  });
  recordTaking(tx, actor, rows, { status: 'running', agentId: agent.id }, { status: 'queued', agentId: null });
  for (const row of rows) {
    const task = tasks.get(row.task_id);
    if (!task) continue;
    const run = { ...UNTOUCHED, id: row.id, skillName: row.skill_name };
    emitEvents(tx, await settle(tx, task, locked, run));
    tx.ring(QUEUE_TOPIC, queueDetail({ userId: row.user_id, skillName: row.skill_name }));
  }
}

/** Notes in the audit log that runs came to an agent, or back from it. */
function recordTaking(
  tx: Tx,
  actor: Actor,
  runs: readonly { id: number; user_id: number }[],
  before: object,
  after: object,
): void {
  recordAudits(
    tx,
    actor,
    runs.map((run) => ({
      operation: 'UPDATE',
      entityType: 'execution',
      entityId: run.id,
      ownerId: run.user_id,
      changedFields: changedFields(before, after),
    })),
  );
}

/** What is to be told of a run that was given back. */
const UNTOUCHED = {
  status: 'queued',
  cause: null,
  agentId: null,
  outputText: null,
  outputTruncated: false,
  errorText: null,
  startedAt: null,
  endedAt: null,
} as const;
