import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createFeed, type PlacedEvent } from '../../src/realtime/feed.ts';
import { relayBatch } from '../../src/realtime/relay.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';
import { emit, logger, numbered, openProcess, openSocket } from './support.ts';

let closers: (() => unknown)[];
beforeEach(() => {
  closers = [];
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

async function start(): Promise<TestServer> {
  const server = await startServer();
  closers.push(server.stop);
  return server;
}

describe('sockets stay open and miss nothing', () => {
  test.each([
    ['the connections of the bus', `application_name = 'muster-bus'`],
    ['the session of the relay', `application_name = 'muster-relay'`],
    ['every connection to Postgres', 'pid <> pg_backend_pid()'],
  ])('while %s break again and again', async (_what, which) => {
    const server = await start();
    const outsider = await openProcess(server.databaseUrl);
    closers.push(outsider.close);
    const user = await server.newUser();
    const client = openSocket(`${server.url}/ws?token=${user.token}`);
    await client.ack;

    let killed = 0;
    for (let n = 1; n <= 30; n++) {
      const written = () => emit(outsider.db, numbered(n, { userId: user.id }));
      // The writer's own connections break too; what it was told had failed it writes again.
      await written().catch(written).catch(written);
      if (n % 3 !== 0) continue;
      const { rowCount } = await until(
        () =>
          outsider.db
            .query({
              text: `select pg_terminate_backend(pid) from pg_stat_activity
                     where datname = current_database() and backend_type = 'client backend' and ${which}`,
            })
            .catch(() => ({ rowCount: 0 })),
        ({ rowCount }) => (rowCount ?? 0) > 0,
      );
      killed += rowCount ?? 0;
    }
    expect(killed).toBeGreaterThanOrEqual(10);
    await client.frame(({ data }) => data['n'] === 30);
    expect([...new Set(client.numbers())]).toEqual(Array.from({ length: 30 }, (_, i) => i + 1));
    const ids = client.frames.flatMap(({ event_id: id }) => id ?? []);
    expect(ids).toEqual([...new Set(ids)].sort((a, b) => a - b));
    client.socket.close();
  });
});

test('stopping the server closes its sockets with 1001 and does not wait for one that is deaf', async () => {
  const server = await startServer();
  const clients = ['a', 'b', 'c'].map(() => openSocket(`${server.url}/ws?token=${server.adminKey}`));
  await Promise.all(clients.map(({ ack }) => ack));
  const [one, other, deaf] = clients;
  deaf?.socket.pause();
  await server.stop();
  expect([await one?.closed, await other?.closed]).toMatchObject([{ code: 1001 }, { code: 1001 }]);
  deaf?.socket.terminate();
});

describe('the feed', () => {
  test('gives a listener everything after the place it had, also when it was just moving on for want of listeners', async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const process = await openProcess(database.url);
    closers.push(process.close);
    let open = () => {};
    let gate: Promise<void> | undefined;
    let waiting = 0;
    const feed = createFeed({
      ...process,
      logger,
      db: {
        ...process.db,
        async query(statement) {
          const result = await process.db.query(statement);
          if (gate) {
            waiting++;
            await gate;
          }
          // biome-ignore lint/suspicious/noExplicitAny: the rows are what they were.
          return result as any;
        },
      },
    });
    closers.push(feed.close);
    feed.start();
    await feed.ready();
    expect(feed.position()).toBe(0);

    gate = new Promise((resolve) => {
      open = resolve;
    });
    await emit(process.db, numbered(1, { userId: 1 }));
    await relayBatch(process.db);
    // The feed looks where the end is, while somebody begins to listen.
    await until(
      async () => waiting,
      (count) => count > 0,
    );
    const heard: PlacedEvent[] = [];
    const place = feed.position();
    closers.push(feed.subscribe((event) => heard.push(event)));
    expect(place).toBe(0);
    gate = undefined;
    open();
    await until(
      async () => heard.map(({ eventId }) => eventId),
      (ids) => ids.length > 0,
    );
    expect(heard.map(({ eventId }) => eventId)).toEqual([1]);
    expect(JSON.parse(String(heard[0]?.text))).toMatchObject({
      type: 'task_status_update',
      event_id: 1,
      data: { n: 1 },
    });
  });

  test('hands every event to every listener though one before it throws', async () => {
    const database = await createTestDatabase();
    closers.push(database.drop);
    const process = await openProcess(database.url);
    closers.push(process.close);
    const feed = createFeed({ ...process, logger });
    closers.push(feed.close);
    feed.subscribe(() => {
      throw new Error('a fault');
    });
    const heard: PlacedEvent[] = [];
    feed.subscribe((event) => heard.push(event));
    feed.start();
    await feed.ready();
    await emit(
      process.db,
      numbered(1, { userId: 3, taskId: 4, projectId: 5, data: { text: '"}\u2028' } }),
      numbered(2, { userId: 3, type: 'agent_activity_update', agentId: 6, shared: true }),
    );
    await relayBatch(process.db);
    await until(
      async () => heard.length,
      (count) => count === 2,
    );
    const [first, second] = heard.map(({ text, ...place }) => ({
      place,
      envelope: JSON.parse(String(text)) as object,
    }));
    expect(first).toEqual({
      place: {
        eventId: 1,
        userId: 3,
        shared: false,
        topic: 'tasks',
        taskId: 4,
        projectId: 5,
        agentId: null,
        type: 'task_status_update',
      },
      envelope: {
        type: 'task_status_update',
        event_id: 1,
        timestamp: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
        data: { n: 1, padding: '', text: '"}\u2028' },
      },
    });
    expect(second).toMatchObject({
      place: { eventId: 2, shared: true, topic: 'agents', taskId: null, projectId: null, agentId: 6 },
      envelope: { type: 'agent_activity_update', event_id: 2 },
    });
    expect(feed.position()).toBe(2);
  });

  test('moves on while nobody listens, so that reads hand over from now', async () => {
    const server = await start();
    const task = await server.admin('POST', '/tasks', { skill_name: 'x' });
    expect(task.status).toBe(201);
    await until(
      () => server.admin('GET', '/tasks'),
      ({ headers }) => Number(headers.get('x-event-cursor')) >= 1,
    );
  });
});
