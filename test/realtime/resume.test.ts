import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';
import { type Client, emit, numbered, openSocket } from './support.ts';

let server: TestServer;
/** A second process on the same database, with a feed of its own. */
let second: TestServer;
beforeAll(async () => {
  server = await startServer();
  second = await startServer({ databaseUrl: server.databaseUrl, env: { JWT_SECRET: server.config.JWT_SECRET ?? '' } });
});
afterAll(async () => {
  await second?.stop();
  await server?.stop();
});

const open = (credential: string, lastEventId: number, at = server) =>
  openSocket(`${at.url}/ws?token=${credential}&last_event_id=${lastEventId}`);
const upTo = (client: Client, n: number) => client.frame(({ data }) => data['n'] === n);
const ids = (client: Client) => client.frames.flatMap(({ event_id: id }) => id ?? []);

/** The place of the last event. */
const lastEvent = async (): Promise<number> => {
  const { rows } = await server.db.query<{ last: number }>({ text: 'select max(event_id) as last from events' });
  return rows[0]?.last ?? 0;
};
/** Waits until all that was written has its place. */
const relayed = () =>
  until(
    async () => (await server.db.query({ text: 'select from event_outbox' })).rowCount,
    (waiting) => waiting === 0,
  );

describe('last_event_id', () => {
  test('brings what was missed, then what comes, without hole or repeat', async () => {
    const user = await server.newUser();
    await emit(server.db, ...[1, 2, 3].map((n) => numbered(n, { userId: user.id })));
    await relayed();
    const second = (await lastEvent()) - 1;
    const client = open(user.token, second);
    expect((await client.ack).data).toMatchObject({ resumed: true, last_event_id: second });
    await upTo(client, 3);
    await emit(server.db, numbered(4, { userId: user.id }));
    await upTo(client, 4);
    expect(client.numbers()).toEqual([3, 4]);
    client.socket.close();
  });

  test('brings only what one may see and asked for', async () => {
    const [one, other] = [await server.newUser(), await server.newUser()];
    await relayed();
    const start = await lastEvent();
    await emit(
      server.db,
      numbered(1, { userId: one.id }),
      numbered(2, { userId: other.id }),
      numbered(3, { userId: other.id, shared: true, type: 'agent_activity_update' }),
      numbered(4, { userId: one.id, type: 'calendar_event_created' }),
      numbered(5, { userId: one.id }),
    );
    await relayed();
    const mine = open(one.token, start);
    const narrow = openSocket(`${server.url}/ws?token=${one.token}&last_event_id=${start}&topics=tasks`);
    const theirs = open(other.token, start);
    const admin = open(second.adminKey, start); // The second start made the first admin a new key.
    await Promise.all([upTo(mine, 5), upTo(narrow, 5), upTo(theirs, 3), upTo(admin, 5)]);
    expect([mine, narrow, theirs, admin].map((client) => client.numbers())).toEqual([
      [1, 3, 4, 5],
      [1, 5],
      [2, 3],
      [1, 2, 3, 4, 5],
    ]);
    for (const { socket } of [mine, narrow, theirs, admin]) socket.close();
  });

  test('of a process that is ahead of this one repeats nothing', async () => {
    const user = await server.newUser();
    await emit(server.db, numbered(1, { userId: user.id }));
    await relayed();
    for (const at of [server, second]) {
      const client = open(user.token, await lastEvent(), at);
      expect((await client.ack).data['resumed']).toBe(true);
      await emit(server.db, numbered(2, { userId: user.id }));
      await upTo(client, 2);
      expect(client.numbers()).toEqual([2]);
      client.socket.close();
    }
  });

  test('that lies ahead of every event → resync_required, then live', async () => {
    const user = await server.newUser();
    const client = open(user.token, (await lastEvent()) + 1_000_000);
    expect((await client.ack).data['resumed']).toBe(false);
    const resync = await client.frame(({ type }) => type === 'resync_required');
    expect(resync.data['last_event_id']).toBeLessThanOrEqual(await lastEvent());
    await emit(server.db, numbered(1, { userId: user.id }));
    await upTo(client, 1);
    expect(client.frames.slice(0, 2).map(({ type }) => type)).toEqual(['ack', 'resync_required']);
    client.socket.close();
  });
});

test('many clients that are cut off at random, and go on at another process, miss and repeat nothing', async () => {
  const users = await Promise.all(Array.from({ length: 3 }, () => server.newUser()));
  await relayed();
  const start = await lastEvent();
  const total = 600;
  let on = true;
  const writing = (async () => {
    let n = 0;
    await Promise.all(
      users.map(async (user) => {
        while (n < total) {
          const events = Array.from({ length: 3 }, () => numbered(n++, { userId: user.id }, 'x'.repeat(1_000)));
          await emit(server.db, ...events);
        }
      }),
    );
    await relayed();
    on = false;
  })();

  const follow = async (credential: string, which: number): Promise<number[]> => {
    let last = start;
    const seen: number[] = [];
    for (let round = 0; ; round++) {
      const finish = !on;
      const client = open(credential, last, (round + which) % 2 === 0 ? server : second);
      await client.ack;
      if (finish) {
        const end = await lastEvent();
        const { rows } = await server.db.query<{ last: number }>({
          text: 'select coalesce(max(event_id), 0) as last from events where event_id <= $1 and user_id = $2',
          values: [end, users[which % users.length]?.id],
        });
        const mine = rows[0]?.last ?? 0;
        if (mine > last) await client.frame(({ event_id: id }) => id === mine);
      } else {
        // Cut off in the middle of what comes, be it replay or live.
        const enough = 1 + Math.floor(Math.random() * 30);
        await Promise.race([
          until(
            async () => client.frames.length > enough || !on,
            (yes) => yes,
          ),
          client.closed,
        ]);
      }
      client.socket.terminate();
      await client.closed;
      const got = ids(client);
      seen.push(...got);
      last = got.at(-1) ?? last;
      if (finish) return seen;
    }
  };
  const followers = Array.from({ length: 9 }, (_, which) => {
    const user = users[which % users.length];
    return follow(user?.token ?? '', which);
  });
  await writing;
  const { rows } = await server.db.query<{ event_id: number; user_id: number }>({
    text: 'select event_id, user_id from events where event_id > $1 order by event_id',
    values: [start],
  });
  for (const [which, follower] of followers.entries()) {
    const user = users[which % users.length];
    const owed = rows.filter((row) => row.user_id === user?.id).map((row) => row.event_id);
    expect(owed.length).toBeGreaterThan(50);
    expect(await follower).toEqual(owed);
  }
});

test('a replay of far more than a socket may have waiting comes whole, though the client is in no hurry', async () => {
  const user = await server.newUser();
  await relayed();
  const start = await lastEvent();
  const numbers = Array.from({ length: 1_200 }, (_, n) => n);
  for (let n = 0; n < numbers.length; n += 100) {
    await emit(server.db, ...numbers.slice(n, n + 100).map((m) => numbered(m, { userId: user.id }, 'x'.repeat(8_000))));
  }
  await relayed();
  const client = open(user.token, start);
  await client.ack;
  client.socket.pause();
  await emit(server.db, numbered(1_200, { userId: user.id }));
  await relayed();
  client.socket.resume();
  await upTo(client, 1_200);
  expect(client.numbers()).toEqual([...numbers, 1_200]);
  client.socket.close();
});

describe('older than what is kept', () => {
  test('→ resync_required, then live; just within → all of it', async () => {
    const own = await startServer();
    try {
      const user = await own.newUser();
      const open = (lastEventId: number) =>
        openSocket(`${own.url}/ws?token=${user.token}&last_event_id=${lastEventId}`);
      await emit(own.db, ...[1, 2, 3, 4, 5].map((n) => numbered(n, { userId: user.id })));
      await until(
        async () => (await own.db.query({ text: 'select from events' })).rowCount,
        (count) => count === 5,
      );
      await own.db.query({ text: 'delete from events where event_id <= 2' });
      const tooOld = open(1);
      const within = open(2);
      expect((await tooOld.ack).data['resumed']).toBe(false);
      expect((await tooOld.frame(({ type }) => type === 'resync_required')).data['last_event_id']).toBe(5);
      expect((await within.ack).data['resumed']).toBe(true);
      await upTo(within, 5);
      await emit(own.db, numbered(6, { userId: user.id }));
      await Promise.all([upTo(tooOld, 6), upTo(within, 6)]);
      expect(tooOld.numbers()).toEqual([6]);
      expect(within.numbers()).toEqual([3, 4, 5, 6]);
      for (const { socket } of [tooOld, within]) socket.close();
    } finally {
      await own.stop();
    }
  });

  test('0 on a database without any event is not', async () => {
    const own = await startServer();
    try {
      const client = openSocket(`${own.url}/ws?token=${own.adminKey}&last_event_id=0`);
      expect((await client.ack).data).toMatchObject({ resumed: true, last_event_id: 0 });
      client.socket.close();
    } finally {
      await own.stop();
    }
  });
});
