import type { BreakerState } from './breaker.ts';
import { LinkError } from './link.ts';
import type { Remote } from './remote.ts';

// What this process did with the memory server, in numbers that only grow, for /metrics.

export const OPERATIONS = ['store', 'search', 'has', 'ping'] as const;
export type Operation = (typeof OPERATIONS)[number];

export const OUTCOMES = [
  'ok',
  'failed', // no answer in time, or none that says yes
  'rejected', // the server took the call for wrong, and is well
  'refused_open', // not made, since the breaker is not closed
] as const;
type Outcome = (typeof OUTCOMES)[number];

export const BREAKER_STATES = ['closed', 'open', 'half_open'] as const satisfies readonly BreakerState[];

/** Numbers by name, all of them there from the start, so that a rate can be told from the first one on. */
const zeros = <T extends string>(names: readonly T[]) =>
  Object.fromEntries(names.map((name) => [name, 0])) as Record<T, number>;

export function createCounts() {
  return {
    calls: Object.fromEntries(OPERATIONS.map((operation) => [operation, zeros(OUTCOMES)])) as Record<
      Operation,
      Record<Outcome, number>
    >,
    /** How often the breaker came into each state. */
    changes: zeros(BREAKER_STATES),
  };
}
export type Counts = ReturnType<typeof createCounts>;

/** The same remote, whose calls are counted; `onAnswer` hears of each that was answered well, or as wrong by a server that is. */
export function countCalls(remote: Remote, { calls }: Counts, onAnswer: () => void): Remote {
  const counted =
    <A extends unknown[], R>(operation: Operation, call: (...args: A) => Promise<R>) =>
    async (...args: A): Promise<R> => {
      let outcome: Outcome = 'failed';
      try {
        const result = await call(...args);
        outcome = 'ok';
        return result;
      } catch (error) {
        if (error instanceof LinkError && error.rejected) outcome = 'rejected';
        throw error;
      } finally {
        calls[operation][outcome]++;
        if (outcome !== 'failed') onAnswer();
      }
    };
  return {
    ...remote,
    store: counted('store', remote.store),
    search: counted('search', remote.search),
    has: counted('has', remote.has),
    missing: counted('has', remote.missing) as Remote['missing'],
    ping: counted('ping', remote.ping),
  };
}
