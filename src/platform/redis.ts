import { Cluster, Redis } from 'ioredis';
import type { Logger } from './logger.ts';

/** What was counted in a window, and how many milliseconds are left of that. */
export interface WindowCount {
  count: number;
  leftMs: number;
}

/**
 * A Redis that may be away: nothing waits for it longer than a moment, and nothing is lost with it. Every call rejects at
 * once while there is no connection, and after 150 ms when Redis hangs; then it may have happened or not.
 */
export interface RedisConnection {
  /** Resolves when Redis answers. */
  ping(): Promise<void>;
  /** Adds one to the count of `key`, which begins a window of `windowMs` when there is none. */
  increment(key: string, windowMs: number): Promise<WindowCount>;
  /** The count of `key`; 0 when it has no window. */
  readCount(key: string): Promise<WindowCount>;
  /** Says `text` of `id` under `key`, and answers what all said there within the last `seconds`, by Redis's clock. */
  exchange(key: string, id: string, text: string, seconds: number): Promise<string[]>;
  /** Takes back what `id` said under `key`. */
  withdraw(key: string, id: string): Promise<void>;
  /** What was kept under `key`; null when nothing is. */
  read(key: string): Promise<string | null>;
  /** Keeps `text` under `key` for so many seconds. */
  keep(key: string, text: string, seconds: number): Promise<void>;
  publish(channel: string, message: string): Promise<void>;
  /**
   * Listens to `channel` on a connection of its own, again after every loss; `onReady` is called each time it listens.
   * What is published while it is away is gone.
   */
  subscribe(channel: string, onMessage: (message: string) => void, onReady: () => void): RedisSubscription;
  close(): Promise<void>;
}

export interface RedisSubscription {
  /** Drops the connection and makes another one: for a caller that hears nothing although something was said. */
  renew(): void;
  close(): void;
}

/** Scripts, so that no key is left without an end by a fault between two commands. Any Redis since 5 runs them. */
const INCREMENT = `
  local count = redis.call('INCR', KEYS[1])
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 then
    left = tonumber(ARGV[1])
    redis.call('PEXPIRE', KEYS[1], left)
  end
  return {count, left}`;
const READ_COUNT = `return {tonumber(redis.call('GET', KEYS[1]) or 0), math.max(0, redis.call('PTTL', KEYS[1]))}`;
/** What was said is a hash, and when is a sorted set beside it; the braces in their names keep both on one node of a cluster. */
const EXCHANGE = `
  local now = tonumber(redis.call('TIME')[1])
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('ZADD', KEYS[2], now, ARGV[1])
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - tonumber(ARGV[3]))) do
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
  end
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
  return redis.call('HVALS', KEYS[1])`;

const CONNECT_TIMEOUT_MS = 500;
const retryStrategy = (tries: number) => Math.min(tries * 100, 2_000);

/** Where a Redis is: one server, those that sentinels name, or a cluster. */
export interface RedisPlace {
  kind: 'single' | 'sentinel' | 'cluster';
  nodes: { host: string; port: number }[];
  tls: boolean;
  username?: string;
  password?: string;
  /** The name that the sentinels know the master by. */
  master?: string;
  db: number;
}

const FORM =
  /^redis(?<tls>s)?(?:\+(?<kind>sentinel|cluster))?:\/\/(?:(?<user>[^:@/]*)(?::(?<password>[^@/]*))?@)?(?<nodes>[^@/?#]+)(?:\/(?<path>[^?#]*))?$/;
const DEFAULT_PORTS = { single: 6379, sentinel: 26_379, cluster: 6379 };

/**
 * Reads `redis://[user:password@]host[:port][/db]` (`rediss:` for TLS), `redis+sentinel://h1,h2:26379/master[/db]` or
 * `redis+cluster://h1:7000,h2:7001`; undefined for anything else.
 */
export function readRedisUrl(text: string): RedisPlace | undefined {
  const groups = FORM.exec(text)?.groups;
  if (!groups) return undefined;
  const kind = (groups['kind'] as 'sentinel' | 'cluster' | undefined) ?? 'single';
  const nodes = (groups['nodes'] ?? '').split(',').map((node) => {
    const [, host = '', port] = /^(\[[\da-f:.]+\]|[\w.-]+)(?::(\d{1,5}))?$/i.exec(node) ?? [];
    return { host: host.replace(/^\[|\]$/g, ''), port: port === undefined ? DEFAULT_PORTS[kind] : Number(port) };
  });
  if (nodes.some(({ host, port }) => host === '' || port < 1 || port > 65_535)) return undefined;
  if (kind === 'single' && nodes.length > 1) return undefined;
  const parts = (groups['path'] ?? '').split('/').filter(Boolean);
  const master = kind === 'sentinel' ? parts.shift() : undefined;
  if (kind === 'sentinel' && master === undefined) return undefined;
  const [db = '0', ...more] = parts;
  if (!/^\d{1,4}$/.test(db) || more.length > 0 || (kind === 'cluster' && db !== '0')) return undefined;
  try {
    return {
      kind,
      nodes,
      tls: groups['tls'] !== undefined,
      ...(groups['user'] ? { username: decodeURIComponent(groups['user']) } : {}),
      ...(groups['password'] ? { password: decodeURIComponent(groups['password']) } : {}),
      ...(master === undefined ? {} : { master: decodeURIComponent(master) }),
      db: Number(db),
    };
  } catch {
    return undefined;
  }
}

interface Manners {
  enableOfflineQueue?: boolean;
  maxRetriesPerRequest: number | null;
  commandTimeout?: number;
}

function open(place: RedisPlace, { enableOfflineQueue = true, ...manners }: Manners): Redis | Cluster {
  const { kind, nodes, tls, username, password, master, db } = place;
  const common = {
    connectTimeout: CONNECT_TIMEOUT_MS,
    // Whoever subscribes does it again at each connection, and is told when.
    autoResubscribe: false,
    ...manners,
    ...(username === undefined ? {} : { username }),
    ...(password === undefined ? {} : { password }),
    ...(tls ? { tls: {} } : {}),
  };
  if (kind === 'cluster') {
    return new Cluster(nodes, {
      redisOptions: common,
      enableOfflineQueue,
      clusterRetryStrategy: retryStrategy,
      slotsRefreshTimeout: CONNECT_TIMEOUT_MS,
    });
  }
  if (kind === 'sentinel') {
    const sentinel = { sentinels: nodes, name: master ?? '', sentinelRetryStrategy: retryStrategy };
    return new Redis({
      ...common,
      ...sentinel,
      enableOfflineQueue,
      retryStrategy,
      db,
      ...(tls ? { enableTLSForSentinelMode: true } : {}),
    });
  }
  const [node] = nodes;
  return new Redis({ ...common, enableOfflineQueue, retryStrategy, host: node?.host ?? '', port: node?.port ?? 0, db });
}

/**
 * Connects to Redis, and again after every loss. Commands fail at once while there is no connection: ioredis would queue
 * them without bound and wait for ever. Throws when `url` is none that readRedisUrl takes.
 */
export function connectRedis(url: string, logger: Logger): RedisConnection {
  const place = readRedisUrl(url);
  if (!place) throw new Error('REDIS_URL cannot be read.');
  const redis = open(place, { enableOfflineQueue: false, maxRetriesPerRequest: 1, commandTimeout: 150 });
  let away = false;
  redis.on('error', (error: Error) => {
    // One line an outage, not one a try.
    if (!away) logger.warn({ err: error }, 'Redis is away');
    away = true;
  });
  redis.on('ready', () => {
    if (away) logger.info('Redis is back');
    away = false;
  });
  const subscriptions = new Set<RedisSubscription>();
  return {
    async ping() {
      await redis.ping();
    },
    async increment(key, windowMs) {
      return windowCount(await redis.eval(INCREMENT, 1, key, windowMs));
    },
    async readCount(key) {
      return windowCount(await redis.eval(READ_COUNT, 1, key));
    },
    async exchange(key, id, text, seconds) {
      const said = await redis.eval(EXCHANGE, 2, `${key}:said`, `${key}:when`, id, text, seconds);
      if (!Array.isArray(said)) throw new Error('Redis answered something else.');
      return said.map(String);
    },
    async withdraw(key, id) {
      await redis.hdel(`${key}:said`, id);
    },
    read: (key) => redis.get(key),
    async keep(key, text, seconds) {
      await redis.set(key, text, 'EX', seconds);
    },
    async publish(channel, message) {
      await redis.publish(channel, message);
    },
    subscribe(channel, onMessage, onReady) {
      let connection: Redis | Cluster | undefined;
      const connect = () => {
        // It waits for its connection as long as that takes: nobody else waits for it.
        const next = open(place, { maxRetriesPerRequest: null });
        connection = next;
        next.on('error', () => {}); // Told by the connection beside it.
        next.on('message', (_channel: string, message: string) => onMessage(message));
        next.on('ready', () => {
          next.subscribe(channel).then(
            () => {
              if (connection === next) onReady();
            },
            () => {},
          );
        });
      };
      connect();
      const subscription: RedisSubscription = {
        renew() {
          connection?.disconnect();
          connect();
        },
        close() {
          subscriptions.delete(subscription);
          connection?.disconnect();
          connection = undefined;
        },
      };
      subscriptions.add(subscription);
      return subscription;
    },
    async close() {
      for (const subscription of subscriptions) subscription.close();
      redis.disconnect();
    },
  };
}

function windowCount(reply: unknown): WindowCount {
  const [count, leftMs] = Array.isArray(reply) ? (reply as unknown[]) : [];
  if (typeof count !== 'number' || typeof leftMs !== 'number') throw new Error('Redis answered something else.');
  return { count, leftMs };
}
