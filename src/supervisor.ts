import cluster, { type Worker } from 'node:cluster';
import type { Logger } from './platform/logger.ts';

// Several processes of one server (WORKERS). The primary serves nothing: it hands connections out in turn, starts a worker
// anew when one dies, and replaces all of them one after the other when it is told to, so that new code and new certificates
// come in without a failed request: the new worker serves before the old one is told to go.
//
// Connections are handed out by the primary (round robin) and not taken by whoever wakes first: sockets live for hours, and
// an uneven start would stay. Its price: what is handed to a worker in the moment between its sudden death and the notice
// of that is never answered, and its client waits for its own timeout.

/** The pause before a worker that died is started anew: doubled each time, unless it had lived for so long. */
const FIRST_PAUSE_MS = 100;
const MAX_PAUSE_MS = 10_000;
const LIVED_MS = 30_000;
/** How much longer than its own timeout a worker gets to end before it is killed. */
const KILL_AFTER_MS = 2_000;

/** What a worker tells: its address when it serves, and that it is about to end. */
export type WorkerMessage = { ready: string } | { leaving: true };

/** How long a worker waits for the primary's word that it may end. */
const LEAVE_WITHIN_MS = 1_000;

/**
 * Waits, in a worker that takes no more connections, until the primary knows. What it had handed over before arrives before
 * its answer, and is handed on to another worker; a worker that ended without would take such a connection with it, whose
 * client then waits for ever.
 */
export function takeLeave(): Promise<void> {
  return new Promise((resolve) => {
    if (!process.connected) return resolve();
    setTimeout(resolve, LEAVE_WITHIN_MS);
    process.on('message', () => resolve());
    process.send?.({ leaving: true } satisfies WorkerMessage);
  });
}

export interface Supervisor {
  /** Resolves with the address when the first workers serve; rejects when one cannot start, and then all are ended. */
  started: Promise<string>;
  /** Replaces the workers, one after the other. */
  restart(): Promise<void>;
  /** Ends all workers, each in its own order, and resolves when they have ended. */
  stop(): Promise<void>;
}

interface Slot {
  worker: Worker | undefined;
  pauseMs: number;
  timer: NodeJS.Timeout | undefined;
}

/** Starts `count` workers with `env` besides the environment of this process, and keeps them running. */
export function superviseWorkers(options: {
  count: number;
  env: Record<string, string>;
  stopTimeoutMs: number;
  logger: Logger;
}): Supervisor {
  const { count, env, stopTimeoutMs, logger } = options;
  cluster.schedulingPolicy = cluster.SCHED_RR;
  // A worker's exit is heard by whoever started it, below.
  const slots: Slot[] = Array.from({ length: count }, () => ({ worker: undefined, pauseMs: 0, timer: undefined }));
  const leaving = new WeakSet<Worker>();
  let stopping = false;

  /** Starts one; resolves with its address when it serves, and rejects when it ends before. */
  const start = (): { worker: Worker; serves: Promise<string> } => {
    const worker = cluster.fork(env);
    const serves = new Promise<string>((resolve, reject) => {
      worker.on('message', (message: WorkerMessage) => {
        if ('ready' in message) resolve(message.ready);
        else if (worker.isConnected()) worker.send('leave');
      });
      worker.once('exit', () => reject(new Error('The worker ended before it served.')));
      worker.once('error', reject);
    });
    serves.catch(() => {});
    return { worker, serves };
  };
  const end = async (worker: Worker) => {
    leaving.add(worker);
    if (worker.isDead()) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => {
        logger.warn({ worker: worker.process.pid }, 'a worker did not end in time and is killed');
        worker.process.kill('SIGKILL');
      }, stopTimeoutMs + KILL_AFTER_MS);
      worker.once('exit', () => {
        clearTimeout(timer);
        resolve();
      });
      worker.process.kill('SIGTERM');
    });
  };
  const keep = (slot: Slot, worker: Worker) => {
    const since = performance.now();
    slot.worker = worker;
    worker.once('exit', (code, signal) => {
      if (stopping || leaving.has(worker)) return;
      slot.pauseMs =
        performance.now() - since > LIVED_MS
          ? FIRST_PAUSE_MS
          : Math.min(MAX_PAUSE_MS, Math.max(FIRST_PAUSE_MS, slot.pauseMs * 2));
      logger.error({ worker: worker.process.pid, code, signal, again_in_ms: slot.pauseMs }, 'a worker died');
      slot.timer = setTimeout(() => {
        if (!stopping) keep(slot, start().worker);
      }, slot.pauseMs);
    });
  };

  const first = slots.map((slot) => {
    const { worker, serves } = start();
    leaving.add(worker);
    return serves.then((url) => {
      leaving.delete(worker);
      keep(slot, worker);
      return url;
    });
  });
  const stop = async () => {
    stopping = true;
    for (const { timer } of slots) clearTimeout(timer);
    await Promise.all(Object.values(cluster.workers ?? {}).map((worker) => worker && end(worker)));
  };
  const started = Promise.all(first).then(
    ([url = '']) => url,
    async (error: unknown) => {
      await stop();
      throw error;
    },
  );
  started.catch(() => {});

  let restarting: Promise<void> = Promise.resolve();
  const restart = async () => {
    for (const slot of slots) {
      if (stopping) return;
      const { worker: next, serves } = start();
      leaving.add(next);
      try {
        await serves;
      } catch (error) {
        logger.error({ err: error }, 'a new worker could not start: the others go on as they are');
        return;
      }
      leaving.delete(next);
      clearTimeout(slot.timer);
      const { worker: old } = slot;
      keep(slot, next);
      slot.pauseMs = 0;
      if (old) await end(old);
    }
    logger.info('all workers were replaced');
  };
  return {
    started,
    restart() {
      restarting = restarting.then(restart);
      return restarting;
    },
    stop,
  };
}
