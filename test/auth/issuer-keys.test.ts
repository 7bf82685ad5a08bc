import { constants, generateKeyPairSync, type KeyObject, sign } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer } from '../support/server.ts';

const ISSUER = 'https://id.example';
const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 });

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'muster-issuer-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const encode = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64url');
function signed(alg: 'RS256' | 'PS256', kid?: string, key: KeyObject = rsa.privateKey): string {
  const iat = Math.floor(Date.now() / 1000);
  const text = `${encode({ alg, typ: 'JWT', kid })}.${encode({ sub: '1', iss: ISSUER, aud: 'muster', iat, exp: iat + 600 })}`;
  const padding = alg === 'PS256' ? { padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: 32 } : {};
  return `${text}.${sign('sha256', Buffer.from(text), { key, ...padding }).toString('base64url')}`;
}

async function startWithKey(pem: string) {
  const file = join(folder, `${Math.random()}.pem`);
  await writeFile(file, pem);
  return startServer({ env: { JWT_SECRET: '', JWT_PUBLIC_KEY_FILE: file, JWT_ISSUER: ISSUER } });
}
const pemOf = (key: KeyObject) => key.export({ type: 'spki', format: 'pem' }).toString();

describe('JWT_PUBLIC_KEY_FILE', () => {
  test('an RSA key takes RS256 and not PS256', async () => {
    const server = await startWithKey(pemOf(rsa.publicKey));
    try {
      expect((await server.as(signed('RS256'))('GET', '/auth/me')).status).toBe(200);
      expect((await server.as(signed('PS256'))('GET', '/auth/me')).status).toBe(401);
    } finally {
      await server.stop();
    }
  });

  test.each([
    ['another curve', () => pemOf(generateKeyPairSync('ec', { namedCurve: 'P-384' }).publicKey)],
    ['a short RSA key', () => pemOf(generateKeyPairSync('rsa', { modulusLength: 1024 }).publicKey)],
    ['a DSA key', () => pemOf(generateKeyPairSync('dsa', { modulusLength: 2048, divisorLength: 256 }).publicKey)],
    ['no key', () => 'not a key'],
  ])('%s stops the start, since no token could be taken', async (_, pem) => {
    const started = startWithKey(pem());
    // One that starts after all must not be left running.
    started.then((server) => server.stop()).catch(() => {});
    await expect(started).rejects.toThrow(/^JWT_PUBLIC_KEY_FILE must be the PEM of/);
  });
});

describe('JWT_JWKS_URL', () => {
  /** An issuer on loopback that answers what it is told to, and counts how often it is asked. */
  async function issuer() {
    const state = { asked: 0, answer: { status: 200, body: '' } };
    const server = createServer((_, response) => {
      state.asked++;
      response.writeHead(state.answer.status, { 'content-type': 'application/json' }).end(state.answer.body);
    });
    await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/keys`;
    return {
      state,
      env: { JWT_SECRET: '', JWT_JWKS_URL: url, JWT_ISSUER: ISSUER },
      close: () =>
        new Promise((done) => {
          server.close(done);
          server.closeAllConnections();
        }),
    };
  }
  const keySet = JSON.stringify({ keys: [{ ...rsa.publicKey.export({ format: 'jwk' }), kid: 'one', alg: 'RS256' }] });

  test.each([
    ['no JSON', '<html>'],
    ['no key set', '{"keys":"none"}'],
    ['a list', '[]'],
  ])('an issuer that answers %s is away (503), and no fault of the token', async (_, body) => {
    const { state, env, close } = await issuer();
    state.answer = { status: 200, body };
    const server = await startServer({ env });
    try {
      const answer = await server.as(signed('RS256', 'one'))('GET', '/auth/me');
      expect(answer.status).toBe(503);
      expect(answer.headers.get('retry-after')).toBe('5');
      expect(JSON.stringify(answer.body)).not.toContain(env.JWT_JWKS_URL);
    } finally {
      await server.stop();
      await close();
    }
  });

  test('an issuer that cannot be reached is 503, and keys go on working', async () => {
    const { env, close } = await issuer();
    await close();
    const server = await startServer({ env });
    try {
      expect((await server.as(signed('RS256', 'one'))('GET', '/auth/me')).status).toBe(503);
      expect((await server.admin('GET', '/auth/me')).status).toBe(200);
    } finally {
      await server.stop();
    }
  });

  test('an issuer that is down is not hammered, and is asked again', async () => {
    const { state, env, close } = await issuer();
    state.answer = { status: 500, body: '' };
    const server = await startServer({ env });
    try {
      for (let i = 0; i < 20; i++) {
        expect((await server.as(signed('RS256', `made-up-${i}`))('GET', '/auth/me')).status).toBe(503);
      }
      expect(state.asked).toBeLessThanOrEqual(2);
      state.answer = { status: 200, body: keySet };
      const start = performance.now();
      let status = 503;
      while (status !== 200 && performance.now() - start < 20_000) {
        await new Promise((done) => setTimeout(done, 200));
        status = (await server.as(signed('RS256', 'one'))('GET', '/auth/me')).status;
      }
      expect(status).toBe(200);
    } finally {
      await server.stop();
      await close();
    }
  });
});
