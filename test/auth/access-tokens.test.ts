import { createHmac, createSign, generateKeyPairSync, type KeyObject, sign } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { openSocket, refusal } from '../realtime/support.ts';
import { startServer, type TestServer } from '../support/server.ts';

const SECRET = 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa-test';
const now = () => Math.floor(Date.now() / 1000);
const b64 = (value: unknown) =>
  Buffer.from(typeof value === 'string' ? value : JSON.stringify(value)).toString('base64url');
const hmac = (alg: 'sha256' | 'sha512', key: string | Buffer, text: string) =>
  createHmac(alg, key).update(text).digest('base64url');

/** A token by hand, so that it can be wrong in every way. */
function token(header: unknown, payload: unknown, signer: (text: string) => string): string {
  const text = `${b64(header)}.${b64(payload)}`;
  return `${text}.${signer(text)}`;
}

let server: TestServer;
let good: { sub: string; fam: string; use: string; iss: string; aud: string; iat: number; exp: number };
beforeAll(async () => {
  server = await startServer({ env: { JWT_SECRET: SECRET } });
  const user = await server.newUser();
  const payload = JSON.parse(Buffer.from(user.token.split('.')[1] ?? '', 'base64url').toString());
  good = { ...payload, iat: now(), exp: now() + 600 };
});
afterAll(() => server?.stop());

const HS256 = { alg: 'HS256', typ: 'JWT' };
const byHand = (payload: unknown, header: unknown = HS256) =>
  token(header, payload, (text) => hmac('sha256', SECRET, text));
const without = (name: keyof typeof good) => {
  const { [name]: _, ...rest } = good;
  return rest;
};

describe('our own access tokens', () => {
  test.each(['JWT', 'jwt', 'at+jwt', 'application/at+jwt', undefined])('the good one is taken, as %s', async (typ) => {
    expect((await server.as(byHand(good, { alg: 'HS256', typ }))('GET', '/auth/me')).status).toBe(200);
  });

  const forged: [string, () => string][] = [
    ['alg none', () => token({ alg: 'none', typ: 'JWT' }, good, () => '')],
    ['alg None', () => token({ alg: 'None', typ: 'JWT' }, good, () => '')],
    ['HS512', () => token({ alg: 'HS512', typ: 'JWT' }, good, (text) => hmac('sha512', SECRET, text))],
    ['another secret', () => token(HS256, good, (text) => hmac('sha256', 'another secret', text))],
    ['empty signature', () => token(HS256, good, () => '')],
    ['no exp', () => byHand(without('exp'))],
    ['expired', () => byHand({ ...good, iat: now() - 700, exp: now() - 100 })],
    ['exp as text', () => byHand({ ...good, exp: String(good.exp) })],
    ['exp 1e400', () => byHand(JSON.stringify(good).replace(/"exp":\d+/, '"exp":1e400'))],
    ['nbf to come', () => byHand({ ...good, nbf: now() + 3600 })],
    ['iat to come', () => byHand({ ...good, iat: now() + 3000, exp: now() + 3500 })],
    ['issued long ago', () => byHand({ ...good, iat: now() - 10_000 })],
    ['ten years', () => byHand({ ...good, exp: now() + 315_360_000 })],
    ['no iat', () => byHand(without('iat'))],
    ['wrong issuer', () => byHand({ ...good, iss: 'evil' })],
    ['issuer as a list', () => byHand({ ...good, iss: ['muster'] })],
    ['wrong audience', () => byHand({ ...good, aud: 'evil' })],
    ['no issuer', () => byHand(without('iss'))],
    ['no audience', () => byHand(without('aud'))],
    ['neither issuer nor audience', () => byHand({ ...without('iss'), aud: undefined })],
    ['crit', () => byHand(good, { ...HS256, crit: ['exp'] })],
    ['a refresh token by its typ', () => byHand(good, { ...HS256, typ: 'refresh+jwt' })],
    ['another use', () => byHand({ ...good, use: 'refresh' })],
    ['no login', () => byHand(without('fam'))],
    ['a login that is not', () => byHand({ ...good, fam: '00000000-0000-4000-8000-000000000000' })],
    ['a payload that is no object', () => byHand('"x"')],
    ['a header that is no object', () => byHand(good, '"x"')],
    ['a subject that is no id', () => byHand({ ...good, sub: '1 or 1=1' })],
    ['a subject past 2^53', () => byHand({ ...good, sub: '9007199254740993' })],
    ['a user that is not', () => byHand({ ...good, sub: '999999' })],
    ['two parts', () => byHand(good).split('.').slice(0, 2).join('.')],
    ['garbage', () => 'a.b.c'],
    ['a made-up key', () => `muster_${'x'.repeat(43)}`],
    ['half a key', () => 'muster_x'],
  ];
  /** Well-formed and signed, as far as anybody can tell without a look into the database. */
  const LOOKED_UP = ['a login that is not', 'a user that is not', 'a made-up key'];
  test.each(forged)('%s → 401 over HTTP and as a socket, and no query unless it is signed', async (name, forge) => {
    const queries = vi.spyOn(server.db.pool, 'query');
    try {
      const answer = await server.as(forge())('GET', '/auth/me');
      expect(answer.status).toBe(401);
      expect(answer.headers.get('www-authenticate')).toMatch(/^Bearer/);
      expect(answer.headers.get('content-type')).toMatch(/^application\/problem\+json/);
      expect((await refusal(`${server.url}/ws?token=${encodeURIComponent(forge())}`)).status).toBe(401);
      const looks = queries.mock.calls.filter(([query]) => JSON.stringify(query).includes('credential'));
      expect(looks).toHaveLength(LOOKED_UP.includes(name) ? 2 : 0);
    } finally {
      queries.mockRestore();
    }
  });

  test('the good one opens a socket, and costs one query', async () => {
    const queries = vi.spyOn(server.db.pool, 'query');
    const socket = openSocket(`${server.url}/ws?token=${byHand(good)}`);
    try {
      expect((await socket.ack).data['user_id']).toBe(Number(good.sub));
      const looks = queries.mock.calls.filter(([query]) => JSON.stringify(query).includes('credential'));
      expect(looks).toHaveLength(1);
    } finally {
      queries.mockRestore();
      socket.socket.close();
      await socket.closed;
    }
  });

  test.each([undefined, 'Basic abc', 'Bearer', 'Bearer a b', 'bearer', `Bearer ${'x'.repeat(9_000)}`])(
    'the header Authorization: %s → 401',
    async (authorization) => {
      const headers = authorization === undefined ? {} : { authorization };
      expect((await server.as(undefined)('GET', '/auth/me', undefined, headers)).status).toBe(401);
    },
  );

  test('guessing has a limit per address, whatever the route', async () => {
    const strict = await startServer({ env: { RATE_LIMIT_PER_MINUTE: '5' } });
    try {
      const statuses: number[] = [];
      for (let i = 0; i < 8; i++) statuses.push((await strict.as(`muster_${'y'.repeat(43)}`)('GET', '/tasks')).status);
      expect(statuses).toEqual([401, 401, 401, 401, 401, 429, 429, 429]);
      expect((await strict.admin('GET', '/auth/me')).status).toBe(429);
    } finally {
      await strict.stop();
    }
  });
});

describe('tokens of another issuer', () => {
  const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 });
  const ec = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  const ed = generateKeyPairSync('ed25519');
  const pem = (key: KeyObject) => key.export({ type: 'spki', format: 'pem' }).toString();
  const signers: Record<string, (text: string) => string> = {
    RS256: (text) => createSign('sha256').update(text).sign(rsa.privateKey).toString('base64url'),
    ES256: (text) =>
      sign('sha256', Buffer.from(text), { key: ec.privateKey, dsaEncoding: 'ieee-p1363' }).toString('base64url'),
    EdDSA: (text) => sign(null, Buffer.from(text), ed.privateKey).toString('base64url'),
  };
  const claims = () => ({ sub: '1', iss: 'https://id.example', aud: 'muster', iat: now(), exp: now() + 600 });
  const signed = (alg: string, kid?: string, payload: object = claims()) =>
    token({ alg, typ: 'JWT', ...(kid ? { kid } : {}) }, payload, signers[alg] ?? (() => ''));

  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'muster-keys-'));
  });
  afterAll(() => rm(folder, { recursive: true }));

  test.each([
    ['RS256', rsa.publicKey],
    ['ES256', ec.publicKey],
    ['EdDSA', ed.publicKey],
  ])('%s by a public key: its algorithm alone, and never the key as an HMAC secret', async (alg, key) => {
    const file = join(folder, `${alg}.pem`);
    await writeFile(file, pem(key));
    const other = await startServer({
      env: { JWT_SECRET: '', JWT_PUBLIC_KEY_FILE: file, JWT_ISSUER: 'https://id.example' },
    });
    try {
      const status = async (credential: string) => (await other.as(credential)('GET', '/auth/me')).status;
      expect(await status(signed(alg))).toBe(200);
      for (const wrong of ['RS256', 'ES256', 'EdDSA'].filter((name) => name !== alg))
        expect(await status(signed(wrong))).toBe(401);
      expect(await status(token(HS256, claims(), (text) => hmac('sha256', pem(key), text)))).toBe(401);
      expect(await status(signed(alg, undefined, { ...claims(), sub: '999' }))).toBe(401);
      expect(await status(signed(alg, undefined, { ...claims(), iss: 'muster' }))).toBe(401);
      expect(await status(signed(alg, undefined, { ...claims(), exp: now() - 10 }))).toBe(401);
      // Nothing can be signed here, and keys go on working.
      const login = await other.as(undefined)('POST', '/auth/login', {
        email: 'a@example.com',
        password: 'whatever it is',
      });
      expect(login).toMatchObject({ status: 403, body: { detail: expect.stringMatching(/issuer/) } });
      const refresh = await other.as(undefined)('POST', '/auth/refresh', { refresh_token: 'mrt_x' });
      expect(refresh).toMatchObject({ status: 403, body: { detail: expect.stringMatching(/issuer/) } });
      expect(await status(other.adminKey)).toBe(200);
    } finally {
      await other.stop();
    }
  });

  test('by a key set: found by its id, fetched seldom, redirects not followed, away → 503', async () => {
    let fetches = 0;
    let mode: 'good' | 'redirect' | 'broken' = 'good';
    const keys = [{ ...rsa.publicKey.export({ format: 'jwk' }), kid: 'one', alg: 'RS256', use: 'sig' }];
    const issuer: Server = createServer((request, response) => {
      fetches++;
      if (mode === 'redirect' && request.url !== '/elsewhere')
        response.writeHead(302, { location: '/elsewhere' }).end();
      else if (mode === 'broken') response.writeHead(500).end();
      else response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ keys }));
    });
    await new Promise<void>((done) => issuer.listen(0, '127.0.0.1', done));
    const url = `http://127.0.0.1:${(issuer.address() as AddressInfo).port}/jwks.json`;
    const env = { JWT_SECRET: '', JWT_JWKS_URL: url, JWT_ISSUER: 'https://id.example' };
    const statusOf = (at: TestServer) => async (credential: string) =>
      (await at.as(credential)('GET', '/auth/me')).status;
    const other = await startServer({ env });
    try {
      const status = statusOf(other);
      expect(await status(signed('RS256', 'one'))).toBe(200);
      expect(await status(signed('RS256', 'one'))).toBe(200);
      expect(fetches).toBe(1);
      for (let i = 0; i < 20; i++) expect(await status(signed('RS256', `made-up-${i}`))).toBe(401);
      expect(fetches).toBeLessThanOrEqual(2);
      expect(await status(signed('ES256', 'one'))).toBe(401);
    } finally {
      await other.stop();
    }
    for (mode of ['redirect', 'broken'] as const) {
      const away = await startServer({ env });
      try {
        expect(await statusOf(away)(signed('RS256', 'one'))).toBe(503);
        expect(await statusOf(away)(away.adminKey)).toBe(200);
      } finally {
        await away.stop();
      }
    }
    await new Promise((done) => issuer.close(done));
  });
});
