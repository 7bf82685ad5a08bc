import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask } from '../support/work.ts';
import { openSocket, openStream, refusal } from './support.ts';

let server: TestServer;
let second: TestServer;
beforeAll(async () => {
  server = await startServer();
  second = await startServer({ databaseUrl: server.databaseUrl, env: { JWT_SECRET: server.config.JWT_SECRET ?? '' } });
});
afterAll(async () => {
  await second?.stop();
  await server?.stop();
});

const login = async (user: { email: string; password: string }) =>
  (await server.as(undefined)('POST', '/auth/login', { email: user.email, password: user.password })).body as {
    access_token: string;
    refresh_token: string;
  };
type User = Awaited<ReturnType<TestServer['newUser']>>;

describe('a credential that ends closes its sockets and streams, on every server', () => {
  test.each<[string, (user: User) => Promise<{ token: string; end: () => Promise<unknown> }>]>([
    [
      'by a logout',
      async (user) => {
        const { access_token: token, refresh_token } = await login(user);
        return { token, end: () => server.as(undefined)('POST', '/auth/logout', { refresh_token }) };
      },
    ],
    [
      'by a refresh token that is used twice',
      async (user) => {
        const { access_token: token, refresh_token } = await login(user);
        const refresh = () => server.as(undefined)('POST', '/auth/refresh', { refresh_token });
        return { token, end: async () => [await refresh(), await refresh()] };
      },
    ],
    [
      'by the end of its API key',
      async (user) => {
        const { body } = await user.call('POST', '/auth/api-keys', { name: 'k', scopes: ['read'] });
        return { token: body.key, end: () => user.call('DELETE', `/auth/api-keys/${body.id}`) };
      },
    ],
    [
      'by hand: the user is disabled',
      async (user) => ({
        token: user.token,
        end: () => server.db.query({ text: 'update users set disabled_at = now() where id = $1', values: [user.id] }),
      }),
    ],
    [
      'by hand: the user has another role',
      async (user) => ({
        token: user.token,
        end: () => server.db.query({ text: `update users set role = 'admin' where id = $1`, values: [user.id] }),
      }),
    ],
  ])('%s', async (_how, prepare) => {
    const user = await server.newUser();
    const { token, end } = await prepare(user);
    const bystander = await server.newUser();
    const sockets = [server, second].map(({ url }) => openSocket(`${url}/ws?token=${token}`));
    const others = [server, second].map(({ url }) => openSocket(`${url}/ws?token=${bystander.token}`));
    const stream = await openStream(`${second.url}/api/v1/events`, token);
    await Promise.all([...sockets, ...others].map(({ ack }) => ack));
    await stream.event(({ type }) => type === 'ack');
    await end();
    for (const { closed } of sockets) expect(await closed).toMatchObject({ code: 1008 });
    await stream.ended;
    expect(stream.events.at(-1)).toMatchObject({ type: 'close', data: { code: 1008 } });
    // The others live on.
    const task = await makeTask(bystander.call);
    for (const other of others) {
      await other.frame(({ data }) => data['task_id'] === task.id);
      other.socket.close();
    }
  });
});

describe('a socket', () => {
  test('goes on with a new credential of its user, and its old one may end', async () => {
    const user = await server.newUser();
    const old = await login(user);
    const next = await login(user);
    const socket = openSocket(`${server.url}/ws?token=${old.access_token}`);
    await socket.ack;
    socket.say({ type: 'auth', token: next.access_token });
    await expect.poll(() => socket.frames.filter(({ type }) => type === 'ack').length).toBe(2);
    await server.as(undefined)('POST', '/auth/logout', { refresh_token: old.refresh_token });
    const task = await makeTask(user.call);
    await socket.frame(({ data }) => data['task_id'] === task.id);
    await server.as(undefined)('POST', '/auth/logout', { refresh_token: next.refresh_token });
    expect(await socket.closed).toMatchObject({ code: 1008 });
  });

  test('does not go on as somebody else, nor with a credential that is no good', async () => {
    const [user, other] = [await server.newUser(), await server.newUser()];
    const socket = openSocket(`${server.url}/ws?token=${user.token}`);
    await socket.ack;
    const { body: writeOnly } = await user.call('POST', '/auth/api-keys', { name: 'w', scopes: ['write'] });
    const { ticket } = (await user.call('POST', '/auth/ws-ticket')).body;
    for (const token of [other.token, server.adminKey, 'garbage', writeOnly.key, ticket]) {
      const before = socket.frames.length;
      socket.say({ type: 'auth', token });
      await expect.poll(() => socket.frames.length).toBeGreaterThan(before);
      expect(socket.frames.at(-1)).toMatchObject({ type: 'error', data: { code: 'unauthorized' } });
    }
    await makeTask(other.call);
    const own = await makeTask(user.call);
    await socket.frame(({ data }) => data['task_id'] === own.id);
    const told = socket.frames.filter(({ type }) => type === 'task_status_update');
    expect(told.map(({ data }) => data['task_id'])).toEqual([own.id]);
    socket.socket.close();
  });

  test('that says too much at once is closed, and others are not', async () => {
    const user = await server.newUser();
    const [loud, quiet] = [0, 1].map(() => openSocket(`${server.url}/ws?token=${user.token}`));
    await loud?.ack;
    await quiet?.ack;
    for (let i = 0; i < 1_000; i++) loud?.say({ type: 'ping' });
    expect(await loud?.closed).toMatchObject({ code: 1008, reason: 'too many messages' });
    const task = await makeTask(user.call);
    await quiet?.frame(({ data }) => data['task_id'] === task.id);
    quiet?.socket.close();
  });
});

describe('a ticket', () => {
  const ticketOf = async (user: Pick<User, 'call'>) => {
    const { status, headers, body } = await user.call('POST', '/auth/ws-ticket');
    expect(status).toBe(200);
    expect(headers.get('cache-control')).toBe('no-store');
    expect(body.expires_in).toBe(30);
    return body.ticket as string;
  };

  test('opens one socket, of fifty that try at once, on whichever server', async () => {
    const user = await server.newUser();
    const ticket = await ticketOf(user);
    const tries = Array.from({ length: 50 }, (_, i) =>
      openSocket(`${(i % 2 ? server : second).url}/ws?ticket=${ticket}`),
    );
    const opened = await Promise.all(
      tries.map((socket) =>
        Promise.race([
          socket.ack.then(
            () => 1,
            () => 0,
          ),
          socket.closed.then(() => 0),
        ]),
      ),
    );
    expect(opened.reduce<number>((sum, one) => sum + one, 0)).toBe(1);
    for (const { socket } of tries) socket.terminate();
    expect(await refusal(`${server.url}/ws?ticket=${ticket}`)).toMatchObject({ status: 401 });
  });

  test('opens an event stream too', async () => {
    const user = await server.newUser();
    const stream = await openStream(`${server.url}/api/v1/events?ticket=${await ticketOf(user)}`, undefined);
    expect((await stream.event(({ type }) => type === 'ack')).data['user_id']).toBe(user.id);
    stream.close();
  });

  test('is no good after half a minute, when its credential has ended, or for anything else', async () => {
    const user = await server.newUser();
    const late = await ticketOf(user);
    await server.db.query({
      text: `update ws_tickets set expires_at = now() - interval '1 ms' where user_id = $1`,
      values: [user.id],
    });
    expect(await refusal(`${server.url}/ws?ticket=${late}`)).toMatchObject({ status: 401 });

    const { body: key } = await user.call('POST', '/auth/api-keys', { name: 'k', scopes: ['read'] });
    const orphan = await ticketOf({ call: server.as(key.key) });
    await user.call('DELETE', `/auth/api-keys/${key.id}`);
    expect(await refusal(`${server.url}/ws?ticket=${orphan}`)).toMatchObject({ status: 401 });

    const ticket = await ticketOf(user);
    expect((await server.as(ticket)('GET', '/tasks')).status).toBe(401);
    expect((await server.as(ticket)('POST', '/auth/api-keys', { name: 'x' })).status).toBe(401);
    expect(await refusal(`${server.url}/ws?ticket=mwt_${'x'.repeat(43)}`)).toMatchObject({ status: 401 });
    const { rows } = await server.db.query({ text: 'select from ws_tickets where ticket_hash = $1', values: [ticket] });
    expect(rows).toEqual([]);
  });
});

test('a user and an address have a bound on what they hold open', async () => {
  const small = await startServer({ env: { WS_MAX_CONNECTIONS_PER_USER: '3', WS_MAX_CONNECTIONS_PER_ADDRESS: '5' } });
  try {
    const [one, two] = [await small.newUser(), await small.newUser()];
    const sockets = [one, one, one, two].map(({ token }) => openSocket(`${small.url}/ws?token=${token}`));
    for (const { ack } of sockets) await ack;
    expect(await refusal(`${small.url}/ws?token=${one.token}`)).toMatchObject({ status: 429 });
    const stream = await openStream(`${small.url}/api/v1/events`, two.token);
    await stream.event(({ type }) => type === 'ack');
    const refused = await openStream(`${small.url}/api/v1/events`, two.token);
    expect(refused.status).toBe(429);
    expect(refused.headers.get('retry-after')).toBe('10');
    sockets[0]?.socket.close();
    await sockets[0]?.closed;
    await expect
      .poll(async () => {
        const again = openSocket(`${small.url}/ws?token=${one.token}`);
        return Promise.race([again.ack.then(() => 'open'), again.closed.then(() => 'refused')]);
      })
      .toBe('open');
  } finally {
    await small.stop();
  }
});
