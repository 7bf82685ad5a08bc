import type { FastifyReply } from 'fastify';
import type { Deliveries } from './deliveries.ts';
import type { Hello, Wire } from './delivery.ts';

// Events for those who cannot use WebSockets, as the HTML standard describes them (section 9.2, Server-sent events). Every
// frame of the WebSocket comes as an event of its type, with the same envelope as its data; those that have a place in the
// order carry it as their id, which browsers send back as Last-Event-ID when they reconnect.

/** How long a client waits before it reconnects, in milliseconds: the field `retry`. */
const RETRY_MS = 2_000;

/** Answers a request with a stream of events, until either side ends it. */
export function openStream(deliveries: Deliveries, reply: FastifyReply, address: string, hello: Hello): void {
  const { raw } = reply;
  // Who went away while its credential was looked up is not heard to go again, and would be counted for ever.
  if (raw.destroyed || raw.socket?.destroyed) return;
  const headers = { ...reply.getHeaders() };
  reply.hijack();
  raw.writeHead(200, {
    ...(headers as Record<string, string>),
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-store',
    // nginx would hold events back until its buffer is full.
    'x-accel-buffering': 'no',
  });
  raw.write(`retry: ${RETRY_MS}\n\n`);
  const wire: Wire = {
    answers: false,
    // The envelope is JSON in one line, so it is one line of data.
    send(text, type, eventId) {
      // What is sent in one go leaves in one packet.
      if (raw.writableCorked === 0) {
        raw.cork();
        process.nextTick(() => raw.uncork());
      }
      raw.write(`${eventId === undefined ? '' : `id: ${eventId}\n`}event: ${type}\ndata: ${String(text)}\n\n`);
    },
    waiting: () => raw.writableLength,
    flushed: () =>
      new Promise((resolve) => {
        const done = () => {
          raw.off('drain', done);
          raw.off('close', done);
          resolve();
        };
        if (!raw.writableNeedDrain) return resolve();
        raw.on('drain', done);
        raw.on('close', done);
      }),
    beat: () => void raw.write(':\n\n'),
    close(code, reason) {
      const data = JSON.stringify({ type: 'close', timestamp: new Date().toISOString(), data: { code, reason } });
      raw.end(`event: close\ndata: ${data}\n\n`);
      // Who does not read would hold the end up.
      setTimeout(() => raw.destroy(), 1_000).unref();
    },
  };
  const delivery = deliveries.open(wire, address, hello);
  raw.once('close', () => deliveries.ended(delivery));
  raw.on('error', () => delivery.gone());
  void delivery.begin(hello.lastEventId);
}
