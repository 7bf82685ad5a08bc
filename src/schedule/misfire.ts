export type MisfirePolicy = 'skip' | 'fire_last' | 'fire_all';

/** A due tick and what becomes of it before overlap is looked at. */
export interface Tick {
  /** ms of UTC. */
  scheduledFor: number;
  verdict: 'fired' | 'late' | 'coalesced' | 'skipped_misfire';
}

export interface Due {
  /** Oldest first; about a thousand at the most, the newest ones. */
  ticks: Tick[];
  /** Whether older missed ticks are left out. */
  truncated: boolean;
  /** The first tick after now. */
  next: number | undefined;
}

/** How many ticks of one task are listed at the most. */
const MAX_TICKS = 1_000;

/**
 * What becomes of the ticks of a schedule that are due, from `dueAt` (the oldest) to `now`, in ms of UTC. One that is at
 * most `toleranceMs` old is on time and fires. Older ones were missed: `skip` leaves them; `fire_last` runs the latest,
 * late, unless a younger tick fires anyway, and the others are coalesced into that run; `fire_all` runs them all, late,
 * but of more than `maxCatchUp` only the newest. Long silences are cheap: ticks that would not be listed are not walked
 * through one by one.
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
  const { times, truncated, next } = dueTimes(nextAfter, dueAt, now);
  const onTime = times.filter((time) => now - time <= toleranceMs);
  const missed = times.slice(0, times.length - onTime.length);
  const ticks = missed.map((scheduledFor, i): Tick => {
    const fromEnd = missed.length - i;
    if (policy === 'skip') return { scheduledFor, verdict: 'skipped_misfire' };
    if (policy === 'fire_all') return { scheduledFor, verdict: fromEnd <= maxCatchUp ? 'late' : 'skipped_misfire' };
    return { scheduledFor, verdict: fromEnd === 1 && onTime.length === 0 ? 'late' : 'coalesced' };
  });
  for (const scheduledFor of onTime) ticks.push({ scheduledFor, verdict: 'fired' });
  return { ticks, truncated, next };
}

/** The newest due times, oldest first, and the first one after now. */
function dueTimes(
  nextAfter: (ms: number) => number | undefined,
  dueAt: number,
  now: number,
): { times: number[]; truncated: boolean; next: number | undefined } {
  const times: number[] = [];
  let truncated = false;
  let at: number | undefined = dueAt;
  while (at !== undefined && at <= now) {
    times.push(at);
    if (times.length > MAX_TICKS) {
      // More than are listed: jump so far towards now that about as many remain, by how dense they were so far.
      const span = at - (times[0] ?? at);
      const jump = now - span;
      if (jump > at + span) {
        truncated = true;
        times.length = 0;
        at = nextAfter(jump - 1);
        continue;
      }
      times.shift();
      truncated = true;
    }
    at = nextAfter(at);
  }
  return { times, truncated, next: at };
}
