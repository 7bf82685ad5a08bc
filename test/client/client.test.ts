import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import WebSocket from 'ws';
import { type Client, type ClientOptions, connectMuster, type Envelope } from '../../src/client/muster-client.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';
import { makeTask } from '../support/work.ts';

let server: TestServer;
const open: Client[] = [];
beforeAll(async () => {
  server = await startServer();
});
afterEach(() => {
  for (const client of open.splice(0)) client.close();
});
afterAll(() => server?.stop());

/** A client that keeps what it is given. */
function follow(options: Partial<ClientOptions> & Pick<ClientOptions, 'token'>) {
  const events: Envelope[] = [];
  const states: string[] = [];
  const details: string[] = [];
  const resyncs: number[] = [];
  const client = connectMuster({
    url: server.url,
    WebSocket,
    onEvent: (event) => events.push(event),
    onState: (state, detail) => {
      states.push(state);
      details.push(detail);
    },
    onResync: (place) => resyncs.push(place),
    ...options,
  });
  open.push(client);
  const live = () => expect.poll(() => states.at(-1), { timeout: 20_000 }).toBe('live');
  const taskIds = () => events.filter(({ type }) => type === 'task_status_update').map(({ data }) => data['task_id']);
  return { client, events, states, details, resyncs, live, taskIds };
}

describe('the client', () => {
  test('gives every event once and in order, however often the connection is cut', { timeout: 60_000 }, async () => {
    const user = await server.newUser();
    const proxy = await createTcpProxy(server.url);
    try {
      const { live, taskIds, events, states } = follow({ token: user.token, url: proxy.url });
      await live();
      const made: number[] = [];
      for (let i = 0; i < 60; i++) {
        made.push((await makeTask(user.call)).id);
        if (i % 10 !== 5) continue;
        proxy.cut();
        await proxy.restore();
      }
      await expect.poll(() => taskIds().length, { timeout: 30_000 }).toBe(made.length);
      expect(taskIds()).toEqual(made);
      const ids = events.map(({ event_id }) => event_id ?? 0);
      expect(ids).toEqual([...new Set(ids)].sort((a, b) => a - b));
      expect(states.filter((state) => state === 'waiting').length).toBeGreaterThan(1);
    } finally {
      proxy.close();
    }
  });

  test('takes over from a read, and asks to read again when the server does not keep what is missing', async () => {
    const user = await server.newUser();
    const cursor = Number((await user.call('GET', '/tasks')).headers.get('x-event-cursor'));
    const task = await makeTask(user.call);
    const { live, taskIds } = follow({ token: user.token, lastEventId: cursor });
    await live();
    await expect.poll(taskIds).toEqual([task.id]);
    const late = follow({ token: user.token, lastEventId: Number.MAX_SAFE_INTEGER });
    await expect.poll(() => late.resyncs.length).toBe(1);
    const next = await makeTask(user.call);
    await expect.poll(late.taskIds).toEqual([next.id]);
  });

  test('keeps to what it was asked to follow, also after it came back', { timeout: 60_000 }, async () => {
    const user = await server.newUser();
    const proxy = await createTcpProxy(server.url);
    try {
      const { client, live, taskIds, states } = follow({
        token: user.token,
        url: proxy.url,
        topics: ['tasks'],
      });
      await live();
      const [one, two] = [await makeTask(user.call), await makeTask(user.call)];
      await expect.poll(() => taskIds().length).toBe(2);
      client.subscribe({ task_ids: [two.id] });
      proxy.cut();
      await proxy.restore();
      await expect.poll(() => states.filter((state) => state === 'live').length, { timeout: 20_000 }).toBe(2);
      const change = async (id: number, priority: string) => user.call('PUT', `/tasks/${id}`, { priority });
      // Its wish goes out when it was greeted: what is told before may still be more.
      await expect
        .poll(async () => {
          const before = taskIds().length;
          await change(one.id, taskIds().length % 2 ? 'low' : 'high');
          await change(two.id, taskIds().length % 2 ? 'low' : 'high');
          await expect.poll(() => taskIds().slice(before)).toContain(two.id);
          return taskIds().slice(before);
        })
        .toEqual([two.id]);
      client.subscribe({ topics: ['tasks'] });
      await expect
        .poll(async () => {
          await change(one.id, taskIds().length % 2 ? 'medium' : 'critical');
          return taskIds().at(-1);
        })
        .toBe(one.id);
    } finally {
      proxy.close();
    }
  });

  test('stops when its key is revoked, or asks for another one where it can', { timeout: 60_000 }, async () => {
    const user = await server.newUser();
    const make = async () => (await user.call('POST', '/auth/api-keys', { name: 'k', scopes: ['read'] })).body;
    const keys = [await make(), await make()];
    const fixed = follow({ token: keys[0].key });
    let asked = 0;
    const renewed = follow({ token: () => keys[asked++]?.key ?? keys[1].key });
    await fixed.live();
    await renewed.live();
    await user.call('DELETE', `/auth/api-keys/${keys[0].id}`);
    await expect.poll(() => fixed.states.at(-1), { timeout: 20_000 }).toBe('closed');
    expect(fixed.details.at(-1)).toContain('1008');
    await expect.poll(() => renewed.states.filter((state) => state === 'live').length, { timeout: 20_000 }).toBe(2);
    const task = await makeTask(user.call);
    await expect.poll(renewed.taskIds).toEqual([task.id]);
    expect(fixed.taskIds()).toEqual([]);
  });

  test('goes on although a callback throws, and is over when it is closed', async () => {
    const user = await server.newUser();
    const uncaught: unknown[] = [];
    const keep = (error: unknown) => uncaught.push(error);
    const before = process.listeners('uncaughtException');
    process.removeAllListeners('uncaughtException');
    process.on('uncaughtException', keep);
    try {
      const seen: unknown[] = [];
      const { client, live, states } = follow({
        token: user.token,
        onEvent: ({ data }) => {
          seen.push(data['task_id']);
          throw new Error('a fault of the page');
        },
      });
      await live();
      const made = [(await makeTask(user.call)).id, (await makeTask(user.call)).id];
      await expect.poll(() => seen).toEqual(made);
      await expect.poll(() => uncaught.length).toBe(2);
      client.close();
      expect(states.at(-1)).toBe('closed');
      const { body } = await server.as(undefined)('GET', '//ws/health');
      expect(body.connections).toBeLessThanOrEqual(1);
    } finally {
      process.off('uncaughtException', keep);
      for (const listener of before) process.on('uncaughtException', listener);
    }
  });

  test.each([['ftp://x'], ['127.0.0.1:8080'], ['']])('refuses the url %j', (url) => {
    expect(() => connectMuster({ url, token: 'x', WebSocket, onEvent: () => {} })).toThrow('url must begin with');
  });
});
