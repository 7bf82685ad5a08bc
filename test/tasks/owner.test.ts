import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask } from '../support/work.ts';
import { auditOf, expectProblem, tracesOf } from './traces.ts';

let server: TestServer;
let owner: Awaited<ReturnType<TestServer['newUser']>>;
let stranger: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  owner = await server.newUser();
  stranger = await server.newUser();
});
afterAll(() => server?.stop());

/** Every call that concerns one task, and what its success answers. */
const CALLS = [
  ['GET', '', undefined, 200],
  ['GET', '/preview', undefined, 200],
  ['PUT', '', { name: 'changed' }, 200],
  ['POST', '/run', undefined, 202],
  ['POST', '/pause', undefined, 200],
  ['POST', '/resume', undefined, 200],
  ['DELETE', '', undefined, 200],
] as const;

const schedule = { schedule_cron: '@yearly' };

describe.each(CALLS)('%s /tasks/{id}%s', (method, path, body, success) => {
  test('is forbidden to a stranger and changes nothing', async () => {
    const task = await makeTask(owner.call, { ...schedule, name: 'secret canary' });
    if (path === '/resume') await owner.call('POST', `/tasks/${task.id}/pause`);
    const before = await tracesOf(server, task.id);
    for (const headers of [{}, { 'if-match': '"999"' }, { 'if-match': '*' }]) {
      const answer = await stranger.call(method, `/tasks/${task.id}${path}`, body, headers);
      expectProblem(answer, 403);
      expect(JSON.stringify(answer.body)).not.toContain('canary');
    }
    expect(await tracesOf(server, task.id)).toEqual(before);
  });

  test('is 404 to everybody where there is no task', async () => {
    for (const call of [owner.call, stranger.call, server.admin]) {
      expectProblem(await call(method, `/tasks/987654321${path}`, body), 404);
    }
  });

  test('is open to the owner and to an admin', async () => {
    for (const call of [owner.call, server.admin]) {
      const task = await makeTask(owner.call, schedule);
      if (path === '/resume') await owner.call('POST', `/tasks/${task.id}/pause`);
      expect((await call(method, `/tasks/${task.id}${path}`, body)).status).toBe(success);
    }
  });

  test('needs a credential', async () => {
    const task = await makeTask(owner.call, schedule);
    for (const credential of [undefined, 'muster_nonsense', 'a.b.c']) {
      const answer = await server.as(credential)(method, `/tasks/${task.id}${path}`, body);
      expectProblem(answer, 401);
      expect(answer.headers.get('www-authenticate')).toMatch(/^Bearer/);
    }
  });

  test('needs an API key of the right scope', async () => {
    const [right, wrong] = method === 'GET' ? ['read', 'write'] : ['write', 'read'];
    const keyOf = async (scope: string) => {
      const answer = await owner.call('POST', '/auth/api-keys', { name: scope, scopes: [scope] });
      expect(answer.status).toBe(201);
      return server.as(answer.body.key);
    };
    const task = await makeTask(owner.call, schedule);
    for (const scope of [wrong, 'agent']) {
      expectProblem(await (await keyOf(scope))(method, `/tasks/${task.id}${path}`, body), 403);
    }
    expect((await (await keyOf(right))(method, `/tasks/${task.id}${path}`, body)).status).toBe(success);
  });
});

describe('what an admin does to the task of somebody else', () => {
  test('is written down as the admin’s deed on the owner’s task', async () => {
    const task = await makeTask(owner.call, schedule);
    const admin = (await server.admin('GET', '/auth/me')).body.id;
    await server.admin('PUT', `/tasks/${task.id}`, { name: 'by the admin' });
    await server.admin('DELETE', `/tasks/${task.id}`);
    const audit = await auditOf(server, task.id);
    expect(audit.map(({ operation, user_id, owner_id }) => [operation, user_id, owner_id])).toEqual([
      ['CREATE', owner.id, owner.id],
      ['UPDATE', admin, owner.id],
      ['DELETE', admin, owner.id],
    ]);
    expect((await tracesOf(server, task.id)).events.every((event) => event.user_id === owner.id)).toBe(true);
  });
});

describe('GET /tasks', () => {
  test('holds only what the caller owns, in its total too, and everything for an admin', async () => {
    const [a, b] = [await server.newUser(), await server.newUser()];
    const ofA = [await makeTask(a.call), await makeTask(a.call)].map(({ id }) => id);
    const ofB = await makeTask(b.call, { skill_name: 'canary', name: 'canary' });
    const listed = async (call: typeof a.call, query = '') => {
      const { body } = await call('GET', `/tasks?limit=100${query}`);
      return { ids: (body.tasks as { id: number }[]).map(({ id }) => id), total: body.total as number };
    };
    expect(await listed(a.call)).toEqual({ ids: ofA.reverse(), total: 2 });
    expect(await listed(b.call)).toEqual({ ids: [ofB.id], total: 1 });
    for (const query of ['&skill_name=canary', '&search=canary', '&sort_by=priority&search=canary']) {
      expect(await listed(a.call, query)).toEqual({ ids: [], total: 0 });
    }
    const all = await listed(server.admin);
    expect(all.ids).toEqual(expect.arrayContaining([...ofA, ofB.id]));
    expectProblem(await server.as(undefined)('GET', '/tasks'), 401);
  });
});

describe('POST /tasks and /tasks/preview', () => {
  test('need a credential', async () => {
    expectProblem(await server.as(undefined)('POST', '/tasks', { skill_name: 'a' }), 401);
    expectProblem(await server.as(undefined)('POST', '/tasks/preview', { schedule_cron: '@daily' }), 401);
  });

  test('make tasks of the caller, whoever it is', async () => {
    expect((await makeTask(stranger.call)).user_id).toBe(stranger.id);
  });
});
