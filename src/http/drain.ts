import { setMaxListeners } from 'node:events';
import type { FastifyInstance } from 'fastify';

/**
 * How long a load balancer gets to see "not ready", and clients to hear `Connection: close`, before idle connections are
 * closed: a request that is on its way on one of them then would be lost, so this is longer than a busy machine stalls.
 */
const NOTICE_MS = 1_000;

/** A server on its way out. */
export interface Drain {
  /** Aborted when draining begins: whatever waits (long polls, loops) ends its wait. */
  readonly signal: AbortSignal;
  /**
   * Not ready at once; goes on serving for a moment, with `Connection: close` on every answer so that clients move on;
   * then finishes what is in flight and closes. Resolves when everything is closed. A second call waits for the first.
   */
  finish(): Promise<void>;
}

/**
 * Prepares `app` to be stopped without failing a request. Fastify alone answers 503 to requests on open connections and
 * waits over a minute for busy keep-alive connections; here they are answered, told to close, and swept when idle.
 */
export function createDrain(app: FastifyInstance): Drain {
  const controller = new AbortController();
  // Every long poll listens.
  setMaxListeners(0, controller.signal);
  let finished: Promise<void> | undefined;
  app.addHook('onSend', async (_request, reply) => {
    if (controller.signal.aborted) reply.header('connection', 'close');
  });
  const finish = async () => {
    controller.abort();
    await new Promise((resolve) => setTimeout(resolve, NOTICE_MS));
    const sweep = setInterval(() => app.server.closeIdleConnections(), 100);
    try {
      await app.close();
    } finally {
      clearInterval(sweep);
    }
  };
  return {
    signal: controller.signal,
    finish: () => {
      finished ??= finish();
      return finished;
    },
  };
}
