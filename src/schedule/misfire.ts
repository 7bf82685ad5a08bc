import { defaultMaxLatenessMs, ON_TIME_MS } from './recurrence.ts';

// What becomes of ticks that are due.
//
// A tick is in time while it is no later than its task allows, and then it runs whatever the policy: fired while it is on
// time, which a few seconds are, and else late. An older one was missed: the process was down, or the database was. Every
// due tick gets exactly one verdict, so that the record can answer why something did not run; and none of them is on the
// other side of now, so that nothing is answered for twice.
//
// A task that does not say how late its ticks may be goes by their spacing: half of it, so that a tick never runs closer to
// the next one than to its own time. Only the latest tick can be in time by that, and those that are on time: an older one
// has had its next. So it is the latest one's spacing that is looked at, not that of a schedule as a whole, which working
// hours do not have.
//
// A schedule of every second that slept for a year owes 31 million ticks, and nobody reads a list of those. The newest
// few are listed; the older ones are one stretch with one verdict, counted without being walked through. The newest
// are found by stepping back from now, not by guessing from the oldest how dense they lie: a schedule of working hours,
// asked on a Sunday, has nothing for two days before now, and a guess would find none at all.

export type MisfirePolicy = 'skip' | 'fire_last' | 'fire_all';

/** A due tick and what becomes of it before overlap is looked at. */
export interface Tick {
  /** ms of UTC. */
  scheduledFor: number;
  verdict: 'fired' | 'late' | 'coalesced' | 'skipped_misfire';
}

export interface Due {
  /** Oldest first: all that are in time, and the newest of those that were missed. */
  ticks: Tick[];
  /** The missed ticks older than those, `count` of them, from `from` (which is one) to before `until`, all with one verdict. */
  unlisted?: { from: number; until: number; count: number; verdict: 'coalesced' | 'skipped_misfire' };
  /** The first tick after now; undefined when there is none, or none that may run. */
  next: number | undefined;
}

/** How many ticks that do not run are listed at the most. Ten thousand tasks may have been missed at once. */
const MAX_LISTED = 20;
/** How many ticks may be in time at once; of more, the older ones count as missed. */
const MAX_IN_TIME = 1_000;

/** The newest of some ticks, oldest first, and the stretch before them: `count` ticks from `from` (which is one) to before `until`. */
export interface Listed {
  listed: number[];
  unlisted?: { from: number; until: number; count: number };
}

/** The ticks of a schedule from `from` to before `until` that need no run: the newest one by one, the others as a stretch. */
export function listTicks(
  ticks: { next(afterMs: number): { scheduledFor: number } | undefined; count(from: number, until: number): number },
  from: number,
  until: number,
): Listed {
  const nextAfter = (ms: number) => ticks.next(ms)?.scheduledFor;
  const first = nextAfter(from - 1);
  if (first === undefined || first >= until) return { listed: [] };
  const firstFrom = (ms: number) => (ms <= first ? first : nextAfter(ms - 1));
  const listed = newestBetween(firstFrom, nextAfter, first, until, MAX_LISTED);
  const [oldest = first] = listed;
  if (oldest === first) return { listed };
  return { listed, unlisted: { from: first, until: oldest, count: ticks.count(first, oldest) } };
}

/**
 * What becomes of the ticks of a schedule that are due, from `dueAt` (the oldest) to `now`, in ms of UTC. One that is at
 * most `maxLatenessMs` old is in time and runs: fired, or late where it is not on time. Older ones were missed: `skip`
 * leaves them; `fire_last` runs the latest, late, unless a younger tick runs anyway, and the others are coalesced into that
 * run; `fire_all` runs them all, late, but of more than `maxCatchUp` only the newest. Of those that would run, the oldest
 * `maxTicks` do, and what comes after them is no tick at all.
 */
export function resolveDue(options: {
  /** The first tick strictly after an instant. */
  nextAfter: (ms: number) => number | undefined;
  /** How many ticks lie from an instant (inclusive) to another (exclusive). */
  countBetween: (from: number, until: number) => number;
  dueAt: number;
  now: number;
  policy: MisfirePolicy;
  /** null: by the spacing of the ticks, as `defaultMaxLatenessMs` says. */
  maxLatenessMs: number | null;
  maxCatchUp: number;
  /** How many missed ticks are listed at the most, unless more may run; 20 unless given. */
  maxListed?: number;
  /** How many more ticks may run at all; no limit unless given. */
  maxTicks?: number | undefined;
}): Due {
  const { nextAfter, countBetween, dueAt, now, policy, maxLatenessMs, maxCatchUp } = options;
  const { maxTicks = Number.POSITIVE_INFINITY, maxListed = MAX_LISTED } = options;
  if (maxTicks <= 0) return { ticks: [], next: undefined };
  if (dueAt > now) return { ticks: [], next: dueAt };
  // The oldest is a tick by its own right: a one-off has no other, and a schedule may have changed since it was set.
  const firstFrom = (ms: number) => (ms <= dueAt ? dueAt : find(ms - 1));
  const newest = (end: number, limit: number) => newestBetween(firstFrom, find, dueAt, end, limit);
  // Mostly it is the only one that is due, and what follows it is all there is to find.
  const second = nextAfter(dueAt);
  const find = second === undefined || second > now ? () => second : nextAfter;
  const next = find(now);
  const [latest = dueAt] = newest(now + 1, 1);
  const maxLateness = maxLatenessMs ?? defaultMaxLatenessMs(next === undefined ? undefined : next - latest);
  const onTimeFrom = now - Math.min(ON_TIME_MS, maxLateness);
  // By default none older than the latest is in time, unless it is on time.
  const oldestInTime =
    maxLatenessMs === null ? Math.max(now - maxLateness, Math.min(latest, onTimeFrom)) : now - maxLateness;
  const inTime = newestBetween(firstFrom, find, Math.max(dueAt, oldestInTime), now + 1, MAX_IN_TIME);
  const [inTimeFrom = Math.max(dueAt, oldestInTime)] = inTime;
  const missed = newest(inTimeFrom, Math.max(maxListed, policy === 'fire_all' ? maxCatchUp : 1));
  const ticks = missed.map((scheduledFor, i): Tick => {
    const fromEnd = missed.length - i;
    if (policy === 'skip') return { scheduledFor, verdict: 'skipped_misfire' };
    if (policy === 'fire_all') return { scheduledFor, verdict: fromEnd <= maxCatchUp ? 'late' : 'skipped_misfire' };
    return { scheduledFor, verdict: fromEnd === 1 && inTime.length === 0 ? 'late' : 'coalesced' };
  });
  for (const scheduledFor of inTime) {
    ticks.push({ scheduledFor, verdict: scheduledFor >= onTimeFrom ? 'fired' : 'late' });
  }
  const due = upToRuns(ticks, maxTicks, next);
  const [oldest] = missed;
  if (oldest === undefined || oldest === dueAt) return due;
  // The oldest counts even where the schedule no longer has it.
  const count = 1 + countBetween(dueAt + 1, oldest);
  const verdict = policy === 'fire_last' ? 'coalesced' : 'skipped_misfire';
  return { ...due, unlisted: { from: dueAt, until: oldest, count, verdict } };
}

/** The ticks up to the `maxTicks`th that runs; when that one is among them, nothing comes next. */
function upToRuns(ticks: Tick[], maxTicks: number, next: number | undefined): Due {
  let runs = 0;
  const last = ticks.findIndex(({ verdict }) => (verdict === 'fired' || verdict === 'late') && ++runs >= maxTicks);
  return last === -1 ? { ticks, next } : { ticks: ticks.slice(0, last + 1), next: undefined };
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
