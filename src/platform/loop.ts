/** Something that is done again and again. */
export interface Loop {
  /** Ends the sleep; if a turn is under way, another one follows at once. */
  wake(): void;
  /** Lets the turn under way finish and starts no other. */
  stop(): Promise<void>;
}

const FIRST_RETRY_MS = 100;
const MAX_RETRY_MS = 2_000;

/**
 * Takes turns until stopped. A turn answers how many milliseconds to sleep before the next. One that fails is reported to
 * `onError` and followed by another after a pause that doubles up to two seconds, so nothing ends a loop but `stop`.
 */
export function startLoop(onError: (error: unknown) => void, turn: () => Promise<number>): Loop {
  let stopped = false;
  let woken = false;
  let endSleep: (() => void) | undefined;
  let retryMs = FIRST_RETRY_MS;

  const sleep = (ms: number) =>
    new Promise<void>((resolve) => {
      const timer = setTimeout(done, ms);
      function done() {
        clearTimeout(timer);
        endSleep = undefined;
        resolve();
      }
      endSleep = done;
    });

  const run = async () => {
    while (!stopped) {
      woken = false;
      let pause: number;
      try {
        pause = await turn();
        retryMs = FIRST_RETRY_MS;
      } catch (error) {
        if (!stopped) onError(error);
        pause = retryMs;
        retryMs = Math.min(retryMs * 2, MAX_RETRY_MS);
      }
      if (!stopped && !woken) await sleep(pause);
    }
  };
  const ended = run();
  return {
    wake() {
      woken = true;
      endSleep?.();
    },
    stop() {
      stopped = true;
      endSleep?.();
      return ended;
    },
  };
}
