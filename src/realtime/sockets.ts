import { randomUUID } from 'node:crypto';
import type { WebSocket } from '@fastify/websocket';
import { z } from 'zod';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import { EVENT_TOPICS } from '../db/schema.ts';
import { mayAccess } from '../http/access.ts';
import type { Identity } from '../http/authenticate.ts';
import type { Logger } from '../platform/logger.ts';
import { CLOSE } from './close-codes.ts';
import { eventsAfter, type Feed, keptEvents, type PlacedEvent } from './feed.ts';

// A socket's life:
//
//   open ──▶ ack ──▶ (replay of what was missed) ──▶ live ──▶ closed
//
// It listens to the feed from its first moment and holds what comes until the replay has ended, then goes on with what it
// held: so between the two there is neither a hole nor a repeat. Who may see an event is decided at its delivery, without a
// query. What a socket costs is bounded: bytes that wait for it, events held for it, faults it may make.

const PING_EVERY_MS = 30_000;
const SILENT_AFTER_MS = 60_000;
const BOOKMARK_EVERY_MS = 300_000;
/** How long a closing handshake may take. */
const CLOSE_WITHIN_MS = 1_000;
const MAX_FAULTS = 10;
const MAX_HELD = 10_000;
const MAX_IDS = 1_000;
/** The longest time that a timer takes. */
const MAX_TIMER_MS = 2 ** 31 - 1;

export type Topic = (typeof EVENT_TOPICS)[number];

const ids = z.array(z.int().min(1)).max(MAX_IDS).optional();
const subscription = {
  topics: z.array(z.enum(EVENT_TOPICS)).max(EVENT_TOPICS.length).optional(),
  task_ids: ids,
  project_ids: ids,
  agent_ids: ids,
};
const clientMessage = z.discriminatedUnion('type', [
  z.strictObject({ type: z.literal('subscribe'), ...subscription }),
  z.strictObject({ type: z.literal('unsubscribe'), ...subscription }),
  z.object({ type: z.literal('ping') }),
  z.object({ type: z.literal('pong') }),
  z.object({ type: z.literal('ack') }),
]);

export interface Sockets {
  /** Takes over a socket that was just opened. Attaches its handlers before it returns, so that no message is missed. */
  open(
    socket: WebSocket,
    hello: { identity: Identity; topics: readonly Topic[]; lastEventId: number | undefined },
  ): void;
  /** Closes every socket with 1001; resolves when all are closed. */
  closeAll(): Promise<void>;
}

interface Connection {
  /** Pings, bookmarks or gives up, whatever is due. */
  tend(now: number): void;
  shut(code: number, reason: string): void;
  closed: Promise<void>;
}

/** The sockets of this process. */
export function createSockets(deps: { config: Config; db: Database; feed: Feed; logger: Logger }): Sockets {
  const connections = new Set<Connection>();
  const tending = setInterval(() => {
    const now = performance.now();
    for (const connection of connections) connection.tend(now);
  }, PING_EVERY_MS / 3);
  tending.unref();

  return {
    open(socket, hello) {
      const connection = connect(deps, socket, hello);
      connections.add(connection);
      void connection.closed.then(() => connections.delete(connection));
    },
    async closeAll() {
      clearInterval(tending);
      const closing = [...connections];
      for (const connection of closing) connection.shut(CLOSE.goingAway, 'server going away');
      await Promise.all(closing.map(({ closed }) => closed));
    },
  };
}

function connect(
  { config, db, feed, logger }: { config: Config; db: Database; feed: Feed; logger: Logger },
  socket: WebSocket,
  hello: { identity: Identity; topics: readonly Topic[]; lastEventId: number | undefined },
): Connection {
  const { identity } = hello;
  const connectionId = randomUUID();
  const topics = new Set<Topic>(hello.topics);
  const only = { task_ids: new Set<number>(), project_ids: new Set<number>(), agent_ids: new Set<number>() };
  let held: PlacedEvent[] | undefined = [];
  let place = 0;
  let faults = 0;
  let heardAt = performance.now();
  let pingedAt = heardAt;
  let toldAt = heardAt;
  let shutting = false;

  const shut = (code: number, reason: string) => {
    if (shutting) return;
    shutting = true;
    unsubscribe();
    socket.close(code, reason);
    setTimeout(() => socket.terminate(), CLOSE_WITHIN_MS).unref();
  };

  const send = (text: string) => {
    if (shutting) return;
    if (socket.bufferedAmount + text.length > config.WS_MAX_BUFFERED_BYTES) {
      return shut(CLOSE.tooSlow, 'too slow: come back with last_event_id');
    }
    socket.send(text);
    toldAt = performance.now();
  };
  const tell = (type: string, data: object, eventId?: number) =>
    send(JSON.stringify({ type, event_id: eventId, timestamp: new Date().toISOString(), data }));

  const mayPass = (event: PlacedEvent) => {
    if (!event.shared && !mayAccess(identity, event.userId)) return false;
    if (!topics.has(event.topic)) return false;
    if (only.task_ids.size + only.project_ids.size + only.agent_ids.size === 0) return true;
    return (
      (event.taskId !== null && only.task_ids.has(event.taskId)) ||
      (event.projectId !== null && only.project_ids.has(event.projectId)) ||
      (event.agentId !== null && only.agent_ids.has(event.agentId))
    );
  };
  const deliver = (event: PlacedEvent) => {
    place = event.eventId;
    if (mayPass(event)) send(event.text);
  };
  const unsubscribe = feed.subscribe((event) => {
    if (held === undefined) return deliver(event);
    held.push(event);
    if (held.length > MAX_HELD) shut(CLOSE.tooSlow, 'too slow: come back with last_event_id');
  });

  /** Runs a handler so that its fault ends this socket and nothing else. */
  const safely = (work: () => void | Promise<void>) => {
    const failed = (error: unknown) => {
      logger.error({ err: error, connectionId }, 'a socket failed');
      shut(CLOSE.fault, 'fault');
    };
    try {
      Promise.resolve(work()).catch(failed);
    } catch (error) {
      failed(error);
    }
  };

  const fault = (code: string, detail: string) => {
    tell('error', { code, detail });
    if (++faults >= MAX_FAULTS) shut(CLOSE.policy, 'too many messages that cannot be understood');
  };

  const onMessage = (raw: string, binary: boolean) => {
    heardAt = performance.now();
    let json: unknown;
    try {
      json = binary ? undefined : JSON.parse(raw);
    } catch {
      json = undefined;
    }
    if (json === undefined) return fault('invalid_json', 'Send text frames with a JSON object.');
    const parsed = clientMessage.safeParse(json);
    if (!parsed.success) {
      const [issue] = parsed.error.issues;
      const where = issue?.path.join('.') || 'message';
      return fault('invalid_message', `${where}: ${issue?.message ?? 'not understood'}.`);
    }
    const message = parsed.data;
    if (message.type === 'ping') return tell('pong', {});
    if (message.type !== 'subscribe' && message.type !== 'unsubscribe') return;
    const change = <T>(set: Set<T>, values: readonly T[] | undefined) => {
      for (const value of values ?? []) message.type === 'subscribe' ? set.add(value) : set.delete(value);
    };
    const sizes = (['task_ids', 'project_ids', 'agent_ids'] as const).map(
      (key) => only[key].size + (message[key]?.length ?? 0),
    );
    if (message.type === 'subscribe' && sizes.some((size) => size > MAX_IDS)) {
      return fault('too_many_ids', `At most ${MAX_IDS} ids of a kind; leave them out to get all.`);
    }
    change(topics, message.topics);
    change(only.task_ids, message.task_ids);
    change(only.project_ids, message.project_ids);
    change(only.agent_ids, message.agent_ids);
    acknowledge(false, place);
  };

  const acknowledge = (resumed: boolean, lastEventId: number) =>
    tell('ack', {
      connection_id: connectionId,
      user_id: identity.userId,
      resumed,
      last_event_id: lastEventId,
      heartbeat_interval_ms: PING_EVERY_MS,
      topics: [...topics],
    });

  const begin = async () => {
    await feed.ready();
    // The place from which on the feed's events are held.
    place = (held?.[0]?.eventId ?? feed.position() + 1) - 1;
    const since = hello.lastEventId;
    if (since === undefined) {
      acknowledge(false, place);
    } else {
      const kept = await keptEvents(db);
      const known = kept === undefined ? since === 0 : since >= kept.first - 1 && since <= Math.max(kept.last, place);
      acknowledge(known, known ? since : place);
      if (known) await replay(since, place);
      else tell('resync_required', { last_event_id: place, detail: 'Older than what is kept: read anew over REST.' });
    }
    for (const event of held ?? []) deliver(event);
    held = undefined;
  };

  const replay = async (since: number, until: number) => {
    const userId = identity.role === 'admin' ? undefined : identity.userId;
    for (let at = since; at < until && !shutting; ) {
      const events = await eventsAfter(db, at, until, userId);
      for (const event of events) if (mayPass(event)) send(event.text);
      const last = events.at(-1);
      if (!last) return;
      at = last.eventId;
      // The next page waits until this one is on its way: a replay must not be what makes a client too slow.
      while (socket.bufferedAmount > config.WS_MAX_BUFFERED_BYTES / 4 && !shutting) {
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    }
  };

  const expiry = identity.expiresAt
    ? setTimeout(
        () => shut(CLOSE.policy, 'the credential has expired'),
        Math.min(Math.max(0, identity.expiresAt.getTime() - Date.now()), MAX_TIMER_MS),
      )
    : undefined;
  const closed = new Promise<void>((resolve) => {
    socket.once('close', () => {
      shutting = true;
      clearTimeout(expiry);
      unsubscribe();
      resolve();
    });
  });
  socket.on('message', (data: Buffer, binary: boolean) => safely(() => onMessage(data.toString('utf8'), binary)));
  socket.on('pong', () => {
    heardAt = performance.now();
  });
  // What breaks the protocol (too large, not UTF-8, …) is closed by the library with its code; it tells of it here.
  socket.on('error', (error: Error) => logger.debug({ err: error, connectionId }, 'a socket broke'));
  safely(begin);

  return {
    closed,
    shut,
    tend(now) {
      if (shutting) return;
      if (now - heardAt > SILENT_AFTER_MS) return shut(CLOSE.silent, 'nothing heard for a minute');
      if (now - pingedAt >= PING_EVERY_MS - 1_000) {
        pingedAt = now;
        socket.ping();
      }
      if (held === undefined && now - toldAt > BOOKMARK_EVERY_MS) tell('bookmark', { last_event_id: place }, place);
    },
  };
}
