import { connect } from 'node:net';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask } from '../support/work.ts';
import { openSocket, openStream } from './support.ts';

// Server-Sent Events: the same events, order, filters and resume as over the WebSocket.

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

const events = '/api/v1/events';

test('tells what a socket tells, in the same order, with the id to resume by', async () => {
  const user = await server.newUser();
  const socket = openSocket(`${server.url}/ws?token=${user.token}`);
  const stream = await openStream(server.url + events, user.token);
  await socket.ack;
  expect((await stream.event(({ type }) => type === 'ack')).id).toBeUndefined();
  expect(stream.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
  expect(stream.headers.get('cache-control')).toBe('no-store');
  expect(stream.headers.get('x-request-id')).toBeTruthy();
  for (let i = 0; i < 5; i++) await makeTask(user.call, { schedule_cron: '0 0 1 1 *' });
  const last = await makeTask(user.call, { name: 'line one\nline two \u2028 {"a":1}' });
  await stream.event(({ data }) => data['task_id'] === last.id);
  await socket.frame(({ data }) => data['task_id'] === last.id);
  expect(
    stream.events.filter(({ id }) => id).map(({ id, type, data }) => ({ event_id: Number(id), type, data })),
  ).toEqual(
    socket.frames.filter(({ event_id }) => event_id).map(({ event_id, type, data }) => ({ event_id, type, data })),
  );
  stream.close();

  // A browser comes back with Last-Event-ID, which is newer than what its URL says.
  const middle = stream.events.filter(({ id }) => id)[3]?.id ?? '';
  const resumed = await openStream(`${server.url}${events}?last_event_id=0`, user.token, { 'last-event-id': middle });
  await resumed.event(({ data }) => data['task_id'] === last.id);
  expect(resumed.events[0]).toMatchObject({ type: 'ack', data: { resumed: true } });
  expect(resumed.events.filter(({ id }) => id)).toEqual(stream.events.filter(({ id }) => id).slice(4));
  resumed.close();
  socket.socket.close();
});

test('takes topics and ids as filters, and a cursor that is too old asks to read again', async () => {
  const user = await server.newUser();
  const [one, two] = [await makeTask(user.call), await makeTask(user.call)];
  const stream = await openStream(
    `${server.url}${events}?topics=tasks,agents&task_ids=${two.id},${two.id + 1}`,
    user.token,
  );
  await stream.event(({ type }) => type === 'ack');
  await user.call('PUT', `/tasks/${one.id}`, { priority: 'high' });
  await user.call('PUT', `/tasks/${two.id}`, { schedule_cron: '0 0 1 1 *' });
  const told = await stream.event(({ type }) => type === 'task_status_update');
  expect(told.data['task_id']).toBe(two.id);
  expect(stream.events.filter(({ id }) => id)).toHaveLength(1);
  stream.close();

  const late = await openStream(server.url + events, user.token, { 'last-event-id': '9007199254740991' });
  await late.event(({ type }) => type === 'resync_required');
  late.close();
});

test.each([
  ['?topics=everything', 400],
  ['?task_ids=0', 400],
  ['?task_ids=1,x', 400],
  ['?last_event_id=-1', 400],
  ['?what=1', 400],
])('refuses %s', async (query, status) => {
  const user = await server.newUser();
  expect((await user.call('GET', `/events${query}`)).status).toBe(status);
});

test('refuses a Last-Event-ID that is none, and whoever has no credential', async () => {
  const user = await server.newUser();
  expect((await user.call('GET', '/events', undefined, { 'last-event-id': 'x' })).status).toBe(400);
  expect((await server.as(undefined)('GET', '/events')).status).toBe(401);
  expect((await server.as(undefined)('GET', '/events?token=garbage')).status).toBe(401);
});

test('who does not read is let go, and nobody else notices', async () => {
  const user = await server.newUser();
  const { port } = new URL(server.url);
  const deaf = connect(Number(port), '127.0.0.1');
  const gone = new Promise((done) => deaf.once('close', done));
  deaf.on('error', () => {});
  deaf.write(`GET ${events} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${user.token}\r\n\r\n`);
  deaf.pause();
  const stream = await openStream(server.url + events, user.token);
  await stream.event(({ type }) => type === 'ack');
  const health = async () => (await server.as(undefined)('GET', '//ws/health')).body;
  await expect.poll(async () => (await health()).connections).toBe(2);
  const text = JSON.stringify({ task_id: 1, filler: 'x'.repeat(15_000) });
  for (let i = 0; i < 10; i++) {
    await server.db.query({
      text: `insert into event_outbox (user_id, shared, topic, type, data)
        select $1, false, 'tasks', 'task_status_update', $2 from generate_series(1, 100)`,
      values: [user.id, text],
    });
  }
  await expect.poll(async () => (await health()).connections, { timeout: 20_000 }).toBe(1);
  await expect.poll(() => stream.events.filter(({ id }) => id).length, { timeout: 20_000 }).toBe(1_000);
  deaf.resume();
  await gone;
  stream.close();
});

test('who goes away while it is asked who it is leaves nothing behind', async () => {
  const user = await server.newUser();
  const { port } = new URL(server.url);
  const health = async () => (await server.as(undefined)('GET', '//ws/health')).body.connections;
  await expect.poll(health).toBe(0);
  let held = 0;
  const real = server.db.pool.query.bind(server.db.pool);
  const look = vi.spyOn(server.db.pool, 'query').mockImplementation((async (...given: unknown[]) => {
    const { name } = given[0] as { name?: string };
    if (name?.startsWith('credential')) {
      held += 1;
      await new Promise((done) => setTimeout(done, 100));
    }
    return (real as (...args: unknown[]) => unknown)(...given);
  }) as never);
  try {
    for (let i = 0; i < 5; i++) {
      const client = connect(Number(port), '127.0.0.1');
      client.on('error', () => {});
      client.write(`GET ${events} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${user.token}\r\n\r\n`);
      const before = held;
      await expect.poll(() => held).toBeGreaterThan(before);
      client.resetAndDestroy();
    }
  } finally {
    look.mockRestore();
  }
  // A call that comes after them is answered after them.
  expect((await user.call('GET', '/auth/me')).status).toBe(200);
  await expect.poll(health).toBe(0);
});

test('a server that stops ends its streams and says so', async () => {
  const other = await startServer({ databaseUrl: server.databaseUrl });
  const user = await other.newUser();
  const stream = await openStream(other.url + events, user.token);
  await stream.event(({ type }) => type === 'ack');
  await other.stop();
  await stream.ended;
  expect(stream.events.at(-1)).toMatchObject({ type: 'close', data: { code: 1001 } });
});

test('GET /ws/health tells how many follow', async () => {
  const before = (await server.as(undefined)('GET', '//ws/health')).body;
  const user = await server.newUser();
  const socket = openSocket(`${server.url}/ws?token=${user.token}&topics=agents`);
  await socket.ack;
  const { status, body } = await server.as(undefined)('GET', '//ws/health');
  expect(status).toBe(200);
  expect(body).toMatchObject({ status: 'ok', redis: 'disabled', connections: before.connections + 1 });
  expect(body.subscriptions.agents).toBe((before.subscriptions.agents ?? 0) + 1);
  expect(body.workers).toEqual([expect.objectContaining({ pid: process.pid, connections: body.connections })]);
  socket.socket.close();
});
