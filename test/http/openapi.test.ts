import { afterAll, beforeAll, expect, test } from 'vitest';
import { type ApiDocument, readApiDocument } from '../support/api-document.ts';
import { startServer, type TestServer } from '../support/server.ts';

let server: TestServer;
let api: ApiDocument;
beforeAll(async () => {
  server = await startServer();
  api = await readApiDocument(server);
});
afterAll(() => server?.stop());

test('every call has a name that no other has', () => {
  const names = api.operations.map(({ operationId }) => operationId);
  for (const name of names) expect(name).toMatch(/^[a-z][a-zA-Z0-9]+$/);
  expect(new Set(names).size).toBe(names.length);
});

test('every body that is sent or answered has an example, and each is what its schema takes', () => {
  for (const { operationId, body, answers } of api.operations) {
    const good = Object.entries(answers).flatMap(([status, content]) =>
      status.startsWith('2') && content ? [{ what: `${operationId} ${status}`, content }] : [],
    );
    for (const { what, content } of [...(body ? [{ what: operationId, content: body }] : []), ...good]) {
      const examples =
        content.example === undefined
          ? Object.values(content.examples ?? {}).map(({ value }) => value)
          : [content.example];
      expect(examples.length, what).toBeGreaterThan(0);
      const validate = api.validator(content.schema);
      for (const example of examples) {
        expect(validate(example), `${what}: ${JSON.stringify(validate.errors)} ${JSON.stringify(example)}`).toBe(true);
      }
    }
  }
});

test('every call says how it fails', () => {
  for (const { operationId, answers } of api.operations) expect(answers['default'], operationId).toBeDefined();
});

test('the examples of what creates can be sent as they are', async () => {
  const made: Record<string, number> = {};
  for (const [path, field] of [
    ['/api/v1/projects', 'project_id'],
    ['/api/v1/agents', 'agent_id'],
    ['/api/v1/tasks', 'task_id'],
  ] as const) {
    const operation = api.operations.find((candidate) => candidate.path === path && candidate.method === 'POST');
    const { example, examples } = operation?.body ?? {};
    for (const body of example === undefined ? Object.values(examples ?? {}).map(({ value }) => value) : [example]) {
      const answer = await server.admin('POST', `/${path}`, body);
      expect(answer.status, JSON.stringify(answer.body)).toBe(201);
      made[field] = answer.body.id;
    }
  }
  expect(Object.keys(made)).toHaveLength(3);
});
