import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import WebSocket from 'ws';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder, startServerProcess } from '../support/processes.ts';
import { haveRedis, redisOnPort } from '../support/redis.ts';
import { caller } from '../support/server.ts';
import { until } from '../support/work.ts';
import { type Frame, openProcess } from './support.ts';

// The promise of it all: whatever is killed, stopped or cut meanwhile, each client has in the end the very events that it
// was owed, in order. Two servers of two workers each over one Postgres and one Redis; transactions that commit long after
// they have written; relays (whoever leads) and workers killed; Redis stopped and started; clients that lose their
// connection at random.

const SECRET = 'chaos-0123456789-abcdefghijklmnopqrstuvwxyz';

let folders: string[];
let database: TestDatabase;
let closers: (() => unknown)[];
beforeEach(async () => {
  folders = [await newFolder(), await newFolder()];
  database = await createTestDatabase();
  closers = [];
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
  await endPrograms();
  await database.drop();
  for (const folder of folders) await removeFolder(folder);
});

/** A client that comes back wherever it can with what it has seen, and keeps the ids of its events in the order they came. */
function follow(urls: string[], token: string, cursor: number) {
  const got: { id: number; n: number }[] = [];
  let last = cursor;
  let over = false;
  let socket: WebSocket | undefined;
  let turn = Math.floor(Math.random() * urls.length);
  let resyncs = 0;
  const run = async () => {
    while (!over) {
      turn += 1;
      const url = `${urls[turn % urls.length]?.replace('http', 'ws')}/ws?token=${token}&last_event_id=${last}`;
      const next = new WebSocket(url, { handshakeTimeout: 2_000 });
      socket = next;
      next.on('error', () => {});
      next.on('message', (data) => {
        const frame = JSON.parse(String(data)) as Frame;
        if (frame.type === 'resync_required') resyncs += 1;
        if (frame.event_id === undefined) return;
        last = frame.event_id;
        if (typeof frame.data['n'] === 'number') got.push({ id: frame.event_id, n: frame.data['n'] });
      });
      await new Promise((done) => next.once('close', done));
      if (!over) await new Promise((done) => setTimeout(done, 50));
    }
  };
  const ended = run();
  return {
    got,
    resyncs: () => resyncs,
    cut: () => socket?.terminate(),
    async close() {
      over = true;
      socket?.terminate();
      await ended;
    },
  };
}

describe.runIf(haveRedis())('whatever fails', () => {
  test('every client has in the end what it was owed, in order', { timeout: 180_000 }, async () => {
    const redis = await redisOnPort();
    redis.start();
    closers.push(redis.stop);
    const env = {
      DATABASE_URL: database.url,
      REDIS_URL: redis.url,
      JWT_SECRET: SECRET,
      AUTH_REGISTRATION: 'open',
      WORKERS: '2',
      DATABASE_POOL_SIZE: '4',
      LOG_LEVEL: 'warn',
    };
    const servers = [];
    for (const folder of folders) servers.push(await startServerProcess({ folder, env }));
    const urls = servers.map(({ url }) => url);
    const process_ = await openProcess(database.url);
    closers.push(process_.close);

    const users = await Promise.all(
      Array.from({ length: 3 }, async (_, i) => {
        const call = caller(urls[0] ?? '', undefined);
        const credentials = { email: `chaos${i}@example.com`, password: 'a long enough pass phrase' };
        const { body: user } = await call('POST', '/auth/register', credentials);
        const { body: login } = await call('POST', '/auth/login', credentials);
        return { id: user.id as number, token: login.access_token as string };
      }),
    );
    const clients = users.flatMap((user) => [0, 1].map(() => ({ user, client: follow(urls, user.token, 0) })));

    // Writers hold their transactions open between the write and the commit, each for as long as it likes.
    let n = 0;
    let writing = true;
    const written = new Map<number, number>();
    const writers = Array.from({ length: 6 }, async () => {
      while (writing) {
        const [mine, user] = [++n, users[n % users.length]];
        if (!user) return;
        const text = JSON.stringify({ n: mine, task_id: 1 });
        try {
          await process_.db.transaction(async (tx) => {
            await tx.query({
              text: `insert into event_outbox (user_id, shared, topic, type, data) values ($1, false, 'tasks', 'task_status_update', $2)`,
              values: [user.id, text],
            });
            await tx.query({ text: 'select pg_sleep($1)', values: [Math.random() * 0.05] });
            if (mine % 10 === 0) throw new Error('rolled back');
            tx.ring('outbox');
          });
          written.set(mine, user.id);
        } catch (error) {
          if ((error as Error).message !== 'rolled back') throw error;
        }
      }
    });

    const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));
    const workersOf = async (url: string) => {
      const answer = await caller(url, undefined)('GET', '//ws/health', undefined, { connection: 'close' });
      return (answer.body?.workers ?? []) as { pid: number; host: string }[];
    };
    const killed: number[] = [];
    for (let round = 0; round < 6; round++) {
      await pause(500);
      for (const { client } of clients) if (Math.random() < 0.5) client.cut();
      if (round === 1) await redis.stop();
      if (round === 3) redis.start();
      // The session that leads, as if the network had taken it; and a whole worker, which may be the one.
      await process_.db.query({
        text: `select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'muster-relay'
          and datname = current_database()`,
      });
      const [victim] = await workersOf(urls[round % 2] ?? '').catch(() => []);
      if (victim && round % 2 === 0) {
        process.kill(victim.pid, 'SIGKILL');
        killed.push(victim.pid);
      }
    }
    await pause(500);
    writing = false;
    await Promise.all(writers);
    expect(killed.length).toBeGreaterThan(0);
    expect(written.size).toBeGreaterThan(50);

    const { rows } = await until(
      () =>
        process_.db.query<{ event_id: number; user_id: number; n: number }>({
          text: `select event_id, user_id, (data::jsonb->>'n')::int as n from events where data::jsonb ? 'n' order by event_id`,
        }),
      (result) => result.rows.length >= written.size,
      30,
    );
    // What was committed is there once, and nothing else is.
    expect(rows.map((row) => [row.n, row.user_id]).sort()).toEqual([...written].sort());
    for (const { user, client } of clients) {
      const owed = rows
        .filter(({ user_id }) => user_id === user.id)
        .map(({ event_id, n: of }) => ({ id: event_id, n: of }));
      await until(
        async () => client.got.length,
        (length) => length >= owed.length,
        30,
      );
      expect(client.got).toEqual(owed);
      expect(client.resyncs()).toBe(0);
      await client.close();
    }
  });
});
