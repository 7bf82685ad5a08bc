import { request } from 'node:http';
import { Readable } from 'node:stream';
import { brotliDecompressSync, gunzipSync } from 'node:zlib';
import { fastify } from 'fastify';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { compressAnswers } from '../../src/http/compression.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let path: string;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
  const task = await makeTask(user.call, { params: { text: 'all work and no play '.repeat(200) } });
  path = `/api/v1/tasks/${task.id}`;
});
afterAll(() => server?.stop());

/** An answer as it comes over the wire: fetch would undo the encoding. */
const wire = (
  where: string,
  options: { method?: string; headers?: Record<string, string>; body?: string | Buffer } = {},
): Promise<{ status: number; headers: Record<string, unknown>; bytes: Buffer }> =>
  new Promise((done, failed) => {
    const { method = 'GET', headers = {}, body } = options;
    request(`${server.url}${where}`, { method, headers: { authorization: `Bearer ${user.token}`, ...headers } })
      .on('response', async (response) => {
        const chunks: Buffer[] = [];
        for await (const chunk of response) chunks.push(chunk as Buffer);
        done({ status: response.statusCode ?? 0, headers: response.headers, bytes: Buffer.concat(chunks) });
      })
      .on('error', failed)
      .end(body);
  });
const accepting = (encodings: string) => ({ headers: { 'accept-encoding': encodings } });

describe('an answer', () => {
  test.each([
    ['br', brotliDecompressSync],
    ['gzip', gunzipSync],
  ] as const)('above 1 KiB is compressed for who takes %s, and is the same', async (encoding, undo) => {
    const plain = await wire(path);
    expect(plain.headers['content-encoding']).toBeUndefined();
    const packed = await wire(path, accepting(encoding));
    expect(packed.status).toBe(200);
    expect(packed.headers['content-encoding']).toBe(encoding);
    expect(packed.headers['vary']).toMatch(/accept-encoding/i);
    expect(packed.headers['etag']).toBe(plain.headers['etag']);
    expect(packed.headers['x-request-id']).toEqual(expect.any(String));
    expect(packed.bytes.length).toBeLessThan(plain.bytes.length / 2);
    expect(JSON.parse(undo(packed.bytes).toString())).toEqual(JSON.parse(plain.bytes.toString()));
  });

  test('that is large is compressed too: the API document', async () => {
    const plain = await wire('/openapi.json');
    const packed = await wire('/openapi.json', accepting('br, gzip'));
    expect(packed.headers['content-encoding']).toBe('br');
    expect(brotliDecompressSync(packed.bytes).equals(plain.bytes)).toBe(true);
  });

  test.each(['identity', 'deflate', 'zstd', 'br;q=0, gzip;q=0', '', 'nonsense'])(
    'goes out as it is for who takes %j',
    async (encodings) => {
      const { status, headers, bytes } = await wire(path, accepting(encodings));
      expect(status).toBe(200);
      expect(headers['content-encoding']).toBeUndefined();
      expect(JSON.parse(bytes.toString())).toMatchObject({ skill_name: expect.any(String) });
    },
  );

  test('that is small, a problem among them, goes out as it is', async () => {
    for (const where of ['/health/live', '/api/v1/tasks/999999', '/nothing']) {
      const { headers, bytes } = await wire(where, accepting('br, gzip'));
      expect(headers['content-encoding'], where).toBeUndefined();
      expect(JSON.parse(bytes.toString())).toBeTypeOf('object');
    }
  });

  test('that a caller’s words make large is refused in full: a problem above 1 KiB can be read', async () => {
    const fields = Object.fromEntries(Array.from({ length: 100 }, (_, i) => [`no-such-field-${i}`, 1]));
    const { status, headers, bytes } = await wire('/api/v1/tasks', {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'accept-encoding': 'gzip' },
      body: JSON.stringify({ skill_name: 'x', ...fields }),
    });
    expect(status).toBe(400);
    expect(headers['content-type']).toMatch(/^application\/problem\+json/);
    expect(headers['content-encoding']).toBe('gzip');
    expect(JSON.parse(gunzipSync(bytes).toString()).errors).toHaveLength(100);
  });

  test('to HEAD has no body and the headers of GET', async () => {
    const { status, headers, bytes } = await wire(path, { method: 'HEAD', ...accepting('gzip') });
    expect(status).toBe(200);
    expect(bytes.length).toBe(0);
    expect(headers['etag']).toEqual(expect.any(String));
  });

  test('of /auth is never compressed: its length would tell of the secrets in it', async () => {
    for (let i = 0; i < 12; i++) await user.call('POST', '/auth/api-keys', { name: `key ${i} ${'x'.repeat(60)}` });
    const { status, headers, bytes } = await wire('/api/v1/auth/api-keys?limit=100', accepting('br, gzip'));
    expect(status).toBe(200);
    expect(bytes.length).toBeGreaterThan(1_024);
    expect(headers['content-encoding']).toBeUndefined();
    expect(JSON.parse(bytes.toString()).total).toBe(12);
  });
});

test('an export by lines goes out as it is written', async () => {
  const { status, headers, bytes } = await wire('/api/v1/audit?format=ndjson', accepting('br, gzip'));
  expect(status).toBe(200);
  expect(bytes.length).toBeGreaterThan(1_024);
  expect(headers['content-encoding']).toBeUndefined();
});

test('events go out as they are written', async () => {
  const app = fastify();
  await compressAnswers(app, { except: /^\/never/ });
  app.get('/events', (_request, reply) =>
    reply.type('text/event-stream').send(Readable.from([`data: ${'x'.repeat(5_000)}\n\n`])),
  );
  app.get('/text', (_request, reply) => reply.type('text/plain').send(Readable.from(['x'.repeat(5_000)])));
  try {
    const ask = (url: string) => app.inject({ url, headers: { 'accept-encoding': 'gzip' } });
    expect((await ask('/events')).headers['content-encoding']).toBeUndefined();
    expect((await ask('/text')).headers['content-encoding']).toBe('gzip');
  } finally {
    await app.close();
  }
});

test.each(['gzip', 'br', 'deflate', 'zstd', 'x-gzip', 'GZIP', 'gzip, gzip', 'identity, gzip', 'nonsense'])(
  'a request body with Content-Encoding %j is refused, and what is taken is told',
  async (encoding) => {
    const { status, headers, bytes } = await wire('/api/v1/tasks', {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'content-encoding': encoding },
      body: '{"skill_name":"x"}',
    });
    expect(status).toBe(415);
    expect(headers['accept-encoding']).toBe('identity');
    expect(JSON.parse(bytes.toString())).toMatchObject({ type: 'urn:muster:problem:unsupported-media-type' });
  },
);

test('a request body with Content-Encoding identity is taken', async () => {
  const { status } = await wire('/api/v1/tasks', {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'content-encoding': 'identity' },
    body: '{"skill_name":"x"}',
  });
  expect(status).toBe(201);
});
