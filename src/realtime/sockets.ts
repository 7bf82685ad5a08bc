import { randomUUID } from 'node:crypto';
import type { WebSocket } from '@fastify/websocket';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import { mayAccess } from '../http/access.ts';
import type { Identity } from '../http/authenticate.ts';
import { isDatabaseAway } from '../http/problem.ts';
import type { Logger } from '../platform/logger.ts';
import { CLOSE } from './close-codes.ts';
import { type Feed, keptEvents, type PlacedEvent, visibleEvents } from './feed.ts';
import { createSubscription, type Fault, readMessage, type Topic } from './subscription.ts';

// A socket's life:
//
//   open ──▶ ack ──▶ (replay of what was missed) ──▶ live ──▶ closed
//
// A replay reads the kept events up to where the feed is, again and again until it has caught up, and listens to the feed
// from that very moment: there is no turn of the event loop between the two, so there is neither a hole nor a repeat, and
// nothing is held meanwhile. Who may see an event is decided at its delivery, without a query.
//
// Nothing that a client does costs more than its share: frames are small, what waits for it is bounded, a replay goes at
// its pace, ten faults end it. A fault of ours in one socket ends that socket with 1011 and reaches no other.
//
// What goes out is `{type, event_id, timestamp, data}`; only events and bookmarks have a place in the order, so the others
// have no event_id, and a client's last_event_id is the largest it has seen.

/** When a socket is looked after, in milliseconds. */
export const RHYTHM = {
  /** How often it is looked whether something is due. */
  tend: 1_000,
  ping: 30_000,
  /** Without a word for so long it counts as dead. */
  silent: 60_000,
  /** An idle socket is told its place, so that it does not fall out of what is kept. */
  bookmark: 300_000,
};

/** What the WebSocket server must be set to. */
export const SOCKET_OPTIONS = {
  maxPayload: 65_536,
  // A message in a thousand crumbs costs far more memory than its bytes (ws SECURITY.md).
  maxFragments: 128,
  maxBufferedChunks: 1_024,
  // Compression keeps a window of memory for each socket: one event to 10,000 of them took a gigabyte.
  perMessageDeflate: false,
  /** How long a closing handshake may take before the connection is cut. */
  closeTimeout: 1_000,
  // The other sub-protocols offered are a browser's way to hand over the credential.
  handleProtocols: (protocols: Set<string>) => (protocols.has('bearer') ? 'bearer' : false),
} as const;

const MAX_FAULTS = 10;

/** Who opened a socket, and what for. */
export interface Hello {
  identity: Identity;
  topics: readonly Topic[];
  /** The last event that the client has; undefined when it wants no replay. */
  lastEventId: number | undefined;
}

export interface Sockets {
  /** Takes over a socket that was just opened. Attaches its handlers before it returns, so that no message is missed. */
  open(socket: WebSocket, hello: Hello): void;
  /** Closes every socket with 1001, also those that are opened from now on; resolves when the present ones are closed. */
  closeAll(): Promise<void>;
}

interface Deps {
  config: Config;
  db: Database;
  feed: Feed;
  logger: Logger;
}

interface Connection {
  /** Pings, tells the place or gives up, whatever is due. */
  tend(now: number): void;
  shut(code: number, reason: string): void;
  closed: Promise<void>;
}

/** The sockets of this process. */
export function createSockets(deps: Deps, rhythm = RHYTHM): Sockets {
  const connections = new Set<Connection>();
  let closing = false;
  const goAway = (connection: Connection) => connection.shut(CLOSE.goingAway, 'server going away');
  const tending = setInterval(() => {
    const now = performance.now();
    for (const connection of connections) connection.tend(now);
  }, rhythm.tend);
  tending.unref();

  return {
    open(socket, hello) {
      const connection = connect(deps, rhythm, socket, hello);
      connections.add(connection);
      void connection.closed.then(() => connections.delete(connection));
      if (closing) goAway(connection);
    },
    async closeAll() {
      closing = true;
      clearInterval(tending);
      const present = [...connections];
      for (const connection of present) goAway(connection);
      await Promise.all(present.map(({ closed }) => closed));
    },
  };
}

function connect(
  { config, db, feed, logger }: Deps,
  rhythm: typeof RHYTHM,
  socket: WebSocket,
  { identity, topics, lastEventId }: Hello,
): Connection {
  const connectionId = randomUUID();
  const subscription = createSubscription(topics);
  let state: 'greeting' | 'replaying' | 'live' | 'over' = 'greeting';
  /** Up to here the client was given everything. */
  let place = 0;
  let unsubscribe = () => {};
  let faults = 0;
  let heardAt = performance.now();
  let pingedAt = heardAt;
  let toldAt = heardAt;
  const isOver = () => state === 'over';

  const shut = (code: number, reason: string) => {
    if (isOver()) return;
    state = 'over';
    unsubscribe();
    socket.resume();
    socket.close(code, reason);
  };
  const failed = (error: unknown) => {
    if (isDatabaseAway(error)) logger.debug({ connectionId }, 'a socket ends for want of the database');
    else logger.error({ err: error, connectionId }, 'a socket failed');
    shut(CLOSE.fault, 'fault of the server');
  };
  /** Runs a handler so that its fault ends this socket and nothing else. */
  const safely = (work: () => void) => {
    try {
      work();
    } catch (error) {
      failed(error);
    }
  };

  const send = (text: string) => {
    if (isOver()) return;
    if (socket.bufferedAmount > config.WS_MAX_BUFFERED_BYTES) {
      return shut(CLOSE.tooSlow, 'too slow: come back with last_event_id');
    }
    socket.send(text);
    toldAt = performance.now();
  };
  /** Resolves when what was sent so far is on its way, or the connection is gone. */
  const flushed = () => new Promise<void>((resolve) => socket.ping(undefined, undefined, () => resolve()));
  const tell = (type: string, data: object, eventId?: number) =>
    send(JSON.stringify({ type, event_id: eventId, timestamp: new Date().toISOString(), data }));
  const acknowledge = (resumed: boolean) =>
    tell('ack', {
      connection_id: connectionId,
      user_id: identity.userId,
      resumed,
      last_event_id: place,
      heartbeat_interval_ms: rhythm.ping,
      topics: subscription.topics(),
    });

  const isWanted = (event: PlacedEvent) =>
    (event.shared || mayAccess(identity, event.userId)) && subscription.covers(event);
  const goLive = () => {
    if (isOver()) return;
    state = 'live';
    unsubscribe = feed.subscribe((event) =>
      safely(() => {
        // A client may come from a process whose feed is ahead of this one.
        if (event.eventId <= place) return;
        place = event.eventId;
        if (isWanted(event)) send(event.text);
      }),
    );
  };
  const startAnew = () => {
    place = feed.position();
    tell('resync_required', { last_event_id: place, detail: 'Events were missed that are not kept: read over REST.' });
    goLive();
  };

  const greet = async () => {
    await feed.ready();
    place = feed.position();
    if (lastEventId === undefined) {
      acknowledge(false);
      goLive();
    } else if (await isKnown(lastEventId)) {
      place = lastEventId;
      acknowledge(true);
      await replay();
    } else {
      place = feed.position();
      acknowledge(false);
      startAnew();
    }
  };
  const isKnown = async (id: number) => {
    const kept = await keptEvents(db);
    // Who saw none and there was none has missed none.
    if (kept === undefined) return id === 0;
    return id >= kept.first - 1 && id <= kept.last;
  };
  const replay = async () => {
    if (isOver()) return;
    state = 'replaying';
    socket.resume();
    const userId = identity.role === 'admin' ? undefined : identity.userId;
    while (!isOver() && place < feed.position()) {
      const { events, upTo } = await visibleEvents(db, place, feed.position(), userId);
      // Asked after the look: what was deleted before it is missing from it.
      if (!(await isKnown(place))) return startAnew();
      for (const event of events) {
        // It must not be the replay that makes a client too slow.
        if (socket.bufferedAmount > config.WS_MAX_BUFFERED_BYTES / 4) await flushed();
        if (isWanted(event)) send(event.text);
      }
      place = upTo;
    }
    goLive();
  };

  const complain = ({ code, detail }: Fault) => {
    tell('error', { code, detail });
    if (++faults >= MAX_FAULTS) shut(CLOSE.policy, 'too many messages that cannot be understood');
  };
  const onMessage = (data: Buffer, binary: boolean) => {
    if (isOver()) return;
    heardAt = performance.now();
    const read = readMessage(binary ? '' : data.toString('utf8'));
    if ('fault' in read) return complain(read.fault);
    const { message } = read;
    if (message.type === 'ping') return tell('pong', {});
    if (message.type !== 'subscribe' && message.type !== 'unsubscribe') return;
    if (subscription.change(message)) acknowledge(false);
    else complain({ code: 'too_many_ids', detail: 'That is too many ids of a kind: leave them out to get all.' });
  };

  socket.on('message', (data: Buffer, binary: boolean) => safely(() => onMessage(data, binary)));
  socket.on('pong', () => {
    heardAt = performance.now();
  });
  // Who breaks the protocol (frames too large, not UTF-8, …) is closed by the library with the right code.
  socket.on('error', () => {
    state = 'over';
    unsubscribe();
  });
  const closed = new Promise<void>((resolve) => {
    socket.once('close', () => {
      state = 'over';
      unsubscribe();
      resolve();
    });
  });
  // What the client sends already waits until it was greeted.
  socket.pause();
  greet()
    .then(() => socket.resume())
    .catch(failed);

  const tend = (now: number) => {
    if (isOver()) return;
    if (identity.expiresAt && identity.expiresAt.getTime() <= Date.now()) {
      return shut(CLOSE.policy, 'the credential has expired');
    }
    if (now - heardAt > rhythm.silent) return shut(CLOSE.silent, 'nothing was heard for too long');
    if (now - pingedAt >= rhythm.ping) {
      pingedAt = now;
      socket.ping();
    }
    if (state === 'live' && now - toldAt >= rhythm.bookmark) tell('bookmark', { last_event_id: place }, place);
  };
  return { closed, shut, tend: (now) => safely(() => tend(now)) };
}
