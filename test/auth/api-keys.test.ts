import { sql } from 'drizzle-orm';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { ensureFirstAdmin } from '../../src/auth/first-admin.ts';
import { newFolder, removeFolder } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

type User = Awaited<ReturnType<TestServer['newUser']>>;
async function newKey(user: User, fields: object = {}): Promise<{ id: number; key: string }> {
  const made = await user.call('POST', '/auth/api-keys', { name: 'a key', ...fields });
  expect(made.status).toBe(201);
  return made.body;
}
const status = async (credential: string) => (await server.as(credential)('GET', '/auth/me')).status;

async function auditOf(id: number) {
  const { rows } = await server.db.query({
    text: `
      select operation, user_id, owner_id, changed_fields, request_id from audit_log
      where entity_type = 'api_key' and entity_id = $1 order by id`,
    values: [id],
  });
  return rows;
}

describe('who may do what', () => {
  test('a key of a disabled user is refused, and good again when the user is', async () => {
    const user = await server.newUser();
    const { key } = await newKey(user);
    expect(await status(key)).toBe(200);
    await server.db.orm.execute(sql`update users set disabled_at = now() where id = ${user.id}`);
    expect(await status(key)).toBe(401);
    await server.db.orm.execute(sql`update users set disabled_at = null where id = ${user.id}`);
    expect(await status(key)).toBe(200);
  });

  test("everybody lists their own keys only, an admin too, and an admin may revoke anybody's", async () => {
    const [user, other] = [await server.newUser(), await server.newUser()];
    const { id, key } = await newKey(user);
    for (const call of [other.call, server.admin]) {
      const { body } = await call('GET', '/auth/api-keys?limit=100');
      expect(body.api_keys.map((entry: { id: number }) => entry.id)).not.toContain(id);
    }
    expect((await server.admin('DELETE', `/auth/api-keys/${id}`)).status).toBe(204);
    expect(await status(key)).toBe(401);
    const [, revoked] = await auditOf(id);
    expect(revoked).toMatchObject({ operation: 'DELETE', owner_id: user.id });
    expect(revoked?.['user_id']).not.toBe(user.id);
  });

  test.each([
    ['0', 400],
    ['-1', 400],
    ['x', 400],
    ['1.5', 400],
    ['9007199254740993', 400],
    ['9007199254740991', 404],
  ])('a key %s cannot be revoked: %i', async (id, expected) => {
    const answer = await server.admin('DELETE', `/auth/api-keys/${id}`);
    expect(answer).toMatchObject({ status: expected, body: { status: expected } });
  });

  test('each call needs its scope', async () => {
    const user = await server.newUser();
    const [read, write] = [await newKey(user, { scopes: ['read'] }), await newKey(user, { scopes: ['write'] })];
    const as = (key: { key: string }) => server.as(key.key);
    expect((await as(read)('DELETE', `/auth/api-keys/${write.id}`)).status).toBe(403);
    expect((await as(read)('POST', '/auth/api-keys', { name: 'x' })).status).toBe(403);
    expect((await as(write)('GET', '/auth/api-keys')).status).toBe(403);
    expect((await as(write)('GET', '/auth/me')).status).toBe(403);
    expect((await as(write)('DELETE', `/auth/api-keys/${read.id}`)).status).toBe(204);
  });

  test.each([
    ['GET', '/auth/me'],
    ['GET', '/auth/api-keys'],
    ['POST', '/auth/api-keys'],
    ['DELETE', '/auth/api-keys/1'],
  ])('%s %s without a credential → 401', async (method, path) => {
    const body = method === 'POST' ? { name: 'x' } : undefined;
    expect((await server.as(undefined)(method, path, body)).status).toBe(401);
  });
});

test('a list goes page by page, newest first, without holes or repeats', async () => {
  const user = await server.newUser();
  const ids: number[] = [];
  for (let i = 0; i < 5; i++) ids.unshift((await newKey(user, { name: `key ${i}` })).id);
  const idsOf = (body: { api_keys: { id: number }[] }) => body.api_keys.map(({ id }) => id);
  const byOffset = await user.call('GET', '/auth/api-keys?limit=2&offset=2');
  expect(byOffset.body).toMatchObject({ total: 5, limit: 2, offset: 2, has_more: true });
  expect(idsOf(byOffset.body)).toEqual(ids.slice(2, 4));
  const seen: number[] = [];
  let cursor = '';
  do {
    const { body } = await user.call('GET', `/auth/api-keys?limit=2&total=false${cursor && `&cursor=${cursor}`}`);
    expect(body.total).toBe(null);
    seen.push(...idsOf(body));
    cursor = body.next_cursor ?? '';
  } while (cursor);
  expect(seen).toEqual(ids);
  for (const query of ['limit=0', 'limit=101', 'page=1', 'sort_order=asc', 'cursor=x']) {
    expect((await user.call('GET', `/auth/api-keys?${query}`)).status).toBe(400);
  }
});

test('its use is noted once, however many use it at once, and not again within a minute', async () => {
  const user = await server.newUser();
  const { id, key } = await newKey(user);
  const lastUsed = async () => (await user.call('GET', '/auth/api-keys')).body.api_keys[0].last_used_at;
  const query = vi.spyOn(server.db.pool, 'query');
  /** Calls at once, and answers how many notes were tried and how many were written. */
  const use = async (times: number) => {
    query.mockClear();
    expect(await Promise.all(Array.from({ length: times }, () => status(key)))).toEqual(Array(times).fill(200));
    const notes = query.mock.calls.flatMap(([statement], i) =>
      JSON.stringify(statement).includes('credential-key-used') ? [query.mock.results[i]?.value as unknown] : [],
    );
    const written = (await Promise.all(notes)).map((result) => (result as { rowCount: number }).rowCount);
    return { tried: notes.length, written: written.reduce((sum, count) => sum + count, 0) };
  };
  try {
    expect(await lastUsed()).toBe(null);
    expect((await use(20)).written).toBe(1);
    const noted = await lastUsed();
    expect(noted).not.toBe(null);
    expect(await use(1)).toEqual({ tried: 0, written: 0 });
    expect(await lastUsed()).toBe(noted);
    await server.db.orm.execute(sql`update api_keys set last_used_at = now() - interval '61 seconds' where id = ${id}`);
    expect(await use(1)).toEqual({ tried: 1, written: 1 });
    expect(Date.parse(await lastUsed())).toBeGreaterThanOrEqual(Date.parse(noted));
  } finally {
    query.mockRestore();
  }
});

test('its making and its end are audited, without the key', async () => {
  const user = await server.newUser();
  const made = await user.call(
    'POST',
    '/auth/api-keys',
    { name: 'ci', scopes: ['agent'] },
    { 'x-request-id': 'make-1' },
  );
  const { id, key } = made.body;
  await user.call('DELETE', `/auth/api-keys/${id}`, undefined, { 'x-request-id': 'end-1' });
  const entries = await auditOf(id);
  expect(entries).toMatchObject([
    {
      operation: 'CREATE',
      user_id: user.id,
      owner_id: user.id,
      request_id: 'make-1',
      changed_fields: { name: { old: null, new: 'ci' }, scopes: { old: null, new: ['agent'] } },
    },
    { operation: 'DELETE', user_id: user.id, request_id: 'end-1', changed_fields: { name: { old: 'ci', new: null } } },
  ]);
  expect(JSON.stringify(entries)).not.toContain(key.slice(7));
});

test("a lost admin key's end is audited like any other", async () => {
  const folder = await newFolder();
  try {
    const first = await ensureFirstAdmin(server.db, folder);
    const { body } = await server.as(first.key)('GET', '/auth/api-keys');
    const [{ id }] = body.api_keys;
    await removeFolder(folder);
    expect((await ensureFirstAdmin(server.db, folder)).made).toBe(true);
    expect((await auditOf(id)).map(({ operation }) => operation)).toEqual(['CREATE', 'DELETE']);
  } finally {
    await removeFolder(folder);
  }
});

test('twenty that revoke one key at once: it ends once', async () => {
  const user = await server.newUser();
  const { id } = await newKey(user);
  const answers = await Promise.all(Array.from({ length: 20 }, () => user.call('DELETE', `/auth/api-keys/${id}`)));
  expect(answers.filter((answer) => answer.status === 204)).toHaveLength(1);
  expect(answers.filter((answer) => answer.status === 404)).toHaveLength(19);
  expect(await auditOf(id)).toHaveLength(2);
});
