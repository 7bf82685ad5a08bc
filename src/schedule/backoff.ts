const MAX_DELAY_MS = 3_600_000;

/**
 * How long to wait before the attempt after `attempt` (1 for the first), in ms: a random time up to the base doubled with
 * every attempt, at most an hour. Full jitter spreads what failed together better than any fixed share would
 * (AWS Architecture Blog, "Exponential Backoff And Jitter"). `random` answers numbers in [0, 1).
 */
export function retryDelayMs(attempt: number, baseSeconds: number, random: () => number): number {
  const ceiling = Math.min(MAX_DELAY_MS, baseSeconds * 1000 * 2 ** (attempt - 1));
  return Math.floor(random() * ceiling);
}
