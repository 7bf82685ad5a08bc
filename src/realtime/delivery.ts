import { randomUUID } from 'node:crypto';
import type { Config } from '../config.ts';
import type { Database } from '../db/database.ts';
import { mayAccess } from '../http/access.ts';
import type { Identity } from '../http/authenticate.ts';
import { isDatabaseAway } from '../http/problem.ts';
import type { Logger } from '../platform/logger.ts';
import { CLOSE } from './close-codes.ts';
import { type Feed, keptEvents, type PlacedEvent, type Stretch, visibleEvents } from './feed.ts';
import type { Subscription } from './subscription.ts';

// How events reach one client, over a WebSocket or as Server-Sent Events:
//
//   open ──▶ ack ──▶ (replay of what was missed) ──▶ live ──▶ over
//
// A replay reads the kept events up to where the feed is, again and again until it has caught up, and listens to the feed
// from that very moment: there is no turn of the event loop between the two, so there is neither a hole nor a repeat, and
// nothing is held meanwhile. Who may see an event is decided at its delivery, without a query.
//
// Nothing that a client does costs more than its share: what waits for it is bounded, a replay goes at its pace. A fault of
// ours in one delivery ends that one with 1011 and reaches no other.
//
// What goes out is `{type, event_id, timestamp, data}`; only events and bookmarks have a place in the order, so the others
// have no event_id, and a client's last_event_id is the largest it has seen.

/** When a client is looked after, in milliseconds. */
export const RHYTHM = {
  /** How often it is looked whether something is due. */
  tend: 1_000,
  ping: 30_000,
  /** Without a word for so long a socket counts as dead. */
  silent: 60_000,
  /** An idle client is told its place, so that it does not fall out of what is kept. */
  bookmark: 300_000,
  /** How often it is looked whether credentials are still good, besides whenever one ends. */
  recheck: 3_000,
};

/** Who opened it, and what for. */
export interface Hello {
  identity: Identity;
  subscription: Subscription;
  /** The last event that the client has; undefined when it wants no replay. */
  lastEventId: number | undefined;
}

/** What carries it to the client. */
export interface Wire {
  /** `eventId` is given for what has a place in the order. */
  send(text: string | Buffer, type: string, eventId?: number): void;
  /** Bytes that were sent and are not on their way yet. */
  waiting(): number;
  /** Resolves when what was sent so far is on its way, or the connection is gone. */
  flushed(): Promise<void>;
  /** Shows the client, and whatever is in between, that the connection lives. */
  beat(): void;
  close(code: number, reason: string): void;
  /** Whether the client answers beats, so that one that does not counts as dead. */
  readonly answers: boolean;
}

export interface DeliveryDeps {
  config: Config;
  db: Database;
  feed: Feed;
  logger: Logger;
  /** Resolves when it is this caller's turn to do a stretch of work, so that thousands of them do not stop the process. */
  turn: () => Promise<void>;
}

/** How much of a replay goes out in one stretch. */
const REPLAY_BYTES = 65_536;

/** A class for its size: there are tens of thousands, and closures would cost each of them kilobytes. */
export class Delivery {
  readonly connectionId = randomUUID();
  readonly subscription: Subscription;
  identity: Identity;
  /** Resolves when the first frame has been sent, or there will be none. */
  readonly greeted: Promise<void>;
  #greet: () => void = () => {};
  readonly #deps: DeliveryDeps;
  readonly #rhythm: typeof RHYTHM;
  readonly #wire: Wire;
  #state: 'greeting' | 'replaying' | 'live' | 'over' = 'greeting';
  /** Up to here the client was given everything. */
  #place = 0;
  #unsubscribe = () => {};
  #heardAt = performance.now();
  #beatAt = performance.now();
  #toldAt = performance.now();

  constructor(deps: DeliveryDeps, rhythm: typeof RHYTHM, wire: Wire, hello: Hello) {
    this.#deps = deps;
    this.#rhythm = rhythm;
    this.#wire = wire;
    this.identity = hello.identity;
    this.subscription = hello.subscription;
    this.greeted = new Promise((resolve) => {
      this.#greet = resolve;
    });
  }

  /** Greets the client and brings it up to date; what comes after that comes by itself. */
  async begin(lastEventId: number | undefined): Promise<void> {
    const { feed } = this.#deps;
    try {
      await feed.ready();
      this.#place = feed.position();
      if (lastEventId === undefined) {
        this.acknowledge(false);
        this.#goLive();
      } else if (await this.#isKnown(lastEventId)) {
        this.#place = lastEventId;
        this.acknowledge(true);
        await this.#replay();
      } else {
        this.#place = feed.position();
        this.acknowledge(false);
        this.#startAnew();
      }
    } catch (error) {
      this.fail(error);
    }
  }

  isOver(): boolean {
    return this.#state === 'over';
  }

  /** Notes that the client was heard. */
  heard(): void {
    this.#heardAt = performance.now();
  }

  /** Sends something that has no place in the order. */
  tell(type: string, data: object, eventId?: number): void {
    this.#send(JSON.stringify({ type, event_id: eventId, timestamp: new Date().toISOString(), data }), type, eventId);
  }

  acknowledge(resumed: boolean): void {
    this.tell('ack', {
      connection_id: this.connectionId,
      user_id: this.identity.userId,
      resumed,
      last_event_id: this.#place,
      heartbeat_interval_ms: this.#rhythm.ping,
      topics: this.subscription.topics(),
      expires_at: this.identity.expiresAt?.toISOString() ?? null,
    });
    this.#greet();
  }

  shut(code: number, reason: string): void {
    if (this.isOver()) return;
    this.gone();
    this.#wire.close(code, reason);
  }

  /** Notes that the connection has ended. */
  gone(): void {
    this.#state = 'over';
    this.#unsubscribe();
    this.#greet();
  }

  /** Ends this delivery for a fault of ours. */
  fail(error: unknown): void {
    const { logger } = this.#deps;
    const { connectionId } = this;
    if (isDatabaseAway(error)) logger.debug({ connectionId }, 'a delivery ends for want of the database');
    else logger.error({ err: error, connectionId }, 'a delivery failed');
    this.shut(CLOSE.fault, 'fault of the server');
  }

  #take(event: PlacedEvent): void {
    // A client may come from a process whose feed is ahead of this one.
    if (event.eventId <= this.#place) return;
    this.#place = event.eventId;
    try {
      if (this.#isWanted(event)) this.#send(event.text, event.type, event.eventId);
    } catch (error) {
      this.fail(error);
    }
  }

  /** Tells that nothing comes for a while, to a client that was greeted. */
  tellAway(): void {
    if (this.#state !== 'live' && this.#state !== 'replaying') return;
    this.tell('error', {
      code: 'database_away',
      detail: 'Nothing can be told at the moment. It goes on by itself, and nothing is missed.',
    });
  }

  /** Beats, tells the place or gives up, whatever is due at `now` (performance.now()). */
  tend(now: number): void {
    if (this.isOver()) return;
    const { expiresAt } = this.identity;
    if (expiresAt && expiresAt.getTime() <= Date.now()) this.shut(CLOSE.policy, 'the credential has expired');
    if (this.#wire.answers && now - this.#heardAt > this.#rhythm.silent) {
      this.shut(CLOSE.silent, 'nothing was heard for too long');
    }
    if (this.isOver()) return;
    if (now - this.#beatAt >= this.#rhythm.ping) {
      this.#beatAt = now;
      this.#wire.beat();
    }
    if (this.#state === 'live' && now - this.#toldAt >= this.#rhythm.bookmark) {
      this.tell('bookmark', { last_event_id: this.#place }, this.#place);
    }
  }

  #send(text: string | Buffer, type: string, eventId?: number): void {
    if (this.isOver()) return;
    if (this.#wire.waiting() > this.#deps.config.WS_MAX_BUFFERED_BYTES) {
      this.shut(CLOSE.tooSlow, 'too slow: come back with last_event_id');
      return;
    }
    this.#wire.send(text, type, eventId);
    this.#toldAt = performance.now();
  }

  #isWanted(event: PlacedEvent): boolean {
    return (event.shared || mayAccess(this.identity, event.userId)) && this.subscription.covers(event);
  }

  #goLive(): void {
    if (this.isOver()) return;
    this.#state = 'live';
    this.#unsubscribe = this.#deps.feed.subscribe((event) => this.#take(event));
  }

  #startAnew(): void {
    this.#place = this.#deps.feed.position();
    this.tell('resync_required', {
      last_event_id: this.#place,
      detail: 'Events were missed that are not kept: read over REST.',
    });
    this.#goLive();
  }

  async #isKnown(id: number): Promise<boolean> {
    const { feed, db } = this.#deps;
    if (id <= feed.position() && (await feed.recent(id))) return true;
    const kept = await keptEvents(db);
    // Who saw none and there was none has missed none.
    if (kept === undefined) return id === 0;
    return id >= kept.first - 1 && id <= kept.last;
  }

  /** What comes next for this client: from memory when that reaches back so far, else from the database; undefined if gone. */
  async #missed(): Promise<Stretch | undefined> {
    const { db, feed } = this.#deps;
    const recent = await feed.recent(this.#place);
    if (recent) return recent;
    const userId = this.identity.role === 'admin' ? undefined : this.identity.userId;
    const stretch = await visibleEvents(db, this.#place, feed.position(), userId);
    // Asked after the look: what was deleted before it is missing from it.
    return (await this.#isKnown(this.#place)) ? stretch : undefined;
  }

  async #replay(): Promise<void> {
    if (this.isOver()) return;
    this.#state = 'replaying';
    const { feed, config, turn } = this.#deps;
    while (!this.isOver() && this.#place < feed.position()) {
      const missed = await this.#missed();
      if (!missed) return this.#startAnew();
      for (let i = 0; i < missed.events.length && !this.isOver(); ) {
        // Thousands may come back at once: each gets its turn, and everything else gets on in between.
        await turn();
        // It must not be the replay that makes a client too slow.
        if (this.#wire.waiting() > config.WS_MAX_BUFFERED_BYTES / 4) await this.#wire.flushed();
        for (let bytes = 0; i < missed.events.length && bytes < REPLAY_BYTES; i++) {
          const event = missed.events[i];
          if (!event || !this.#isWanted(event)) continue;
          this.#send(event.text, event.type, event.eventId);
          bytes += event.text.length;
        }
      }
      this.#place = missed.upTo;
    }
    this.#goLive();
  }
}
