import type pg from 'pg';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { CommitUnknownError, createDatabase, type Database, type Tx } from '../../src/db/database.ts';
import type { Bus } from '../../src/platform/bus.ts';
import { createLogger } from '../../src/platform/logger.ts';
import { createPool } from '../../src/platform/postgres.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';

let database: TestDatabase;
let pool: pg.Pool;
let db: Database;
const rings: string[] = [];
const bus: Bus = {
  ring: (topic) => void rings.push(topic),
  on: () => () => {},
  connected: () => true,
  close: async () => {},
};

beforeAll(async () => {
  database = await createTestDatabase();
  pool = createPool({ url: database.url, size: 4, name: 'test', logger: createLogger('silent', false) });
  db = createDatabase(pool, bus);
  await db.query({ text: 'create table things (id int primary key, n int not null)' });
});
afterAll(async () => {
  await pool.end();
  await database.drop();
});

const count = async () => (await db.query<{ n: number }>({ text: 'select count(*)::int as n from things' })).rows[0]?.n;
const idle = () => expect(pool.totalCount - pool.idleCount).toBe(0);
const insert = (id: number) => ({ text: 'insert into things values ($1, 0)', values: [id] });

describe('a transaction', () => {
  test('commits what was done, answers its value, and rings afterwards', async () => {
    rings.length = 0;
    const answer = await db.transaction(async (tx) => {
      await tx.query(insert(1));
      tx.ring('after');
      expect(rings).toEqual([]);
      return 'done';
    });
    expect(answer).toBe('done');
    expect(rings).toEqual(['after']);
    expect(await count()).toBe(1);
    idle();
  });

  test('does what it sends without waiting, in order, before its commit', async () => {
    const before = await count();
    const seen = await db.transaction(async (tx) => {
      tx.write(insert(100));
      tx.write({ text: 'update things set n = 7 where id = 100' });
      return tx.query<{ n: number }>({ text: 'select n from things where id = 100' });
    });
    expect(seen.rows).toEqual([{ n: 7 }]);
    await db.transaction(async (tx) => tx.write({ text: 'delete from things where id = 100' }));
    expect(await count()).toBe(before);
    idle();
  });

  test('fails as what it sent without waiting failed, and leaves nothing, whatever comes after', async () => {
    const before = await count();
    const twice = async (after: (tx: Tx) => unknown) =>
      db.transaction(async (tx) => {
        tx.write(insert(101));
        tx.write(insert(101));
        tx.ring('after');
        await after(tx);
      });
    rings.length = 0;
    for (const after of [
      () => {},
      (tx: Tx) => tx.query({ text: 'select 1' }),
      (tx: Tx) => tx.write(insert(102)),
      () => {
        throw new Error('later');
      },
    ]) {
      await expect(twice(after)).rejects.toMatchObject({ code: '23505' });
    }
    expect(rings).toEqual([]);
    expect(await count()).toBe(before);
    idle();
  });

  test('that throws leaves nothing and rings nothing; the error is the one that was thrown', async () => {
    rings.length = 0;
    const mine = new Error('mine');
    const thrown = db.transaction(async (tx) => {
      await tx.query(insert(2));
      tx.ring('after');
      throw mine;
    });
    await expect(thrown).rejects.toBe(mine);
    expect(rings).toEqual([]);
    expect(await count()).toBe(1);
    idle();
  });

  test('whose failed statement was swallowed does not pretend to have committed', async () => {
    const swallowed = db.transaction(async (tx) => {
      await tx.query(insert(3));
      await tx.query(insert(1)).catch(() => {});
    });
    await expect(swallowed).rejects.toThrow(/rolled back/);
    expect(await count()).toBe(1);
    idle();
  });

  test('refuses to work once it has ended', async () => {
    let kept: Parameters<Parameters<Database['transaction']>[0]>[0] | undefined;
    await db.transaction(async (tx) => {
      kept = tx;
    });
    await expect(kept?.query(insert(4))).rejects.toThrow('This transaction has ended.');
    await expect((async () => kept?.orm.execute('select 1'))()).rejects.toThrow();
    expect(await count()).toBe(1);
  });

  test('is tried again when Postgres asks for it, three times at most', async () => {
    let tries = 0;
    const failing = (until: number) =>
      db.transaction(async (tx) => {
        tries++;
        if (tries < until) await tx.query({ text: `do $$ begin raise exception 'x' using errcode = '40001'; end $$` });
        return tries;
      });
    expect(await failing(3)).toBe(3);
    tries = 0;
    await expect(failing(9)).rejects.toMatchObject({ code: '40001' });
    expect(tries).toBe(3);
    idle();
  });

  test('two that wait for each other: both get through', async () => {
    await db.query({ text: 'insert into things values (10, 0), (11, 0)' });
    const add = (first: number, second: number) =>
      db.transaction(async (tx) => {
        const plus = (id: number) => tx.query({ text: 'update things set n = n + 1 where id = $1', values: [id] });
        await plus(first);
        await tx.query({ text: 'select pg_sleep(0.2)' });
        await plus(second);
      });
    await Promise.all([add(10, 11), add(11, 10)]);
    const { rows } = await db.query({ text: 'select n from things where id in (10, 11)' });
    expect(rows).toEqual([{ n: 2 }, { n: 2 }]);
    idle();
  });

  test('fifty whose connection dies, at BEGIN or in the middle, leave a pool that works', async () => {
    const kill = (pid: number) => pool.query('select pg_terminate_backend($1)', [pid]);
    const dying = Array.from({ length: 50 }, (_, i) =>
      db.transaction(async (tx) => {
        const { rows } = await tx.query<{ pid: number }>({ text: 'select pg_backend_pid() as pid' });
        if (i % 2) await kill(rows[0]?.pid ?? 0);
        await tx.query({ text: 'select 1' });
        throw new Error('never committed');
      }),
    );
    for (const result of await Promise.allSettled(dying)) expect(result.status).toBe('rejected');
    const begin = vi.spyOn(pool, 'connect').mockImplementationOnce(async () => {
      const client = await pool.connect();
      await client.query('select pg_terminate_backend(pg_backend_pid())').catch(() => {});
      return client;
    });
    await expect(db.transaction(async () => {})).rejects.toThrow();
    begin.mockRestore();
    // A connection that was on its way for one that gave up waiting arrives yet.
    await expect.poll(() => pool.totalCount - pool.idleCount).toBe(0);
    expect(await db.transaction(async (tx) => (await tx.query({ text: 'select 1 as one' })).rows)).toEqual([
      { one: 1 },
    ]);
  });

  test.each([
    ['at BEGIN', 0],
    ['in the middle', 1],
  ])('whose Postgres stops talking %s is given up with the statement that got no answer', async (_when, statements) => {
    const proxy = await createTcpProxy(database.url);
    const own = createPool({ url: proxy.url, size: 4, name: 'test', logger: createLogger('silent', false) });
    try {
      const through = createDatabase(own, bus);
      await Promise.all([own.query('select 1'), own.query('select 1')]);
      let said = 0;
      const lost = through.transaction(async (tx) => {
        while (said < statements) {
          await tx.query({ text: 'select 1' });
          said++;
        }
        proxy.swallow();
        await tx.query({ text: 'select 1' });
      });
      if (statements === 0) proxy.swallow();
      // Asking in vain twice, one after the other, takes longer than being given up once.
      const twice = own.query('select pg_sleep(60)').catch(() => own.query('select 1').catch(() => 'asked twice'));
      const first = await Promise.race([lost.catch((error: unknown) => error), twice]);
      expect(first).toMatchObject({ message: 'Query read timeout' });
      await twice;
      expect(own.totalCount - own.idleCount).toBe(0);
      await proxy.restore();
      expect(await through.transaction(async (tx) => (await tx.query({ text: 'select 1 as one' })).rows)).toEqual([
        { one: 1 },
      ]);
    } finally {
      await own.end();
      proxy.close();
    }
  });

  test('whose commit got no answer says that it does not know', async () => {
    const lost = db.transaction(async (tx) => {
      const { rows } = await tx.query<{ pid: number }>({ text: 'select pg_backend_pid() as pid' });
      await tx.query({ text: `create temp table late (id int) on commit drop` });
      // The commit waits for this constraint's check; its connection is ended meanwhile.
      await tx.query({ text: `create table if not exists slow_check (id int)` });
      await tx.query({
        text: `create or replace function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(5); return new; end $$`,
      });
      await tx.query({
        text: `create constraint trigger slow_at_commit after insert on slow_check deferrable initially deferred for each row execute function slow()`,
      });
      await tx.query({ text: 'insert into slow_check values (1)' });
      setTimeout(() => void socketOf(rows[0]?.pid ?? 0), 300);
    });
    await expect(lost).rejects.toBeInstanceOf(CommitUnknownError);
    idle();
  });

  /** Cuts the connection from our side, so that Postgres says nothing more to it. */
  function socketOf(pid: number): void {
    for (const client of (
      pool as unknown as { _clients: { processID: number; connection: { stream: { destroy(): void } } }[] }
    )._clients) {
      if (client.processID === pid) client.connection.stream.destroy();
    }
  }
});
