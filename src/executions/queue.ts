import type { Bus } from '../platform/bus.ts';

// Long polls wait here for work. A ring of the bus names the owner and the skill of what was queued, so that only agents
// that may take it look; a ring without detail, and a timer, wake everybody, so a lost ring costs a moment and no run.

/** The bus topic that is rung when runs become available; its detail is made by `queueDetail`. */
export const QUEUE_TOPIC = 'queue';

/** The bus topic that is rung when a retry was queued that is due later. */
export const RETRY_TOPIC = 'retry';

const LOOK_ANYWAY_MS = 2_000;

/** Whose queue got a run, or may move on, and for which skill; null: any. */
export function queueDetail({ userId, skillName }: { userId: number; skillName: string | null }): string {
  return `${userId}:${skillName ?? ''}`;
}

export interface QueueWaiter {
  /** Resolves when there may be work, after a while at most, or when `signal` is aborted. */
  next(signal: AbortSignal): Promise<void>;
  /** Work that came between two calls of `next` is not missed, until this is called. */
  close(): void;
}

/** Waits for work of an owner (null: of anybody, for shared agents) and of certain skills (undefined: any). */
export function waitForWork(bus: Bus, owner: number | null, skills: readonly string[] | undefined): QueueWaiter {
  let pending = false;
  let wake: (() => void) | undefined;
  const wanted = skills && new Set(skills);
  const off = bus.on(QUEUE_TOPIC, (detail) => {
    if (detail !== undefined) {
      const split = detail.indexOf(':');
      if (owner !== null && Number(detail.slice(0, split)) !== owner) return;
      const skill = detail.slice(split + 1);
      if (wanted && skill !== '' && !wanted.has(skill)) return;
    }
    pending = true;
    wake?.();
  });
  return {
    close: off,
    next: (signal) =>
      new Promise((resolve) => {
        const done = () => {
          clearTimeout(timer);
          signal.removeEventListener('abort', done);
          wake = undefined;
          pending = false;
          resolve();
        };
        const timer = setTimeout(done, LOOK_ANYWAY_MS);
        signal.addEventListener('abort', done);
        wake = done;
        if (pending || signal.aborted) done();
      }),
  };
}
