import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Duplex } from 'node:stream';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { type WebSocket, WebSocketServer } from 'ws';
import { readConfig } from '../../src/config.ts';
import type { Database } from '../../src/db/database.ts';
import type { Identity } from '../../src/http/authenticate.ts';
import { silentBus } from '../../src/platform/bus.ts';
import { createDeliveries } from '../../src/realtime/deliveries.ts';
import { type DeliveryDeps, type Hello, RHYTHM } from '../../src/realtime/delivery.ts';
import { createFeed, type Feed, type PlacedEvent, visibleEvents } from '../../src/realtime/feed.ts';
import { startRelay } from '../../src/realtime/relay.ts';
import { SOCKET_OPTIONS, openSocket as takeOver } from '../../src/realtime/sockets.ts';
import { createSubscription } from '../../src/realtime/subscription.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { until } from '../support/work.ts';
import { type Client, emit, logger, numbered, openProcess, openSocket } from './support.ts';

// The sockets, the feed and the relay on a WebSocket server of this test's own, so that their rhythm can be quicker and
// their server side looked at.

let closers: (() => unknown)[];
let db: Database;
let feed: Feed;
beforeEach(async () => {
  closers = [];
  const database = await createTestDatabase();
  closers.push(database.drop);
  const process = await openProcess(database.url);
  closers.push(process.close);
  db = process.db;
  const relay = await startRelay({ ...process, logger, directUrl: database.url });
  closers.push(relay.close);
  feed = createFeed({ ...process, logger });
  feed.start();
  closers.push(feed.close);
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

const BOUND = 65_536;
const config = readConfig({ WS_MAX_BUFFERED_BYTES: String(BOUND) }, '/nonexistent');
const userOf = (userId: number, expiresAt: Date | null = null): Identity => ({
  userId,
  role: 'user',
  scopes: ['read'],
  expiresAt,
  apiKeyId: null,
  family: null,
});

interface Sockets {
  open(socket: WebSocket, hello: Hello): void;
  closeAll(): Promise<void>;
}
/** What a socket of `ws` stands on. */
const connectionOf = (socket: WebSocket) => (socket as unknown as { _socket: Duplex })._socket;
/** The sockets of a process whose credentials are all good. */
function createSockets(deps: Omit<DeliveryDeps, 'turn'>, rhythm = RHYTHM): Sockets {
  const stillGood = async (identities: readonly unknown[]) => identities.map(() => true);
  const deliveries = createDeliveries({ ...deps, bus: silentBus, stillGood }, rhythm);
  const verify = () => Promise.reject(new Error('Nobody logs in here.'));
  return {
    open: (socket, hello) =>
      takeOver({ deliveries, verify }, { socket, connection: connectionOf(socket) }, 'here', hello),
    closeAll: deliveries.closeAll,
  };
}

interface Stage {
  sockets: Sockets;
  /** Opens a socket; answers both of its ends. */
  open(hello?: Partial<Hello>, at?: Sockets): Promise<{ client: Client; end: WebSocket }>;
}

async function stage(rhythm: Partial<typeof RHYTHM> = {}): Promise<Stage> {
  const sockets = createSockets({ config, db, feed, logger }, { ...RHYTHM, tend: 20, ...rhythm });
  const http: Server = createServer();
  const server = new WebSocketServer({ ...SOCKET_OPTIONS, server: http });
  http.listen(0, '127.0.0.1');
  await once(http, 'listening');
  closers.push(async () => {
    await sockets.closeAll();
    http.close();
  });
  return {
    sockets,
    async open(hello = {}, at = sockets) {
      const connected = new Promise<WebSocket>((resolve) => {
        server.once('connection', (end) => {
          at.open(end, {
            identity: userOf(1),
            subscription: createSubscription(['tasks']),
            lastEventId: undefined,
            ...hello,
          });
          resolve(end);
        });
      });
      const client = openSocket(`http://127.0.0.1:${(http.address() as AddressInfo).port}/`);
      return { client, end: await connected };
    },
  };
}

/** The code with which this end was told to close. */
const closeCode = (end: WebSocket) => {
  const close = vi.spyOn(end, 'close');
  return () => close.mock.calls[0]?.[0];
};

describe('heartbeat', () => {
  test('pings go out; who answers them stays, however long it says nothing', async () => {
    const { open } = await stage({ ping: 40, silent: 200 });
    const { client } = await open();
    let pings = 0;
    client.socket.on('ping', () => pings++);
    await until(
      async () => pings,
      (count) => count > 12,
    );
    expect(client.socket.readyState).toBe(client.socket.OPEN);
    client.socket.close();
  });

  test('who answers none is closed with 4408, and cut off when it does not answer that either', async () => {
    const { open } = await stage({ ping: 40, silent: 200 });
    const { client, end } = await open();
    const code = closeCode(end);
    await client.ack;
    client.socket.pause();
    const closed = once(end, 'close');
    await closed;
    expect(code()).toBe(4408);
    client.socket.resume();
    await client.closed;
  });

  test('what a client says counts as a sign of life', async () => {
    const { open } = await stage({ ping: 1_000_000, silent: 300 });
    const { client } = await open();
    await client.ack;
    const start = performance.now();
    for (let pongs = 1; performance.now() - start < 900; pongs++) {
      client.say({ type: 'ping' });
      await until(
        async () => client.frames.filter(({ type }) => type === 'pong').length,
        (count) => count === pongs,
      );
    }
    expect(client.socket.readyState).toBe(client.socket.OPEN);
    client.socket.close();
  });
});

test('a bookmark moves the place of an idle socket past the events of others', async () => {
  const { open } = await stage({ bookmark: 100 });
  const { client } = await open();
  await client.ack;
  await emit(db, numbered(1, { userId: 2 }), numbered(2, { userId: 2 }));
  const bookmark = await client.frame(({ type, event_id: id }) => type === 'bookmark' && id === 2);
  expect(bookmark.data).toEqual({ last_event_id: 2 });
  expect(client.numbers()).toEqual([]);
  client.socket.close();
});

describe('a credential', () => {
  test('that has expired ends its socket with 1008', async () => {
    const { open } = await stage();
    const { client } = await open({ identity: userOf(1, new Date(Date.now() + 300)) });
    await client.ack;
    expect((await client.closed).code).toBe(1008);
  });

  test('that lasts longer than a timer can does not', async () => {
    const { open } = await stage({ bookmark: 60 });
    const { client } = await open({ identity: userOf(1, new Date(Date.now() + 2 ** 31 + 1_000)) });
    // It has been looked after by then.
    await client.frame(({ type }) => type === 'bookmark');
    expect(client.socket.readyState).toBe(client.socket.OPEN);
    client.socket.close();
  });
});

test('a slow reader is closed with 1013 and cut off; what waited for it was bounded; others get everything', async () => {
  const { open } = await stage();
  const slow = await open();
  const quick = await open();
  await Promise.all([slow.client.ack, quick.client.ack]);
  const code = closeCode(slow.end);
  const send = slow.end.send.bind(slow.end);
  let most = 0;
  vi.spyOn(slow.end, 'send').mockImplementation((data: unknown) => {
    send(data as string);
    most = Math.max(most, slow.end.bufferedAmount);
  });
  slow.client.socket.pause();
  const gone = once(slow.end, 'close');
  const padding = 'x'.repeat(10_000);
  let n = 0;
  while (code() === undefined) {
    await emit(db, ...Array.from({ length: 50 }, () => numbered(++n, { userId: 1 }, padding)));
    const last = n;
    await quick.client.frame(({ data }) => data['n'] === last);
  }
  expect(code()).toBe(1013);
  await gone;
  expect(most).toBeGreaterThan(BOUND);
  expect(most).toBeLessThan(BOUND + 11_000);
  expect(quick.client.numbers()).toEqual(Array.from({ length: n }, (_, i) => i + 1));
  for (const { client } of [slow, quick]) client.socket.terminate();
});

test('what is deleted in the middle of a replay is told with resync_required', async () => {
  const { open } = await stage();
  await emit(db, ...[1, 2, 3].map((n) => numbered(n, { userId: 1 })));
  await until(
    async () => (await db.query({ text: 'select from events' })).rowCount,
    (count) => count === 3,
  );
  const pruning: Database = {
    ...db,
    async query(statement) {
      if (statement.name === 'feed-visible-between') await db.query({ text: 'delete from events where event_id <= 2' });
      return db.query(statement);
    },
  };
  const { client } = await open({ lastEventId: 0 }, createSockets({ config, db: pruning, feed: forgetful(), logger }));
  expect((await client.ack).data['resumed']).toBe(true);
  await client.frame(({ type }) => type === 'resync_required');
  await emit(db, numbered(4, { userId: 1 }));
  await client.frame(({ data }) => data['n'] === 4);
  expect(client.numbers()).toEqual([4]);
  client.socket.close();
});

describe('a fault of ours', () => {
  test('in one socket ends that one with 1011 and reaches no other', async () => {
    const { open } = await stage();
    const [before, broken, after] = [await open(), await open(), await open()];
    await Promise.all([before, broken, after].map(({ client }) => client.ack));
    vi.spyOn(broken.end, 'send').mockImplementation(() => {
      throw new Error('a fault');
    });
    await emit(db, numbered(1, { userId: 1 }));
    expect((await broken.client.closed).code).toBe(1011);
    await emit(db, numbered(2, { userId: 1 }));
    for (const { client } of [before, after]) {
      await client.frame(({ data }) => data['n'] === 2);
      expect(client.numbers()).toEqual([1, 2]);
      client.socket.close();
    }
  });

  test('in the answer to a message ends the socket with 1011', async () => {
    const { open } = await stage();
    const { client, end } = await open();
    await client.ack;
    vi.spyOn(end, 'send').mockImplementation(() => {
      throw new Error('a fault');
    });
    client.say({ type: 'ping' });
    expect((await client.closed).code).toBe(1011);
  });

  test('in a replay, as when the database is away, ends the socket with 1011', async () => {
    const { open } = await stage();
    await emit(db, numbered(1, { userId: 1 }));
    for (const message of ['a fault', 'Connection terminated unexpectedly']) {
      const broken: Database = { ...db, query: () => Promise.reject(new Error(message)) };
      const { client } = await open(
        { lastEventId: 0 },
        createSockets({ config, db: broken, feed: forgetful(), logger }),
      );
      expect((await client.closed).code).toBe(1011);
    }
  });
});

test('going away closes every socket with 1001, also one that is just opening and one that answers nothing', async () => {
  const { open, sockets } = await stage();
  const open1 = await open();
  const deaf = await open();
  await Promise.all([open1.client.ack, deaf.client.ack]);
  deaf.client.socket.pause();
  const codes = [open1, deaf].map(({ end }) => closeCode(end));
  const closing = sockets.closeAll();
  const late = await open({ lastEventId: 0 });
  await closing;
  expect(codes.map((code) => code())).toEqual([1001, 1001]);
  expect((await open1.client.closed).code).toBe(1001);
  expect((await late.client.closed).code).toBe(1001);
  expect(deaf.end.readyState).toBe(deaf.end.CLOSED);
  deaf.client.socket.terminate();
});

/** The feed, as if what it keeps in memory never reached back far enough. */
const forgetful = (): Feed => ({ ...feed, recent: async () => undefined });

/** The feed, whose readiness and events wait for the test. */
function heldFeed(): Feed & { letReady(): void; listeners: Set<(event: PlacedEvent) => void> } {
  let letReady = () => {};
  const ready = new Promise<void>((resolve) => {
    letReady = resolve;
  });
  const listeners = new Set<(event: PlacedEvent) => void>();
  return {
    ...feed,
    letReady: () => letReady(),
    listeners,
    position: () => 0,
    ready: () => ready,
    subscribe(listener) {
      listeners.add(listener);
      return () => void listeners.delete(listener);
    },
  };
}

test('a socket that is gone before it was greeted is forgotten', async () => {
  const { open } = await stage();
  const held = heldFeed();
  const sockets = createSockets({ config, db, feed: held, logger });
  const { client, end } = await open({}, sockets);
  client.socket.once('open', () => client.socket.terminate());
  await once(end, 'close');
  held.letReady();
  await sockets.closeAll();
  expect(held.listeners.size).toBe(0);
});

test('what a client says before it was greeted is answered after that', async () => {
  const { open } = await stage();
  const held = heldFeed();
  const early = await open({}, createSockets({ config, db, feed: held, logger }));
  await once(early.client.socket, 'open');
  early.client.say({ type: 'ping' });
  // Meanwhile another one comes, says more and is answered.
  const { client } = await open();
  await client.ack;
  for (let pongs = 1; pongs <= 5; pongs++) {
    client.say({ type: 'ping' });
    await until(
      async () => client.frames.filter(({ type }) => type === 'pong').length,
      (count) => count === pongs,
    );
  }
  held.letReady();
  await early.client.frame(({ type }) => type === 'pong');
  expect(early.client.frames.map(({ type }) => type)).toEqual(['ack', 'pong']);
  for (const { socket } of [client, early.client]) socket.close();
});

test('a client that comes from a process whose feed is ahead of this one is given nothing twice', async () => {
  const { open } = await stage();
  await emit(db, ...[1, 2, 3].map((n) => numbered(n, { userId: 1 })));
  await until(
    async () => (await db.query({ text: 'select from events' })).rowCount,
    (count) => count === 3,
  );
  const behind = heldFeed();
  behind.letReady();
  const { client } = await open({ lastEventId: 2 }, createSockets({ config, db, feed: behind, logger }));
  expect((await client.ack).data).toMatchObject({ resumed: true, last_event_id: 2 });
  await until(
    async () => behind.listeners.size,
    (size) => size === 1,
  );
  const { events } = await visibleEvents(db, 0, 3, 1);
  for (const event of events) for (const listener of behind.listeners) listener(event);
  await client.frame(({ data }) => data['n'] === 3);
  expect(client.numbers()).toEqual([3]);
  client.socket.close();
});
