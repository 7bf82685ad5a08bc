import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Answer, type Caller, startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask } from '../support/work.ts';

// What every route keeps to, tried on every route that the API document has: a new one is covered the moment it exists.

interface Parameter {
  name: string;
  in: 'query' | 'path' | 'header';
  schema: { type?: string; enum?: string[]; format?: string };
}
interface Operation {
  method: string;
  /** As the document has it, with `{id}`; and with the id of a thing of the user. */
  pattern: string;
  path: string;
  parameters: Parameter[];
}

const ORIGIN = 'https://app.example.com';
let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let stranger: Awaited<ReturnType<TestServer['newUser']>>;
let operations: Operation[];
let lists: Operation[];
/** The projects of the user; the first holds three tasks, and so does the second. */
let projects: number[];

beforeAll(async () => {
  server = await startServer({ env: { CORS_ORIGINS: ORIGIN } });
  [user, stranger] = [await server.newUser(), await server.newUser()];
  const taskId = await fill(user.call, user.id);
  await fill(stranger.call, stranger.id);
  projects = (await user.call('GET', '/projects?sort_order=asc')).body.projects.map(({ id }: { id: number }) => id);

  const { paths } = (await server.as(undefined)('GET', '//openapi.json')).body as {
    paths: Record<string, Record<string, { parameters?: Parameter[] }>>;
  };
  const ids: Record<string, number | undefined> = { projects: projects[0], tasks: taskId };
  operations = Object.entries(paths).flatMap(([pattern, methods]) =>
    Object.entries(methods).map(([method, { parameters = [] }]) => {
      const [, noun = ''] = /^\/api\/v1\/(\w+)/.exec(pattern) ?? [];
      const path = `/${pattern.replace(/\{\w+\}/g, String(ids[noun] ?? 1))}`;
      return { method: method.toUpperCase(), pattern, path, parameters };
    }),
  );
  lists = operations.filter(({ parameters }) => parameters.some(({ name }) => name === 'cursor'));
});
afterAll(() => server?.stop());

/** Makes three of everything that is listed; answers a task with three runs and three ticks. */
async function fill(call: Caller, userId: number): Promise<number> {
  for (let i = 0; i < 3; i++) {
    await call('POST', '/auth/api-keys', { name: `key ${i}` });
    await makeAgent(call);
    await call('PUT', '/concurrency-limits', { skill_name: `skill-${i}`, max_running: 9 });
    const project = (await call('POST', '/projects', { name: `project ${i}` })).body;
    if (i < 2) for (let n = 0; n < 3; n++) await makeTask(call, { project_id: project.id });
  }
  const task = await makeTask(call);
  for (let i = 0; i < 3; i++) await call('POST', `/tasks/${task.id}/run`);
  await server.db.query({
    text: `insert into occurrences (task_id, user_id, scheduled_for, verdict)
      select $1, $2, now() - n * interval '1 hour', 'skipped_overlap' from generate_series(1, 3) n`,
    values: [task.id, userId],
  });
  await server.db.query({
    text: `insert into orphan_results (execution_id, user_id, lease_token, status)
      select (select min(id) from executions where user_id = $1), $1, gen_random_uuid(), 'success' from generate_series(1, 3)`,
    values: [userId],
  });
  return task.id;
}

const named = ({ method, pattern }: Operation) => `${method} ${pattern}`;
const withQuery = (path: string, query: Record<string, string | number>) =>
  `${path}?${Object.entries(query)
    .map(([name, value]) => `${name}=${encodeURIComponent(value)}`)
    .join('&')}`;
const get = (list: Operation, query: Record<string, string | number>, call = user.call) =>
  call('GET', withQuery(list.path, query));
/** The things of a page: the one list in it. */
const thingsOf = ({ body }: Answer) =>
  Object.values(body as Record<string, unknown>).find((value) => Array.isArray(value)) as { id: number }[];
const cursorOf = async (list: Operation, query: Record<string, string | number> = {}) => {
  const { status, body } = await get(list, { limit: 1, ...query });
  expect(status, named(list)).toBe(200);
  expect(body.next_cursor, `${named(list)} has too few to page through`).toEqual(expect.any(String));
  return body.next_cursor as string;
};
const refuses = (answer: Answer, path: string, what: string) => {
  expect(answer.status, what).toBe(400);
  expect(
    answer.body.errors?.map((error: { path: string }) => error.path),
    what,
  ).toContain(path);
};

/** Some value that a parameter takes. */
function sample({ schema, name }: Parameter): string {
  if (schema.enum) return schema.enum.at(-1) ?? '';
  if (schema.format === 'date-time') return '2026-01-01T00:00:00Z';
  if (schema.type === 'integer') return name === 'user_id' ? String(user.id) : '1';
  return schema.type === 'boolean' ? 'true' : 'x';
}

test('the document has routes and lists to try', () => {
  expect(operations.length).toBeGreaterThan(40);
  expect(lists.map(({ pattern }) => pattern)).toEqual(
    expect.arrayContaining([
      '/api/v1/tasks',
      '/api/v1/projects',
      '/api/v1/agents',
      '/api/v1/executions',
      '/api/v1/audit',
    ]),
  );
});

describe('every list', () => {
  test('is walked by its cursor, each thing once, and as many as total says', async () => {
    for (const list of lists) {
      const seen: number[] = [];
      let total: number | undefined;
      for (let cursor: string | null | undefined; cursor !== null; ) {
        const answer = await get(list, { limit: 2, ...(cursor === undefined ? {} : { cursor }) });
        expect(answer.status, named(list)).toBe(200);
        // What is read is not audited: nothing is added on the way.
        total ??= answer.body.total;
        expect(answer.body.total, named(list)).toBe(total);
        expect(answer.body.has_more, named(list)).toBe(answer.body.next_cursor !== null);
        seen.push(...thingsOf(answer).map(({ id }) => id));
        cursor = answer.body.next_cursor;
      }
      expect(seen.length, named(list)).toBe(total);
      expect(new Set(seen).size, named(list)).toBe(total);
      expect(total, named(list)).toBeGreaterThan(2);
    }
  });

  test('refuses a cursor of another query, and takes it with another limit or without a total', async () => {
    for (const list of lists) {
      const cursor = await cursorOf(list);
      for (const parameter of list.parameters) {
        const { name, in: place } = parameter;
        if (place !== 'query' || ['cursor', 'offset', 'limit', 'total', 'sort_by', 'sort_order'].includes(name))
          continue;
        refuses(await get(list, { cursor, [name]: sample(parameter) }), 'query.cursor', `${named(list)} with ${name}`);
      }
      expect((await get(list, { cursor, limit: 3 })).status, named(list)).toBe(200);
      expect((await get(list, { cursor, total: 'false' })).body.total, named(list)).toBe(null);
    }
  });

  test('refuses a cursor of another order', async () => {
    for (const list of lists) {
      for (const name of ['sort_by', 'sort_order']) {
        const values = list.parameters.find((parameter) => parameter.name === name)?.schema.enum ?? [];
        for (const value of values) {
          const cursor = await cursorOf(list, { [name]: value });
          for (const other of values) {
            const answer = await get(list, { cursor, [name]: other });
            const what = `${named(list)} from ${value} to ${other}`;
            // `-created_at` is another word for the same order.
            if (other.replace('-', '') === value.replace('-', '')) expect([200, 400], what).toContain(answer.status);
            else refuses(answer, 'query.cursor', what);
            if (other === value) expect(answer.status, what).toBe(200);
          }
        }
      }
    }
  });

  test('refuses a cursor of another user', async () => {
    for (const list of lists) {
      const cursor = await cursorOf(list);
      const theirs = await get(list, { cursor }, stranger.call);
      const admins = await get(list, { cursor }, server.admin);
      if (list.pattern.includes('{')) {
        // The list of one thing: who may not see the thing gets none of it, and who may sees what its owner sees.
        expect(theirs.status, named(list)).toBe(403);
        expect(thingsOf(admins), named(list)).toEqual(thingsOf(await get(list, { cursor })));
      } else {
        refuses(theirs, 'query.cursor', `${named(list)} by a stranger`);
        refuses(admins, 'query.cursor', `${named(list)} by an admin`);
      }
    }
  });

  test('refuses cursors of other lists, made-up ones, and one together with an offset', async () => {
    const cursors = await Promise.all(lists.map((list) => cursorOf(list)));
    const made = (value: unknown) => Buffer.from(JSON.stringify(value)).toString('base64url');
    for (const [i, list] of lists.entries()) {
      const own = cursors[i] ?? '';
      const [scope, key] = JSON.parse(Buffer.from(own, 'base64url').toString()) as [string, string, number];
      for (const cursor of [
        ...cursors.filter((cursor) => cursor !== own),
        '',
        'x',
        '../../etc/passwd',
        "' or 1=1 --",
        own.slice(1),
        'x'.repeat(513),
        ...[null, 1, {}, [], [scope], [scope, key], [scope, key, '1'], [scope, key, 0], [scope, key, 2 ** 53]].map(
          made,
        ),
        ...[
          [scope, key, 1, 1],
          [scope, 'now()', 1],
          [scope, '', 1],
          [scope, "2026-01-01' or '1", 1],
        ].map(made),
      ]) {
        refuses(await get(list, { cursor }), 'query.cursor', `${named(list)} with ${cursor}`);
      }
      refuses(await get(list, { cursor: own, offset: 0 }), 'query.cursor', `${named(list)} with an offset`);
    }
  });

  test('leaves the total out when told to, and is the same otherwise', async () => {
    for (const list of lists) {
      const { body } = await get(list, { limit: 1 });
      expect(await get(list, { limit: 1, total: 'false' }), named(list)).toMatchObject({
        status: 200,
        body: { ...body, total: null },
      });
      for (const bad of ['0', 'no', 'FALSE', '']) refuses(await get(list, { total: bad }), 'query.total', named(list));
    }
  });

  test('refuses limits and offsets that are none', async () => {
    for (const list of lists) {
      for (const name of ['limit', 'offset']) {
        for (const bad of ['-1', '1.5', '1e1', '0x1', ' 1', '', 'NaN', '9007199254740993', '1001000']) {
          refuses(await get(list, { [name]: bad }), `query.${name}`, `${named(list)} with ${name}=${bad}`);
        }
      }
      refuses(await get(list, { limit: 0 }), 'query.limit', named(list));
    }
  });
});

test('the tasks of a project refuse a cursor of another project', async () => {
  const [one, other] = projects;
  const { body } = await user.call('GET', `/projects/${one}?tasks_limit=1`);
  const cursor = body.tasks_next_cursor ?? body.tasks?.next_cursor;
  expect(cursor).toEqual(expect.any(String));
  expect((await user.call('GET', `/projects/${one}?tasks_limit=1&tasks_cursor=${cursor}`)).status).toBe(200);
  expect((await user.call('GET', `/projects/${other}?tasks_limit=1&tasks_cursor=${cursor}`)).status).toBe(400);
  expect((await user.call('GET', `/projects/${one}?tasks_cursor=nonsense`)).status).toBe(400);
});

describe('every route', () => {
  test('refuses a field that it does not know, in the query and in the body', async () => {
    for (const operation of operations) {
      const { method, path } = operation;
      const query = await server.admin(method, `${path}?no_such_field=1`, method === 'GET' ? undefined : {});
      if (method === 'GET') refuses(query, 'query.no_such_field', named(operation));
      else expect(query.status, named(operation)).toBe(400);
      if (method === 'GET') continue;
      refuses(await server.admin(method, path, { no_such_field: 1 }), 'body.no_such_field', named(operation));
    }
  });

  test('sends back the id that it was given, in a header and in problems, or makes one', async () => {
    for (const [i, operation] of operations.entries()) {
      const { method, path } = operation;
      const id = `conventions:${i}.a_b-c`;
      const answer = await server.as('garbage')(method, `${path}?no_such_field=1`, undefined, { 'x-request-id': id });
      expect([400, 401], named(operation)).toContain(answer.status);
      expect(answer.headers.get('x-request-id'), named(operation)).toBe(id);
      expect(answer.body.request_id, named(operation)).toBe(id);
      const unsafe = await server.as('garbage')(method, path, undefined, { 'x-request-id': 'a b' });
      expect(unsafe.headers.get('x-request-id'), named(operation)).toMatch(/^[0-9a-f-]{36}$/);
    }
  });

  test('can be called by a page of an origin that was let in, with every header it may need', async () => {
    const needed = ['authorization', 'content-type', 'idempotency-key', 'if-match', 'x-request-id'];
    for (const operation of operations) {
      const preflight = (origin: string) =>
        fetch(`${server.url}${operation.path.slice(1)}`, {
          method: 'OPTIONS',
          headers: {
            origin,
            'access-control-request-method': operation.method,
            'access-control-request-headers': needed.join(', '),
          },
        });
      const { status, headers } = await preflight(ORIGIN);
      expect(status, named(operation)).toBe(204);
      expect(headers.get('access-control-allow-origin'), named(operation)).toBe(ORIGIN);
      expect(headers.get('access-control-allow-methods'), named(operation)).toContain(operation.method);
      const allowed = headers.get('access-control-allow-headers')?.toLowerCase().split(/, */);
      expect(allowed, named(operation)).toEqual(expect.arrayContaining(needed));
      expect(headers.get('vary'), named(operation)).toMatch(/origin/i);
      const other = await preflight('https://evil.example.com');
      expect(other.headers.get('access-control-allow-origin'), named(operation)).not.toBe('https://evil.example.com');
    }
  });
});

test('nested fields that are not known are refused too', async () => {
  const lease_token = '00000000-0000-4000-8000-000000000000';
  refuses(
    await user.call('POST', '/tasks/bulk', { action: 'pause', filter: { skill_nam: 'x' } }),
    'body.filter.skill_nam',
    'bulk',
  );
  refuses(
    await user.call('POST', '/executions/1/heartbeat', { lease_token, progress: { percent: 1, mesage: 'x' } }),
    'body.progress.mesage',
    'heartbeat',
  );
});

test('a body is not needed where none is declared, and an empty one does no harm', async () => {
  const task = await makeTask(user.call);
  for (const body of [undefined, {}]) {
    expect((await user.call('POST', `/tasks/${task.id}/pause`, body)).status).toBe(200);
    expect((await user.call('POST', `/tasks/${task.id}/resume`, body)).status).toBe(200);
  }
  for (const body of [[], 'null', '"x"', '1']) {
    expect((await user.call('POST', `/tasks/${task.id}/resume`, body)).status).toBe(400);
  }
  // A path that leads nowhere is told as such, whatever is sent there.
  expect((await user.call('POST', '/nothing', { a: 1 })).status).toBe(404);
});

test('the request id is kept with what the call changed', async () => {
  const { body: task } = await user.call('POST', '/tasks', { skill_name: 'x' }, { 'x-request-id': 'mine-1' });
  const { body } = await user.call('GET', `/audit?entity_type=task&entity_id=${task.id}`);
  expect(body.entries).toMatchObject([{ operation: 'CREATE', request_id: 'mine-1' }]);
});

test('a page may read every header that an answer has for it, also of answers that refuse', async () => {
  const [task] = (await user.call('GET', '/tasks')).body.tasks;
  for (const path of [`/tasks/${task.id}`, '/tasks/999999', '/tasks?x=1', '/nothing']) {
    const { headers } = await user.call('GET', path, undefined, { origin: ORIGIN });
    const exposed = headers.get('access-control-expose-headers')?.toLowerCase().split(/, */);
    expect(exposed, path).toEqual(
      expect.arrayContaining([
        'etag',
        'idempotency-replayed',
        'location',
        'retry-after',
        'x-event-cursor',
        'x-request-id',
        ...['limit', 'remaining', 'reset'].flatMap((name) => [`ratelimit-${name}`, `x-ratelimit-${name}`]),
      ]),
    );
  }
});
