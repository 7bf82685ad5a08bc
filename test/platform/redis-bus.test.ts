import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Bus, createBus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { createPool } from '../../src/platform/postgres.ts';
import { connectRedis, type RedisConnection, readRedisUrl } from '../../src/platform/redis.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { freePort } from '../support/processes.ts';
import { haveRedis, redisOnPort } from '../support/redis.ts';
import { until } from '../support/work.ts';

const logger = createLogger('silent', false);
let closers: (() => unknown)[];
beforeEach(() => {
  closers = [];
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

/** A process on a database and a Redis, with what its bus heard. */
async function start(database: TestDatabase, redisUrl: string) {
  const pool = createPool({ url: database.url, size: 2, name: 'muster-test', logger });
  closers.push(() => pool.end());
  const redis = connectRedis(redisUrl, logger);
  closers.push(redis.close);
  const bus = await createBus({ pool, directUrl: database.url, redis, logger });
  closers.push(bus.close);
  const heard: (string | undefined)[] = [];
  bus.on('topic', (detail) => heard.push(detail));
  return { bus, heard };
}

/** Resolves when a ring of the one is heard by the other, however often it takes. */
async function reaches(from: Bus, to: { heard: (string | undefined)[] }, what: string): Promise<void> {
  await until(
    async () => {
      from.ring('topic', what);
      return to.heard.includes(what);
    },
    (heard) => heard,
  );
}

/** How many times Postgres was asked to notify. */
const notifies = async (database: TestDatabase) => {
  const pool = createPool({ url: database.url, size: 1, name: 'count', logger });
  const { rows } = await pool.query<{ n: string }>(
    `select count(*) as n from pg_stat_activity where application_name = 'muster-test' and query like '%pg_notify%' and datname = current_database()`,
  );
  await pool.end();
  return Number(rows[0]?.n);
};

describe.runIf(haveRedis())('the bus over Redis', () => {
  test('takes Redis while it is there, Postgres while it is away or hangs, and hears once it is back', async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const redis = await redisOnPort();
    closers.push(redis.stop);
    redis.start();
    const [one, two] = [await start(database, redis.url), await start(database, redis.url)];
    const sub = new Redis(redis.url, { retryStrategy: () => 50 });
    sub.on('error', () => {});
    closers.push(() => sub.disconnect());
    const overRedis: string[] = [];
    sub.on('message', (_channel: string, message: string) => overRedis.push(message));
    await sub.subscribe('muster');
    await until(
      async () => {
        one.bus.ring('topic', 'first');
        return overRedis.some((message) => message.includes('first'));
      },
      (seen) => seen,
    );
    await until(
      async () => two.heard,
      (heard) => heard.includes('first'),
    );
    expect(await notifies(database)).toBeLessThanOrEqual(2);

    await redis.stop();
    await reaches(one.bus, two, 'while it is away');
    expect(overRedis.some((message) => message.includes('while it is away'))).toBe(false);

    redis.start();
    await until(
      async () => {
        two.bus.ring('topic', 'again');
        return overRedis.some((message) => message.includes('again'));
      },
      (seen) => seen,
    );
    await reaches(two.bus, one, 'again');
    // After an outage everybody looks: something may have happened meanwhile.
    await until(
      async () => one.heard,
      (heard) => heard.includes(undefined),
    );

    redis.signal('SIGSTOP');
    await reaches(one.bus, two, 'while it hangs');
    redis.signal('SIGCONT');
    await reaches(two.bus, one, 'at last');
  });

  test('notices a subscription that hears nothing although its connection lives, and makes another', async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const redis = await redisOnPort();
    closers.push(redis.stop);
    redis.start();
    const pool = createPool({ url: database.url, size: 2, name: 'muster-test', logger });
    closers.push(() => pool.end());
    const real = connectRedis(redis.url, logger);
    closers.push(real.close);
    let deaf = false;
    let renewed = 0;
    const bus = await createBus({
      pool,
      directUrl: database.url,
      logger,
      redis: {
        ...real,
        subscribe(channel, onMessage, onReady) {
          const subscription = real.subscribe(channel, (message) => deaf || onMessage(message), onReady);
          return {
            renew() {
              renewed += 1;
              deaf = false;
              subscription.renew();
            },
            close: subscription.close,
          };
        },
      },
    });
    closers.push(bus.close);
    const heard: (string | undefined)[] = [];
    bus.on('topic', (detail) => heard.push(detail));
    const other = await start(database, redis.url);
    await reaches(other.bus, { heard }, 'before');
    deaf = true;
    await until(
      async () => renewed,
      (times) => times === 1,
    );
    await until(
      async () => heard,
      (all) => all.includes(undefined),
    );
    await reaches(other.bus, { heard }, 'after');
  });

  test('comes back after its subscriptions were cut', async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const redis = await redisOnPort();
    closers.push(redis.stop);
    redis.start();
    const [one, two] = [await start(database, redis.url), await start(database, redis.url)];
    await reaches(one.bus, two, 'works');
    const admin = new Redis(redis.url);
    closers.push(() => admin.disconnect());
    await admin.call('CLIENT', 'KILL', 'TYPE', 'pubsub');
    two.heard.length = 0;
    await reaches(one.bus, two, 'heals');
  });

  test('a Redis cluster and one behind sentinels serve as well as a single one', { timeout: 60_000 }, async () => {
    const folder = await mkdtemp(join(tmpdir(), 'muster-redis-'));
    closers.push(() => rm(folder, { recursive: true, force: true }));
    const run = async (args: string[]): Promise<void> => {
      const child: ChildProcess = spawn('redis-server', args, { cwd: folder, stdio: 'ignore' });
      const ended = new Promise((done) => child.once('exit', done));
      closers.push(async () => {
        child.kill('SIGKILL');
        await ended;
      });
    };
    const plain = ['--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'];
    const [clusterPort, masterPort, sentinelPort] = [await freePort(), await freePort(), await freePort()];
    await run([
      ...plain,
      '--port',
      String(clusterPort),
      '--cluster-announce-ip',
      '127.0.0.1',
      '--cluster-enabled',
      'yes',
      '--cluster-config-file',
      'nodes.conf',
      '--cluster-port',
      String(await freePort()),
    ]);
    await run([...plain, '--port', String(masterPort)]);
    await writeFile(
      join(folder, 'sentinel.conf'),
      `port ${sentinelPort}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 ${masterPort} 1\n`,
    );
    await run([join(folder, 'sentinel.conf'), '--sentinel']);
    const admin = new Redis(clusterPort, '127.0.0.1');
    closers.push(() => admin.disconnect());
    await admin.cluster('ADDSLOTS', ...Array.from({ length: 16_384 }, (_, i) => i));

    const database = await createTestDatabase();
    closers.push(database.drop);
    for (const url of [`redis+cluster://127.0.0.1:${clusterPort}`, `redis+sentinel://127.0.0.1:${sentinelPort}/main`]) {
      const redis: RedisConnection = connectRedis(url, logger);
      closers.push(redis.close);
      await until(
        () =>
          redis.ping().then(
            () => true,
            () => false,
          ),
        (ok) => ok,
      );
      expect(await redis.increment(`count-${url}`, 1_000)).toMatchObject({ count: 1 });
      expect(await redis.exchange('{k}', 'a', 'hello', 5)).toEqual(['hello']);
      const over = new Redis(url.includes('cluster') ? clusterPort : masterPort, '127.0.0.1');
      closers.push(() => over.disconnect());
      const seen: string[] = [];
      over.on('message', (_channel: string, message: string) => seen.push(message));
      await over.subscribe('muster');
      const [one, two] = [await start(database, url), await start(database, url)];
      await reaches(one.bus, two, url);
      await until(
        async () => {
          one.bus.ring('topic', `${url} over Redis`);
          return seen.some((message) => message.includes('over Redis'));
        },
        (found) => found,
      );
    }
  });
});

describe('REDIS_URL', () => {
  test.each([
    ['redis://h', { kind: 'single', nodes: [{ host: 'h', port: 6379 }], tls: false, db: 0 }],
    [
      'rediss://u:p%40s@h:1/3',
      { kind: 'single', nodes: [{ host: 'h', port: 1 }], tls: true, username: 'u', password: 'p@s', db: 3 },
    ],
    [
      'redis://:secret@[::1]:7',
      { kind: 'single', nodes: [{ host: '::1', port: 7 }], tls: false, password: 'secret', db: 0 },
    ],
    [
      'redis+sentinel://a,b:2/main/1',
      {
        kind: 'sentinel',
        nodes: [
          { host: 'a', port: 26_379 },
          { host: 'b', port: 2 },
        ],
        tls: false,
        master: 'main',
        db: 1,
      },
    ],
    [
      'rediss+cluster://a:1,b',
      {
        kind: 'cluster',
        nodes: [
          { host: 'a', port: 1 },
          { host: 'b', port: 6379 },
        ],
        tls: true,
        db: 0,
      },
    ],
  ])('%s is read', (url, place) => {
    expect(readRedisUrl(url)).toEqual(place);
  });
  test.each([
    '',
    'http://h',
    'redis://',
    'redis://a,b',
    'redis+sentinel://a',
    'redis+cluster://a/1',
    'redis://h/x',
    'redis://h:0',
    'redis://h:99999',
    'redis://h:1/2/3',
    'redis://%zz:%zz@h',
  ])('%j is refused', (url) => {
    expect(readRedisUrl(url)).toBeUndefined();
  });
});
