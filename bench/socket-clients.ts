import { randomBytes } from 'node:crypto';
import { connect, type Socket } from 'node:net';

// WebSocket clients that cost little beside what they measure: a handshake, and then frames are counted; the text of a
// frame is only looked at where somebody asks for it.

export interface Clients {
  /** How many messages came in all. */
  count(): number;
  /** When the first and the last of the next `messages` came, by performance.now(). */
  next(messages: number): Promise<{ first: number; last: number }>;
  /** Called with the text of each message of every `everyNth` client. */
  look(everyNth: number, onText: (text: string) => void): void;
  closeAll(): void;
}

/** Opens `count` sockets, `atOnce` at a time, at `pathOf(i)`; resolves when all are open. */
export async function openClients(
  port: number,
  count: number,
  pathOf: (i: number) => string,
  atOnce = 200,
): Promise<Clients> {
  const sockets: Socket[] = [];
  let messages = 0;
  let waiting: { until: number; first: number; done: (times: { first: number; last: number }) => void } | undefined;
  let nth = Number.POSITIVE_INFINITY;
  let onText: (text: string) => void = () => {};

  const open = (i: number) =>
    new Promise<void>((resolve, reject) => {
      const socket = connect(port, '127.0.0.1');
      sockets.push(socket);
      socket.setNoDelay(true);
      let held = Buffer.alloc(0);
      let upgraded = false;
      socket.on('connect', () =>
        socket.write(
          `GET ${pathOf(i)} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${randomBytes(16).toString('base64')}\r\n\r\n`,
        ),
      );
      socket.on('error', reject);
      socket.on('close', () => reject(new Error('closed')));
      socket.on('data', (chunk) => {
        held = held.length === 0 ? chunk : Buffer.concat([held, chunk]);
        if (!upgraded) {
          const end = held.indexOf('\r\n\r\n');
          if (end < 0) return;
          if (!held.subarray(0, 12).toString().includes('101')) return reject(new Error(held.toString().slice(0, 300)));
          upgraded = true;
          held = held.subarray(end + 4);
          resolve();
        }
        for (;;) {
          if (held.length < 2) return;
          const [head = 0, short = 0] = held;
          const size = short < 126 ? short : short === 126 ? held.length >= 4 && held.readUInt16BE(2) : -1;
          if (size === false) return;
          if (size < 0) throw new Error('A frame is too large.');
          const start = short < 126 ? 2 : 4;
          if (held.length < start + size) return;
          const body = held.subarray(start, start + size);
          held = held.subarray(start + size);
          if ((head & 0x0f) === 9) socket.write(Buffer.concat([Buffer.from([0x8a, 0x80 | size, 0, 0, 0, 0]), body]));
          else if ((head & 0x0f) === 1) {
            messages += 1;
            if (i % nth === 0) onText(body.toString());
            if (waiting) {
              const now = performance.now();
              if (waiting.first === 0) waiting.first = now;
              if (messages >= waiting.until) {
                waiting.done({ first: waiting.first, last: now });
                waiting = undefined;
              }
            }
          }
        }
      });
    });
  for (let from = 0; from < count; from += atOnce) {
    await Promise.all(Array.from({ length: Math.min(atOnce, count - from) }, (_, i) => open(from + i)));
  }
  return {
    count: () => messages,
    next: (n) =>
      new Promise((done) => {
        waiting = { until: messages + n, first: 0, done };
      }),
    look(everyNth, listener) {
      nth = everyNth;
      onText = listener;
    },
    closeAll() {
      for (const socket of sockets) {
        socket.removeAllListeners('close');
        socket.removeAllListeners('error');
        socket.on('error', () => {});
        socket.destroy();
      }
    },
  };
}
