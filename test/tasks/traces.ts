import { expect } from 'vitest';
import type { Answer, TestServer } from '../support/server.ts';

/** What the audit log says of a task, oldest first. */
export async function auditOf(server: TestServer, taskId: number) {
  const { rows } = await server.db.query<{
    operation: string;
    user_id: number;
    owner_id: number;
    request_id: string;
    changed_fields: Record<string, { old: unknown; new: unknown }>;
  }>({
    text: `select operation, user_id, owner_id, request_id, changed_fields from audit_log
      where entity_type = 'task' and entity_id = $1 order by id`,
    values: [taskId],
  });
  return rows;
}

/** The events of a task, oldest first, whether the relay has given them their place or not. */
export async function eventsOf(server: TestServer, taskId: number) {
  const { rows } = await server.db.query<{ type: string; user_id: number; data: string }>({
    text: `select type, user_id, data from (
        select 0 as waits, event_id as place, type, user_id, data from events where task_id = $1
        union all select 1, id, type, user_id, data from event_outbox where task_id = $1
      ) e order by waits, place`,
    values: [taskId],
  });
  return rows.map(({ data, ...event }) => ({ ...event, data: JSON.parse(data) as Record<string, unknown> }));
}

/** Everything that a write of a task leaves behind, to be compared with itself where nothing may change. */
export async function tracesOf(server: TestServer, taskId: number) {
  const { rows } = await server.db.query<Record<string, unknown>>({
    text: 'select * from tasks where id = $1',
    values: [taskId],
  });
  return { row: rows[0], audit: await auditOf(server, taskId), events: await eventsOf(server, taskId) };
}

/** Expects a problem of this status; with `path`, one that names this field. Answers the field's message. */
export function expectProblem(answer: Answer, status: number, path?: string): string {
  expect(answer, JSON.stringify(answer.body)).toMatchObject({
    status,
    body: { status, type: expect.stringMatching(/^urn:muster:problem:/), detail: expect.any(String) },
  });
  expect(answer.headers.get('content-type')).toMatch(/^application\/problem\+json/);
  if (path === undefined) return answer.body.detail;
  const errors = (answer.body.errors ?? []) as { path: string; message: string }[];
  expect(errors.map((error) => error.path)).toContain(path);
  return errors.find((error) => error.path === path)?.message ?? '';
}

/** A project of a user. */
export async function makeProject(server: TestServer, userId: number, status = 'active'): Promise<number> {
  const { rows } = await server.db.query<{ id: number }>({
    text: `insert into projects (user_id, name, status) values ($1, 'a project', $2) returning id`,
    values: [userId, status],
  });
  return rows[0]?.id ?? 0;
}

/** How many tasks a project says it has. */
export async function tasksCount(server: TestServer, projectId: number): Promise<number | undefined> {
  const { rows } = await server.db.query<{ tasks_count: number }>({
    text: 'select tasks_count from projects where id = $1',
    values: [projectId],
  });
  return rows[0]?.tasks_count;
}
