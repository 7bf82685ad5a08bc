import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type ApiDocument, type JsonSchema, type Operation, readApiDocument } from '../support/api-document.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask } from '../support/work.ts';

// What nobody should send, sent to every field, parameter and header of every call that the API document has. Never a 5xx,
// never silence, never half a change, and every answer is what the document says of it.

/** What takes longer each of three times hangs; once, the machine may have been busy. Answers take milliseconds. */
const HANG_MS = 1_000;

let server: TestServer;
let api: ApiDocument;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let ids: Record<string, number>;
/** A server that nobody may be made to call (SSRF); its address is among the values of every field. */
let canary: Server;
let canaryCalls = 0;
const failures: string[] = [];
const listen = (error: unknown) => failures.push(String(error));

beforeAll(async () => {
  process.on('unhandledRejection', listen);
  server = await startServer();
  api = await readApiDocument(server);
  canary = createServer(() => {
    canaryCalls += 1;
  }).listen(0, '127.0.0.1');
  canary.on('connection', () => {
    canaryCalls += 1;
  });
  await once(canary, 'listening');
  const { port } = canary.address() as AddressInfo;
  for (const scheme of ['http', 'https', 'gopher', 'ws', 'postgres', 'redis'])
    TEXTS.push(`${scheme}://127.0.0.1:${port}/x`);
  user = await server.newUser();
  const project = (await user.call('POST', '/projects', { name: 'p' })).body;
  const agent = await makeAgent(user.call);
  const task = await makeTask(user.call, { schedule_cron: '0 0 1 1 *' });
  const run = (await user.call('POST', `/tasks/${task.id}/run`)).body;
  const { rows: orphans } = await server.db.query<{ id: number }>({
    text: `insert into orphan_results (execution_id, user_id, lease_token, status)
      values ($1, $2, gen_random_uuid(), 'success') returning id`,
    values: [run.id, user.id],
  });
  const limit = (await user.call('PUT', '/concurrency-limits', { max_running: 9 })).body;
  ids = {
    'concurrency-limits': limit.id,
    projects: project.id,
    agents: agent.id,
    tasks: task.id,
    executions: run.id,
    'orphan-results': orphans[0]?.id ?? 0,
  };
});
afterAll(async () => {
  process.off('unhandledRejection', listen);
  canary.close();
  await server?.stop();
});

const deep = (levels: number) => JSON.parse(`${'{"a":'.repeat(levels)}1${'}'.repeat(levels)}`) as unknown;

/** Values for any field; as JSON text where JSON.stringify could not say it. */
const TEXTS = [
  '',
  '\0',
  'a\0b',
  '\ud800',
  '\udc00\ud800',
  '\u202e',
  '\ufeff',
  '\u2028',
  '\u{10ffff}',
  'İßK',
  `e${'\u0301'.repeat(300)}`,
  '%00',
  '%2e%2e/',
  'a\r\nSet-Cookie: x=1',
  '\u001b[31m',
  `'; drop table tasks; --`,
  '$1',
  '%',
  '_',
  '\\',
  '{{7*7}}',
  '__proto__',
  'constructor',
  'toString',
  'NaN',
  '-0',
  '1e309',
  '2147483648',
  '9007199254740993',
  '9223372036854775808',
  '9'.repeat(400),
  'x'.repeat(256),
  'Mars/X',
  `UTC'; drop`,
  'z'.repeat(10_240),
  '0000-01-01T00:00:00Z',
  '-000001-01-01T00:00:00Z',
  '10000-01-01T00:00:00Z',
  '2026-11-23T24:00:00Z',
  '2026-06-30T23:59:60Z',
  '2026-11-23T00:00:00+99:99',
  'infinity',
  'H * * * *',
  '?',
  '60 * * * *',
  '*/0 * * * *',
  '* * * * 8',
  '* '.repeat(513),
  '٠ ٠ * * *',
  '0 0 30 2 *',
  '0 0 * 2 1#5',
  `${'*,'.repeat(200)}* * * * *`,
  `${'a'.repeat(40)}!`,
  'file:///etc/passwd',
  'http://169.254.169.254/',
];
const RAW = [
  '1e400',
  '-1e400',
  '1e309',
  '-0',
  '0',
  '-1',
  '1.5',
  '2147483648',
  '9007199254740991',
  '9007199254740993',
  '9223372036854775808',
  'true',
  'null',
  '[]',
  '{}',
  '[[[[1]]]]',
  '{"__proto__":{"admin":true}}',
  '{"constructor":{"prototype":{"admin":true}}}',
  JSON.stringify(deep(40)),
  `[${'1,'.repeat(2_000)}1]`,
  `{${Array.from({ length: 1_100 }, (_, i) => `"k${i}":1`).join(',')}}`,
];
/** Whole bodies. */
const BODIES = [
  '',
  ' ',
  'null',
  '[]',
  '1',
  '"text"',
  '{',
  '{"a":1,}',
  '[[[[',
  '\ufeff{}',
  '{"a":1}garbage',
  `${'['.repeat(100_000)}`,
  JSON.stringify({ a: deep(33) }),
  `{"a":"${'x'.repeat(2_000_000)}"}`,
  '{"skill_name":"a","skill_name":"b"}',
  '{"name":"\\ud800"}',
  '{"__proto__":{"isAdmin":true}}',
  '{"\\u005f_proto__":{"isAdmin":true}}',
];

interface Sent {
  status: number;
  contentType: string;
  body: unknown;
}

/** Sends raw bytes, since clients refuse to send much of this; undefined where it cannot be sent as HTTP at all. */
async function send(
  operation: Operation,
  path: string,
  body?: string | undefined,
  headers: Record<string, string> = {},
): Promise<Sent | undefined> {
  let answer: Response | undefined;
  for (let tries = 1; answer === undefined; tries++) {
    try {
      answer = await fetch(`${server.url}${path}`, {
        method: operation.method,
        headers: {
          authorization: `Bearer ${user.token}`,
          ...(body === undefined ? {} : { 'content-type': 'application/json' }),
          ...headers,
        },
        ...(body === undefined ? {} : { body }),
        signal: AbortSignal.timeout(HANG_MS),
      });
    } catch (error) {
      if (error instanceof TypeError && /header|Invalid URL|parse/i.test(String(error.cause ?? error)))
        return undefined;
      if ((error as Error).name === 'TimeoutError' && tries < 3) continue;
      throw new Error(`${operation.method} ${path.slice(0, 200)} ${(body ?? '').slice(0, 200)}: ${String(error)}`);
    }
  }
  const text = await answer.text();
  const contentType = answer.headers.get('content-type') ?? '';
  const sent = { status: answer.status, contentType, body: /json/.test(contentType) ? JSON.parse(text) : text };
  judge(operation, sent, `${path.slice(0, 300)} ${(body ?? '').slice(0, 300)}`);
  return sent;
}

/** What must hold of every answer. */
function judge(operation: Operation, { status, contentType, body }: Sent, sent: string): void {
  const about = `${operation.operationId} ${sent} → ${status} ${JSON.stringify(body).slice(0, 400)}`;
  expect(status, about).toBeLessThan(500);
  if (status === 204) return;
  const content = operation.answers[status] ?? (status >= 400 ? operation.answers['default'] : undefined);
  expect(content, about).toBeDefined();
  expect(contentType, about).toMatch(status >= 400 ? /^application\/problem\+json/ : /^application\/json/);
  const validate = api.validator(content?.schema ?? {});
  expect(validate(body), `${about} ${JSON.stringify(validate.errors)}`).toBe(true);
}

const pathOf = ({ path }: Operation) =>
  path.replace(/\/([\w-]+)\/\{id\}/, (_match, noun: string) => `/${noun}/${ids[noun] ?? 1}`);
/** Calls that would take the ground from under the others, or cost a password hash each. */
const tame = ({ method, path }: Operation) =>
  method !== 'DELETE' && !/\/auth\/(register|login)|\/(archive|drain)$/.test(path);

/** How many rows there are of what calls make; ticks and lost leases make runs meanwhile. */
async function counts(): Promise<unknown> {
  const { rows } = await server.db.query({
    text: `select (select count(*) from users) as users, (select count(*) from projects) as projects,
      (select count(*) from tasks) as tasks, (select count(*) from agents) as agents, (select count(*) from api_keys) as keys,
      (select count(*) from executions where trigger not in ('schedule', 'retry')) as runs`,
  });
  return rows[0];
}

const texts = (schema: JsonSchema) => Object.entries(schema.properties ?? {});
/** A body as JSON text with one field given as it stands. */
const bodyWith = (base: Record<string, unknown>, field: string, raw: string) =>
  `{${[
    ...Object.entries(base)
      .filter(([name]) => name !== field)
      .map(([name, value]) => `${JSON.stringify(name)}:${JSON.stringify(value)}`),
    `${JSON.stringify(field)}:${raw}`,
  ].join(',')}}`;
const exampleOf = ({ body }: Operation) =>
  (body?.example ?? Object.values(body?.examples ?? {})[0]?.value ?? {}) as Record<string, unknown>;

// As many calls as there are fields, values and parameters take minutes on a busy machine.
describe('poison', { timeout: 300_000 }, () => {
  test('in each field of each body', async () => {
    for (const operation of api.operations.filter(({ body }) => body).filter(tame)) {
      const base = exampleOf(operation);
      for (const [field] of texts(operation.body?.schema ?? {})) {
        for (const raw of [...TEXTS.map((text) => JSON.stringify(text)), ...RAW]) {
          const answer = await send(operation, pathOf(operation), bodyWith(base, field, raw));
          if (answer?.status !== 400) continue;
          const { errors, type } = answer.body as { errors?: { path: string }[]; type: string };
          if (type.endsWith('invalid-request') && errors) expect(errors[0]?.path).toMatch(/^body/);
        }
      }
    }
  });

  test('as a whole body, with any media type; what is refused leaves nothing behind', async () => {
    for (const operation of api.operations.filter(({ method }) => method === 'POST' || method === 'PUT')) {
      const before = await counts();
      let taken = 0;
      for (const body of BODIES) {
        const answer = await send(operation, pathOf(operation), body);
        if (answer && answer.status < 400) taken += 1;
      }
      for (const type of [
        'text/plain',
        'application/xml',
        'application/json; charset=utf-16',
        'application/x-www-form-urlencoded',
      ]) {
        const answer = await send(operation, pathOf(operation), '{"a":1}', { 'content-type': type });
        expect(answer?.status, `${operation.operationId} ${type}`).toBeGreaterThanOrEqual(400);
      }
      if (taken === 0) expect(await counts(), operation.operationId).toEqual(before);
    }
    expect(({} as Record<string, unknown>)['isAdmin']).toBeUndefined();
    expect(({} as Record<string, unknown>)['admin']).toBeUndefined();
  });

  test('in each parameter of each path and query', async () => {
    const values = [...TEXTS, ...RAW.slice(0, 12), '1,2', ' 1', '0x1', '١', '1e3', '1e20'].map((value) =>
      encodeURIComponent(value.toWellFormed()),
    );
    for (const operation of api.operations) {
      for (const { name, in: place } of operation.parameters) {
        for (const value of [...values, '%00', '%ff%fe', '%ED%A0%80']) {
          if (value.length > 8_000) continue; // Longer than a request line may be; that is edge.test.ts's.
          if (place === 'query') await send(operation, `${pathOf(operation)}?${name}=${value}`, operation.body && '{}');
          if (place === 'path' && operation.method === 'GET') {
            await send(operation, operation.path.replace(`{${name}}`, value || '%20'));
          }
        }
        if (place === 'query')
          await send(operation, `${pathOf(operation)}?${name}=1&${name}=2`, operation.body && '{}');
      }
    }
  });

  test('in headers', async () => {
    const [create] = api.operations.filter(({ operationId }) => operationId === 'postTasks');
    if (!create) throw new Error('There is no postTasks.');
    for (const name of [
      'if-match',
      'idempotency-key',
      'x-request-id',
      'user-agent',
      'x-forwarded-for',
      'accept',
      'accept-encoding',
      'origin',
    ]) {
      for (const text of TEXTS) {
        const value = Buffer.from(text.toWellFormed()).toString('latin1').slice(0, 4_000);
        await send(create, '/api/v1/tasks', '{"skill_name":"x"}', { [name]: value });
      }
    }
  });

  test('in what was never HTTP: the connection is answered or closed, and the server lives', async () => {
    const { port } = new URL(server.url);
    for (const bytes of [
      'GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n',
      'GET /\u0001 HTTP/1.1\r\nHost: x\r\n\r\n',
      'POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n',
      'POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n',
      `GET /${'a'.repeat(20_000)} HTTP/1.1\r\nHost: x\r\n\r\n`,
      `GET / HTTP/1.1\r\nHost: x\r\n${'X: y\r\n'.repeat(3_000)}\r\n`,
      'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    ]) {
      const socket = connect(Number(port), '127.0.0.1');
      socket.on('error', () => {});
      socket.end(bytes);
      socket.resume();
      await once(socket, 'close');
    }
    expect((await fetch(`${server.url}/health/live`)).status).toBe(200);
  });
});

describe('fuzz', { timeout: 300_000 }, () => {
  const poison = fc.oneof(
    fc.constantFrom(...TEXTS),
    fc.string({ unit: 'binary', maxLength: 40 }),
    fc.jsonValue(),
    fc.constantFrom(0, -1, 2 ** 31, 2 ** 53 + 2, 1.5, -0),
  );

  /** What a schema takes, mostly. */
  function arbitrary(schema: JsonSchema, depth = 0): fc.Arbitrary<unknown> {
    if (schema.enum) return fc.constantFrom(...schema.enum);
    if (schema.anyOf) return fc.oneof(...schema.anyOf.map((one) => arbitrary(one, depth)));
    if (schema.$ref !== undefined || depth > 4) return fc.jsonValue({ maxDepth: 2 });
    const [type] = [schema.type].flat();
    switch (type) {
      case 'integer':
        return fc.integer({ min: schema.minimum ?? 0, max: Math.min(schema.maximum ?? 1_000, 1_000_000) });
      case 'number':
        return fc.double({ min: schema.minimum ?? 0, max: schema.maximum ?? 100, noNaN: true });
      case 'boolean':
        return fc.boolean();
      case 'string':
        return schema.format === 'date-time'
          ? fc
              .date({ min: new Date('2027-01-01'), max: new Date('2099-01-01'), noInvalidDate: true })
              .map((date) => date.toISOString())
          : fc.oneof(
              fc.stringMatching(/^[a-z]{1,12}$/),
              fc.constantFrom('0 9 * * *', 'Europe/Rome', '@daily', 'report'),
            );
      case 'array':
        return fc.array(arbitrary(schema.items ?? {}, depth + 1), { minLength: schema.minItems ?? 0, maxLength: 4 });
      case 'object': {
        const fields = Object.fromEntries(
          Object.entries(schema.properties ?? {}).map(([name, value]) => [name, arbitrary(value, depth + 1)]),
        );
        if (Object.keys(fields).length === 0)
          return fc.dictionary(fc.string({ maxLength: 8 }), fc.jsonValue({ maxDepth: 2 }), { maxKeys: 4 });
        return fc.record(fields, { requiredKeys: schema.required ?? [] });
      }
      default:
        return fc.jsonValue({ maxDepth: 2 });
    }
  }

  test('bodies of every call: as the document wants them, with a field poisoned, and with one too many', async () => {
    for (const operation of api.operations.filter(({ body }) => body).filter(tame)) {
      const { schema } = operation.body ?? { schema: {} };
      const fields = Object.keys(schema.properties ?? {});
      const valid = arbitrary(schema) as fc.Arbitrary<Record<string, unknown>>;
      const bodies = fc.oneof(
        valid,
        fc
          .tuple(valid, fc.constantFrom(...fields), poison)
          .map(([body, field, value]) => ({ ...body, [field]: value })),
        fc.tuple(valid, fc.string(), poison).map(([body, field, value]) => ({ ...body, [field]: value })),
      );
      await fc.assert(
        fc.asyncProperty(bodies, async (body) => {
          // A long poll is meant to take its time.
          const quick = 'wait_ms' in (schema.properties ?? {}) ? { ...body, wait_ms: 0 } : body;
          await send(operation, pathOf(operation), JSON.stringify(quick));
        }),
        { numRuns: 40 },
      );
    }
  });

  test('queries of every list', async () => {
    for (const operation of api.operations.filter(({ method }) => method === 'GET')) {
      const parameters = operation.parameters.filter((parameter) => parameter.in === 'query');
      if (parameters.length === 0) continue;
      const query = fc.record(
        Object.fromEntries(
          parameters.map(({ name, schema }) => [name, fc.oneof(arbitrary(schema), arbitrary(schema), poison)]),
        ),
        { requiredKeys: [] },
      );
      await fc.assert(
        fc.asyncProperty(query, async (values) => {
          const text = Object.entries(values)
            .map(
              ([name, value]) =>
                `${name}=${encodeURIComponent((typeof value === 'string' ? value : JSON.stringify(value)).toWellFormed())}`,
            )
            .join('&');
          // An export is no JSON and has tests of its own; what is too long for a request line too.
          if (text.length > 8_000 || text.includes('format=ndjson')) return;
          await send(operation, `${pathOf(operation)}?${text}`);
        }),
        { numRuns: 40 },
      );
    }
  });
});

test('what was deleted is gone for every call', async () => {
  const project = (await user.call('POST', '/projects', { name: 'gone' })).body;
  const task = await makeTask(user.call);
  const agent = await makeAgent(user.call);
  for (const path of [`/projects/${project.id}`, `/tasks/${task.id}`, `/agents/${agent.id}`]) {
    expect((await user.call('DELETE', path)).status).toBeLessThan(300);
  }
  const gone: Record<string, number> = { projects: project.id, tasks: task.id, agents: agent.id };
  for (const operation of api.operations) {
    const [, noun = ''] = /^\/api\/v1\/(\w+)\/\{id\}/.exec(operation.path) ?? [];
    const id = gone[noun];
    if (id === undefined) continue;
    const example = operation.body && JSON.stringify(exampleOf(operation));
    const answer = await send(operation, operation.path.replace('{id}', String(id)), example);
    expect(answer?.status, operation.operationId).toBe(404);
  }
});

test('no address that was sent was called', () => {
  expect(canaryCalls).toBe(0);
});

test('nothing was left unhandled', () => {
  expect(failures).toEqual([]);
});
