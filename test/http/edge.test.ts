import { request } from 'node:http';
import { connect } from 'node:net';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Answer, startServer, type TestServer } from '../support/server.ts';
import { unique, until } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { CORS_ORIGINS: 'https://app.example.com' } });
});
afterAll(() => server?.stop());

const post = (path: string, body: string | Buffer, headers: Record<string, string> = {}): Promise<Answer> =>
  fetch(`${server.url}/api/v1${path}`, {
    method: 'POST',
    headers: { authorization: `Bearer ${server.adminKey}`, 'content-type': 'application/json', ...headers },
    body: body as never,
  }).then(async (response) => ({ status: response.status, headers: response.headers, body: await response.json() }));

/** Sends bytes as they are and answers what comes back until the connection ends. */
const raw = (bytes: string | Buffer, seconds = 10): Promise<string> =>
  new Promise((done, failed) => {
    const url = new URL(server.url);
    const socket = connect(Number(url.port), url.hostname, () => socket.write(bytes));
    let answer = '';
    socket.setTimeout(seconds * 1000, () => socket.destroy());
    socket.on('data', (chunk) => {
      answer += chunk;
      if (/\r\n\r\n/.test(answer)) socket.end();
    });
    socket.on('error', failed);
    socket.on('close', () => done(answer));
  });

const isProblem = (answer: Answer, status: number, kind: string) => {
  expect(answer.status).toBe(status);
  expect(answer.headers.get('content-type')).toBe('application/problem+json; charset=utf-8');
  expect(answer.body).toMatchObject({
    type: `urn:muster:problem:${kind}`,
    title: expect.any(String),
    status,
    detail: expect.stringMatching(/\.$/),
    instance: expect.stringMatching(/^\//),
    request_id: answer.headers.get('x-request-id'),
  });
  expect(JSON.stringify(answer.body)).not.toMatch(/node_modules|\bat \w+ \(|select |insert /);
};

describe('problems', () => {
  test('a path that leads nowhere', async () => {
    isProblem(await server.admin('GET', '/nothing'), 404, 'not-found');
    isProblem(await server.as(undefined)('DELETE', '//nothing/at/all'), 404, 'not-found');
    isProblem(await server.admin('PATCH', '/tasks'), 404, 'not-found');
  });

  test.each([
    ['not JSON', '{"skill_name":', 'invalid-json'],
    ['__proto__', '{"skill_name":"x","__proto__":{"a":1}}', 'invalid-json'],
    ['constructor.prototype', '{"skill_name":"x","params":{"constructor":{"prototype":{"a":1}}}}', 'invalid-json'],
    ['not UTF-8', Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d]), 'invalid-json'],
    ['UTF-16', Buffer.from('{"skill_name":"x"}', 'utf16le'), 'invalid-json'],
  ])('a body that is no good: %s', async (_name, body, kind) => {
    isProblem(await post('/tasks', body), 400, kind);
    expect(({} as Record<string, unknown>)['a']).toBeUndefined();
  });

  test.each([
    ['U+0000', '{"skill_name":"x","name":"a\\u0000b"}', 'body.name'],
    ['U+0000 in a key of params', '{"skill_name":"x","params":{"a\\u0000":1}}', 'body.params'],
    ['a lone surrogate', '{"skill_name":"x","name":"\\ud800"}', 'body.name'],
    ['a number out of range', '{"skill_name":"x","params":{"n":1e400}}', 'body.params.n'],
    ['33 levels', `{"skill_name":"x","params":${'{"a":'.repeat(33)}1${'}'.repeat(34)}`, 'body'],
    ['150,000 levels', `{"skill_name":"x","params":{"a":${'['.repeat(150_000)}${']'.repeat(150_000)}}}`, 'body'],
    [
      '1,001 keys',
      JSON.stringify({ skill_name: 'x', params: Object.fromEntries(Array.from({ length: 1_001 }, (_, i) => [i, 1])) }),
      'body',
    ],
    ['an unknown field', '{"skill_name":"x","skil":1}', 'body.skil'],
    ['a list', '[]', 'body'],
    ['null', 'null', 'body'],
    ['nothing', '', 'body'],
  ])('%s is refused, and the place is named', async (_name, body, path) => {
    const answer = await post('/tasks', body);
    isProblem(answer, 400, 'invalid-request');
    expect(answer.body.errors[0].path).toBe(path);
  });

  test('a media type that is not JSON, and a body that is too large', async () => {
    for (const type of [
      'text/plain',
      'application/x-www-form-urlencoded',
      'application/json\ta',
      'text/json',
      'multipart/form-data',
    ]) {
      isProblem(await post('/tasks', '{"skill_name":"x"}', { 'content-type': type }), 415, 'unsupported-media-type');
    }
    // A body that is small as it comes and large as it is meant.
    const bomb = gzipSync(JSON.stringify({ skill_name: 'x', params: { a: 'x'.repeat(10_000_000) } }));
    const zipped = await fetch(`${server.url}/api/v1/tasks`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${server.adminKey}`,
        'content-type': 'application/json',
        'content-encoding': 'gzip',
      },
      body: bomb,
    });
    expect(zipped.status).toBe(415);
    expect(zipped.headers.get('accept-encoding')).toBe('identity');
    isProblem(
      await post('/tasks', JSON.stringify({ skill_name: 'x', params: { a: 'x'.repeat(1_100_000) } })),
      413,
      'body-too-large',
    );
  });

  test('an unknown parameter of a query, one given twice, and ids that are none', async () => {
    for (const path of ['/tasks?lmit=1', '/auth/me?x=1', '/tasks?limit=1&limit=2', '/executions?task_id=']) {
      isProblem(await server.admin('GET', path), 400, 'invalid-request');
    }
    for (const id of [
      '0',
      '-1',
      '1.0',
      '1e3',
      '0x1',
      '%201',
      '١',
      '9007199254740993',
      '9223372036854775808',
      '1%00',
      'NaN',
      `${'9'.repeat(400)}`,
    ]) {
      const { status } = await server.admin('GET', `/executions/${id}`);
      expect([400, 404]).toContain(status);
    }
    expect((await server.admin('GET', '/executions/9007199254740991')).status).toBe(404);
    expect((await server.admin('GET', '/executions/%00')).status).toBe(400);
    expect((await server.admin('GET', '/executions/%E0%A4%A')).status).toBe(400);
  });

  test('a slash at the end makes no difference', async () => {
    expect((await server.admin('GET', '/tasks/')).status).toBe(200);
  });
});

describe('what is no request', () => {
  test.each([
    ['no HTTP', 'hello\r\n\r\n', 400],
    ['two lengths', 'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n', 400],
    ['headers of 40 KiB', `GET / HTTP/1.1\r\nHost: x\r\nX-A: ${'x'.repeat(40_000)}\r\n\r\n`, 431],
  ])('%s is a problem too', async (_name, bytes, status) => {
    const answer = await raw(bytes);
    expect(answer).toMatch(new RegExp(`^HTTP/1\\.1 ${status} `));
    expect(answer).toContain('application/problem+json');
  });
});

describe('headers', () => {
  test('X-Request-ID is taken when it is sane, made otherwise, and answered', async () => {
    const idOf = async (id: string) =>
      (await server.admin('GET', '/auth/me', undefined, { 'x-request-id': id })).headers.get('x-request-id');
    expect(await idOf('my-request:1.2_3')).toBe('my-request:1.2_3');
    for (const bad of ['a b', 'x'.repeat(129), '{"a":1}', '\u001b[31m'.slice(1)])
      expect(await idOf(bad)).toMatch(/^[0-9a-f-]{36}$/);
  });

  test('of safety are there, and no page may frame or script it', async () => {
    const { headers } = await server.admin('GET', '/auth/me');
    expect(headers.get('content-security-policy')).toContain("default-src 'none'");
    expect(headers.get('x-content-type-options')).toBe('nosniff');
    expect(headers.get('x-powered-by')).toBeNull();
  });

  test('of CORS go to origins that were let in, and to no other', async () => {
    const preflight = (origin: string) =>
      fetch(`${server.url}/api/v1/tasks`, {
        method: 'OPTIONS',
        headers: { origin, 'access-control-request-method': 'POST', 'access-control-request-headers': 'authorization' },
      });
    const allowed = await preflight('https://app.example.com');
    expect(allowed.status).toBe(204);
    expect(allowed.headers.get('access-control-allow-origin')).toBe('https://app.example.com');
    expect(allowed.headers.get('access-control-allow-credentials')).toBeNull();
    for (const origin of [
      'https://evil.example.com',
      'https://app.example.com.evil.com',
      'null',
      'http://app.example.com',
    ]) {
      expect((await preflight(origin)).headers.get('access-control-allow-origin')).not.toBe(origin);
    }
    const read = await server.admin('GET', '/auth/me', undefined, { origin: 'https://app.example.com' });
    expect(read.headers.get('access-control-expose-headers')).toContain('X-Event-Cursor');
  });

  test('in the thousands hide nothing: the request is refused or understood, never half read', async () => {
    const empty = Array.from({ length: 1_998 }, (_, i) => `a${i}:\r\n`).join('');
    const answer = await raw(
      `GET /api/v1/auth/me HTTP/1.1\r\nHost: x\r\n${empty}Authorization: Bearer ${server.adminKey}\r\nConnection: close\r\n\r\n`,
    );
    expect(answer).toMatch(/^HTTP\/1\.1 (200|431) /);
  });
});

describe('limits', () => {
  test('calls are counted per user and address, told in headers, and refused beyond', async () => {
    const strict = await startServer({ env: { RATE_LIMIT_PER_MINUTE: '3', RATE_LIMIT_ACTIVITY_PER_MINUTE: '5' } });
    try {
      const answers: Answer[] = [];
      for (let i = 0; i < 4; i++)
        answers.push(await strict.admin('GET', '/auth/me', undefined, { 'x-forwarded-for': `10.0.0.${i}` }));
      expect(answers.map(({ status }) => status)).toEqual([200, 200, 200, 429]);
      expect(answers[0]?.headers.get('ratelimit-limit')).toBe('3');
      expect(answers[0]?.headers.get('x-ratelimit-remaining')).toBe('2');
      const refused = answers[3];
      if (!refused) throw new Error('no answer');
      isProblem(refused, 429, 'rate-limited');
      expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
      // The calls of agents have a limit of their own, and probes none.
      expect((await strict.admin('GET', '/executions')).status).toBe(200);
      for (let i = 0; i < 10; i++) expect((await strict.as(undefined)('GET', '//health/live')).status).toBe(200);
      // Who is not signed in is counted by address, which X-Forwarded-For does not change without a proxy to trust.
      const statuses: number[] = [];
      for (let i = 0; i < 5; i++)
        statuses.push(
          (await strict.as(undefined)('GET', '/nothing', undefined, { 'x-forwarded-for': `10.1.0.${i}` })).status,
        );
      expect(statuses).toEqual([404, 404, 404, 429, 429]);
    } finally {
      await strict.stop();
    }
  });

  test('slow senders are cut', { timeout: 60_000 }, async () => {
    const url = new URL(server.url);
    const cut = (start: string, more: string) =>
      new Promise<string>((done) => {
        const socket = connect(Number(url.port), url.hostname, () => socket.write(start));
        const drip = setInterval(() => socket.write(more), 500);
        let answer = '';
        socket.on('data', (chunk) => {
          answer += chunk;
        });
        socket.on('error', () => {});
        socket.on('close', () => {
          clearInterval(drip);
          done(answer);
        });
      });
    const [headers, body] = await Promise.all([
      cut('GET /health HTTP/1.1\r\nHost: x\r\n', 'X-A: b\r\n'),
      cut(
        `POST /api/v1/auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n`,
        ' ',
      ),
    ]);
    for (const answer of [headers, body]) {
      expect(answer).toMatch(/^HTTP\/1\.1 408 /);
      expect(answer).toContain('urn:muster:problem:timeout');
    }
    expect((await server.admin('GET', '/auth/me')).status).toBe(200);
  });
});

describe('upgrades', () => {
  test.each(['/health', '/api/v1/tasks', '/docs', '/nothing'])('%s is never upgraded', async (path) => {
    const answer = await raw(
      `GET ${path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${server.adminKey}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${Buffer.from(unique('0123456789abcdef')).toString('base64').slice(0, 22)}==\r\n\r\n`,
    );
    expect(answer).toMatch(/^HTTP\/1\.1 4\d\d /);
  });
});

describe('the API document', () => {
  test('is OpenAPI 3.1, has every route, and refers to nothing that is not there', async () => {
    const { body: document } = await server.as(undefined)('GET', '//openapi.json');
    expect(document.openapi).toMatch(/^3\.1\./);
    const text = JSON.stringify(document);
    for (const [, name = ''] of text.matchAll(/"#\/components\/schemas\/([^"]+)"/g)) {
      expect(document.components.schemas).toHaveProperty(name);
    }
    for (const path of [
      '/api/v1/tasks',
      '/api/v1/tasks/{id}/run',
      '/api/v1/agents/{id}/claim',
      '/api/v1/executions/{id}/complete',
      '/api/v1/auth/login',
      '/health',
    ]) {
      expect(document.paths).toHaveProperty([path]);
    }
  });

  test('has a page to try calls from', async () => {
    const page = await server.as(undefined)('GET', '//docs');
    expect(page).toMatchObject({ status: 200, body: expect.stringContaining('swagger-ui') });
    const script = await server.as(undefined)('GET', '//docs/static/swagger-ui-bundle.js');
    expect(script.status).toBe(200);
  });
});

describe('health', () => {
  test('is the same at the root and under the API, for everybody', async () => {
    for (const path of ['//health', '/health']) {
      expect(await server.as(undefined)('GET', path)).toMatchObject({
        status: 200,
        body: { status: 'healthy', database: 'ok', redis: 'disabled', memory_mcp: 'disabled', version: '0.0.0-test' },
      });
    }
    for (const path of ['//health/live', '//health/ready', '/liveness', '/readiness']) {
      expect(await server.as(undefined)('GET', path)).toMatchObject({ status: 200, body: { status: 'ok' } });
    }
  });

  test('while it drains it is not ready, and answers waiting agents at once', async () => {
    const other = await startServer();
    const agent = (await other.admin('POST', '/agents', { name: 'waiting' })).body;
    const poll = other.admin('POST', `/agents/${agent.id}/claim`, { wait_ms: 30_000 });
    // A connection that is open already goes on being answered.
    const kept = new Promise<{ status: number; connection: string | undefined }>((done, failed) => {
      const ask = () =>
        request(`${other.url}/health/ready`, (response) => {
          response.resume();
          if (response.statusCode === 200) response.on('end', () => setTimeout(ask, 20));
          else done({ status: response.statusCode ?? 0, connection: response.headers.connection });
        })
          .on('error', failed)
          .end();
      ask();
    });
    await until(
      async () => (await other.db.query({ text: `select from agents` })).rowCount,
      (count) => count === 1,
    );
    const stopped = other.stop();
    expect(await kept).toEqual({ status: 503, connection: 'close' });
    expect(await poll).toMatchObject({ status: 200, body: { executions: [] } });
    await stopped;
  });
});
