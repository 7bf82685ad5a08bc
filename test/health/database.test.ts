import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { emit, numbered, openProcess, openSocket } from '../realtime/support.ts';
import { createTestDatabase } from '../support/postgres.ts';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { createTcpProxy, type TcpProxy } from '../support/tcp-proxy.ts';
import { makeTask, until } from '../support/work.ts';

let server: TestServer;
let proxy: TcpProxy;
/** Reaches the database without the proxy. */
let outsider: Awaited<ReturnType<typeof openProcess>>;
let closers: (() => unknown)[];
beforeEach(async () => {
  const database = await createTestDatabase();
  closers = [database.drop];
  proxy = await createTcpProxy(database.url);
  closers.push(proxy.close);
  outsider = await openProcess(database.url);
  closers.push(outsider.close);
  server = await startServer({ databaseUrl: proxy.url });
  closers.push(server.stop);
});
afterEach(async () => {
  for (let close = closers.pop(); close; close = closers.pop()) await close();
});

const anybody = (path: string) => server.as(undefined)('GET', path);
const healthSays = (status: string) =>
  until(
    () => anybody('//health'),
    ({ body }) => body.status === status,
  );

describe.each<['cut' | 'swallow', string]>([
  ['cut', 'refuses connections'],
  ['swallow', 'takes what it is told and says nothing'],
])('%s: a Postgres that %s', (failure) => {
  test('makes calls answer 503 and not hang, the process stays alive, and all comes back by itself', async () => {
    const user = await server.newUser();
    const task = await makeTask(user.call);
    expect((await healthSays('healthy')).status).toBe(200);

    proxy[failure]();
    const unhealthy = await healthSays('unhealthy');
    expect(unhealthy).toMatchObject({ status: 503, body: { database: 'away' } });
    for (const path of ['//health/live', '//api/v1/liveness']) expect((await anybody(path)).status).toBe(200);
    for (const path of ['//health/ready', '//api/v1/readiness']) {
      expect(await anybody(path)).toMatchObject({ status: 503, body: { status: 503 } });
    }
    const login = { email: user.email, password: user.password };
    const calls: [call: Caller, method: string, path: string, body?: unknown][] = [
      [user.call, 'GET', '/tasks'],
      [user.call, 'GET', `/tasks/${task.id}`],
      [user.call, 'POST', '/tasks', { skill_name: 'x' }],
      [user.call, 'DELETE', `/tasks/${task.id}`],
      [user.call, 'POST', `/tasks/${task.id}/run`],
      [server.admin, 'GET', '/auth/me'],
      [server.as(undefined), 'POST', '/auth/login', login],
      [server.as(undefined), 'POST', '/auth/refresh', { refresh_token: 'x'.repeat(43) }],
    ];
    await Promise.all(
      calls.map(async ([call, method, path, body]) => {
        const answer = await call(method, path, body);
        expect([path, answer.status, answer.body.status]).toEqual([path, 503, 503]);
        expect(answer.headers.get('content-type')).toBe('application/problem+json; charset=utf-8');
        expect(answer.headers.get('retry-after')).toMatch(/^[1-5]$/);
      }),
    );

    await proxy.restore();
    await healthSays('healthy');
    expect((await user.call('GET', `/tasks/${task.id}`)).status).toBe(200);
    expect((await anybody('//health/ready')).status).toBe(200);
    // What was refused was not done, and the work goes on.
    await makeTask(user.call);
    await until(
      () => user.call('GET', '/tasks'),
      ({ body }) => body.tasks.length === 2,
    );
    await until(
      async () => server.db.pool.totalCount - server.db.pool.idleCount,
      (busy) => busy === 0,
    );
  });

  test('leaves sockets open, which then are told what happened meanwhile', async () => {
    const user = await server.newUser();
    const client = openSocket(`${server.url}/ws?token=${user.token}`);
    await client.ack;
    await emit(outsider.db, numbered(1, { userId: user.id }));
    await client.frame(({ data }) => data['n'] === 1);

    proxy[failure]();
    await healthSays('unhealthy');
    for (const n of [2, 3, 4]) await emit(outsider.db, numbered(n, { userId: user.id }));
    client.say({ type: 'ping' });
    await client.frame(({ type }) => type === 'pong');
    await proxy.restore();
    await emit(outsider.db, numbered(5, { userId: user.id }));
    await client.frame(({ data }) => data['n'] === 5);
    expect(client.numbers()).toEqual([1, 2, 3, 4, 5]);
    client.socket.close();
  });

  test('does not keep the server from stopping', async () => {
    const client = openSocket(`${server.url}/ws?token=${server.adminKey}`);
    await client.ack;
    proxy[failure]();
    await server.stop();
    expect((await client.closed).code).toBe(1001);
  });
});
