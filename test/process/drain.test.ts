import { Agent, request } from 'node:http';
import { setImmediate as turn } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import WebSocket from 'ws';
import { createTestDatabase, type TestDatabase } from '../support/postgres.ts';
import { endPrograms, newFolder, removeFolder, startServerProcess } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, unique, until } from '../support/work.ts';

const SECRET = 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa';
let database: TestDatabase;
/** Stays when the other one goes. */
let beside: TestServer;
let folder: string;
beforeAll(async () => {
  folder = await newFolder();
  database = await createTestDatabase();
  beside = await startServer({ env: { JWT_SECRET: SECRET }, databaseUrl: database.url });
});
afterAll(async () => {
  await endPrograms();
  await beside?.stop();
  await database?.drop();
  await removeFolder(folder);
});

/**
 * A client that keeps its one connection, and asks again as soon as it has its answer until it is told to move on
 * (`Connection: close`).
 */
function keepAsking(url: string, path: string, body?: object) {
  const agent = new Agent({ keepAlive: true, maxSockets: 1 });
  const statuses: number[] = [];
  const ask = () =>
    new Promise<boolean>((done, failed) => {
      const headers = { authorization: `Bearer ${beside.adminKey}`, 'content-type': 'application/json' };
      request(`${url}${path}`, { agent, method: body ? 'POST' : 'GET', headers }, (response) => {
        response.resume().once('error', failed);
        response.once('end', () => {
          statuses.push(response.statusCode ?? 0);
          done(response.headers.connection !== 'close');
        });
      })
        .once('error', failed)
        .end(body ? JSON.stringify(body) : undefined);
    });
  const movedOn = (async () => {
    while (await ask()) await turn();
    agent.destroy();
  })();
  // Whoever awaits it sees it fail.
  movedOn.catch(() => {});
  return { statuses, movedOn };
}

test('SIGTERM under load fails no request, frees the waiting agents, says goodbye to sockets, and ends with 0', async () => {
  const leaving = await startServerProcess({
    folder,
    // A stop that hangs ends with 1 after this time, before any of the polls below is over.
    env: { DATABASE_URL: database.url, JWT_SECRET: SECRET, SHUTDOWN_TIMEOUT_SECONDS: '15' },
  });
  const admin = beside.as(beside.adminKey);
  const skill = unique('skill');
  const task = await makeTask(admin, { skill_name: skill });
  const sockets = Array.from({ length: 5 }, () => {
    const socket = new WebSocket(`${leaving.url.replace('http', 'ws')}/ws?token=${beside.adminKey}`);
    return {
      acknowledged: new Promise((done) => socket.once('message', done)),
      closed: new Promise<number>((done) => socket.once('close', done)),
    };
  });
  await Promise.all(sockets.map(({ acknowledged }) => acknowledged));
  const polls = [];
  for (let i = 0; i < 10; i++) {
    const { id } = await makeAgent(admin);
    polls.push(poll(leaving.url, id, skill));
  }
  const written = unique('written');
  const clients = Array.from({ length: 20 }, (_, i) =>
    i % 4 === 0
      ? keepAsking(leaving.url, '/api/v1/tasks', { skill_name: written })
      : keepAsking(leaving.url, '/api/v1/tasks?limit=5'),
  );
  await until(
    async () => clients.map(({ statuses }) => statuses.length),
    (answers) => answers.every((count) => count >= 5),
  );

  leaving.child.kill('SIGTERM');
  await leaving.saying(/"stopping"/);
  // Work that comes up now is for those who stay.
  await admin('POST', `/tasks/${task.id}/run`);
  expect(await Promise.all(polls)).toEqual(polls.map(() => ({ status: 200, executions: [] })));
  await Promise.all(clients.map(({ movedOn }) => movedOn));
  expect(await Promise.all(sockets.map(({ closed }) => closed))).toEqual([1001, 1001, 1001, 1001, 1001]);
  expect(await leaving.exited).toBe(0);
  expect(leaving.err()).toBe('');

  expect(new Set(clients.flatMap(({ statuses }) => statuses))).toEqual(new Set([200, 201]));
  const acknowledged = clients.flatMap(({ statuses }) => statuses).filter((status) => status === 201).length;
  const { body } = await admin('GET', `/tasks?skill_name=${written}&limit=1`);
  expect(body.total).toBe(acknowledged);
  const [run] = (await admin('GET', `/executions?task_id=${task.id}`)).body.executions;
  expect(run).toMatchObject({ status: 'queued', agent_id: null });
});

async function poll(url: string, agentId: number, skill: string) {
  const response = await fetch(`${url}/api/v1/agents/${agentId}/claim`, {
    method: 'POST',
    headers: { authorization: `Bearer ${beside.adminKey}`, 'content-type': 'application/json' },
    body: JSON.stringify({ max: 1, wait_ms: 30_000, skills: [skill] }),
  });
  const { executions } = (await response.json()) as { executions: unknown };
  return { status: response.status, executions };
}
