import { retryDelayMs } from '../schedule/backoff.ts';
import type { Execution } from './schemas.ts';

// Whether a run that ended badly is tried again, and when. What agents do wrong and what becomes of agents are counted apart:
// a run that crashes every agent it meets must end, but one that was underway while agents were replaced has done nothing.

/** What is known of a run that ended. `lostLeases` are those of the attempts of the same fire before it. */
export type Ended = Pick<Execution, 'cause' | 'attempt' | 'lostLeases'>;

/** What its task allows. `maxLostLeases` null: one less than `maxAttempts`. */
export interface RetryRules {
  maxAttempts: number;
  maxLostLeases: number | null;
  retryBackoffSeconds: number;
}

/** What the agent that failed says of trying again. */
export interface RetryWish {
  /** Wait so long instead of the backoff. */
  retryAfterSeconds?: number | undefined;
  /** It would fail again. */
  nonRetryable?: boolean | undefined;
}

/** Which budget an end draws on; of the others there is none. */
const BUDGETS: Record<NonNullable<Execution['cause']>, 'failures' | 'lost_leases' | null> = {
  agent_failed: 'failures',
  run_timeout: 'failures',
  lease_lost: 'lost_leases',
  cancelled: null,
  queue_expired: null,
};

/**
 * The next attempt of a fire whose last one ended like this: after how many ms, and how many leases were lost by then.
 * Undefined when there is none. `random` answers numbers in [0, 1).
 */
export function nextAttempt(
  ended: Ended,
  rules: RetryRules,
  wish: RetryWish,
  random: () => number,
): { delayMs: number; lostLeases: number } | undefined {
  const { lostLeases } = ended;
  switch (ended.cause && BUDGETS[ended.cause]) {
    case 'failures': {
      const failures = ended.attempt - lostLeases;
      if (wish.nonRetryable || failures >= rules.maxAttempts) return undefined;
      const { retryAfterSeconds: after } = wish;
      const delayMs = after === undefined ? retryDelayMs(failures, rules.retryBackoffSeconds, random) : after * 1000;
      return { delayMs, lostLeases };
    }
    case 'lost_leases': {
      // It says nothing against the work: it is offered again at once.
      const lost = lostLeases + 1;
      return lost <= (rules.maxLostLeases ?? rules.maxAttempts - 1) ? { delayMs: 0, lostLeases: lost } : undefined;
    }
    default:
      return undefined;
  }
}
