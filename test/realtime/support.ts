import { once } from 'node:events';
import { createServer, connect as netConnect, type Socket } from 'node:net';
import WebSocket from 'ws';
import { createDatabase, type Database } from '../../src/db/database.ts';
import { type Bus, createBus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { createPool } from '../../src/platform/postgres.ts';
import { emitEvents, type NewEvent } from '../../src/realtime/events.ts';
import { until } from '../support/work.ts';

export const logger = createLogger(process.env['TEST_LOG_LEVEL'] ?? 'silent', false);

/** A frame as the server sends it. */
export interface Frame {
  type: string;
  event_id?: number;
  timestamp: string;
  data: Record<string, unknown>;
}

/** A WebSocket client that keeps what it is told. */
export interface Client {
  socket: WebSocket;
  frames: Frame[];
  /** The numbers (data.n) of the events that came, in order. */
  numbers(): number[];
  /** The first frame, from the first on, that satisfies; fails when the socket closes or after 20 s. */
  frame(satisfies: (frame: Frame) => boolean): Promise<Frame>;
  ack: Promise<Frame>;
  say(message: unknown): void;
  closed: Promise<{ code: number; reason: string }>;
}

/** Opens a socket; what the server refuses with is in `closed`, see `refusal` for those that are meant to be refused. */
export function openSocket(
  url: string,
  options: { protocols?: string[]; headers?: Record<string, string> } = {},
): Client {
  const socket = new WebSocket(url.replace(/^http/, 'ws'), options.protocols ?? [], {
    headers: options.headers ?? {},
    handshakeTimeout: 15_000,
  });
  const frames: Frame[] = [];
  const waiting = new Set<() => void>();
  const look = () => {
    for (const check of waiting) check();
  };
  socket.on('message', (data) => {
    frames.push(JSON.parse(String(data)) as Frame);
    look();
  });
  let over: { code: number; reason: string } | undefined;
  socket.on('error', () => {});
  const closed = new Promise<{ code: number; reason: string }>((resolve) => {
    socket.once('close', (code, reason) => {
      over = { code, reason: String(reason) };
      look();
      resolve(over);
    });
  });
  const frame = (satisfies: (frame: Frame) => boolean) =>
    new Promise<Frame>((resolve, reject) => {
      const timer = setTimeout(() => fail('within 20 s'), 20_000);
      const fail = (why: string) => {
        stop();
        reject(new Error(`No such frame ${why}; last: ${JSON.stringify(frames.at(-1))}, ${frames.length} in all`));
      };
      const stop = () => {
        clearTimeout(timer);
        waiting.delete(check);
      };
      const check = () => {
        const found = frames.find(satisfies);
        if (found) {
          stop();
          resolve(found);
        } else if (over) fail(`before the close with ${over.code} ${over.reason}`);
      };
      waiting.add(check);
      check();
    });
  const ack = frame(({ type }) => type === 'ack');
  ack.catch(() => {});
  return {
    socket,
    frames,
    numbers: () => frames.filter(({ data }) => 'n' in data).map(({ data }) => data['n'] as number),
    frame,
    ack,
    say: (message) => socket.send(typeof message === 'string' ? message : JSON.stringify(message)),
    closed,
  };
}

/** The HTTP answer to an upgrade that is refused. */
export async function refusal(
  url: string,
  options: { protocols?: string[]; headers?: Record<string, string> } = {},
): Promise<{ status: number; type: string; body: Record<string, unknown> }> {
  const socket = new WebSocket(url.replace(/^http/, 'ws'), options.protocols ?? [], { headers: options.headers ?? {} });
  socket.on('error', () => {});
  return new Promise((resolve, reject) => {
    socket.once('open', () => {
      socket.terminate();
      reject(new Error('It was upgraded.'));
    });
    socket.once('unexpected-response', (_request, response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('end', () => {
        const text = Buffer.concat(chunks).toString();
        const type = String(response.headers['content-type']);
        resolve({ status: response.statusCode ?? 0, type, body: type.includes('json') ? JSON.parse(text) : { text } });
      });
    });
  });
}

/** An event that carries a number, to know it by. */
export function numbered(n: number, fields: Partial<NewEvent> & { userId: number }, padding = ''): NewEvent {
  return { type: 'task_status_update', ...fields, data: { n, padding, ...fields.data } };
}

/** Writes events in a transaction of their own, as nouns do. */
export function emit(db: Database, ...events: NewEvent[]): Promise<void> {
  return db.transaction(async (tx) => emitEvents(tx, events));
}

/** A connection to a server on which anything can be said. */
export async function rawConnection(
  url: string,
): Promise<{ socket: Socket; received: () => Buffer; ended: Promise<void> }> {
  const { hostname, port } = new URL(url);
  const socket = netConnect(Number(port), hostname);
  let received = Buffer.alloc(0);
  socket.on('data', (chunk) => {
    received = Buffer.concat([received, chunk]);
  });
  socket.on('error', () => {});
  const ended = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  await once(socket, 'connect');
  return { socket, received: () => received, ended };
}

/** A way to a Postgres that can be made to swallow everything, in both directions, without closing anything. */
export async function createBlackHole(databaseUrl: string): Promise<{ url: string; swallow(): void; close(): void }> {
  const target = new URL(databaseUrl);
  // Our own Postgres listens on a Unix socket, whose folder is the URL's host.
  const host = decodeURIComponent(target.hostname);
  const port = Number(target.port || 5432);
  let swallowing = false;
  const sockets = new Set<Socket>();
  const server = createServer((near) => {
    const far = netConnect(host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port });
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(from);
      from.on('data', (chunk) => {
        if (!swallowing) to.write(chunk);
      });
      from.on('error', () => {});
      from.on('close', () => {
        sockets.delete(from);
        if (!swallowing) to.destroy();
      });
    }
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = new URL(databaseUrl);
  url.hostname = '127.0.0.1';
  url.port = String((server.address() as { port: number }).port);
  return {
    url: url.href,
    swallow() {
      swallowing = true;
    },
    close() {
      for (const socket of sockets) socket.destroy();
      server.close();
    },
  };
}

/** What every process of Muster has: its pool, its bus and its database. */
export async function openProcess(databaseUrl: string): Promise<{ db: Database; bus: Bus; close(): Promise<void> }> {
  const pool = createPool({ url: databaseUrl, size: 10, name: 'muster-test', logger });
  const bus = await createBus({ pool, directUrl: databaseUrl, logger });
  return {
    db: createDatabase(pool, bus),
    bus,
    async close() {
      await bus.close();
      await pool.end();
    },
  };
}

/** An event of a stream: its id, its type and its envelope's data. */
export interface StreamEvent {
  id: string | undefined;
  type: string;
  data: Record<string, unknown>;
}

/** Opens an event stream (Server-Sent Events) and keeps what it says. */
export async function openStream(
  url: string,
  token: string | undefined,
  headers: Record<string, string> = {},
): Promise<{
  status: number;
  headers: Headers;
  events: StreamEvent[];
  event(satisfies: (event: StreamEvent) => boolean): Promise<StreamEvent>;
  ended: Promise<void>;
  close(): void;
}> {
  const controller = new AbortController();
  const answer = await fetch(url, {
    headers: { ...(token === undefined ? {} : { authorization: `Bearer ${token}` }), ...headers },
    signal: controller.signal,
  });
  const events: StreamEvent[] = [];
  const read = async () => {
    let held = '';
    const decoder = new TextDecoder();
    for await (const chunk of answer.body ?? []) {
      held += decoder.decode(chunk, { stream: true });
      for (let end = held.indexOf('\n\n'); end >= 0; end = held.indexOf('\n\n')) {
        const fields = Object.fromEntries(
          held
            .slice(0, end)
            .split('\n')
            .map((line) => [line.slice(0, line.indexOf(':')), line.slice(line.indexOf(':') + 1).trim()]),
        );
        held = held.slice(end + 2);
        if (fields['data'] === undefined) continue;
        events.push({ id: fields['id'], type: fields['event'] ?? 'message', data: JSON.parse(fields['data']).data });
      }
    }
  };
  const ended = read().catch(() => {});
  return {
    status: answer.status,
    headers: answer.headers,
    events,
    event: async (satisfies) => {
      const found = await until(
        async () => events.find(satisfies),
        (event) => event !== undefined,
      );
      if (!found) throw new Error('There is no such event.');
      return found;
    },
    ended,
    close: () => controller.abort(),
  };
}
