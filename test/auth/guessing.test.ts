import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { unique, until } from '../support/work.ts';

/** Counts the hashes of passwords, and holds them up while `gate` is not open. */
const scrypts = vi.hoisted(() => ({ count: 0, gate: Promise.resolve() }));
vi.mock('node:crypto', async (original) => {
  const crypto = await original<typeof import('node:crypto')>();
  const scrypt = (...args: Parameters<typeof crypto.scrypt>) => {
    scrypts.count++;
    void scrypts.gate.then(() => crypto.scrypt(...args));
  };
  return { ...crypto, default: crypto, scrypt };
});

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { TRUST_PROXY: '127.0.0.1' } });
});
afterAll(() => server?.stop());

const logIn = (email: string, password: string, address: string) =>
  server.as(undefined)('POST', '/auth/login', { email, password }, { 'x-forwarded-for': address });

test('a user that is none costs a hash like any other, so that time tells nobody which there are', async () => {
  const user = await server.newUser();
  const hashesOf = async (email: string) => {
    const before = scrypts.count;
    expect((await logIn(email, 'whatever it is', '10.2.0.1')).status).toBe(401);
    return scrypts.count - before;
  };
  expect(await hashesOf(user.email)).toBe(1);
  expect(await hashesOf(`${unique('nobody')}@example.com`)).toBe(1);
  expect(await hashesOf('admin@localhost')).toBe(1);
});

test('guesses that come all at once learn no more than one after another', async () => {
  const user = await server.newUser();
  const query = vi.spyOn(server.db.pool, 'query');
  const usersFound = async () =>
    query.mock.calls.filter(
      ([statement], i) =>
        JSON.stringify(statement).includes('from \\"users\\"') && query.mock.settledResults[i]?.type === 'fulfilled',
    ).length;
  let open = () => {};
  scrypts.gate = new Promise<void>((resolve) => {
    open = resolve;
  });
  const wrong = Array.from({ length: 20 }, (_, i) => logIn(user.email, `guess number ${i}`, '10.2.0.2'));
  await until(usersFound, (count) => count === 20);
  // The last in the queue, and let in like the others, since none has failed yet.
  const last = logIn(user.email, user.password, '10.2.0.2');
  await until(usersFound, (count) => count === 21);
  query.mockRestore();
  open();
  const statuses = (await Promise.all(wrong)).map(({ status }) => status);
  expect(statuses.filter((status) => status === 401)).toHaveLength(5);
  expect(statuses.filter((status) => status === 429)).toHaveLength(15);
  expect((await last).status).toBe(429);
  expect((await logIn(user.email, user.password, '10.2.0.3')).status).toBe(200);
});

test('an address that tries one password with everybody is stopped too', { timeout: 120_000 }, async () => {
  const user = await server.newUser();
  const spray = await Promise.all(
    Array.from({ length: 50 }, () => logIn(`${unique('victim')}@example.com`, 'Sommer2026!', '10.2.0.4')),
  );
  expect(new Set(spray.map(({ status }) => status))).toEqual(new Set([401]));
  expect((await logIn(user.email, user.password, '10.2.0.4')).status).toBe(429);
  expect((await logIn(user.email, user.password, '10.2.0.5')).status).toBe(200);
});
