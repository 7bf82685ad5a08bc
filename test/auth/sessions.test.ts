import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { sql } from 'drizzle-orm';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ensureFirstAdmin } from '../../src/auth/first-admin.ts';
import { hashPassword, passwordFault, verifyPassword } from '../../src/auth/passwords.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { unique } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { TRUST_PROXY: '127.0.0.1' } });
});
afterAll(() => server?.stop());

const anybody = (...args: Parameters<TestServer['admin']>) => server.as(undefined)(...args);
const from = (address: string) => ({ 'x-forwarded-for': address });
const newEmail = () => `${unique('user')}@example.com`;
const PASSWORD = 'correct horse battery';

describe('registering', () => {
  test('makes a plain user, whose email is kept in lower case, and audits it without the password', async () => {
    const email = newEmail();
    const answer = await anybody('POST', '/auth/register', {
      email: email.toUpperCase(),
      password: PASSWORD,
      name: ' Ada ',
    });
    expect(answer).toMatchObject({ status: 201, body: { email, name: 'Ada', role: 'user' } });
    expect(JSON.stringify(answer.body)).not.toContain('password');
    const { rows } = await server.db.query<{ changed_fields: object }>({
      text: `select changed_fields from audit_log where entity_type = 'user' and entity_id = $1`,
      values: [answer.body.id],
    });
    expect(rows[0]?.changed_fields).toMatchObject({ password_hash: { old: null, new: '[redacted]' } });
    expect((await anybody('POST', '/auth/register', { email, password: PASSWORD })).status).toBe(409);
  });

  test.each([
    [{ email: 'nobody', password: PASSWORD }, 'body.email'],
    [{ email: 'a@b.example', password: 'short' }, 'body.password'],
    [{ email: 'a@b.example', password: 'x'.repeat(129) }, 'body.password'],
    [{ email: 'a@b.example', password: 'Password123' }, 'body.password'],
    [{ email: 'somebody1@b.example', password: 'somebody1' }, 'body.password'],
    [{ email: 'a@b.example', password: 'abababab' }, 'body.password'],
    [{ email: 'a@b.example' }, 'body.password'],
    [{ email: 'a@b.example', password: PASSWORD, role: 'admin' }, 'body.role'],
    [{ email: 'a@b.example', password: PASSWORD, name: '' }, 'body.name'],
  ])('refuses %j and names the field', async (body, path) => {
    const answer = await anybody('POST', '/auth/register', body);
    expect(answer.status).toBe(400);
    expect(answer.body.errors[0].path).toBe(path);
    if ('password' in body) expect(JSON.stringify(answer.body)).not.toContain(body.password);
  });

  test('at once and often, it never makes an admin, nor two users of one address', async () => {
    const email = newEmail();
    const answers = await Promise.all(
      Array.from({ length: 20 }, () => anybody('POST', '/auth/register', { email, password: PASSWORD })),
    );
    expect(answers.filter(({ status }) => status === 201)).toHaveLength(1);
    expect(answers.filter(({ status }) => status === 409)).toHaveLength(19);
    const { rows } = await server.db.query({ text: `select email from users where role = 'admin'` });
    expect(rows).toEqual([{ email: 'admin@localhost' }]);
  });

  test('is closed where it is closed', async () => {
    const closed = await startServer({ env: { AUTH_REGISTRATION: 'closed' } });
    try {
      const answer = await closed.as(undefined)('POST', '/auth/register', { email: newEmail(), password: PASSWORD });
      expect(answer).toMatchObject({ status: 403, body: { detail: expect.stringMatching(/closed/) } });
    } finally {
      await closed.stop();
    }
  });
});

describe('logging in', () => {
  test('answers tokens that work, and is the same for every wrong answer', async () => {
    const user = await server.newUser();
    const login = await anybody('POST', '/auth/login', { email: user.email.toUpperCase(), password: user.password });
    expect(login).toMatchObject({ status: 200, body: { token_type: 'bearer', expires_in: 3600 } });
    expect(login.headers.get('cache-control')).toBe('no-store');
    const me = await server.as(login.body.access_token)('GET', '/auth/me');
    expect(me).toMatchObject({ status: 200, body: { id: user.id, email: user.email } });

    await server.db.orm.execute(sql`insert into users (email, role) values ('nopassword@example.com', 'user')`);
    const wrong = await Promise.all([
      anybody('POST', '/auth/login', { email: user.email, password: 'wrong password' }, from('10.9.0.1')),
      anybody('POST', '/auth/login', { email: newEmail(), password: PASSWORD }, from('10.9.0.2')),
      anybody('POST', '/auth/login', { email: 'nopassword@example.com', password: PASSWORD }, from('10.9.0.3')),
    ]);
    for (const answer of wrong) {
      expect(answer.status).toBe(401);
      expect(answer.body.detail).toBe('The email address or the password is wrong.');
      expect(answer.headers.get('www-authenticate')).toMatch(/^Bearer/);
    }
  });

  test('a guesser is stopped at the sixth try in a minute; others and other emails are not', async () => {
    const user = await server.newUser();
    const attempt = (email: string, password: string, address: string) =>
      anybody('POST', '/auth/login', { email, password }, from(address));
    for (let i = 0; i < 5; i++) expect((await attempt(user.email, `guess number ${i}`, '10.1.1.1')).status).toBe(401);
    const sixth = await attempt(user.email, user.password, '10.1.1.1');
    expect(sixth.status).toBe(429);
    expect(Number(sixth.headers.get('retry-after'))).toBeGreaterThan(0);
    expect((await attempt(user.email, user.password, '10.1.1.2')).status).toBe(200);
    expect((await attempt(newEmail(), 'whatever else', '10.1.1.1')).status).toBe(401);
  });
});

describe('refreshing', () => {
  const login = async () => {
    const user = await server.newUser();
    return (await anybody('POST', '/auth/login', { email: user.email, password: user.password })).body;
  };
  const refresh = (token: string) => anybody('POST', '/auth/refresh', { refresh_token: token });

  test('spends a token for the next; a spent one that comes again ends the login, its access tokens too', async () => {
    const first = await login();
    const second = await refresh(first.refresh_token);
    expect(second.status).toBe(200);
    expect(second.body.refresh_token).not.toBe(first.refresh_token);
    const me = () => server.as(second.body.access_token)('GET', '/auth/me');
    expect((await me()).status).toBe(200);
    expect((await refresh(first.refresh_token)).status).toBe(401);
    expect((await refresh(second.body.refresh_token)).status).toBe(401);
    expect((await me()).status).toBe(401);
    const { rows } = await server.db.query({ text: `select from audit_log where entity_type = 'session'` });
    expect(rows.length).toBeGreaterThan(0);
  });

  test('twenty at once with one token: one gets through, and the login is over', async () => {
    const { refresh_token } = await login();
    const answers = await Promise.all(Array.from({ length: 20 }, () => refresh(refresh_token)));
    const good = answers.filter(({ status }) => status === 200);
    expect(good).toHaveLength(1);
    expect(answers.filter(({ status }) => status === 401)).toHaveLength(19);
    expect((await refresh(good[0]?.body.refresh_token)).status).toBe(401);
  });

  test('tokens that are made up, expired, or of a disabled user are refused', async () => {
    expect((await refresh('mrt_nonsense')).status).toBe(401);
    const expired = await login();
    await server.db.orm.execute(
      sql`update refresh_tokens set expires_at = now() where spent_at is null and user_id = (select max(id) from users)`,
    );
    expect((await refresh(expired.refresh_token)).status).toBe(401);
    const user = await server.newUser();
    const tokens = (await anybody('POST', '/auth/login', { email: user.email, password: user.password })).body;
    await server.db.orm.execute(sql`update users set disabled_at = now() where id = ${user.id}`);
    expect((await refresh(tokens.refresh_token)).status).toBe(401);
    expect((await server.as(tokens.access_token)('GET', '/auth/me')).status).toBe(401);
    expect((await anybody('POST', '/auth/login', { email: user.email, password: user.password })).status).toBe(401);
  });

  test('logging out ends the login at once, as often as one likes', async () => {
    const tokens = await login();
    for (let i = 0; i < 2; i++) {
      const answer = await anybody('POST', '/auth/logout', { refresh_token: tokens.refresh_token });
      expect(answer.status).toBe(204);
      expect(answer.body).toBe('');
    }
    expect((await server.as(tokens.access_token)('GET', '/auth/me')).status).toBe(401);
    expect((await refresh(tokens.refresh_token)).status).toBe(401);
  });
});

describe('API keys', () => {
  test('are shown once, kept hashed, listed without their secret, and end when revoked', async () => {
    const user = await server.newUser();
    const made = await user.call('POST', '/auth/api-keys', { name: 'ci', scopes: ['read'] });
    expect(made).toMatchObject({ status: 201, body: { name: 'ci', scopes: ['read'], expires_at: null } });
    expect(made.body.key).toMatch(/^muster_[\w-]{43}$/);
    expect(made.headers.get('cache-control')).toBe('no-store');
    const { rows } = await server.db.query({ text: 'select * from api_keys where id = $1', values: [made.body.id] });
    expect(JSON.stringify(rows)).not.toContain(made.body.key);
    const call = server.as(made.body.key);
    expect((await call('GET', '/auth/me')).body.id).toBe(user.id);
    const list = await user.call('GET', '/auth/api-keys');
    expect(list.body).toMatchObject({ total: 1, api_keys: [{ id: made.body.id, prefix: made.body.key.slice(0, 13) }] });
    expect(JSON.stringify(list.body)).not.toContain(made.body.key);

    const stranger = await server.newUser();
    expect((await stranger.call('DELETE', `/auth/api-keys/${made.body.id}`)).status).toBe(403);
    expect((await user.call('DELETE', `/auth/api-keys/${made.body.id}`)).status).toBe(204);
    expect((await user.call('DELETE', `/auth/api-keys/${made.body.id}`)).status).toBe(404);
    expect((await call('GET', '/auth/me')).status).toBe(401);
    expect((await user.call('GET', '/auth/api-keys')).body.total).toBe(0);
  });

  test('do what their scopes say, and cannot make keys that do more', async () => {
    const user = await server.newUser();
    const key = async (scopes: string[]) =>
      server.as((await user.call('POST', '/auth/api-keys', { name: scopes.join(), scopes })).body.key);
    const [read, write, agent] = [await key(['read']), await key(['write']), await key(['agent'])];
    const task = { skill_name: 'x' };
    expect((await read('GET', '/tasks')).status).toBe(200);
    expect((await read('POST', '/tasks', task)).status).toBe(403);
    expect((await write('POST', '/tasks', task)).status).toBe(201);
    expect((await write('GET', '/tasks')).status).toBe(403);
    expect((await agent('GET', '/tasks')).status).toBe(403);
    expect((await agent('POST', '/agents', { name: 'a' })).status).toBe(201);
    expect((await write('POST', '/auth/api-keys', { name: 'more', scopes: ['read'] })).status).toBe(403);
    expect((await write('POST', '/auth/api-keys', { name: 'same' })).body.scopes).toEqual(['write']);
  });

  test('that expire are refused from then on, and cannot be made expired', async () => {
    const user = await server.newUser();
    const soon = new Date(Date.now() + 3_600_000).toISOString();
    const made = await user.call('POST', '/auth/api-keys', { name: 'x', expires_at: soon });
    expect(made.body.expires_at).toBe(soon);
    expect((await server.as(made.body.key)('GET', '/auth/me')).status).toBe(200);
    await server.db.orm.execute(sql`update api_keys set expires_at = now() where id = ${made.body.id}`);
    expect((await server.as(made.body.key)('GET', '/auth/me')).status).toBe(401);
    const past = await user.call('POST', '/auth/api-keys', { name: 'x', expires_at: '2020-01-01T00:00:00Z' });
    expect(past).toMatchObject({ status: 400, body: { errors: [{ path: 'body.expires_at' }] } });
  });

  test.each([
    [{ name: '' }, 'body.name'],
    [{ name: 'x', scopes: [] }, 'body.scopes'],
    [{ name: 'x', scopes: ['root'] }, 'body.scopes.0'],
    [{ name: 'x', scopes: ['read', 'read'] }, 'body.scopes'],
    [{ name: 'x', expires_at: 'tomorrow' }, 'body.expires_at'],
    [{ name: 'x', user_id: 1 }, 'body.user_id'],
  ])('refuse %j and name the field', async (body, path) => {
    const answer = await server.admin('POST', '/auth/api-keys', body);
    expect(answer).toMatchObject({ status: 400, body: { errors: [{ path }] } });
  });
});

describe('the first admin', () => {
  test('is one, however many starts there are at once, and its key works', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'muster-admin-'));
    try {
      const made = await Promise.all(Array.from({ length: 4 }, () => ensureFirstAdmin(server.db, folder)));
      expect(new Set(made.map(({ key }) => key)).size).toBe(1);
      expect(made.filter((admin) => admin.made)).toHaveLength(1);
      const file = join(folder, 'admin-key');
      expect((await stat(file)).mode & 0o777).toBe(0o600);
      expect((await readFile(file, 'utf8')).trim()).toBe(made[0]?.key);
      expect((await server.as(made[0]?.key)('GET', '/auth/me')).body.role).toBe('admin');

      // A file that is lost, or holds no key, is healed, and the old key ends.
      await writeFile(file, 'muster_stale');
      const healed = await ensureFirstAdmin(server.db, folder);
      expect(healed.made).toBe(true);
      expect((await server.as(made[0]?.key)('GET', '/auth/me')).status).toBe(401);
      expect((await server.as(healed.key)('GET', '/auth/me')).status).toBe(200);
    } finally {
      await rm(folder, { recursive: true });
    }
    const { rows } = await server.db.query({ text: `select from users where email = 'admin@localhost'` });
    expect(rows).toHaveLength(1);
  });
});

describe('passwords', () => {
  test('are known again by their hash, whatever the form of their letters, and others are not', async () => {
    const hash = await hashPassword('Pässwörter sind toll');
    expect(hash).toMatch(/^scrypt\$16384\$8\$5\$/);
    expect(await verifyPassword('Pässwörter sind toll'.normalize('NFD'), hash)).toBe(true);
    expect(await verifyPassword('pässwörter sind toll', hash)).toBe(false);
    expect(await verifyPassword('', null)).toBe(false);
    expect(await hashPassword('Pässwörter sind toll')).not.toBe(hash);
  });

  test('that everybody tries are refused', () => {
    for (const password of ['password', 'PASSWORD1', 'qwertyuiop', '12345678', 'aaaaaaaaaa', 'iloveyou']) {
      expect(passwordFault(password, 'x@example.com')).toBeDefined();
    }
    expect(passwordFault(PASSWORD, 'x@example.com')).toBeUndefined();
  });
});
