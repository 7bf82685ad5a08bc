import pg from 'pg';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { SCHEDULE_TOPIC } from '../../src/tasks/next-times.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { complete, makeAgent, makeTask, unique, until } from '../support/work.ts';
import { auditOf, eventsOf, expectProblem, makeProject, tasksCount, tracesOf } from './traces.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

const put = (id: number, body: unknown, headers?: Record<string, string>) =>
  user.call('PUT', `/tasks/${id}`, body, headers);
const post = (id: number, what: string, body?: unknown) => user.call('POST', `/tasks/${id}/${what}`, body);
const get = async (id: number) => (await user.call('GET', `/tasks/${id}`)).body;
const inMs = (ms: number) => new Date(Date.now() + ms).toISOString();
const HOUR = 3_600_000;

/** What the last write of a task left: its audit entry, and the events after the first `skip`. */
async function lastTraces(id: number, skip: number) {
  const audit = await auditOf(server, id);
  return { audit: audit.at(-1), audits: audit.length, events: (await eventsOf(server, id)).slice(skip) };
}

/** Expects that `act` leaves the task, its audit entries and its events exactly as they were. */
async function leavesNoTrace(id: number, act: () => Promise<unknown>) {
  const before = await tracesOf(server, id);
  await act();
  expect(await tracesOf(server, id)).toEqual(before);
}

/** A task that fires at once, and its run as claimed by an agent. */
async function running(fields: Record<string, unknown> = {}) {
  const skill = unique('skill');
  const agent = await makeAgent(user.call);
  const task = await makeTask(user.call, { skill_name: skill, run_at: inMs(0), max_attempts: 1, ...fields });
  return { task, run: await agent.claimOne([skill]), agent };
}

describe('PUT /tasks/{id}', () => {
  test('changes what is given and nothing else', async () => {
    const task = await makeTask(user.call, { name: 'Old', params: { a: 1 }, priority: 'low' });
    const answer = await put(task.id, { name: ' New ', priority: 'critical' });
    expect(answer.status).toBe(200);
    expect(answer.headers.get('etag')).toBe('"2"');
    expect(answer.body).toEqual({
      ...task,
      name: 'New',
      priority: 'critical',
      version: 2,
      updated_at: expect.any(String),
    });
    expect(Date.parse(answer.body.updated_at)).toBeGreaterThanOrEqual(Date.parse(task.updated_at));
    expect(await get(task.id)).toEqual({ ...answer.body, executions: [] });
    const { audit, audits, events } = await lastTraces(task.id, 1);
    expect(audits).toBe(2);
    expect(audit).toMatchObject({ operation: 'UPDATE', user_id: user.id, owner_id: user.id });
    expect(audit?.changed_fields).toEqual({
      name: { old: 'Old', new: 'New' },
      priority: { old: 'low', new: 'critical' },
    });
    expect(events).toEqual([
      {
        type: 'task_status_update',
        user_id: user.id,
        data: expect.objectContaining({ task_id: task.id, status: 'pending', previous_status: 'pending' }),
      },
    ]);
  });

  test('changes every writable field', async () => {
    const project = await makeProject(server, user.id);
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call);
    const changes = {
      name: 'N',
      skill_name: 'other',
      project_id: project,
      params: { b: [2] },
      priority: 'high',
      schedule_cron: '@yearly',
      timezone: 'Asia/Tokyo',
      overlap_policy: 'allow',
      misfire_policy: 'skip',
      max_attempts: 7,
      retry_backoff_seconds: 1,
      timeout_seconds: 2,
      agent_id: agent.id,
      required_capabilities: ['x'],
    };
    const answer = await put(task.id, changes);
    expect(answer.body).toMatchObject({ ...changes, version: 2 });
    expect(answer.body.next_run_at).toMatch(/-12-31T15:00:00\.000Z$/);
    const { audit } = await lastTraces(task.id, 0);
    expect(Object.keys(audit?.changed_fields ?? {}).sort()).toEqual([...Object.keys(changes), 'next_run_at'].sort());
    // And null empties what can be empty.
    const emptied = { name: null, project_id: null, schedule_cron: null, agent_id: null };
    expect((await put(task.id, emptied)).body).toMatchObject({ ...emptied, next_run_at: null, version: 3 });
    expect(await tasksCount(server, project)).toBe(0);
  });

  test('that changes nothing does nothing', async () => {
    const project = await makeProject(server, user.id);
    const given = {
      name: 'N',
      params: { a: { x: 1, y: -0 }, list: [1, 2] },
      project_id: project,
      schedule_cron: '0 12 15 7 *',
      timezone: 'Europe/Rome',
      required_capabilities: ['a', 'b'],
    };
    const task = await makeTask(user.call, given);
    for (const same of [
      given,
      { name: '  N ' },
      { params: { list: [1, 2], a: { y: 0, x: 1 } } },
      { run_at: null, agent_id: null },
      { priority: 'medium', max_attempts: 3 },
    ]) {
      await leavesNoTrace(task.id, async () => {
        const answer = await put(task.id, same);
        expect(answer.status).toBe(200);
        expect(answer.body).toEqual(task);
        expect(answer.headers.get('etag')).toBe('"1"');
      });
    }
    expect(await tasksCount(server, project)).toBe(1);
  });

  test('sets the next time anew for a new schedule or zone, and tells calendars', async () => {
    const task = await makeTask(user.call, { schedule_cron: '0 12 15 7 *', timezone: 'Europe/Rome', name: 'Noon' });
    expect(task.next_run_at).toMatch(/-07-15T10:00:00\.000Z$/);
    const moved = await put(task.id, { timezone: 'America/New_York' });
    expect(moved.body.next_run_at).toMatch(/-07-15T16:00:00\.000Z$/);
    const { audit, events } = await lastTraces(task.id, 2);
    expect(audit?.changed_fields).toEqual({
      timezone: { old: 'Europe/Rome', new: 'America/New_York' },
      next_run_at: { old: task.next_run_at, new: moved.body.next_run_at },
    });
    expect(events).toMatchObject([
      { type: 'task_status_update', data: { next_run_at: moved.body.next_run_at } },
      {
        type: 'calendar_event_updated',
        data: { title: 'Noon', start_time: moved.body.next_run_at, timezone: 'America/New_York' },
      },
    ]);
    expect((await put(task.id, { schedule_cron: '0 12 15 1 *' })).body.next_run_at).toMatch(/-01-15T17:00:00\.000Z$/);
  });

  test('tells calendars of a new title, and of nothing that they do not show', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    await put(task.id, { params: { a: 1 } });
    await put(task.id, { name: 'Title' });
    const { events } = await lastTraces(task.id, 2);
    expect(events.map(({ type }) => type)).toEqual([
      'task_status_update',
      'task_status_update',
      'calendar_event_updated',
    ]);
    expect(events.at(-1)?.data).toMatchObject({ title: 'Title', start_time: task.next_run_at });
  });

  test('turns a schedule into a one-off and back, and on demand', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    const run_at = inMs(HOUR);
    expectProblem(await put(task.id, { run_at }), 400, 'body.run_at');
    expect((await put(task.id, { run_at, schedule_cron: null })).body).toMatchObject({
      run_at,
      next_run_at: run_at,
      schedule_cron: null,
    });
    expectProblem(await put(task.id, { schedule_cron: '@daily' }), 400, 'body.run_at');
    const onDemand = await put(task.id, { run_at: null });
    expect(onDemand.body).toMatchObject({ run_at: null, next_run_at: null, status: 'pending' });
    const gone = (await eventsOf(server, task.id)).at(-1);
    expect(gone).toMatchObject({ type: 'calendar_event_deleted', data: { start_time: run_at } });
    await put(task.id, { schedule_cron: '@daily' });
    expect((await eventsOf(server, task.id)).at(-1)?.type).toBe('calendar_event_created');
  });

  test('fires at the new time of a one-off', async () => {
    const skill = unique('skill');
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { skill_name: skill, run_at: inMs(HOUR) });
    const waiting = agent.claimOne([skill]);
    const run_at = inMs(300);
    expect((await put(task.id, { run_at })).status).toBe(200);
    expect(await waiting).toMatchObject({ task_id: task.id, scheduled_for: run_at });
  });

  test.each([
    ['completed', 'success'],
    ['failed', 'failed'],
  ])('a %s one-off that gets a new time waits again', async (ended, status) => {
    const { task, run } = await running();
    expect((await complete(user.call, run, { status })).status).toBe(200);
    await server.db.query({
      text: `update tasks set run_at = run_at - interval '1 hour' where id = $1`,
      values: [task.id],
    });
    const before = await get(task.id);
    expect(before).toMatchObject({ status: ended, next_run_at: null });
    // Its old time has long passed; sending it along changes nothing.
    const renamed = await put(task.id, { run_at: before.run_at, name: 'Again' });
    expect(renamed.body).toMatchObject({ status: ended, name: 'Again', next_run_at: null });
    const run_at = inMs(HOUR);
    expect((await put(task.id, { run_at })).body).toMatchObject({ status: 'pending', next_run_at: run_at });
    const { audit, events } = await lastTraces(task.id, -2);
    expect(audit?.changed_fields).toMatchObject({ status: { old: ended, new: 'pending' } });
    expect(events).toMatchObject([
      { type: 'task_status_update', data: { status: 'pending', previous_status: ended, next_run_at: run_at } },
      { type: 'calendar_event_created', data: { start_time: run_at } },
    ]);
  });

  test('does not take a time at which the task has run', async () => {
    const { task, run } = await running();
    await complete(user.call, run);
    await put(task.id, { run_at: inMs(HOUR) });
    expect(expectProblem(await put(task.id, { run_at: task.run_at }), 400, 'body.run_at')).toMatch(/has run/);
  });

  test('a running task stays running with a new schedule', async () => {
    const { task, run } = await running();
    const answer = await put(task.id, { run_at: null, schedule_cron: '@yearly' });
    expect(answer.body).toMatchObject({ status: 'running', next_run_at: expect.any(String) });
    await complete(user.call, run);
    expect(await get(task.id)).toMatchObject({ status: 'pending' });
  });

  test('a paused task keeps no next time until it is resumed', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    await post(task.id, 'pause');
    const changed = await put(task.id, { schedule_cron: '0 12 15 7 *' });
    expect(changed.body).toMatchObject({ status: 'disabled', next_run_at: null, schedule_cron: '0 12 15 7 *' });
    expect((await post(task.id, 'resume')).body.next_run_at).toMatch(/-07-15T12:00:00\.000Z$/);
  });

  test('moves a task between projects and keeps both counts', async () => {
    const [a, b] = [await makeProject(server, user.id), await makeProject(server, user.id)];
    const task = await makeTask(user.call, { project_id: a });
    await put(task.id, { project_id: b });
    expect([await tasksCount(server, a), await tasksCount(server, b)]).toEqual([0, 1]);
    await put(task.id, { project_id: null });
    expect([await tasksCount(server, a), await tasksCount(server, b)]).toEqual([0, 0]);
  });

  test('keeps the counts when tasks are moved to and fro at once', async () => {
    const [a, b] = [await makeProject(server, user.id), await makeProject(server, user.id)];
    const tasks = await Promise.all(
      Array.from({ length: 12 }, (_, i) => makeTask(user.call, { project_id: i % 2 ? a : b })),
    );
    const answers = await Promise.all(tasks.map((task, i) => put(task.id, { project_id: i % 2 ? b : a })));
    expect(answers.map(({ status }) => status)).toEqual(tasks.map(() => 200));
    expect([await tasksCount(server, a), await tasksCount(server, b)]).toEqual([6, 6]);
  });

  test('by an admin puts a task only into a project of its owner', async () => {
    const task = await makeTask(user.call);
    const ofAdmin = await makeProject(server, (await server.admin('GET', '/auth/me')).body.id);
    const ofUser = await makeProject(server, user.id);
    const by = (project_id: number) => server.admin('PUT', `/tasks/${task.id}`, { project_id });
    expectProblem(await by(ofAdmin), 400, 'body.project_id');
    expect((await by(ofUser)).body).toMatchObject({ project_id: ofUser, user_id: user.id });
    expect((await auditOf(server, task.id)).at(-1)).toMatchObject({
      owner_id: user.id,
      user_id: expect.not.toSatisfy((id: number) => id === user.id),
    });
  });

  test.each([
    ['no field', {}, 'body', /at least one/],
    ['a field that does not exist', { colour: 'red' }, 'body.colour', /not a known field/],
    ['the status', { status: 'pending' }, 'body.status', /not a known field/],
    ['the owner', { user_id: 1 }, 'body.user_id', /not a known field/],
    ['the version', { version: 7 }, 'body.version', /not a known field/],
    ['the next time', { next_run_at: '2999-01-01T00:00:00Z' }, 'body.next_run_at', /not a known field/],
    ['no skill', { skill_name: null }, 'body.skill_name', /./],
    ['no zone', { timezone: null }, 'body.timezone', /./],
    ['no params', { params: null }, 'body.params', /./],
    ['a bad schedule', { schedule_cron: '0 25 * * *' }, 'body.schedule_cron', /hour field/],
    ['a bad zone', { timezone: 'Mars/X' }, 'body.timezone', /IANA/],
    ['a time long past', { schedule_cron: null, run_at: '2020-01-01T00:00:00Z' }, 'body.run_at', /has passed/],
    ['a project that is not there', { project_id: 987_654_321 }, 'body.project_id', /no project/],
    ['an agent that is not there', { agent_id: 987_654_321 }, 'body.agent_id', /no agent/],
  ])('refuses %s', async (_what, body, path, message) => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    await leavesNoTrace(task.id, async () => {
      expect(expectProblem(await put(task.id, body), 400, path)).toMatch(message);
    });
  });
});

describe('If-Match', () => {
  test('lets a change through that was made to what is there', async () => {
    const task = await makeTask(user.call);
    const etag = (await user.call('GET', `/tasks/${task.id}`)).headers.get('etag') ?? '';
    expect(etag).toBe('"1"');
    expect((await put(task.id, { name: 'a' }, { 'if-match': etag })).headers.get('etag')).toBe('"2"');
    for (const header of ['*', '"2"', 'W/"2"', '"other", "2"', ' "2" ']) {
      expect((await put(task.id, { name: 'a' }, { 'if-match': header })).status).toBe(200);
    }
  });

  test.each(['"1"', 'W/"1"', '"1", "3"', '""', '"2 "', '"02x"'])(
    'refuses %s when the task is at "2"',
    async (header) => {
      const task = await makeTask(user.call);
      await put(task.id, { name: 'a' });
      await leavesNoTrace(task.id, async () => {
        expectProblem(await put(task.id, { name: 'b' }, { 'if-match': header }), 412);
        // Also for what would change nothing: the caller saw something else.
        expectProblem(await put(task.id, { name: 'a' }, { 'if-match': header }), 412);
        expectProblem(await user.call('DELETE', `/tasks/${task.id}`, undefined, { 'if-match': header }), 412);
      });
    },
  );

  test.each(['1', '"1', 'x', '"1" "2"', '*, "1"'])('says what %s should have been', async (header) => {
    const task = await makeTask(user.call);
    expectProblem(await put(task.id, { name: 'b' }, { 'if-match': header }), 400, 'headers.if-match');
  });

  test('lets one of many through who change the same version', async () => {
    const task = await makeTask(user.call);
    const answers = await Promise.all(
      Array.from({ length: 8 }, (_, i) => put(task.id, { name: `by ${i}` }, { 'if-match': '"1"' })),
    );
    expect(answers.map(({ status }) => status).sort()).toEqual([200, 412, 412, 412, 412, 412, 412, 412]);
    expect((await get(task.id)).version).toBe(2);
    expect(await auditOf(server, task.id)).toHaveLength(2);
  });

  test('is no part of what a run changes', async () => {
    const { task, run } = await running();
    expect((await get(task.id)).version).toBe(1);
    await complete(user.call, run);
    expect((await put(task.id, { name: 'after' }, { 'if-match': '"1"' })).status).toBe(200);
  });
});

describe('DELETE /tasks/{id}', () => {
  test('deletes softly, cancels what is queued, and tells of it', async () => {
    const project = await makeProject(server, user.id);
    const task = await makeTask(user.call, { schedule_cron: '@yearly', project_id: project });
    const runs = [(await post(task.id, 'run')).body.id, (await post(task.id, 'run')).body.id];
    const skip = (await eventsOf(server, task.id)).length;

    const answer = await user.call('DELETE', `/tasks/${task.id}`, undefined, { 'if-match': '"1"' });
    expect(answer.status).toBe(200);
    expect(answer.body).toEqual({ message: expect.any(String), task_id: task.id, status: 'deleted' });

    for (const id of runs) {
      expect((await user.call('GET', `/executions/${id}`)).body).toMatchObject({ status: 'cancelled' });
    }
    expect(await tasksCount(server, project)).toBe(0);
    const { audit, events } = await lastTraces(task.id, skip);
    expect(audit).toMatchObject({ operation: 'DELETE' });
    expect(audit?.changed_fields).toEqual({
      status: { old: 'pending', new: 'deleted' },
      next_run_at: { old: task.next_run_at, new: null },
    });
    expect(events).toMatchObject([
      { type: 'task_status_update', data: { status: 'deleted', previous_status: 'pending', next_run_at: null } },
      { type: 'calendar_event_deleted', data: { start_time: task.next_run_at } },
      { type: 'task_status_update', data: { status: 'deleted', execution_status: 'cancelled' } },
      { type: 'task_status_update', data: { status: 'deleted', execution_status: 'cancelled' } },
    ]);
  });

  test('makes every call answer 404, the second delete too, and leaves nothing more behind', async () => {
    const task = await makeTask(user.call);
    await user.call('DELETE', `/tasks/${task.id}`);
    await leavesNoTrace(task.id, async () => {
      for (const call of [user.call, server.admin]) {
        expectProblem(await call('DELETE', `/tasks/${task.id}`), 404);
        expectProblem(await call('GET', `/tasks/${task.id}`), 404);
        expectProblem(await call('GET', `/tasks/${task.id}/preview`), 404);
        expectProblem(await call('PUT', `/tasks/${task.id}`, { name: 'a' }), 404);
        for (const what of ['run', 'pause', 'resume']) {
          expectProblem(await call('POST', `/tasks/${task.id}/${what}`), 404);
        }
      }
    });
  });

  test('lets an agent that is at a run of it finish', async () => {
    const { task, run } = await running();
    expect((await user.call('DELETE', `/tasks/${task.id}`)).status).toBe(200);
    expect((await complete(user.call, run)).status).toBe(200);
    const { row } = await tracesOf(server, task.id);
    expect(row).toMatchObject({ status: 'deleted', next_run_at: null });
  });

  test('keeps a due task from firing', async () => {
    const soon = inMs(400);
    const task = await makeTask(user.call, { run_at: soon });
    await user.call('DELETE', `/tasks/${task.id}`);
    // Another one that is due later shows that the moment has passed.
    const { task: later } = await running({ run_at: inMs(600) });
    expect(Date.parse(later.run_at)).toBeGreaterThan(Date.parse(soon));
    const { rows } = await server.db.query({
      text: 'select id from occurrences where task_id = $1',
      values: [task.id],
    });
    expect(rows).toEqual([]);
  });
});

describe('POST /tasks/{id}/run', () => {
  test('queues a run now', async () => {
    const task = await makeTask(user.call, { params: { a: 1 }, schedule_cron: '@yearly' });
    const answer = await post(task.id, 'run');
    expect(answer.status).toBe(202);
    expect(answer.headers.get('location')).toBe(`/api/v1/executions/${answer.body.id}`);
    expect(answer.body).toMatchObject({
      task_id: task.id,
      trigger: 'manual',
      status: 'queued',
      attempt: 1,
      params: { a: 1 },
      output_preview: null,
    });
    expect(await get(task.id)).toEqual({ ...task, executions: [answer.body] });
    expect((await eventsOf(server, task.id)).at(-1)).toMatchObject({
      type: 'task_status_update',
      data: { execution_id: answer.body.id, execution_status: 'queued', status: 'pending' },
    });
  });

  test('with params of its own', async () => {
    const task = await makeTask(user.call, { params: { a: 1 } });
    expect((await post(task.id, 'run', { params: { b: 2 } })).body.params).toEqual({ b: 2 });
    expect((await post(task.id, 'run', {})).body.params).toEqual({ a: 1 });
    expect((await get(task.id)).params).toEqual({ a: 1 });
  });

  test('a paused, a completed and a failed task too', async () => {
    const paused = await makeTask(user.call);
    await post(paused.id, 'pause');
    expect((await post(paused.id, 'run')).status).toBe(202);
    expect((await get(paused.id)).status).toBe('disabled');
    for (const status of ['success', 'failed']) {
      const { task, run } = await running();
      await complete(user.call, run, { status });
      expect((await post(task.id, 'run')).status).toBe(202);
    }
  });

  test.each([
    [{ params: 5 }, 'body.params'],
    [{ params: null }, 'body.params'],
    [{ params: { a: 'x'.repeat(65_536) } }, 'body.params'],
    [{ parameters: {} }, 'body.parameters'],
    [[], 'body'],
  ])('refuses %j', async (body, path) => {
    const task = await makeTask(user.call);
    await leavesNoTrace(task.id, async () => expectProblem(await post(task.id, 'run', body), 400, path));
  });
});

describe('POST /tasks/{id}/pause and /resume', () => {
  test('take the next time away and give it back', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    const paused = await post(task.id, 'pause');
    expect(paused.status).toBe(200);
    expect(paused.body).toMatchObject({ status: 'disabled', next_run_at: null, version: 2 });
    expect(await lastTraces(task.id, 2)).toMatchObject({
      audit: {
        operation: 'UPDATE',
        changed_fields: {
          status: { old: 'pending', new: 'disabled' },
          next_run_at: { old: task.next_run_at, new: null },
        },
      },
      events: [
        { type: 'task_status_update', data: { status: 'disabled', previous_status: 'pending' } },
        { type: 'calendar_event_deleted', data: { start_time: task.next_run_at } },
      ],
    });
    const resumed = await post(task.id, 'resume');
    expect(resumed.body).toMatchObject({ status: 'pending', next_run_at: task.next_run_at, version: 3 });
    expect(await lastTraces(task.id, 4)).toMatchObject({
      audit: { changed_fields: { status: { old: 'disabled', new: 'pending' } } },
      events: [
        { type: 'task_status_update', data: { status: 'pending', previous_status: 'disabled' } },
        { type: 'calendar_event_created', data: { start_time: task.next_run_at } },
      ],
    });
  });

  test('that are so already do nothing', async () => {
    const task = await makeTask(user.call, { schedule_cron: '@yearly' });
    await leavesNoTrace(task.id, async () => expect((await post(task.id, 'resume')).body).toEqual(task));
    const paused = (await post(task.id, 'pause')).body;
    await leavesNoTrace(task.id, async () => {
      const again = await post(task.id, 'pause');
      expect([again.status, again.body]).toEqual([200, paused]);
    });
  });

  test.each([
    ['completed', 'success'],
    ['failed', 'failed'],
  ])('pausing a %s task is a conflict, resuming it does nothing', async (ended, status) => {
    const { task, run } = await running();
    await complete(user.call, run, { status });
    await leavesNoTrace(task.id, async () => {
      expect(expectProblem(await post(task.id, 'pause'), 409)).toContain(ended);
      expect((await post(task.id, 'resume')).status).toBe(200);
    });
  });

  test('leave the run alone that an agent is at', async () => {
    const { task, run } = await running({ run_at: null, schedule_cron: '* * * * * *' });
    expect((await post(task.id, 'pause')).body).toMatchObject({ status: 'disabled', next_run_at: null });
    expect((await post(task.id, 'resume')).body).toMatchObject({ status: 'running', next_run_at: expect.any(String) });
    await post(task.id, 'pause');
    expect((await complete(user.call, run)).status).toBe(200);
    expect(await get(task.id)).toMatchObject({ status: 'disabled' });
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  /** A paused one-off whose time was ten minutes ago. */
  const overdue = async (misfire_policy: string) => {
    const skill = unique('skill');
    const task = await makeTask(user.call, {
      skill_name: skill,
      run_at: inMs(HOUR),
      misfire_policy,
      max_lateness_seconds: 60,
    });
    await post(task.id, 'pause');
    await server.db.query({
      text: `update tasks set run_at = now() - interval '10 minutes' where id = $1`,
      values: [task.id],
    });
    const { run_at } = await get(task.id);
    return { task, skill, run_at };
  };
  const verdictsOf = async (id: number) => {
    const { rows } = await server.db.query<{ verdict: string; scheduled_for: Date }>({
      text: 'select verdict, scheduled_for from occurrences where task_id = $1',
      values: [id],
    });
    return rows.map((row) => [row.verdict, row.scheduled_for.toISOString()]);
  };

  test.each(['fire_last', 'fire_all'])(
    'a one-off whose time passed in the pause runs at once with %s',
    async (policy) => {
      const { task, skill, run_at } = await overdue(policy);
      const agent = await makeAgent(user.call);
      const waiting = agent.claimOne([skill]);
      expect((await post(task.id, 'resume')).body).toMatchObject({ status: 'pending', next_run_at: run_at });
      expect(await waiting).toMatchObject({ task_id: task.id, scheduled_for: run_at });
      expect(await verdictsOf(task.id)).toEqual([['late', run_at]]);
    },
  );

  test('a one-off whose time passed in the pause is left alone with skip', async () => {
    const { task, run_at } = await overdue('skip');
    await post(task.id, 'resume');
    const verdicts = await until(
      () => verdictsOf(task.id),
      (found) => found.length > 0,
    );
    expect(verdicts).toEqual([['skipped_misfire', run_at]]);
    expect((await get(task.id)).executions).toEqual([]);
  });

  test('a one-off that has fired does not fire again', async () => {
    const { task, run } = await running();
    expect((await post(task.id, 'pause')).body.status).toBe('disabled');
    expect((await post(task.id, 'resume')).body).toMatchObject({ status: 'running', next_run_at: null });
    await complete(user.call, run);
    expect(await get(task.id)).toMatchObject({ status: 'completed', next_run_at: null });
    expect(await verdictsOf(task.id)).toHaveLength(1);
  });

  test('an on-demand task pauses and resumes without a time', async () => {
    const task = await makeTask(user.call);
    expect((await post(task.id, 'pause')).body).toMatchObject({ status: 'disabled', next_run_at: null });
    expect((await post(task.id, 'resume')).body).toMatchObject({ status: 'pending', next_run_at: null });
  });

  test('take no body fields and no query', async () => {
    const task = await makeTask(user.call);
    expectProblem(await user.call('POST', `/tasks/${task.id}/pause?for=1h`), 400, 'query.for');
  });
});

describe('the scheduler', () => {
  test('is woken for every new next time, in every process', async () => {
    const listener = new pg.Client({ connectionString: server.databaseUrl });
    await listener.connect();
    const heard: string[] = [];
    listener.on('notification', ({ payload = '{}' }) => {
      const { rings = [] } = JSON.parse(payload) as { rings?: [topic: string, details: string[] | null][] };
      for (const [topic, details] of rings) if (topic === SCHEDULE_TOPIC) heard.push(...(details ?? []));
    });
    try {
      await listener.query('listen muster');
      const task = await makeTask(user.call, { schedule_cron: '@yearly', timezone: 'Asia/Tokyo' });
      const moved = await put(task.id, { timezone: 'Asia/Kathmandu' });
      await post(task.id, 'pause');
      const changed = await put(task.id, { timezone: 'Asia/Yangon' });
      expect(changed.body.next_run_at).toBe(null);
      const resumed = await post(task.id, 'resume');
      const times = [task.next_run_at, moved.body.next_run_at, resumed.body.next_run_at];
      expect(new Set(times).size).toBe(3);
      await until(
        async () => heard,
        (all) => times.every((time) => all.includes(time)),
      );
    } finally {
      await listener.end();
    }
  });
});

describe('one transaction', () => {
  test.each(['put', 'delete', 'pause', 'resume', 'run'] as const)(
    '%s writes nothing when its event cannot be',
    async (what) => {
      const project = await makeProject(server, user.id);
      const task = await makeTask(user.call, {
        skill_name: unique('skill'),
        schedule_cron: '@yearly',
        project_id: project,
      });
      if (what === 'resume') await post(task.id, 'pause');
      const trigger = unique('refuse').replaceAll('-', '_');
      await server.db.query({
        text: `create function ${trigger}() returns trigger language plpgsql as $$ begin
          if new.task_id = ${task.id} then raise exception 'refused'; end if; return new; end $$;
          create trigger ${trigger} before insert on event_outbox for each row execute function ${trigger}()`,
      });
      await leavesNoTrace(task.id, async () => {
        const answer = await {
          put: () => put(task.id, { name: 'b', schedule_cron: '@daily', project_id: null }),
          delete: () => user.call('DELETE', `/tasks/${task.id}`),
          pause: () => post(task.id, 'pause'),
          resume: () => post(task.id, 'resume'),
          run: () => post(task.id, 'run'),
        }[what]();
        expectProblem(answer, 500);
      });
      expect((await get(task.id)).executions).toEqual([]);
      expect(await tasksCount(server, project)).toBe(1);
    },
  );
});
