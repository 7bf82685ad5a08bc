import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { z } from 'zod';
import type { Logger } from './logger.ts';
import { createClient } from './postgres.ts';

// How processes wake each other.
//
// A ring says "look again", never what happened: the facts are in Postgres, so a ring that is lost, doubled or late costs
// time and nothing else, and every listener also looks by itself now and then. Listeners of the same process are called
// at once; the other processes hear of it by NOTIFY.
//
// NOTIFY is sent on its own and not inside the business transaction: Postgres takes a lock that is global to the cluster
// at the commit of a transaction that notifies and holds it over the fsync, which ends group commit for all of them.
// Rings that come while a NOTIFY is under way are folded into the next one.
//
// The LISTEN connection proves every two seconds that a message still gets through, since a connection that is open on
// one side only says nothing. After an outage every listener is called once: something may have happened meanwhile.

const CHANNEL = 'muster';
const PROBE_EVERY_MS = 2_000;
const PROBE_TIMEOUT_MS = 2_000;
const MAX_RETRY_MS = 2_000;
/** Postgres takes at most 8,000 bytes; more details than fit are left out, which listeners read as "anything". */
const MAX_PAYLOAD = 7_000;

/** `detail` narrows what is to be looked at; undefined means anything. */
export type Listener = (detail: string | undefined) => void;

/** What a NOTIFY carries: topics with their details, of which null means anything. */
const messageShape = z.object({
  from: z.string(),
  rings: z.array(z.tuple([z.string(), z.array(z.string()).nullable()])),
});
type Message = z.output<typeof messageShape>;

/** Anybody on the database may notify, another version of Muster too: what is no message of ours is undefined. */
function readMessage(payload: string): Message | undefined {
  try {
    return messageShape.safeParse(JSON.parse(payload)).data;
  } catch {
    return undefined;
  }
}

export interface Bus {
  /** Wakes the listeners of `topic` here and, soon, in the other processes. Never throws. */
  ring(topic: string, detail?: string): void;
  /** Calls `listener` at each ring of `topic` and after each outage; the answer takes it off again. */
  on(topic: string, listener: Listener): () => void;
  /** Whether rings of other processes arrive at the moment. */
  connected(): boolean;
  /** Sends what was rung, and ends; the connection closes soon after. */
  close(): Promise<void>;
}

/** A bus over Postgres LISTEN/NOTIFY. `directUrl` must not lead through a pooler in transaction mode. */
export async function createPostgresBus(options: { pool: pg.Pool; directUrl: string; logger: Logger }): Promise<Bus> {
  const { pool, directUrl, logger } = options;
  const self = randomUUID();
  const listeners = new Map<string, Set<Listener>>();
  let client: pg.Client | undefined;
  let closed = false;
  let heard = 0;
  let retryMs = 100;
  let timer: NodeJS.Timeout | undefined;

  const call = (topic: string, detail: string | undefined) => {
    for (const listener of listeners.get(topic) ?? []) {
      try {
        listener(detail);
      } catch (error) {
        logger.error({ err: error, topic }, 'a listener of the bus failed');
      }
    }
  };

  // Topic → details; undefined as details stands for "anything" and swallows the others.
  let waiting = new Map<string, Set<string> | undefined>();
  let sending: Promise<void> | undefined;
  const flush = () => {
    sending ??= send().finally(() => {
      sending = undefined;
      if (waiting.size > 0) flush();
    });
  };
  const send = async () => {
    const rings = [...waiting].map(([topic, details]): Message['rings'][number] => [
      topic,
      details ? [...details] : null,
    ]);
    waiting = new Map();
    let payload = JSON.stringify({ from: self, rings } satisfies Message);
    if (Buffer.byteLength(payload) > MAX_PAYLOAD) {
      payload = JSON.stringify({ from: self, rings: rings.map(([topic]) => [topic, null]) } satisfies Message);
    }
    try {
      await pool.query({ name: 'bus-notify', text: 'select pg_notify($1, $2)', values: [CHANNEL, payload] });
    } catch (error) {
      logger.debug({ err: error }, 'a notification was not sent');
    }
  };

  const receive = (message: pg.Notification) => {
    if (message.channel !== CHANNEL || !message.payload) return;
    const read = readMessage(message.payload);
    if (read === undefined) return;
    if (read.from === self) {
      heard = performance.now();
      return;
    }
    for (const [topic, details] of read.rings) {
      if (details === null) call(topic, undefined);
      else for (const detail of details) call(topic, detail);
    }
  };

  const connect = async () => {
    const next = createClient({ url: directUrl, name: 'muster-bus', queryTimeoutMs: PROBE_TIMEOUT_MS });
    const lost = () => {
      if (client !== next) return;
      client = undefined;
      next.end().catch(() => {});
      if (!closed) {
        logger.warn('the bus lost its connection');
        retry();
      }
    };
    next.on('error', lost);
    next.on('end', lost);
    next.on('notification', receive);
    try {
      await next.connect();
      await next.query(`listen ${CHANNEL}`);
    } catch (error) {
      next.end().catch(() => {});
      throw error;
    }
    if (closed) return void next.end().catch(() => {});
    client = next;
    heard = performance.now();
    retryMs = 100;
    const probe = async () => {
      if (client !== next) return;
      try {
        const before = performance.now();
        await next.query('select pg_notify($1, $2)', [
          CHANNEL,
          JSON.stringify({ from: self, rings: [] } satisfies Message),
        ]);
        // A notification of one's own comes before the answer to the statement that sent it.
        if (heard < before) throw new Error('a probe did not come back');
        timer = setTimeout(probe, PROBE_EVERY_MS).unref();
      } catch {
        lost();
      }
    };
    timer = setTimeout(probe, PROBE_EVERY_MS).unref();
  };

  const retry = () => {
    timer = setTimeout(async () => {
      try {
        await connect();
        if (closed) return;
        logger.info('the bus is connected again');
        for (const topic of listeners.keys()) call(topic, undefined);
      } catch {
        retryMs = Math.min(retryMs * 2, MAX_RETRY_MS);
        if (!closed) retry();
      }
    }, retryMs).unref();
  };

  await connect();
  return {
    ring(topic, detail) {
      call(topic, detail);
      const details = waiting.get(topic);
      if (detail === undefined) waiting.set(topic, undefined);
      else if (details) details.add(detail);
      else if (!waiting.has(topic)) waiting.set(topic, new Set([detail]));
      flush();
    },
    on(topic, listener) {
      const set = listeners.get(topic) ?? new Set();
      listeners.set(topic, set.add(listener));
      return () => void set.delete(listener);
    },
    connected: () => client !== undefined,
    async close() {
      closed = true;
      clearTimeout(timer);
      while (sending) await sending;
      const last = client;
      client = undefined;
      // Not waited for: a connection that only this side believes in would never end in order.
      last?.end().catch(() => {});
    },
  };
}
