import { createHmac } from 'node:crypto';
import { request } from 'node:http';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';
import { type Client, emit, type Frame, numbered, openSocket, refusal } from './support.ts';

const PAGE_ORIGIN = 'https://app.example.com';

let server: TestServer;
beforeAll(async () => {
  server = await startServer({ env: { CORS_ORIGINS: PAGE_ORIGIN } });
});
afterAll(() => server?.stop());

const ws = (query: Record<string, string | number> = {}) =>
  `${server.url}/ws?${new URLSearchParams(Object.entries(query).map(([key, value]): [string, string] => [key, `${value}`]))}`;

/** A socket that is live: it has its first ack. */
async function live(credential: string, query: Record<string, string | number> = {}): Promise<Client> {
  const client = openSocket(ws({ token: credential, ...query }));
  await client.ack;
  return client;
}

/** Resolves when the client has the event with this number, and so all before it. */
const upTo = (client: Client, n: number) => client.frame(({ data }) => data['n'] === n);

describe('the first frame', () => {
  test('is an ack that tells who one is and where in the order', async () => {
    const user = await server.newUser();
    const client = openSocket(ws({ token: user.token }));
    const first = await client.frame(() => true);
    expect(first).toEqual({
      type: 'ack',
      timestamp: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
      data: {
        connection_id: expect.stringMatching(/^[0-9a-f-]{36}$/),
        user_id: user.id,
        resumed: false,
        last_event_id: expect.any(Number),
        heartbeat_interval_ms: 30_000,
        topics: ['tasks', 'agents', 'calendar', 'memory'],
        expires_at: expect.any(String),
      },
    });
    client.socket.close();
  });

  test('comes before the answers to what the client said at once', async () => {
    const client = openSocket(ws({ token: server.adminKey, last_event_id: 0 }));
    client.socket.once('open', () => {
      client.say({ type: 'unsubscribe', topics: ['agents'] });
      client.say({ type: 'ping' });
    });
    await client.frame(({ type }) => type === 'pong');
    const answers = client.frames.filter(({ event_id: id }) => id === undefined);
    expect(answers.map(({ type, data }) => [type, data['topics']])).toEqual([
      ['ack', ['tasks', 'agents', 'calendar', 'memory']],
      ['ack', ['tasks', 'calendar', 'memory']],
      ['pong', undefined],
    ]);
    client.socket.close();
  });
});

describe('credentials', () => {
  test('come by query, by sub-protocol, or by header; tokens and API keys', async () => {
    const user = await server.newUser();
    for (const credential of [user.token, server.adminKey]) {
      const clients = [
        openSocket(ws({ token: credential })),
        openSocket(ws(), { protocols: ['bearer', credential] }),
        openSocket(ws(), { headers: { authorization: `Bearer ${credential}` } }),
      ];
      for (const client of clients) {
        await client.ack;
        client.socket.close();
      }
      expect(clients.map(({ socket }) => socket.protocol)).toEqual(['', 'bearer', '']);
    }
  });

  test.each([
    ['none', {}],
    ['nonsense in the query', { token: 'x' }],
    ['two in the query', { token: ['a', 'b'] }],
    ['an empty one in the query', { token: '' }],
  ])('%s → 401, and no upgrade', async (_what, query) => {
    const parameters = new URLSearchParams();
    for (const [key, value] of Object.entries(query)) for (const v of [value].flat()) parameters.append(key, v);
    expect(await refusal(`${server.url}/ws?${parameters}`)).toMatchObject({
      status: 401,
      type: expect.stringContaining('application/problem+json'),
      body: { status: 401, instance: '/ws' },
    });
  });

  test('a sub-protocol without a credential, or with a bad one → 401', async () => {
    for (const protocols of [['bearer'], ['bearer', 'x'], [server.adminKey, 'bearer'], [server.adminKey]]) {
      expect((await refusal(ws(), { protocols })).status).toBe(401);
    }
  });

  test('an API key without the scope read → 403', async () => {
    const user = await server.newUser();
    const { body } = await user.call('POST', '/auth/api-keys', { name: unique('key'), scopes: ['agent'] });
    expect((await refusal(ws({ token: body.key }))).status).toBe(403);
  });

  test('a credential that expires ends its socket with 1008', async () => {
    const user = await server.newUser();
    const { body } = await user.call('POST', '/auth/api-keys', {
      name: unique('key'),
      scopes: ['read'],
      expires_at: new Date(Date.now() + 1_500).toISOString(),
    });
    const client = await live(body.key);
    expect(await client.closed).toEqual({ code: 1008, reason: 'the credential has expired' });
  });
});

describe('an access token', () => {
  /** The user's token with another end, signed as the server does. */
  const endingAt = (token: string, exp: number) => {
    const [header, payload] = token.split('.').map((part) => Buffer.from(part, 'base64url').toString());
    const body = [header, JSON.stringify({ ...JSON.parse(payload ?? ''), exp })].map((part) =>
      Buffer.from(part ?? '').toString('base64url'),
    );
    const signature = createHmac('sha256', server.config.JWT_SECRET ?? '').update(body.join('.'));
    return [...body, signature.digest('base64url')].join('.');
  };

  test('that expires ends its socket with 1008, and one that lasts keeps its own', async () => {
    const user = await server.newUser();
    const lasting = await live(user.token);
    const client = await live(endingAt(user.token, Math.ceil(Date.now() / 1000) + 1));
    expect(await client.closed).toEqual({ code: 1008, reason: 'the credential has expired' });
    expect(lasting.socket.readyState).toBe(lasting.socket.OPEN);
    lasting.socket.close();
  });

  test('that expired long ago → 401', async () => {
    const user = await server.newUser();
    const token = endingAt(user.token, Math.floor(Date.now() / 1000) - 120);
    expect((await refusal(ws({ token }))).status).toBe(401);
  });
});

describe('the query', () => {
  test.each([
    ['color=red', 'query.color is not a known field'],
    ['last_event_id=-1', 'query.last_event_id must be'],
    ['last_event_id=1e3', 'query.last_event_id must be'],
    ['last_event_id=9007199254740992', 'query.last_event_id must be'],
    ['topics=tasks,cars', 'query.topics'],
    ['topics=', 'query.topics'],
  ])('%s → 400', async (query, sentence) => {
    const refused = await refusal(`${server.url}/ws?token=${server.adminKey}&${query}`);
    expect(refused.status).toBe(400);
    expect(refused.body['detail']).toContain(sentence);
  });

  test('a plain GET is told that this is for WebSocket clients', async () => {
    expect(await server.as(undefined)('GET', '//ws')).toMatchObject({ status: 401 });
    const { status, body, headers } = await server.admin('GET', '//ws');
    expect([status, headers.get('content-type'), body.detail]).toEqual([
      400,
      'application/problem+json; charset=utf-8',
      '/ws is for WebSocket clients.',
    ]);
  });
});

describe('the Origin', () => {
  // After Centrifugo's list.
  test.each([
    'https://evil.example',
    'https://app.example.com.evil.example',
    'https://evilapp.example.com',
    'https://app.example.com:8443',
    'http://app.example.com',
    'https://app.example.com@evil.example',
    'https://аpp.example.com', // A Cyrillic а.
    'https://xn--pp-7lc.example.com',
    'file://',
    'null',
    '',
    'app.example.com',
    '*',
  ])('%j → 403', async (origin) => {
    const refused = await refusal(ws({ token: server.adminKey }), {
      headers: { origin: Buffer.from(origin).toString('latin1') },
    });
    expect(refused).toMatchObject({ status: 403, body: { status: 403 } });
  });

  test('of CORS_ORIGINS in any case, or of the server itself, is let in; so is who sends none', async () => {
    for (const origin of [PAGE_ORIGIN, 'HTTPS://APP.example.com', server.url, undefined]) {
      const client = openSocket(ws({ token: server.adminKey }), { headers: origin === undefined ? {} : { origin } });
      await client.ack;
      client.socket.close();
    }
  });
});

describe('an upgrade anywhere else', () => {
  const upgrade = (method: string, path: string, headers: Record<string, string> = {}) =>
    new Promise<number>((resolve, reject) => {
      const call = request(`${server.url}${path}`, {
        method,
        headers: {
          connection: 'Upgrade',
          upgrade: 'websocket',
          'sec-websocket-version': '13',
          'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==',
          authorization: `Bearer ${server.adminKey}`,
          ...headers,
        },
      });
      call.on('upgrade', (_response, socket) => {
        socket.destroy();
        resolve(101);
      });
      call.on('response', (response) => {
        response.resume();
        resolve(response.statusCode ?? 0);
      });
      call.on('error', reject);
      call.end();
    });

  test.each([
    '/health',
    '/health/live',
    '/openapi.json',
    '/docs',
    '/api/v1/tasks',
    '/api/v1/health',
    '/nowhere',
    '/ws/x',
  ])('%s → 400', async (path) => {
    expect(await upgrade('GET', path)).toBe(400);
  });

  test.each(['POST', 'PUT', 'DELETE', 'OPTIONS', 'HEAD'])('%s /ws is no 101', async (method) => {
    const status = await upgrade(method, '/ws');
    expect(status).toBeGreaterThanOrEqual(200);
    expect(status).not.toBe(101);
  });

  test.each([
    ['a wrong version', { 'sec-websocket-version': '7' }],
    ['no key', { 'sec-websocket-key': '' }],
    ['a bad key', { 'sec-websocket-key': 'x' }],
    ['another protocol', { upgrade: 'h2c' }],
  ])('/ws with %s → 400', async (_what, headers) => {
    expect(await upgrade('GET', '/ws', headers)).toBe(400);
  });

  test('/ws/ is /ws', async () => {
    const client = openSocket(`${server.url}/ws/?token=${server.adminKey}`);
    await client.ack;
    client.socket.close();
  });
});

describe('events', () => {
  test('tell the whole life of a run, live', async () => {
    const user = await server.newUser();
    const client = await live(user.token);
    const task = await makeTask(user.call, { run_at: new Date(Date.now() + 3_600_000).toISOString() });
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    await complete(user.call, run, { status: 'success', output: 'grüezi\n' });
    await user.call('DELETE', `/tasks/${task.id}`);
    await client.frame(({ type }) => type === 'calendar_event_deleted');
    const told = client.frames
      .filter(({ type }) => type === 'task_status_update')
      .map(({ data }) => [data['status'], data['execution_status']]);
    expect(told).toEqual([
      ['pending', undefined],
      ['pending', 'queued'],
      ['running', 'running'],
      [expect.any(String), 'success'],
      ['deleted', undefined],
    ]);
    expect(client.frames.map(({ type }) => type)).toContain('calendar_event_created');
    const [, ...events] = client.frames;
    for (const event of events) {
      expect(Object.keys(event)).toEqual(['type', 'event_id', 'timestamp', 'data']);
      expect(event.timestamp).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    }
    const ids = events.map(({ event_id: id }) => id ?? 0);
    expect(ids).toEqual([...new Set(ids)].sort((a, b) => a - b));
    expect(events.find(({ data }) => data['execution_status'] === 'success')?.data['output']).toBe('grüezi\n');
    client.socket.close();
  });

  test('go to their owner and to admins, the shared ones to everybody', async () => {
    const [one, other] = [await server.newUser(), await server.newUser()];
    const clients = await Promise.all([one.token, other.token, server.adminKey].map((credential) => live(credential)));
    await emit(
      server.db,
      numbered(1, { userId: one.id }),
      numbered(2, { userId: other.id }),
      numbered(3, { userId: one.id, shared: true, type: 'agent_activity_update' }),
    );
    for (const client of clients) await upTo(client, 3);
    expect(clients.map((client) => client.numbers())).toEqual([
      [1, 3],
      [2, 3],
      [1, 2, 3],
    ]);
    for (const { socket } of clients) socket.close();
  });

  test('tell the progress of a run to its owner and to admins, and nothing of it to a stranger', async () => {
    const [user, other] = [await server.newUser(), await server.newUser()];
    const [owner, stranger, admin] = await Promise.all([live(user.token), live(other.token), live(server.adminKey)]);
    const task = await makeTask(user.call);
    const agent = await makeAgent(user.call);
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne();
    const beat = await user.call('POST', `/executions/${run.execution_id}/heartbeat`, {
      lease_token: run.lease_token,
      progress: { percent: 40, message: 'nearly halfway' },
    });
    expect(beat.status).toBe(200);
    await complete(user.call, run, { status: 'success' });
    // Comes after all of that, and to everybody.
    await emit(server.db, numbered(1, { userId: user.id, shared: true, type: 'agent_activity_update' }));
    await Promise.all([owner, stranger, admin].map((client) => upTo(client, 1)));
    const about = (client: Client) =>
      client.frames.filter(({ data }) => data['task_id'] === task.id || data['agent_id'] === agent.id);
    const told = about(owner).map(({ type, data }) => [type, data['execution_status'], data['progress']]);
    expect(told).toContainEqual(['task_status_update', 'running', { percent: 40, message: 'nearly halfway' }]);
    expect(about(admin)).toEqual(about(owner));
    expect(about(stranger)).toEqual([]);
    for (const { socket } of [owner, stranger, admin]) socket.close();
  });

  test('of a shared agent come to everybody, without whose run it is', async () => {
    const [user, other] = [await server.newUser(), await server.newUser()];
    const [owner, stranger] = await Promise.all([live(user.token), live(other.token)]);
    const skill = unique('skill');
    const agent = await makeAgent(server.admin, { shared: true });
    const task = await makeTask(user.call, { skill_name: skill });
    await user.call('POST', `/tasks/${task.id}/run`);
    const run = await agent.claimOne([skill]);
    await complete(server.admin, run, { status: 'success' });
    await emit(server.db, numbered(1, { userId: user.id, shared: true, type: 'agent_activity_update' }));
    await Promise.all([owner, stranger].map((client) => upTo(client, 1)));
    const doings = stranger.frames.filter(({ data }) => data['agent_id'] === agent.id);
    expect(doings.length).toBeGreaterThanOrEqual(2);
    for (const { type, data } of doings) {
      expect(type).toBe('agent_activity_update');
      expect(data).not.toHaveProperty('task_id');
      expect(data).not.toHaveProperty('execution_id');
      expect(JSON.stringify(data)).not.toContain(skill);
    }
    expect(stranger.frames.some(({ data }) => data['task_id'] === task.id)).toBe(false);
    expect(owner.frames.some(({ data }) => data['execution_status'] === 'success')).toBe(true);
    for (const { socket } of [owner, stranger]) socket.close();
  });

  test('text comes as it was written', async () => {
    const user = await server.newUser();
    const client = await live(user.token);
    const text = '"\\\u0001 </script> grüezi 🎉 \u2028';
    await emit(server.db, numbered(1, { userId: user.id, data: { text } }));
    expect((await upTo(client, 1)).data['text']).toBe(text);
    client.socket.close();
  });
});

describe('what a client wants', () => {
  const all = (userId: number, n: number) => [
    numbered(n, { userId, taskId: 7, projectId: 70 }),
    numbered(n + 1, { userId, type: 'agent_activity_update', agentId: 8, taskId: 7 }),
    numbered(n + 2, { userId, type: 'calendar_event_created', taskId: 9, projectId: 70 }),
  ];
  /** A last event that every one of these clients gets tells that no other will come before it. */
  const heard = async (client: Client, user: { id: number }, fields: object = {}) => {
    await emit(server.db, numbered(99, { userId: user.id, taskId: 7, ...fields }));
    await upTo(client, 99);
    client.socket.close();
    return client.numbers().filter((n) => n !== 99);
  };

  test('is narrowed by topics in the query', async () => {
    const user = await server.newUser();
    const client = await live(user.token, { topics: 'tasks,calendar' });
    expect((await client.ack).data['topics']).toEqual(['tasks', 'calendar']);
    await emit(server.db, ...all(user.id, 1));
    expect(await heard(client, user)).toEqual([1, 3]);
  });

  test('changes by subscribe and unsubscribe, each answered with an ack', async () => {
    const user = await server.newUser();
    const client = await live(user.token, { topics: 'tasks' });
    const tell = async (message: object) => {
      const before = client.frames.length;
      client.say(message);
      return client.frame((frame) => frame.type === 'ack' && client.frames.indexOf(frame) >= before);
    };
    expect((await tell({ type: 'subscribe', topics: ['agents'] })).data).toMatchObject({
      topics: ['tasks', 'agents'],
      connection_id: (await client.ack).data['connection_id'],
    });
    await emit(server.db, ...all(user.id, 1));
    await upTo(client, 2);
    await tell({ type: 'unsubscribe', topics: ['tasks'] });
    await emit(server.db, ...all(user.id, 11));
    await upTo(client, 12);
    await tell({ type: 'subscribe', topics: ['tasks', 'calendar'], task_ids: [9] });
    await emit(server.db, ...all(user.id, 21));
    await upTo(client, 23);
    await tell({ type: 'subscribe', project_ids: [70] });
    await emit(server.db, ...all(user.id, 31));
    await upTo(client, 33);
    await tell({ type: 'unsubscribe', project_ids: [70], task_ids: [9] });
    // The other socket has it when this one would have had it.
    const observer = await live(user.token);
    await emit(server.db, ...all(user.id, 41));
    await upTo(observer, 43);
    observer.socket.close();
    await tell({ type: 'subscribe', agent_ids: [8] });
    await emit(server.db, ...all(user.id, 51));
    await upTo(client, 52);
    await tell({ type: 'subscribe', topics: ['tasks'] });
    expect(await heard(client, user)).toEqual([1, 2, 12, 23, 31, 33, 52]);
  });

  test('somebody else’s ids bring nothing', async () => {
    const [one, other] = [await server.newUser(), await server.newUser()];
    const client = await live(other.token);
    client.say({ type: 'subscribe', task_ids: [7], project_ids: [70], agent_ids: [8] });
    await client.frame((frame) => frame.type === 'ack' && frame !== client.frames[0]);
    await emit(server.db, ...all(one.id, 1));
    expect(await heard(client, other)).toEqual([]);
  });
});

describe('messages', () => {
  test('ping is answered with pong; pong and ack are taken', async () => {
    const client = await live(server.adminKey);
    client.say({ type: 'pong' });
    client.say({ type: 'ack', last_event_id: 3 });
    client.say({ type: 'ping', id: 1 });
    await client.frame(({ type }) => type === 'pong');
    expect(client.frames.some(({ type }) => type === 'error')).toBe(false);
    client.socket.close();
  });

  test.each<[string, string | Buffer, string, RegExp]>([
    ['no JSON', '{', 'invalid_json', /JSON/],
    ['U+0000', '\0', 'invalid_json', /JSON/],
    ['a binary frame', Buffer.from('{"type":"ping"}'), 'invalid_json', /text frames/],
    ['no object', '[]', 'invalid_message', /message/],
    ['null', 'null', 'invalid_message', /message/],
    ['an unknown type', '{"type":"shout"}', 'invalid_message', /type: is not known/],
    ['no type', '{}', 'invalid_message', /type: is not known/],
    ['an unknown topic', '{"type":"subscribe","topics":["cars"]}', 'invalid_message', /topics\.0/],
    ['an unknown field', '{"type":"subscribe","user_id":1}', 'invalid_message', /user_id/],
    ['a bad id', '{"type":"subscribe","task_ids":[9007199254740993]}', 'invalid_message', /task_ids\.0/],
    ['a prototype', '{"type":"subscribe","__proto__":{"topics":["tasks"]}}', 'invalid_message', /__proto__/],
    [
      'too many ids',
      JSON.stringify({ type: 'subscribe', task_ids: [...Array(1_001).keys()] }),
      'invalid_message',
      /ids/,
    ],
    ['deep nesting', '['.repeat(60_000), 'invalid_json', /JSON/],
    ['a long key', JSON.stringify({ type: 'subscribe', ['k'.repeat(60_000)]: 1 }), 'invalid_message', /^.{1,300}$/],
  ])('%s is answered with an error, and the socket lives', async (_what, message, code, detail) => {
    const client = await live(server.adminKey);
    client.socket.send(message);
    const { data } = await client.frame(({ type }) => type === 'error');
    expect(data).toEqual({ code, detail: expect.stringMatching(detail) });
    client.say({ type: 'ping' });
    await client.frame(({ type }) => type === 'pong');
    client.socket.close();
  });

  test('ids beyond a thousand of a kind are refused, and change nothing', async () => {
    const client = await live(server.adminKey);
    const ids = Array.from({ length: 1_000 }, (_, i) => i + 1);
    client.say({ type: 'subscribe', task_ids: ids });
    client.say({ type: 'subscribe', task_ids: ids });
    client.say({ type: 'subscribe', task_ids: [1_001], project_ids: [1] });
    expect((await client.frame(({ type }) => type === 'error')).data['code']).toBe('too_many_ids');
    expect(client.frames.filter(({ type }) => type === 'ack')).toHaveLength(3);
    client.socket.close();
  });

  test('ten errors end a socket with 1008', async () => {
    const client = await live(server.adminKey);
    for (let i = 0; i < 20; i++) client.say('?');
    expect((await client.closed).code).toBe(1008);
    expect(client.frames.filter(({ type }) => type === 'error')).toHaveLength(10);
  });
});

describe('X-Event-Cursor', () => {
  test('hands a read over to a socket: what the read does not show comes', async () => {
    const user = await server.newUser();
    const client = await live(user.token);
    const before = await makeTask(user.call);
    await client.frame(({ data }) => data['task_id'] === before.id);
    const read = await until(
      () => user.call('GET', '/tasks'),
      ({ headers }) => Number(headers.get('x-event-cursor')) >= (client.frames.at(-1)?.event_id ?? 0),
    );
    const after = await makeTask(user.call);
    const resumed = await live(user.token, { last_event_id: read.headers.get('x-event-cursor') ?? '' });
    await resumed.frame(({ data }) => data['task_id'] === after.id);
    const seen = (frame: Frame) => frame.data['task_id'] !== undefined;
    expect(new Set(resumed.frames.filter(seen).map(({ data }) => data['task_id']))).toEqual(new Set([after.id]));
    for (const { socket } of [client, resumed]) socket.close();
  });

  test('misses nothing of what is written at the same time', async () => {
    const user = await server.newUser();
    let on = true;
    const made = new Set<number>();
    const writers = Array.from({ length: 4 }, async () => {
      while (on) made.add((await makeTask(user.call)).id);
    });
    const handovers: { shown: number[]; client: Client }[] = [];
    for (let i = 0; i < 8; i++) {
      const { body, headers } = await user.call('GET', '/tasks?limit=100');
      const cursor = headers.get('x-event-cursor') ?? '';
      handovers.push({
        shown: body.tasks.map((task: { id: number }) => task.id),
        client: openSocket(ws({ token: user.token, last_event_id: cursor })),
      });
    }
    on = false;
    await Promise.all(writers);
    expect(made.size).toBeLessThanOrEqual(100);
    expect(handovers.some(({ shown }) => shown.length > 0 && shown.length < made.size)).toBe(true);
    for (const { shown, client } of handovers) {
      const told = () => client.frames.map(({ data }) => data['task_id'] as number);
      await until(
        async () => [...made].filter((id) => !new Set([...shown, ...told()]).has(id)),
        (missing) => missing.length === 0,
      );
      expect(client.frames.some(({ type }) => type === 'resync_required')).toBe(false);
      client.socket.close();
    }
  });

  test('is on reads of the API only', async () => {
    expect((await server.admin('GET', '/tasks')).headers.get('x-event-cursor')).toMatch(/^\d+$/);
    expect((await server.admin('GET', '//health')).headers.has('x-event-cursor')).toBe(false);
    expect((await server.as(undefined)('GET', '/tasks')).headers.has('x-event-cursor')).toBe(false);
  });
});
