import { markSilentAgents } from '../agents/agents.ts';
import { expireTickets } from '../auth/tickets.ts';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import { QUEUE_TOPIC, queueDetail, RETRY_TOPIC } from '../executions/queue.ts';
import { expireAnswers } from '../http/idempotency.ts';
import { isDatabaseAway } from '../http/problem.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import { startLoop } from '../platform/loop.ts';
import { SCHEDULE_TOPIC } from '../tasks/next-times.ts';
import { fireDue } from './fire.ts';
import { markOverdue } from './overdue.ts';
import { noteQuiet } from './quiet.ts';
import { endExpired, reapLeases } from './reaper.ts';
import { retention } from './retention.ts';

// The loops that make things happen without anybody asking. Every process runs them; the work is shared by row locks, so
// there is no leader to lose. Each loop sleeps until there is something to do: until the next tick, or the end of a
// backoff, as the database's clock has it; and is woken when an earlier one comes up.

/** The longest sleep: bounds what a lost ring or a jump of the database's clock can cost. */
const MAX_SLEEP_MS = 5_000;
const REAP_EVERY_MS = 1_000;
const EXPIRE_EVERY_MS = 60_000;
const EXPIRE_BATCH = 1_000;

export interface Scheduler {
  /** Ends the loops after what they are doing; the second call waits for the first. */
  stop(): Promise<void>;
}

/**
 * Starts firing due tasks, noting ticks that do not run, offering runs whose backoff is over, reaping lost leases, noticing
 * silent agents and tasks that did not succeed in time, and deleting what is kept no longer: answers to Idempotency-Keys,
 * runs, ticks.
 */
export function startScheduler(deps: { db: Database; bus: Bus; logger: Logger; config: Config }): Scheduler {
  const { db, bus, config } = deps;
  const log = (error: unknown) => {
    if (isDatabaseAway(error)) deps.logger.warn('the scheduler waits for the database');
    else deps.logger.error({ err: error }, 'the scheduler failed');
  };

  const firing = startTimed(
    bus,
    log,
    async () => (await fireDue(db)).more,
    () => nextAt(db, NEXT_RUN),
  );
  const noting = startTimed(
    bus,
    log,
    async () => (await noteQuiet(db)).more,
    () => nextAt(db, NEXT_QUIET),
  );

  let offeredUntil = new Date(0);
  const offering = startLoop(log, async () => {
    const { until, inMs } = await offerDueRetries(db, bus, offeredUntil);
    offeredUntil = until;
    return Math.min(inMs, MAX_SLEEP_MS);
  });
  // A failed run is followed by a retry that may be due before this loop wakes by itself.
  const offRetry = bus.on(RETRY_TOPIC, () => offering.wake());

  const reaping = startLoop(log, async () => {
    const reaped = (await reapLeases(db)) + (await endExpired(db));
    const silent = await db.transaction((tx) => markSilentAgents(tx, config.AGENT_OFFLINE_AFTER_SECONDS));
    return reaped > 0 || silent > 0 ? 0 : REAP_EVERY_MS;
  });
  const expiring = startLoop(log, async () =>
    Math.max(await expireAnswers(db, EXPIRE_BATCH), await expireTickets(db, EXPIRE_BATCH)) === EXPIRE_BATCH
      ? 0
      : EXPIRE_EVERY_MS,
  );

  const missing = startLoop(log, async () => Math.min((await markOverdue(db)) ?? MAX_SLEEP_MS, MAX_SLEEP_MS));
  const retaining = startLoop(log, retention(deps));

  let stopped: Promise<void> | undefined;
  const stop = async () => {
    offRetry();
    const loops = [firing, noting, offering, reaping, missing, expiring, retaining];
    await Promise.all(loops.map((loop) => loop.stop()));
  };
  return {
    stop: () => {
      stopped ??= stop();
      return stopped;
    },
  };
}

/**
 * A loop that works off what is due, sleeps until the next moment, and is woken by a ring for an earlier one; a ring for a
 * later one needs no waking.
 */
function startTimed(
  bus: Bus,
  log: (error: unknown) => void,
  work: () => Promise<boolean>,
  next: () => Promise<{ at: number; inMs: number }>,
): { stop(): Promise<void> } {
  // In the database's time.
  let sleepingUntil = Number.POSITIVE_INFINITY;
  const loop = startLoop(log, async () => {
    sleepingUntil = Number.POSITIVE_INFINITY;
    if (await work()) return 0;
    const { at, inMs } = await next();
    sleepingUntil = at;
    return Math.min(inMs, MAX_SLEEP_MS);
  });
  const off = bus.on(SCHEDULE_TOPIC, (detail) => {
    if (detail === undefined || !(Date.parse(detail) >= sleepingUntil)) loop.wake();
  });
  return {
    stop() {
      off();
      return loop.stop();
    },
  };
}

const nextOf = (column: 'next_run_at' | 'quiet_at') => ({
  name: `scheduler-${column}`,
  text: `
    select ${column} as at, (extract(epoch from ${column} - clock_timestamp()) * 1000)::float8 as in_ms
    from tasks where ${column} is not null order by ${column}, id limit 1`,
});
/** Served by tasks_due_idx and tasks_quiet_idx. */
const NEXT_RUN = nextOf('next_run_at');
const NEXT_QUIET = nextOf('quiet_at');

/** The next moment, and in how many ms it is. A millisecond more, since timers may fire early. */
async function nextAt(db: Database, statement: typeof NEXT_RUN): Promise<{ at: number; inMs: number }> {
  const { rows } = await db.query<{ at: Date | null; in_ms: number | null }>(statement);
  const [row] = rows;
  if (!row?.at || row.in_ms === null) return { at: Number.POSITIVE_INFINITY, inMs: MAX_SLEEP_MS };
  return { at: row.at.getTime(), inMs: Math.max(1, Math.ceil(row.in_ms) + 1) };
}

/**
 * Wakes agents for runs whose backoff ended since `since`; answers until when it looked and when the next one ends.
 * Served by executions_available_idx.
 */
async function offerDueRetries(db: Database, bus: Bus, since: Date): Promise<{ until: Date; inMs: number }> {
  const due = await db.query<{ until: Date; user_id: number | null; skill_name: string | null }>({
    name: 'scheduler-offer',
    text: `
      select now() as until, e.user_id, e.skill_name from (select 1) one left join (
        select distinct user_id, skill_name from executions
        where status = 'queued' and trigger = 'retry' and available_at > $1 and available_at <= now()
      ) e on true`,
    values: [since],
  });
  for (const { user_id: userId, skill_name: skillName } of due.rows) {
    if (userId !== null && skillName !== null) bus.ring(QUEUE_TOPIC, queueDetail({ userId, skillName }));
  }
  const next = await db.query<{ in_ms: number | null }>({
    name: 'scheduler-offer-next',
    text: `
      select (extract(epoch from min(available_at) - clock_timestamp()) * 1000)::float8 as in_ms from executions
      where status = 'queued' and available_at > now()`,
  });
  const inMs = next.rows[0]?.in_ms ?? MAX_SLEEP_MS;
  return { until: due.rows[0]?.until ?? since, inMs: Math.max(1, Math.ceil(inMs) + 1) };
}
