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
  text: string;
}

export interface Feed {
  /** Begins to follow; before that there is no position and listeners hear nothing. */
  start(): void;
  /** Calls `listener` with every event from the feed's present position on, in order; the answer ends that. */
  subscribe(listener: (event: PlacedEvent) => void): () => void;
  /** The last event that listeners were given; -1 until the feed has found its place. */
  position(): number;
  /** Resolves when the feed has its place; nothing after it is missed by those who subscribed before. */
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

const AFTER = {
  name: 'feed-after',
  text: `
    select event_id, user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at
    from events where event_id > $1 order by event_id limit $2`,
};

/** Of those, what one user may see. Served by events_owner_idx or the primary key, whichever is shorter. */
const AFTER_OF_USER = {
  name: 'feed-after-user',
  text: `
    select event_id, user_id, shared, topic, type, task_id, project_id, agent_id, data, created_at
    from events where event_id > $1 and event_id <= $4 and (user_id = $3 or shared) order by event_id limit $2`,
};

/** The events after a place, in order, a page at the most; of one user's and the shared ones when `userId` is given. */
export async function eventsAfter(
  db: Database,
  after: number,
  until: number,
  userId: number | undefined,
): Promise<PlacedEvent[]> {
  const { rows } =
    userId === undefined
      ? await db.query<EventRow>({ ...AFTER, values: [after, PAGE] })
      : await db.query<EventRow>({ ...AFTER_OF_USER, values: [after, PAGE, userId, until] });
  return rows.filter((row) => row.event_id <= until).map(placed);
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
    // `data` is JSON text already: it is put in as it stands.
    text: `${head.slice(0, -1)},"data":${row.data}}`,
  };
}

/**
 * Follows `events` for the listeners of this process. It starts at the end, and from then on gives every event once and in
 * order: it reads by `event_id`, which is the order in which events become visible (relay.ts), so
 * a ring that is lost only delays and a database that was away is caught up with.
 */
export function createFeed(deps: { db: Database; bus: Bus; logger: Logger }): Feed {
  const { db, bus, logger } = deps;
  const listeners = new Set<(event: PlacedEvent) => void>();
  let position = -1;
  let loop: Loop | undefined;
  let off: (() => void) | undefined;
  let foundPlace: () => void = () => {};
  const hasPlace = new Promise<void>((resolve) => {
    foundPlace = resolve;
  });

  const follow = async (): Promise<number> => {
    if (position < 0) {
      position = (await keptEvents(db))?.last ?? 0;
      foundPlace();
    }
    for (;;) {
      const events = await eventsAfter(db, position, Number.MAX_SAFE_INTEGER, undefined);
      for (const event of events) {
        position = event.eventId;
        for (const listener of listeners) {
          try {
            listener(event);
          } catch (error) {
            logger.error({ err: error }, 'a listener of the event feed failed');
          }
        }
      }
      if (events.length < PAGE) return LOOK_ANYWAY_MS;
    }
  };

  return {
    start() {
      loop ??= startLoop((error) => {
        if (!isDatabaseAway(error)) logger.error({ err: error }, 'the event feed failed');
      }, follow);
      off ??= bus.on(EVENTS_TOPIC, loop.wake);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => void listeners.delete(listener);
    },
    position: () => position,
    ready: () => hasPlace,
    async close() {
      off?.();
      await loop?.stop();
    },
  };
}
