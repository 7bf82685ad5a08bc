import CircuitBreaker from 'opossum';
import type { Operation } from './counts.ts';
import { LinkError } from './link.ts';

export type BreakerState = 'closed' | 'open' | 'half_open';

const FAILURES_TO_OPEN = 3;

/**
 * The breaker before a memory server: opossum, and a count of failures in a row beside its percentage, which would let a
 * hundred successes hide a hundred failures. Once open it lets nothing through until `resetMs` are over; then it probes by
 * itself, so that it closes without anybody's call. Calls that the server rejects as wrong say nothing of its health.
 */
export function createBreaker(options: {
  resetMs: number;
  timeoutMs: number;
  probe: () => Promise<void>;
  onChange: (state: BreakerState, reason: string | null) => void;
  /** A call was not made, since the breaker is not closed. */
  onRefusal: (operation: Operation) => void;
}) {
  const { resetMs, timeoutMs, probe, onChange, onRefusal } = options;
  let inARow = 0;
  let lastError: string | null = null;
  let closed = false;
  const breaker = new CircuitBreaker<[() => Promise<unknown>], unknown>((act) => act(), {
    // Every call has its own limit, which also ends it: this one is the net.
    timeout: timeoutMs,
    resetTimeout: resetMs,
    rollingCountTimeout: resetMs,
    errorThresholdPercentage: 50,
    volumeThreshold: 20,
    enableSnapshots: false,
    errorFilter: (error: unknown) => error instanceof LinkError && error.rejected,
  });
  const state = (): BreakerState => (breaker.opened ? 'open' : breaker.halfOpen ? 'half_open' : 'closed');
  const failed = (error: unknown) => {
    if (error instanceof LinkError && error.rejected) return;
    lastError = error instanceof Error ? error.message : String(error);
    inARow++;
    if (inARow >= FAILURES_TO_OPEN && breaker.closed) breaker.open();
  };
  breaker.on('failure', failed);
  breaker.on('success', () => {
    inARow = 0;
  });
  breaker.on('open', () => onChange('open', lastError));
  breaker.on('close', () => {
    inARow = 0;
    onChange('closed', null);
  });
  breaker.on('halfOpen', () => {
    if (closed) return;
    onChange('half_open', lastError);
    // Twice: a server that is just coming up may answer once.
    breaker
      .fire(async () => {
        await probe();
        await probe();
      })
      .catch(() => {});
  });
  return {
    state,
    lastError: () => lastError,
    /** Calls the server when the breaker is closed. Throws what the call throws, or LinkError at once. */
    async call<T>(operation: Operation, act: () => Promise<T>): Promise<T> {
      // While it is half open, the one call that may pass is the probe's.
      if (!breaker.closed) {
        onRefusal(operation);
        throw new LinkError('The breaker is open.');
      }
      try {
        return (await breaker.fire(act)) as T;
      } catch (error) {
        if (error instanceof LinkError) throw error;
        throw new LinkError(error instanceof Error ? error.message : String(error), { ambiguous: true, cause: error });
      }
    },
    /** A failure that was seen otherwise: by the look that is taken every half minute, which never counts as a success. */
    failed,
    shutdown() {
      closed = true;
      breaker.shutdown();
    },
  };
}

export type Breaker = ReturnType<typeof createBreaker>;
