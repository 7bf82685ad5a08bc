import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { z } from 'zod';
import type { Logger } from './logger.ts';
import { createClient } from './postgres.ts';
import type { RedisConnection } from './redis.ts';

// How processes wake each other.
//
// A ring says "look again", never what happened: the facts are in Postgres, so a ring that is lost, doubled or late costs
// time and nothing else, and every listener also looks by itself now and then. Listeners of the same process are called
// at once; the other processes hear of it over Redis where there is one, else by NOTIFY. Every process listens to both:
// which way is taken is the choice of who rings, and one whose Redis is away rings by NOTIFY until it is back.
//
// NOTIFY is sent on its own and not inside the business transaction: Postgres takes a lock that is global to the cluster
// at the commit of a transaction that notifies and holds it over the fsync, which ends group commit for all of them.
// Rings that come while a message is under way are folded into the next one.
//
// Each way proves every two seconds that a message still gets through, since a connection that is open on one side only
// says nothing, and a subscription may be gone although its connection lives. After an outage every listener is called
// once: something may have happened meanwhile.

const CHANNEL = 'muster';
const PROBE_EVERY_MS = 2_000;
const PROBE_TIMEOUT_MS = 2_000;
const MAX_RETRY_MS = 2_000;
/** Postgres takes at most 8,000 bytes; more details than fit are left out, which listeners read as "anything". */
const MAX_PAYLOAD = 7_000;

/** `detail` narrows what is to be looked at; undefined means anything. */
export type Listener = (detail: string | undefined) => void;

/** What is sent: topics with their details, of which null means anything. */
const messageShape = z.object({
  from: z.string(),
  rings: z.array(z.tuple([z.string(), z.array(z.string()).nullable()])),
});
type Message = z.output<typeof messageShape>;

/** Anybody may send, another version of Muster too: what is no message of ours is undefined. */
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
  /** Sends what was rung, and ends; connections close soon after. */
  close(): Promise<void>;
}

/** A bus that rings nobody, for command line tools: servers look by themselves, a little later. */
export const silentBus: Bus = { ring() {}, on: () => () => {}, connected: () => true, close: async () => {} };

/** What a way between processes reports. */
interface Receiver {
  /** Something was sent, maybe by this process itself. */
  receive(payload: string): void;
  /** It works again, and something may have been missed. */
  recovered(): void;
  /** When this process last heard itself on this way, by performance.now(). */
  heardSelf(): number;
  /** A message that says nothing, by which it can hear itself. */
  probe: string;
}

/** A way between processes. */
interface Way {
  /** Answers false when it did not get through for sure. */
  send(payload: string): Promise<boolean>;
  connected(): boolean;
  close(): void;
}

/**
 * The bus of a process: in process alone when it is the only one there is (`alone`), else over Redis where there is one,
 * with Postgres NOTIFY as the fallback. `directUrl` must not lead through a pooler in transaction mode.
 */
export async function createBus(options: {
  pool: pg.Pool;
  directUrl: string;
  redis?: RedisConnection | undefined;
  alone?: boolean;
  logger: Logger;
}): Promise<Bus> {
  const { pool, directUrl, redis, alone = false, logger } = options;
  const self = randomUUID();
  const listeners = new Map<string, Set<Listener>>();
  const call = (topic: string, detail: string | undefined) => {
    for (const listener of listeners.get(topic) ?? []) {
      try {
        listener(detail);
      } catch (error) {
        logger.error({ err: error, topic }, 'a listener of the bus failed');
      }
    }
  };
  const receiver = (): Receiver => {
    let heard = Number.NEGATIVE_INFINITY;
    return {
      receive(payload) {
        const read = readMessage(payload);
        if (read === undefined) return;
        if (read.from === self) {
          heard = performance.now();
          return;
        }
        for (const [topic, details] of read.rings) {
          if (details === null) call(topic, undefined);
          else for (const detail of details) call(topic, detail);
        }
      },
      recovered() {
        for (const topic of listeners.keys()) call(topic, undefined);
      },
      heardSelf: () => heard,
      probe: JSON.stringify({ from: self, rings: [] } satisfies Message),
    };
  };

  const ways: Way[] = [];
  if (!alone) {
    if (redis) ways.push(redisWay(redis, logger, receiver()));
    ways.push(await postgresWay({ pool, directUrl, logger }, receiver()));
  }

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
    for (const way of ways) if (await way.send(payload)) return;
  };

  return {
    ring(topic, detail) {
      call(topic, detail);
      if (ways.length === 0) return;
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
    connected: () => alone || ways.some((way) => way.connected()),
    async close() {
      while (sending) await sending;
      for (const way of ways) way.close();
    },
  };
}

/** Redis pub/sub. */
function redisWay(redis: RedisConnection, logger: Logger, { receive, recovered, heardSelf, probe }: Receiver): Way {
  let works = false;
  let listening = false;
  const subscription = redis.subscribe(CHANNEL, receive, () => {
    listening = true;
    void prove();
  });
  const prove = async () => {
    const before = performance.now();
    try {
      await redis.publish(CHANNEL, probe);
    } catch {
      if (works) logger.warn('the bus goes over Postgres while Redis is away');
      works = false;
      return;
    }
    // The subscription is another connection: its message may come after the answer to the publish.
    for (let waited = 0; heardSelf() < before && waited < PROBE_TIMEOUT_MS; waited += 20) {
      await new Promise((done) => setTimeout(done, 20).unref());
    }
    if (heardSelf() >= before) {
      if (!works) {
        works = true;
        recovered();
      }
      return;
    }
    if (works) logger.warn('the bus hears nothing over Redis and connects anew');
    works = false;
    if (listening) subscription.renew();
    listening = false;
  };
  let proving = false;
  const timer = setInterval(() => {
    if (proving) return;
    proving = true;
    void prove().finally(() => {
      proving = false;
    });
  }, PROBE_EVERY_MS).unref();
  return {
    async send(payload) {
      if (!works) return false;
      try {
        await redis.publish(CHANNEL, payload);
        return true;
      } catch {
        works = false;
        return false;
      }
    },
    connected: () => works,
    close() {
      clearInterval(timer);
      subscription.close();
    },
  };
}

/** Postgres LISTEN/NOTIFY. */
async function postgresWay(
  { pool, directUrl, logger }: { pool: pg.Pool; directUrl: string; logger: Logger },
  { receive, recovered, heardSelf, probe: probeText }: Receiver,
): Promise<Way> {
  let client: pg.Client | undefined;
  let closed = false;
  let retryMs = 100;
  let timer: NodeJS.Timeout | undefined;

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
    next.on('notification', ({ channel, payload }) => {
      if (channel === CHANNEL && payload) receive(payload);
    });
    try {
      await next.connect();
      await next.query(`listen ${CHANNEL}`);
    } catch (error) {
      next.end().catch(() => {});
      throw error;
    }
    if (closed) return void next.end().catch(() => {});
    client = next;
    retryMs = 100;
    const probe = async () => {
      if (client !== next) return;
      try {
        const before = performance.now();
        await next.query('select pg_notify($1, $2)', [CHANNEL, probeText]);
        // A notification of one's own comes before the answer to the statement that sent it.
        if (heardSelf() < before) throw new Error('a probe did not come back');
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
        recovered();
      } catch {
        retryMs = Math.min(retryMs * 2, MAX_RETRY_MS);
        if (!closed) retry();
      }
    }, retryMs).unref();
  };

  await connect();
  return {
    async send(payload) {
      try {
        await pool.query({ name: 'bus-notify', text: 'select pg_notify($1, $2)', values: [CHANNEL, payload] });
        return true;
      } catch (error) {
        logger.debug({ err: error }, 'a notification was not sent');
        return false;
      }
    },
    connected: () => client !== undefined,
    close() {
      closed = true;
      clearTimeout(timer);
      const last = client;
      client = undefined;
      // Not waited for: a connection that only this side believes in would never end in order.
      last?.end().catch(() => {});
    },
  };
}
