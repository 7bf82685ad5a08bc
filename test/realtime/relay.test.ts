import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { Database } from '../../src/db/database.ts';
import { LOCKS } from '../../src/platform/locks.ts';
import { emitEvents } from '../../src/realtime/events.ts';
import { pruneBatch, type Relay, relayBatch, startRelay } from '../../src/realtime/relay.ts';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { until } from '../support/work.ts';
import { createBlackHole, emit, logger, numbered, openProcess } from './support.ts';

type Process = Awaited<ReturnType<typeof openProcess>>;

let database: TestDatabase;
let closers: (() => unknown)[];
beforeEach(async () => {
  database = await createTestDatabase();
  closers = [];
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
  await database.drop();
});

async function start(): Promise<Process> {
  const process = await openProcess(database.url);
  closers.push(process.close);
  return process;
}

async function relayOf({ db, bus }: Process, directUrl = database.url): Promise<Relay> {
  const relay = await startRelay({ db, bus, logger, directUrl });
  closers.push(relay.close);
  return relay;
}

/** The advisory locks of this test's database. */
const ADVISORY = `locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())`;

function signal(): { give: () => void; given: Promise<void> } {
  let give = () => {};
  const given = new Promise<void>((resolve) => {
    give = resolve;
  });
  return { give, given };
}

const leading = (relay: Relay) =>
  until(
    async () => relay.isLeader(),
    (leads) => leads,
  );

interface Read {
  id: number;
  n: number;
  writer: number;
}

async function eventsAfter(db: Database, cursor: number): Promise<Read[]> {
  const { rows } = await db.query<{ event_id: number; data: string }>({
    text: 'select event_id, data from events where event_id > $1 order by event_id',
    values: [cursor],
  });
  return rows.map(({ event_id: id, data }) => ({ id, ...(JSON.parse(data) as { n: number; writer: number }) }));
}

/** Reads as a client does that resumes again and again: only what has a higher id than the last it saw. */
function follow(db: Database): { read: Read[]; stop(total: number): Promise<void> } {
  const read: Read[] = [];
  const more = async () => {
    read.push(...(await eventsAfter(db, read.at(-1)?.id ?? 0)));
    return read.length;
  };
  let on = true;
  const following = (async () => {
    while (on) await more();
  })();
  return {
    read,
    async stop(total) {
      on = false;
      await following;
      await until(more, (count) => count >= total);
      await more();
    },
  };
}

const WRITERS = 6;
const EACH = 40;

/** Writers at once whose transactions end some time after they wrote, some not at all; answers what was committed. */
async function write(db: Database): Promise<Set<string>> {
  const written = new Set<string>();
  await Promise.all(
    Array.from({ length: WRITERS }, async (_, writer) => {
      for (let n = 0; n < EACH; n++) {
        const abandoned = n % 7 === 6;
        await db
          .transaction(async (tx) => {
            emitEvents(tx, [numbered(n, { userId: 1, data: { writer } })]);
            await tx.query({ text: 'select pg_sleep($1)', values: [Math.random() * 0.01] });
            if (abandoned) throw new Error('abandoned');
          })
          .catch((error: Error) => {
            if (error.message !== 'abandoned') throw error;
          });
        if (!abandoned) written.add(`${writer}:${n}`);
      }
    }),
  );
  return written;
}

function expectAllInOrder(read: readonly Read[], written: Set<string>) {
  const seen = read.map(({ writer, n }) => `${writer}:${n}`);
  expect(seen.length).toBe(new Set(seen).size);
  expect(new Set(seen)).toEqual(written);
  for (let writer = 0; writer < WRITERS; writer++) {
    const order = read.filter((event) => event.writer === writer).map(({ n }) => n);
    expect(order).toEqual(order.toSorted((a, b) => a - b));
  }
}

describe('order', () => {
  test('who resumes by event_id misses none of many writers that commit late', async () => {
    const process = await start();
    await relayOf(process);
    const reader = follow(process.db);
    const written = await write(process.db);
    await reader.stop(written.size);
    expectAllInOrder(reader.read, written);
  });

  test('holds also where several relay at once, as after a leader that does not know it was cut off', async () => {
    const { db } = await start();
    let on = true;
    const relays = Promise.all(
      [1, 2, 3].map(async () => {
        while (on) await relayBatch(db);
      }),
    );
    const reader = follow(db);
    const written = await write(db);
    await reader.stop(written.size);
    on = false;
    await relays;
    expectAllInOrder(reader.read, written);
  });

  test('a batch gets its ids only when the one before has committed', async () => {
    const { db } = await start();
    const gate = signal();
    const moved = signal();
    const late: Database = {
      ...db,
      transaction: (work) =>
        db.transaction(async (tx) => {
          const result = await work(tx);
          moved.give();
          await gate.given;
          return result;
        }),
    };
    await emit(db, numbered(1, { userId: 1 }));
    const first = relayBatch(late);
    await moved.given;
    await emit(db, numbered(2, { userId: 1 }));
    const second = relayBatch(db);
    await until(
      async () => (await db.query({ text: `select from pg_locks where ${ADVISORY} and not granted` })).rowCount,
      (waiting) => waiting === 1,
    );
    expect(await eventsAfter(db, 0)).toEqual([]);
    gate.give();
    expect(await Promise.all([first, second])).toEqual([1, 1]);
    expect((await eventsAfter(db, 0)).map(({ n }) => n)).toEqual([1, 2]);
  });

  test('moves the events of one transaction together and in their order, more than a batch of them', async () => {
    const process = await start();
    const numbers = Array.from({ length: 2_500 }, (_, n) => n);
    await emit(process.db, ...numbers.map((n) => numbered(n, { userId: 1 })));
    await relayOf(process);
    const read = await until(
      () => eventsAfter(process.db, 0),
      (events) => events.length === numbers.length,
    );
    expect(read.map(({ n }) => n)).toEqual(numbers);
    expect((await process.db.query({ text: 'select from event_outbox' })).rowCount).toBe(0);
  });
});

describe('leadership', () => {
  test('is with one, and passes on when that one closes', async () => {
    const [first, second] = [await start(), await start()];
    const one = await relayOf(first);
    await leading(one);
    const other = await relayOf(second);
    // The one proves that it is there, the other has tried.
    const lastOf = async () => (await backends(first.db)).map(({ query }) => query.includes('pg_try_advisory_lock'));
    await until(lastOf, (tried) => tried.length === 2 && tried.includes(true) && tried.includes(false));
    expect(other.isLeader()).toBe(false);
    await one.close();
    await leading(other);
    await emit(first.db, numbered(1, { userId: 1 }));
    await until(
      () => eventsAfter(first.db, 0),
      (events) => events.length === 1,
    );
  });

  test.each([
    ['leads', true],
    ['stands by', false],
  ])('leaves no connection and no lock behind when the one that %s closes', async (_what, leads) => {
    const process = await start();
    const relays = [await relayOf(process)];
    await leading(relays[0] as Relay);
    if (!leads) {
      const other = await start();
      relays.unshift(await relayOf(other));
      await until(
        () => backends(process.db),
        (all) => all.some(({ query }) => query.includes('pg_try_advisory_lock')),
      );
    }
    await relays[0]?.close();
    await until(
      () => backends(process.db),
      (all) => all.length === (leads ? 0 : 1),
    );
    const { rowCount } = await process.db.query({ text: `select from pg_locks where ${ADVISORY} and granted` });
    if (leads) expect(rowCount).toBe(0);
    await relays[0]?.close();
  });

  test('survives the end of its session again and again while events are written; none is lost', async () => {
    const [first, second] = [await start(), await start()];
    const relays = [await relayOf(first), await relayOf(second)];
    const reader = follow(first.db);
    let on = true;
    const killing = (async () => {
      let kills = 0;
      while (on || kills < 3) {
        await until(
          async () => relays.some((relay) => relay.isLeader()),
          (led) => led,
        );
        const { rowCount } = await first.db.query({
          text: `select pg_terminate_backend(pid) from pg_locks where ${ADVISORY} and granted and objid = $1`,
          values: [LOCKS.relayLeader[1]],
        });
        kills += rowCount ?? 0;
      }
    })();
    const written = await write(first.db);
    on = false;
    await killing;
    await reader.stop(written.size);
    expectAllInOrder(reader.read, written);
  });

  test('is taken from a leader whose connection swallows everything', async () => {
    const [first, second] = [await start(), await start()];
    const hole = await createBlackHole(database.url);
    closers.push(hole.close);
    const cutOff = await relayOf(first, hole.url);
    await leading(cutOff);
    const other = await relayOf(second);
    hole.swallow();
    await leading(other);
    expect(cutOff.isLeader()).toBe(false);
    await emit(first.db, numbered(1, { userId: 1 }));
    await until(
      () => eventsAfter(first.db, 0),
      (events) => events.length === 1,
    );
  });
});

function backends(db: Database): Promise<{ query: string }[]> {
  return db
    .query<{ query: string }>({
      text: `select query from pg_stat_activity where application_name = 'muster-relay' and datname = current_database()`,
    })
    .then(({ rows }) => rows);
}

describe('retention', () => {
  const age = (db: Database, hours: readonly number[]) =>
    db.query({
      text: `insert into events (user_id, topic, type, data, created_at)
             select 1, 'tasks', 'task_status_update', '{}', now() - hours * interval '1 hour'
             from unnest($1::int[]) with ordinality as given(hours, place) order by place`,
      values: [hours],
    });
  const kept = async (db: Database) => (await eventsAfter(db, 0)).map(({ id }) => id);

  test('deletes from the front only, so that what is kept has no holes', async () => {
    const { db } = await start();
    // The fourth is of a transaction that began a day ago and has only just ended.
    await age(db, [30, 25, 1, 25, 0]);
    expect(await pruneBatch(db)).toBe(false);
    expect(await kept(db)).toEqual([3, 4, 5]);
  });

  test('keeps the newest event however old it is', async () => {
    const { db } = await start();
    await age(db, [40, 30, 25]);
    await pruneBatch(db);
    await pruneBatch(db);
    expect(await kept(db)).toEqual([3]);
  });

  test('goes in batches', async () => {
    const { db } = await start();
    await age(
      db,
      Array.from({ length: 6_000 }, () => 25),
    );
    expect(await pruneBatch(db)).toBe(true);
    expect(await pruneBatch(db)).toBe(false);
    expect(await kept(db)).toEqual([6_000]);
  });

  test('is done by the leader', async () => {
    const process = await start();
    await age(process.db, [30, 25, 1]);
    await relayOf(process);
    await until(
      () => kept(process.db),
      (ids) => ids.length === 1,
    );
  });
});
