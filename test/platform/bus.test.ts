import { setTimeout as delay } from 'node:timers/promises';
import type pg from 'pg';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { type Bus, createBus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { createPool } from '../../src/platform/postgres.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';
import { until } from '../support/work.ts';

const logger = createLogger('silent', false);

let database: TestDatabase;
let closers: (() => unknown)[];
beforeEach(async () => {
  database = await createTestDatabase();
  closers = [database.drop];
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

interface Process {
  bus: Bus;
  pool: pg.Pool;
  /** What `listen` heard, in order. */
  heard: (string | undefined)[];
  /** Keeps what is rung for the topic. */
  listen(topic: string): () => void;
}

async function start(directUrl = database.url): Promise<Process> {
  const pool = createPool({ url: database.url, size: 4, name: 'muster-test', logger });
  closers.push(() => pool.end());
  const bus = await createBus({ pool, directUrl, logger });
  closers.push(bus.close);
  const heard: Process['heard'] = [];
  return { bus, pool, heard, listen: (topic) => bus.on(topic, (detail) => heard.push(detail)) };
}

const listeners = async (pool: pg.Pool) => {
  const { rows } = await pool.query<{ pid: number }>(
    `select pid from pg_stat_activity where application_name = 'muster-bus' and datname = current_database()`,
  );
  return rows.map(({ pid }) => pid);
};

/** Resolves when the other process has heard whatever was rung before this. */
async function caughtUp(from: Process, to: Process): Promise<void> {
  let here = () => {};
  const arrived = new Promise<void>((resolve) => {
    here = resolve;
  });
  const off = to.bus.on('marker', here);
  from.bus.ring('marker');
  await arrived;
  off();
}

describe('a ring', () => {
  test('is heard at once in the same process, and soon, once, in the others', async () => {
    const [one, other, third] = [await start(), await start(), await start()];
    for (const process of [one, other, third]) process.listen('tasks');
    one.bus.ring('tasks', '7');
    expect(one.heard).toEqual(['7']);
    one.bus.ring('tasks');
    expect(one.heard).toEqual(['7', undefined]);
    await Promise.all([caughtUp(one, other), caughtUp(one, third)]);
    // The first was on its way already when the second came: it was not swallowed by it.
    expect(other.heard).toEqual(['7', undefined]);
    expect(third.heard).toEqual(['7', undefined]);
    expect(one.heard).toEqual(['7', undefined]);
  });

  test('concerns those who listen to its topic, until they are taken off', async () => {
    const [one, other] = [await start(), await start()];
    const off = other.listen('tasks');
    one.bus.ring('agents', '1');
    one.bus.ring('tasks', '2');
    await caughtUp(one, other);
    off();
    one.bus.ring('tasks', '3');
    await caughtUp(one, other);
    expect(other.heard).toEqual(['2']);
  });

  test('reaches every listener though one before it throws', async () => {
    const [one, other] = [await start(), await start()];
    for (const { bus } of [one, other]) {
      bus.on('tasks', () => {
        throw new Error('a fault');
      });
    }
    one.listen('tasks');
    other.listen('tasks');
    expect(() => one.bus.ring('tasks', '1')).not.toThrow();
    await caughtUp(one, other);
    one.bus.ring('tasks', '2');
    await caughtUp(one, other);
    expect([one.heard, other.heard]).toEqual([
      ['1', '2'],
      ['1', '2'],
    ]);
  });

  test('keeps the bytes of its detail', async () => {
    const [one, other] = [await start(), await start()];
    other.listen('tasks');
    const detail = `"\\'; select 1 --\n grüezi 🎉 \u2028`;
    one.bus.ring('tasks', detail);
    await caughtUp(one, other);
    expect(other.heard).toEqual([detail]);
  });
});

describe('rings that come while one is on its way', () => {
  /** Rings under way: the first one is in a NOTIFY that waits. */
  async function whileSending(one: Process, ring: () => void): Promise<number> {
    let send = () => {};
    const gate = new Promise<void>((resolve) => {
      send = resolve;
    });
    const query = one.pool.query.bind(one.pool) as (config: unknown) => Promise<unknown>;
    const spy = vi.spyOn(one.pool, 'query').mockImplementation((async (config: unknown) => {
      await gate;
      return query(config);
    }) as never);
    one.bus.ring('first');
    ring();
    send();
    const sent = await until(
      async () => spy.mock.calls.length,
      (count) => count >= 2,
    );
    spy.mockRestore();
    return sent;
  }

  test('are folded into one more, each detail once', async () => {
    const [one, other] = [await start(), await start()];
    other.listen('tasks');
    const notifies = await whileSending(one, () => {
      for (let i = 0; i < 1_000; i++) one.bus.ring('tasks', String(i % 3));
    });
    await caughtUp(one, other);
    expect(notifies).toBe(2);
    expect(other.heard).toEqual(['0', '1', '2']);
  });

  test('with and without a detail become "anything"', async () => {
    const [one, other] = [await start(), await start()];
    other.listen('tasks');
    await whileSending(one, () => {
      one.bus.ring('tasks', '1');
      one.bus.ring('tasks');
      one.bus.ring('tasks', '2');
    });
    await caughtUp(one, other);
    expect(other.heard).toEqual([undefined]);
  });

  test('with more details than a notification holds become "anything"', async () => {
    const [one, other] = [await start(), await start()];
    other.listen('tasks');
    await whileSending(one, () => {
      // Fewer characters than Postgres takes bytes.
      for (let i = 0; i < 40; i++) one.bus.ring('tasks', `${i}-${'ü'.repeat(95)}`);
    });
    await caughtUp(one, other);
    expect(other.heard).toEqual([undefined]);
  });
});

describe('a connection that is lost', () => {
  test('is made anew, and everybody is called, since something may have happened meanwhile', async () => {
    const [one, other] = [await start(), await start()];
    const calls: string[] = [];
    other.bus.on('tasks', (detail) => calls.push(`tasks ${detail}`));
    other.bus.on('agents', (detail) => calls.push(`agents ${detail}`));
    const before = await listeners(one.pool);
    expect(before).toHaveLength(2);
    await one.pool.query('select pg_terminate_backend(pid) from unnest($1::int[]) as pid', [before]);
    await until(
      async () => calls.length,
      (count) => count === 2,
    );
    expect(calls).toEqual(['tasks undefined', 'agents undefined']);
    await until(
      async () => one.bus.connected() && other.bus.connected(),
      (connected) => connected,
    );
    calls.length = 0;
    one.bus.ring('tasks', '1');
    await caughtUp(one, other);
    expect(calls).toEqual(['tasks 1']);
    expect(await listeners(one.pool)).toHaveLength(2);
  });

  test('is noticed also when it swallows everything without a word', async () => {
    const proxy = await createTcpProxy(database.url);
    closers.push(proxy.close);
    const one = await start();
    const other = await start(proxy.url);
    other.listen('tasks');
    proxy.swallow();
    await until(
      async () => other.bus.connected(),
      (connected) => !connected,
    );
    one.bus.ring('tasks', 'unheard');
    await proxy.restore();
    await until(
      async () => other.heard.length,
      (count) => count > 0,
    );
    expect(other.heard).toEqual([undefined]);
    expect(other.bus.connected()).toBe(true);
    one.bus.ring('tasks', 'heard');
    await caughtUp(one, other);
    expect(other.heard).toEqual([undefined, 'heard']);
  });

  test('of the pool loses the ring for the others and harms nothing here', async () => {
    const [one, other] = [await start(), await start()];
    one.listen('tasks');
    other.listen('tasks');
    const spy = vi.spyOn(one.pool, 'query').mockImplementation((async () => {
      throw new Error('Connection terminated unexpectedly');
    }) as never);
    one.bus.ring('tasks', '1');
    await until(
      async () => spy.mock.calls.length,
      (count) => count === 1,
    );
    spy.mockRestore();
    one.bus.ring('tasks', '2');
    await caughtUp(one, other);
    expect(one.heard).toEqual(['1', '2']);
    expect(other.heard).toEqual(['2']);
  });
});

test.each(['', 'hello', 'null', '{}', '[1]', '{"from":"x","rings":7}', '{"from":"x","rings":[null]}'])(
  'a notification that is none of ours (%j) is passed over',
  async (payload) => {
    const one = await start();
    const other = await start();
    other.listen('tasks');
    await one.pool.query('select pg_notify($1, $2)', ['muster', payload]);
    one.bus.ring('tasks', '1');
    await caughtUp(one, other);
    expect(other.heard).toEqual(['1']);
  },
);

describe('close', () => {
  test('sends what was rung before, and leaves no connection behind', async () => {
    const [one, other] = [await start(), await start()];
    other.listen('tasks');
    one.bus.ring('tasks', '1');
    one.bus.ring('tasks', '2');
    await one.bus.close();
    await until(
      async () => other.heard,
      (heard) => heard.includes('2'),
    );
    expect(other.heard).toEqual(['1', '2']);
    await until(
      () => listeners(one.pool),
      (pids) => pids.length === 1,
    );
    expect(one.bus.connected()).toBe(false);
  });

  test('in the middle of a reconnect leaves none either', async () => {
    const proxy = await createTcpProxy(database.url);
    closers.push(proxy.close);
    const one = await start();
    const other = await start(proxy.url);
    other.listen('tasks');
    proxy.cut();
    await until(
      async () => other.bus.connected(),
      (connected) => !connected,
    );
    await other.bus.close();
    await proxy.restore();
    // Longer than the longest pause before a try.
    await delay(2_500);
    expect(await listeners(one.pool)).toHaveLength(1);
    expect(other.heard).toEqual([]);
  });

  test('does not wait for a Postgres that says nothing', async () => {
    const proxy = await createTcpProxy(database.url);
    closers.push(proxy.close);
    const other = await start(proxy.url);
    proxy.swallow();
    await other.bus.close();
    expect(other.bus.connected()).toBe(false);
    expect(await listeners(other.pool)).toHaveLength(1);
  });
});
