import { afterAll, beforeAll, expect, test } from 'vitest';
import { rotateSession } from '../../src/auth/sessions.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

const refresh = (token: string) => server.as(undefined)('POST', '/auth/refresh', { refresh_token: token });
const logOut = (token: string) => server.as(undefined)('POST', '/auth/logout', { refresh_token: token });

test.each([
  ['a logout', logOut, 204],
  ['a spent token', refresh, 401],
])('%s ends the login also while its newest token is being spent', async (_, end, status) => {
  const user = await server.newUser();
  const login = await server.as(undefined)('POST', '/auth/login', { email: user.email, password: user.password });
  const first: string = login.body.refresh_token;
  const second = (await refresh(first)).body;
  const visitor = { ip: '127.0.0.1', userAgent: null, requestId: 'test' };
  // The commit comes only when the call that ends the login waits for this transaction.
  let ended: ReturnType<typeof end> | undefined;
  const third = await server.db.transaction(async (tx) => {
    const rotated = await rotateSession(tx, visitor, second.refresh_token, 3600);
    ended = end(first);
    await until(
      () =>
        server.db.pool.query(
          `select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`,
        ),
      ({ rows }) => rows.length > 0,
    );
    return rotated;
  });
  expect((await ended)?.status).toBe(status);
  if (!third) throw new Error('The token was not spent.');
  expect((await refresh(third.refreshToken)).status).toBe(401);
  expect((await server.as(second.access_token)('GET', '/auth/me')).status).toBe(401);
  // The login of another device goes on.
  expect((await user.call('GET', '/auth/me')).status).toBe(200);
});
