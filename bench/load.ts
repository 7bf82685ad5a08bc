import { connect } from 'node:net';

// A load generator that costs little beside what it measures: keep-alive connections that each send the next request when
// the answer to the last one is complete.

export interface Load {
  /** Answers a second. */
  rate: number;
  /** Milliseconds, of every answer. */
  times: number[];
}

/** One request of HTTP/1.1 as bytes. */
export function request(method: string, path: string, token: string, body?: unknown): Buffer {
  const json = body === undefined ? '' : JSON.stringify(body);
  const content = body === undefined ? '' : `Content-Type: application/json\r\nContent-Length: ${json.length}\r\n`;
  return Buffer.from(
    `${method} ${path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer ${token}\r\n${content}\r\n${json}`,
  );
}

/** Sends `next()` over `connections` connections for `seconds`; throws on an answer whose status does not start with 2. */
export async function load(port: number, next: () => Buffer, connections: number, seconds: number): Promise<Load> {
  const times: number[] = [];
  const start = performance.now();
  const until = start + seconds * 1_000;
  await Promise.all(Array.from({ length: connections }, () => connection(port, next, until, times)));
  return { rate: times.length / ((performance.now() - start) / 1_000), times };
}

function connection(port: number, next: () => Buffer, until: number, times: number[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1');
    socket.setNoDelay(true);
    let sent = 0;
    let held = '';
    const send = () => {
      sent = performance.now();
      socket.write(next());
    };
    socket.on('connect', send);
    socket.on('error', reject);
    socket.on('data', (chunk) => {
      held += chunk.toString('latin1');
      const head = held.indexOf('\r\n\r\n');
      if (head < 0) return;
      const length = Number(/\r\ncontent-length: (\d+)/i.exec(held.slice(0, head))?.[1] ?? 0);
      if (held.length < head + 4 + length) return;
      if (held[9] !== '2') {
        socket.destroy();
        return reject(new Error(held.slice(0, 600)));
      }
      held = '';
      const now = performance.now();
      times.push(now - sent);
      if (now < until) return send();
      socket.end();
      resolve();
    });
  });
}
