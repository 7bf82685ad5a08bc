const MAX_DELAY_MS = 3_600_000;

/**
 * How long to wait after the `failures`-th failure (1 for the first), in ms: a random time up to the base doubled with
 * every failure, at most an hour. Full jitter spreads what failed together better than any fixed share would
 * (AWS Architecture Blog, "Exponential Backoff And Jitter"). `random` answers numbers in [0, 1).
 */
export function retryDelayMs(failures: number, baseSeconds: number, random: () => number): number {
  const ceiling = Math.min(MAX_DELAY_MS, baseSeconds * 1000 * 2 ** (failures - 1));
  return Math.floor(random() * ceiling);
}
