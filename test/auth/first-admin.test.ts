import { mkdtemp, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { ensureFirstAdmin } from '../../src/auth/first-admin.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { unique } from '../support/work.ts';

let server: TestServer;
let folder: string;
beforeAll(async () => {
  server = await startServer();
  folder = await mkdtemp(join(tmpdir(), 'muster-first-admin-'));
});
afterAll(async () => {
  await server?.stop();
  await rm(folder, { recursive: true, force: true });
});

test('whoever registers first on an empty database is no admin, and two first starts make one', {
  timeout: 120_000,
}, async () => {
  await server.db.query({ text: 'truncate users cascade' });
  const register = () =>
    server.as(undefined)('POST', '/auth/register', {
      email: `${unique('first')}@example.com`,
      password: 'correct horse battery',
    });
  const [answers] = await Promise.all([
    Promise.all(Array.from({ length: 20 }, register)),
    Promise.all([ensureFirstAdmin(server.db, folder), ensureFirstAdmin(server.db, folder)]),
  ]);
  expect(answers.map(({ status, body }) => [status, body.role])).toEqual(Array(20).fill([201, 'user']));
  const { rows } = await server.db.query({ text: `select email from users where role = 'admin'` });
  expect(rows).toEqual([{ email: 'admin@localhost' }]);
});

test('a key whose file is lost, or which was revoked, gets a successor that only its owner may read', async () => {
  const file = join(folder, 'admin-key');
  const whoIs = async (key: string) => (await server.as(key)('GET', '/auth/me')).status;
  const first = await ensureFirstAdmin(server.db, folder);
  await rm(file);
  const second = await ensureFirstAdmin(server.db, folder);
  expect([first.key === second.key, second.made]).toEqual([false, true]);
  expect([await whoIs(first.key), await whoIs(second.key)]).toEqual([401, 200]);
  expect((await stat(file)).mode & 0o777).toBe(0o600);

  const list = await server.as(second.key)('GET', '/auth/api-keys');
  expect(list.body.total).toBe(1);
  expect((await server.as(second.key)('DELETE', `/auth/api-keys/${list.body.api_keys[0].id}`)).status).toBe(204);
  const third = await ensureFirstAdmin(server.db, folder);
  expect(third.made).toBe(true);
  expect(await whoIs(third.key)).toBe(200);
  expect((await readFile(file, 'utf8')).trim()).toBe(third.key);
  expect((await ensureFirstAdmin(server.db, folder)).made).toBe(false);
});
