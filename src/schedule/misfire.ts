// What becomes of ticks that are due.
//
// A tick is on time while it is at most a tolerance old, and then it fires whatever the policy. An older one was missed: the
// process was down, or the database was. Every due tick gets exactly one verdict, so that the record can answer why
// something did not run; and none of them is on the other side of now, so that nothing is answered for twice.
//
// A schedule of every second that slept for a year owes 31 million ticks, and nobody reads a list of those. The newest
// thousand are listed; the older ones are one stretch with one verdict, which can be counted without being walked through
// (countOccurrences). The newest are found by stepping back from now, not by guessing from the oldest how dense they lie:
// a schedule of working hours, asked on a Sunday, has nothing for two days before now, and a guess would find none at all.

export type MisfirePolicy = 'skip' | 'fire_last' | 'fire_all';

/** A due tick and what becomes of it before overlap is looked at. */
export interface Tick {
  /** ms of UTC. */
  scheduledFor: number;
  verdict: 'fired' | 'late' | 'coalesced' | 'skipped_misfire';
}

export interface Due {
  /** Oldest first: all that are on time, and the newest of those that were missed. */
  ticks: Tick[];
  /** The missed ticks older than those, from `from` (which is one) to before `until`, all with one verdict. */
  unlisted?: { from: number; until: number; verdict: 'coalesced' | 'skipped_misfire' };
  /** The first tick after now. */
  next: number | undefined;
}

/** How many missed ticks are listed at the most, unless more may run. */
const MAX_LISTED = 1_000;

/**
 * What becomes of the ticks of a schedule that are due, from `dueAt` (the oldest) to `now`, in ms of UTC. One that is at
 * most `toleranceMs` old is on time and fires. Older ones were missed: `skip` leaves them; `fire_last` runs the latest,
 * late, unless a younger tick fires anyway, and the others are coalesced into that run; `fire_all` runs them all, late,
 * but of more than `maxCatchUp` only the newest.
 */
export function resolveDue(options: {
  /** The first tick strictly after an instant. */
  nextAfter: (ms: number) => number | undefined;
  dueAt: number;
  now: number;
  policy: MisfirePolicy;
  toleranceMs: number;
  maxCatchUp: number;
}): Due {
  const { nextAfter, dueAt, now, policy, toleranceMs, maxCatchUp } = options;
  if (dueAt > now) return { ticks: [], next: dueAt };
  // The oldest is a tick by its own right: a one-off has no other, and a schedule may have changed since it was set.
  const firstFrom = (ms: number) => (ms <= dueAt ? dueAt : nextAfter(ms - 1));
  const inTimeFrom = Math.max(dueAt, now - toleranceMs);
  const inTime = between(firstFrom, nextAfter, inTimeFrom, now + 1, Number.POSITIVE_INFINITY);
  const missed = newestBetween(firstFrom, nextAfter, dueAt, inTimeFrom, Math.max(MAX_LISTED, maxCatchUp));
  const ticks = missed.map((scheduledFor, i): Tick => {
    const fromEnd = missed.length - i;
    if (policy === 'skip') return { scheduledFor, verdict: 'skipped_misfire' };
    if (policy === 'fire_all') return { scheduledFor, verdict: fromEnd <= maxCatchUp ? 'late' : 'skipped_misfire' };
    return { scheduledFor, verdict: fromEnd === 1 && inTime.length === 0 ? 'late' : 'coalesced' };
  });
  for (const scheduledFor of inTime) ticks.push({ scheduledFor, verdict: 'fired' });
  const due = { ticks, next: nextAfter(now) };
  const [oldest] = missed;
  if (oldest === undefined || oldest === dueAt) return due;
  const verdict = policy === 'fire_last' ? 'coalesced' : 'skipped_misfire';
  return { ...due, unlisted: { from: dueAt, until: oldest, verdict } };
}

/** The ticks from `start` to before `end`; of more than `limit`, that many and one. */
function between(
  firstFrom: (ms: number) => number | undefined,
  nextAfter: (ms: number) => number | undefined,
  start: number,
  end: number,
  limit: number,
): number[] {
  const times: number[] = [];
  let at = firstFrom(start);
  while (at !== undefined && at < end && times.length <= limit) {
    times.push(at);
    at = nextAfter(at);
  }
  return times;
}

/** The newest `limit` ticks from `start` to before `end`, oldest first, in steps back that suit how dense they lie. */
function newestBetween(
  firstFrom: (ms: number) => number | undefined,
  nextAfter: (ms: number) => number | undefined,
  start: number,
  end: number,
  limit: number,
): number[] {
  let found: number[] = [];
  let step = 1_000;
  for (let to = end; to > start && found.length < limit; ) {
    const from = Math.max(start, to - step);
    const times = between(firstFrom, nextAfter, from, to, limit);
    if (times.length > limit) {
      step = Math.ceil(step / 8);
      continue;
    }
    found = times.concat(found);
    to = from;
    step *= 2;
  }
  return found.slice(-limit);
}
