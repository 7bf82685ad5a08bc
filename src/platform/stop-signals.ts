/** Ctrl-C under `npm run` arrives twice: from the terminal, and passed on by npm. What comes this soon is an echo. */
const ECHO_MS = 1_000;

/**
 * Calls `stop` at the first SIGINT or SIGTERM, and `again` at each further one that is no echo of the one before: somebody
 * who does not want to wait.
 */
export function onStopSignals(stop: (signal: NodeJS.Signals) => void, again: (signal: NodeJS.Signals) => void): void {
  let lastAt: number | undefined;
  const heard = (signal: NodeJS.Signals) => {
    const now = performance.now();
    const first = lastAt === undefined;
    const echo = lastAt !== undefined && now - lastAt < ECHO_MS;
    lastAt = now;
    if (first) stop(signal);
    else if (!echo) again(signal);
  };
  process.on('SIGINT', heard);
  process.on('SIGTERM', heard);
}
