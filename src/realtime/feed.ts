import type { Database } from '../db/database.ts';
import type { EVENT_TOPICS } from '../db/schema.ts';
import { isDatabaseAway } from '../http/problem.ts';
import type { Bus } from '../platform/bus.ts';
import type { Logger } from '../platform/logger.ts';
import { type Loop, startLoop } from '../platform/loop.ts';
import { EVENTS_TOPIC } from './relay.ts';

/** An event with its place, and its envelope as the text that goes out: made once, however many sockets get it. */
export interface PlacedEvent {
  eventId: number;
  userId: number;
  shared: boolean;
  topic: (typeof EVENT_TOPICS)[number];
  taskId: number | null;
  projectId: number | null;
  agentId: number | null;
  type: string;
  /** As bytes, or each socket would encode it again. */
  text: Buffer;
}

export interface Feed {
  /** Begins to follow; before that there is no position and listeners hear nothing. */
  start(): void;
  /** Calls `listener` with every event after the feed's present position, in order; the answer ends that. */
  subscribe(listener: (event: PlacedEvent) => void): () => void;
  /**
   * The events after the place `after` and up to the feed's own, in order and of everybody, when that is near enough to be
   * kept in memory; else undefined. `upTo` is the place up to which these are all.
   */
  recent(after: number): Promise<Stretch | undefined>;
  /** Calls `listener` when the database went away, once each time; the answer takes it off again. */
  onAway(listener: () => void): () => void;
  /** The place up to which listeners were given everything; -1 until the feed has found its own. */
  position(): number;
  /** Resolves when the feed has its place. */
  ready(): Promise<void>;
  close(): Promise<void>;
}

interface EventRow {
  event_id: number;
  user_id: number;
  shared: boolean;
  topic: PlacedEvent['topic'];
  type: string;
  task_id: number | null;
  project_id: number | null;
  agent_id: number | null;
  data: string;
  created_at: Date;
}

const PAGE = 500;
const LOOK_ANYWAY_MS = 1_000;
/** How much is kept in memory for those who were away for a moment only, so that a thousand of them cost no query each. */
const RECENT_EVENTS = 2_000;
const RECENT_BYTES = 8 * 1_048_576;
/** After so much text the sockets get to write. */
const BREATH_BYTES = 65_536;
/** How many ids one look for a user's events goes through, so that none of them takes long however rare they are. */
const WINDOW = 10_000;

const AFTER = {
  name: 'feed-after',
  text: `
    select event_id, user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at
    from events where event_id > $1 order by event_id limit ${PAGE}`,
};

const BEFORE = {
  name: 'feed-before',
  text: `
    select event_id, user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at
    from events where event_id <= $1 order by event_id desc limit ${RECENT_EVENTS}`,
};

/** Served by the primary key, whose range the window bounds. */
const VISIBLE_BETWEEN = {
  name: 'feed-visible-between',
  text: `
    select event_id, user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at
    from events where event_id > $1 and event_id <= $2 and ($3::bigint is null or user_id = $3 or shared)
    order by event_id limit ${PAGE}`,
};

/** A stretch of the order: the events of it that were asked for, and the place up to which these are all. */
export interface Stretch {
  events: PlacedEvent[];
  upTo: number;
}

/**
 * The next events after the place `after` and up to `until`, in order: those of one user and the shared ones, or everybody's
 * when `userId` is undefined. Goes a bounded way: call again with `upTo` to go on.
 */
export async function visibleEvents(
  db: Database,
  after: number,
  until: number,
  userId: number | undefined,
): Promise<Stretch> {
  const end = Math.min(until, after + WINDOW);
  const { rows } = await db.query<EventRow>({ ...VISIBLE_BETWEEN, values: [after, end, userId ?? null] });
  const full = rows.length === PAGE;
  return { events: rows.map(placed), upTo: full ? (rows.at(-1)?.event_id ?? end) : end };
}

/** The first and the last event that are kept; undefined when there is none. */
export async function keptEvents(db: Database): Promise<{ first: number; last: number } | undefined> {
  const { rows } = await db.query<{ first: number | null; last: number | null }>({
    name: 'feed-kept',
    text: 'select min(event_id) as first, max(event_id) as last from events',
  });
  const { first = null, last = null } = rows[0] ?? {};
  return first === null || last === null ? undefined : { first, last };
}

function placed(row: EventRow): PlacedEvent {
  const head = JSON.stringify({ type: row.type, event_id: row.event_id, timestamp: row.created_at.toISOString() });
  return {
    eventId: row.event_id,
    userId: row.user_id,
    shared: row.shared,
    topic: row.topic,
    taskId: row.task_id,
    projectId: row.project_id,
    agentId: row.agent_id,
    type: row.type,
    // `data` is JSON text already: it is put in as it stands.
    text: Buffer.from(`${head.slice(0, -1)},"data":${row.data}}`),
  };
}

/** The index of the first event after the place `after`. */
function firstAfter(events: readonly PlacedEvent[], after: number): number {
  let [low, high] = [0, events.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((events[middle]?.eventId ?? 0) > after) high = middle;
    else low = middle + 1;
  }
  return low;
}

/**
 * Follows `events` for the listeners of this process. It starts at the end, and from then on gives every event once and in
 * order: it reads by `event_id`, which is the order in which events become visible (relay.ts), so a ring that is lost only
 * delays, and a database that was away is caught up with. While nobody listens it moves on without reading the events.
 *
 * `position` is also where a reader of REST may go over to events (the header X-Event-Cursor), however far the feed is
 * behind: up to it, every event has been seen by a query that has ended, so whatever caused it had committed before, and a
 * query that begins now shows it. What a read does not show has a later place. What it does show may come once more.
 */
export function createFeed(deps: { db: Database; bus: Bus; logger: Logger }): Feed {
  const { db, bus, logger } = deps;
  const listeners = new Set<(event: PlacedEvent) => void>();
  const awayListeners = new Set<() => void>();
  let away = false;
  let position = -1;
  let loop: Loop | undefined;
  let off: (() => void) | undefined;
  let foundPlace: () => void = () => {};
  const hasPlace = new Promise<void>((resolve) => {
    foundPlace = resolve;
  });

  // The events after `recentAfter` and up to the position.
  let recent: PlacedEvent[] = [];
  let recentBytes = 0;
  let recentAfter = -1;
  let refilling: Promise<void> | undefined;
  /** Where the last refill ended: more than that there is not, or would be too much. */
  let refilledTo = -1;
  const keep = (event: PlacedEvent) => {
    recent.push(event);
    recentBytes += event.text.length;
    if (recent.length < RECENT_EVENTS * 2 && recentBytes < RECENT_BYTES) return;
    const dropped = recent.splice(0, Math.ceil(recent.length / 2));
    recentAfter = dropped.at(-1)?.eventId ?? recentAfter;
    for (const { text } of dropped) recentBytes -= text.length;
  };
  const jump = (to: number) => {
    position = to;
    recent = [];
    recentBytes = 0;
    recentAfter = to;
  };
  /** Puts in front of what is kept what came before it. */
  const refill = async () => {
    const until = recentAfter;
    const { rows } = await db.query<EventRow>({ ...BEFORE, values: [until] });
    // It moved on meanwhile.
    if (recentAfter !== until) return;
    const before: PlacedEvent[] = [];
    for (const event of rows.map(placed)) {
      if (recentBytes + event.text.length > RECENT_BYTES / 2) break;
      recentBytes += event.text.length;
      before.push(event);
    }
    recent = [...before.reverse(), ...recent];
    recentAfter = before[0] ? before[0].eventId - 1 : recentAfter;
    refilledTo = recentAfter;
  };

  const hand = (event: PlacedEvent) => {
    position = event.eventId;
    keep(event);
    for (const listener of listeners) {
      try {
        listener(event);
      } catch (error) {
        logger.error({ err: error }, 'a listener of the event feed failed');
      }
    }
  };

  const follow = async (): Promise<number> => {
    if (position < 0 || listeners.size === 0) {
      const last = (await keptEvents(db))?.last ?? 0;
      // Whoever began to listen meanwhile was promised everything after the old position.
      if (position < 0 || listeners.size === 0) jump(Math.max(position, last));
      foundPlace();
    }
    while (listeners.size > 0) {
      const { rows } = await db.query<EventRow>({ ...AFTER, values: [position] });
      let handed = 0;
      for (const row of rows) {
        const event = placed(row);
        hand(event);
        handed += event.text.length;
        if (handed < BREATH_BYTES) continue;
        // Or a burst would fill the sockets of clients that read well enough, before any of it is on its way.
        handed = 0;
        await new Promise((done) => setImmediate(done));
      }
      if (rows.length < PAGE) break;
    }
    away = false;
    return LOOK_ANYWAY_MS;
  };

  return {
    start() {
      loop ??= startLoop((error) => {
        if (!isDatabaseAway(error)) return logger.error({ err: error }, 'the event feed failed');
        if (!away) for (const listener of awayListeners) listener();
        away = true;
      }, follow);
      off ??= bus.on(EVENTS_TOPIC, loop.wake);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => void listeners.delete(listener);
    },
    async recent(after) {
      if (after < recentAfter && recentAfter !== refilledTo && recent.length < RECENT_EVENTS) {
        refilling ??= refill().finally(() => {
          refilling = undefined;
        });
        await refilling;
      }
      if (position < 0 || after < recentAfter) return undefined;
      return { events: recent.slice(firstAfter(recent, after)), upTo: position };
    },
    onAway(listener) {
      awayListeners.add(listener);
      return () => void awayListeners.delete(listener);
    },
    position: () => position,
    ready: () => hasPlace,
    async close() {
      off?.();
      await loop?.stop();
    },
  };
}
