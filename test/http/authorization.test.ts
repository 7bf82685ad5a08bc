import { createHmac, randomBytes, randomUUID } from 'node:crypto';
import { fastify } from 'fastify';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Access, requireAccessRules } from '../../src/http/access.ts';
import { openSocket, openStream } from '../realtime/support.ts';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, until } from '../support/work.ts';

// Nobody reads or changes what is not theirs: tried on every route that the server registered, by the rule that the route
// itself declares. A route that is added is tried the moment it exists; one whose path names a thing that the victim does
// not have here fails until the victim has one.

interface Schema {
  type?: string | string[];
  enum?: unknown[];
  format?: string;
  minimum?: number;
  minItems?: number;
  items?: Schema;
  anyOf?: Schema[];
  properties?: Record<string, Schema>;
  required?: string[];
}
interface Route {
  method: string;
  url: string;
  access: Access;
  parameters: { name: string; in: string }[];
  body: Schema | undefined;
  documented: boolean;
}

/** In the victim's names, params and outputs: whoever else is answered with it has seen what is not theirs. */
const CANARY = `canary-${randomBytes(6).toString('hex')}`;

let server: TestServer;
let victim: Awaited<ReturnType<TestServer['newUser']>>;
let stranger: Awaited<ReturnType<TestServer['newUser']>>;
let routes: Route[];
/** Ids of the victim's things: by the first part of a path, and by the name of a field. */
let byNoun: Record<string, number>;
let byField: Record<string, number>;

beforeAll(async () => {
  server = await startServer();
  [victim, stranger] = [await server.newUser(), await server.newUser()];
  const { call } = victim;
  const project = (await call('POST', '/projects', { name: CANARY, description: CANARY })).body;
  const agent = await makeAgent(call, { name: CANARY, capabilities: [CANARY] });
  const task = await makeTask(call, {
    name: CANARY,
    skill_name: CANARY,
    params: { secret: CANARY },
    project_id: project.id,
    schedule_cron: '0 0 1 1 *',
  });
  for (let i = 0; i < 2; i++) await call('POST', `/tasks/${task.id}/run`);
  const run = await agent.claimOne([CANARY]);
  await call('POST', `/executions/${run.execution_id}/heartbeat`, {
    lease_token: run.lease_token,
    progress: { message: CANARY },
  });
  const report = { agent_id: agent.id, task_id: task.id, status: 'failed', output: CANARY, error: CANARY };
  await call('POST', '/agents/activity', report);
  const key = (await call('POST', '/auth/api-keys', { name: CANARY })).body;
  await server.db.query({
    text: `insert into occurrences (task_id, user_id, scheduled_for, verdict) values ($1, $2, now() - interval '1 day', 'fired')`,
    values: [task.id, victim.id],
  });
  await call('POST', `/executions/${run.execution_id}/output`, { lease_token: run.lease_token, text: CANARY });
  const { rows: orphans } = await server.db.query<{ id: number }>({
    text: `insert into orphan_results (execution_id, user_id, lease_token, status, output_text, error_text)
      values ($1, $2, gen_random_uuid(), 'success', $3, $3) returning id`,
    values: [run.execution_id, victim.id, CANARY],
  });
  const limit = (await call('PUT', '/concurrency-limits', { skill_name: CANARY, max_running: 9 })).body;
  byNoun = {
    projects: project.id,
    tasks: task.id,
    agents: agent.id,
    executions: run.execution_id,
    'api-keys': key.id,
    'orphan-results': orphans[0]?.id ?? 0,
    'concurrency-limits': limit.id,
  };
  byField = {
    project_id: project.id,
    task_id: task.id,
    agent_id: agent.id,
    execution_id: run.execution_id,
    user_id: victim.id,
    entity_id: task.id,
    ids: task.id,
  };
  const { paths } = (await server.as(undefined)('GET', '//openapi.json')).body;
  routes = server.app.declaredRoutes
    // Fastify adds a HEAD to each GET, which is the same route without its body.
    .filter(({ method }) => method !== 'HEAD')
    .map((route) => {
      const documented = paths[route.url.replace(/:(\w+)/g, '{$1}')]?.[route.method.toLowerCase()];
      return {
        ...route,
        documented: documented !== undefined,
        parameters: documented?.parameters ?? [],
        body: documented?.requestBody?.content['application/json'].schema,
      };
    });
});
afterAll(() => server?.stop());

/** The path of a route about the victim's thing, under the root. */
function pathOf({ url }: Pick<Route, 'url'>): string {
  return `/${url.replace(/\/([\w-]+)\/:id/, (_match, noun: string) => {
    const id = byNoun[noun];
    if (id === undefined) throw new Error(`${url}: give the victim one of ${noun}.`);
    return `/${noun}/${id}`;
  })}`;
}

/** The least that a schema takes, with the victim's ids wherever a field names one. */
function sample(schema: Schema, field = ''): unknown {
  const known = byField[field];
  const [type] = [schema.type ?? schema.anyOf?.[0]?.type ?? 'object'].flat();
  if (type === 'array') {
    return known !== undefined
      ? [known]
      : Array.from({ length: schema.minItems ?? 0 }, () => sample(schema.items ?? {}));
  }
  if (known !== undefined) return known;
  if (schema.enum) return schema.enum[0];
  if (type === 'integer' || type === 'number') return schema.minimum ?? 1;
  if (type === 'boolean') return false;
  if (type === 'string') {
    if (schema.format === 'uuid') return randomUUID();
    if (schema.format === 'date-time') return '2099-01-01T00:00:00Z';
    return field === 'schedule_cron' ? '0 0 1 1 *' : 'x';
  }
  const { properties = {}, required = [] } = schema;
  return Object.fromEntries(required.map((name) => [name, sample(properties[name] ?? {}, name)]));
}

/** Bodies for a route: the least, and for each field that names a thing, the least with the victim's. */
function bodiesOf({ body }: Route): (Record<string, unknown> | undefined)[] {
  if (!body) return [undefined];
  const least = sample(body) as Record<string, unknown>;
  const references = Object.keys(body.properties ?? {}).filter((name) => name in byField && !(name in least));
  const fields = Object.entries(body.properties ?? {}).filter(
    ([name]) => !(name in least) && !references.includes(name),
  );
  return [
    least,
    ...references.map((name) => ({ ...least, [name]: sample(body.properties?.[name] ?? {}, name) })),
    // Some bodies need any one field.
    ...(Object.keys(least).length === 0 && fields[0] ? [{ [fields[0][0]]: sample(fields[0][1], fields[0][0]) }] : []),
  ];
}

const guarded = () => routes.filter(({ access }) => access.rule !== 'public');
const named = ({ method, url }: Route) => `${method} ${url}`;

/** Everything that is the victim's, as one hash; the audit log and the events too. */
async function victimHash(): Promise<string> {
  await until(
    async () =>
      (await server.db.query<{ n: number }>({ text: 'select count(*)::int as n from event_outbox' })).rows[0]?.n,
    (n) => n === 0,
  );
  const parts = [
    ...[
      'projects',
      'tasks',
      'executions',
      'orphan_results',
      'agents',
      'occurrences',
      'api_keys',
      'refresh_tokens',
      'events',
      'concurrency_limits',
    ].map(
      (table) =>
        `select '${table}' as t, md5(string_agg(x::text, '|' order by x::text)) as h from ${table} x where user_id = $1`,
    ),
    `select 'output', md5(string_agg(x::text, '|' order by x::text)) from execution_output x
      where execution_id in (select id from executions where user_id = $1)`,
    `select 'users', md5(x::text) from users x where id = $1`,
    `select 'audit_log', md5(string_agg(x::text, '|' order by id)) from audit_log x where owner_id = $1`,
    `select 'agent_stats', md5(string_agg(x::text, '|' order by x::text)) from agent_stats_hourly x
      where agent_id in (select id from agents where user_id = $1)`,
  ];
  const { rows } = await server.db.query({ text: parts.join(' union all '), values: [victim.id] });
  return JSON.stringify(rows);
}

describe('who is nobody', () => {
  const sign = (header: object, payload: object, secret = server.config.JWT_SECRET ?? '') => {
    const text = [header, payload].map((part) => Buffer.from(JSON.stringify(part)).toString('base64url')).join('.');
    return `${text}.${createHmac('sha256', secret).update(text).digest('base64url')}`;
  };

  test('is answered 401 with the way to sign in, on every route, and changes nothing', async () => {
    const now = Math.floor(Date.now() / 1_000);
    const [, payload = ''] = victim.token.split('.');
    const good = JSON.parse(Buffer.from(payload, 'base64url').toString());
    const HS256 = { alg: 'HS256', typ: 'JWT' };
    expect((await server.as(sign(HS256, good))('GET', '/auth/me')).status).toBe(200);

    const revoked = (await victim.call('POST', '/auth/api-keys', { name: 'revoked' })).body;
    await victim.call('DELETE', `/auth/api-keys/${revoked.id}`);
    const disabled = await server.newUser();
    await server.db.query({ text: 'update users set disabled_at = now() where id = $1', values: [disabled.id] });
    const { email, password } = victim;
    const login = (await server.as(undefined)('POST', '/auth/login', { email, password })).body;
    await server.as(undefined)('POST', '/auth/logout', { refresh_token: login.refresh_token });

    const credentials: Record<string, string | undefined> = {
      none: undefined,
      garbage: 'garbage',
      'a key that is none': `muster_${'x'.repeat(43)}`,
      expired: sign(HS256, { ...good, iat: now - 7_200, exp: now - 3_600 }),
      'alg none': `${sign({ alg: 'none' }, good).split('.').slice(0, 2).join('.')}.`,
      'another issuer': sign(HS256, { ...good, iss: 'evil' }),
      'another secret': sign(HS256, good, 'x'.repeat(48)),
      'a revoked key': revoked.key,
      'a disabled user': disabled.token,
      'a login that has ended': login.access_token,
    };
    const before = await victimHash();
    for (const route of guarded()) {
      for (const [name, credential] of Object.entries(credentials)) {
        const answer = await server.as(credential)(route.method, pathOf(route), bodiesOf(route)[0]);
        expect(answer.status, `${named(route)}, ${name}`).toBe(401);
        expect(answer.headers.get('www-authenticate'), named(route)).toMatch(/^Bearer/);
        expect(JSON.stringify(answer.body)).not.toContain(CANARY);
      }
    }
    expect(await victimHash()).toBe(before);
  });

  test('may call what is declared public, and that is what is meant to be', () => {
    const open = routes.filter(({ access }) => access.rule === 'public').map(named);
    expect(
      open.filter(
        (route) =>
          !/health|metrics$|liveness|readiness|openapi\.json|auth\/(register|login|refresh|logout)$/.test(route),
      ),
    ).toEqual([]);
  });
});

describe('who has a key', () => {
  test('needs one of the scopes that the route declares', async () => {
    const keys = await Promise.all(
      (['read', 'write', 'agent'] as const).map(async (scope) => ({
        scope,
        call: server.as((await stranger.call('POST', '/auth/api-keys', { name: scope, scopes: [scope] })).body.key),
      })),
    );
    for (const route of guarded()) {
      if (route.access.rule === 'public') continue;
      for (const { scope, call } of keys) {
        if (route.access.scopes.includes(scope)) continue;
        const answer = await call(route.method, pathOf(route), bodiesOf(route)[0]);
        expect(answer.status, `${named(route)} with ${scope}`).toBe(403);
        expect(answer.body.detail, named(route)).toMatch(/scope/);
      }
    }
  });
});

describe('who is somebody else', () => {
  test('can neither see nor change what is the victim’s, by its id in a path, a query or a body', async () => {
    const before = await victimHash();
    const { call } = stranger;
    for (const route of guarded()) {
      if (['/ws', '/api/v1/events'].includes(route.url)) continue; // Below.
      const about = named(route);
      const see = async (path: string, body?: unknown) => {
        const answer = await call(route.method, path, body);
        expect(answer.status, `${about}: ${JSON.stringify(answer.body)}`).toBeLessThan(500);
        expect(JSON.stringify(answer.body), about).not.toContain(CANARY);
        return answer;
      };
      for (const body of bodiesOf(route)) {
        const { status } = await see(pathOf(route), body);
        // The thing is there and is not theirs; or the body was no good, which is looked at first.
        if (route.url.includes(':id')) expect([403, 400], about).toContain(status);
      }
      if (route.method !== 'GET') continue;
      const window = 'from=2026-11-01T00:00:00Z&to=2026-12-01T00:00:00Z';
      for (const { name } of route.parameters.filter((parameter) => parameter.in === 'query')) {
        const value = byField[name] ?? (/search|skill|capab/.test(name) ? CANARY : undefined);
        if (value === undefined) continue;
        const query = `${name}=${value}${route.url.endsWith('/calendar') ? `&${window}` : ''}`;
        const { status, body } = await see(`${pathOf(route)}?${query}`);
        if (status === 200 && 'total' in body) expect(body.total, `${about}?${query}`).toBe(0);
      }
      if (route.url.endsWith('/calendar')) await see(`${pathOf(route)}?${window}`);
    }
    expect(await victimHash()).toBe(before);
  });

  test('cannot be let in by what a body refers to', async () => {
    const own = await makeTask(stranger.call);
    const ownAgent = await makeAgent(stranger.call);
    const { project_id, agent_id, task_id, execution_id } = byField;
    for (const [method, path, body, field] of [
      ['POST', '/tasks', { skill_name: 'x', project_id }, 'project_id'],
      ['POST', '/tasks', { skill_name: 'x', agent_id }, 'agent_id'],
      ['PUT', `/tasks/${own.id}`, { project_id }, 'project_id'],
      ['PUT', `/tasks/${own.id}`, { agent_id }, 'agent_id'],
      ['POST', '/agents/activity', { agent_id, task_id: own.id, status: 'success' }, 'agent_id'],
      ['POST', '/agents/activity', { agent_id: ownAgent.id, task_id, status: 'success' }, 'task_id'],
    ] as const) {
      const answer = await stranger.call(method, path, body);
      expect(answer).toMatchObject({ status: 400, body: { errors: [{ path: `body.${field}` }] } });
    }
    const report = { agent_id: ownAgent.id, task_id: own.id, execution_id, status: 'success' };
    expect((await stranger.call('POST', '/agents/activity', report)).status).toBe(409);
    const bulk = await stranger.call('POST', '/tasks/bulk', { action: 'delete', ids: [task_id] });
    expect(bulk.body).toMatchObject({ changed: 0, results: [{ result: 'forbidden' }] });
  });

  test('hears nothing of the victim’s in an event stream, whatever is asked for', async () => {
    const filters = [
      '',
      `?task_ids=${byField['task_id']}`,
      `?project_ids=${byField['project_id']}`,
      `?agent_ids=${byField['agent_id']}&last_event_id=0`,
    ];
    for (const filter of filters) {
      const stream = await openStream(`${server.url}/api/v1/events${filter}`, stranger.token);
      try {
        await stream.event((event) => event.type === 'ack');
        await victim.call('PUT', `/tasks/${byField['task_id']}`, {
          priority: filter.includes('task') ? 'low' : 'high',
        });
        await victim.call('PUT', `/agents/${byField['agent_id']}`, {
          type: filter.includes('task') ? 'coder' : 'tester',
        });
        const own = await makeTask(stranger.call);
        if (filter === '') await stream.event(({ data }) => data['task_id'] === own.id);
        else await server.feedCaughtUp();
        expect(JSON.stringify(stream.events)).not.toContain(CANARY);
      } finally {
        stream.close();
      }
    }
  });

  test('hears nothing of the victim’s on a socket, whatever is subscribed to', async () => {
    const socket = openSocket(`${server.url}/ws?token=${stranger.token}`);
    try {
      await socket.ack;
      socket.say({
        type: 'subscribe',
        topics: ['tasks', 'agents', 'calendar'],
        task_ids: [byField['task_id']],
        project_ids: [byField['project_id']],
        agent_ids: [byField['agent_id']],
      });
      await expect.poll(() => socket.frames.filter(({ type }) => type === 'ack').length).toBe(2);
      const own = await makeTask(stranger.call);
      await victim.call('PUT', `/tasks/${byField['task_id']}`, { priority: 'critical' });
      await victim.call('PUT', `/agents/${byField['agent_id']}`, { type: 'coder' });
      socket.say({ type: 'subscribe', topics: ['tasks', 'agents', 'calendar'] });
      await stranger.call('POST', `/tasks/${own.id}/run`);
      await socket.frame(({ data }) => data['task_id'] === own.id);
      expect(JSON.stringify(socket.frames)).not.toContain(CANARY);
    } finally {
      socket.socket.close();
      await socket.closed;
    }
  });
});

test('an admin sees it all, so the victim’s things are there to be seen', async () => {
  const seen: string[] = [];
  const call: Caller = server.admin;
  for (const route of guarded()) {
    if (route.method !== 'GET' || !route.url.includes(':id')) continue;
    const { status, body } = await call('GET', pathOf(route));
    // Keys are listed and never shown one by one.
    expect(status, named(route)).toBe(200);
    if (JSON.stringify(body).includes(CANARY)) seen.push(route.url);
  }
  expect(seen.length).toBeGreaterThanOrEqual(4);
});

test('every route is in the API document, but for the socket, the event stream, the document itself and its page', () => {
  const missing = routes.filter(
    ({ url, documented }) => !documented && !['/ws', '/api/v1/events', '/openapi.json'].includes(url),
  );
  expect(missing.map(named)).toEqual([]);
});

test('a route without a rule does not start', () => {
  const app = fastify();
  requireAccessRules(app);
  expect(() => app.get('/open', async () => 'anybody')).toThrow('GET /open declares no access rule.');
});
