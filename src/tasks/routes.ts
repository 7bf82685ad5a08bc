import { recentExecutions } from '../executions/executions.ts';
import { executionSummary, executionSummaryView } from '../executions/schemas.ts';
import { mayAccess } from '../http/access.ts';
import type { App, Deps } from '../http/app.ts';
import { etag, ifMatchHeaders, versions } from '../http/etag.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { Problem } from '../http/problem.ts';
import { idParams, toTime } from '../http/validation.ts';
import { backfillAnswer, backfillBody, backfillTask } from './backfill.ts';
import { bulkAnswer, bulkBody, bulkTasks } from './bulk.ts';
import { calendar } from './calendar.ts';
import {
  calendarAnswer,
  calendarQuery,
  calendarView,
  occurrenceList,
  occurrenceQuery,
  occurrenceView,
} from './calendar-schemas.ts';
import { forecastAnswer, forecastQuery, forecastTasks } from './forecast.ts';
import { databaseNow } from './next-times.ts';
import { listOccurrences } from './occurrences.ts';
import { previewAnswer, previewBody, previewQuery, previewSchedule, previewTask } from './preview.ts';
import { getTask, listTasks, taskReader } from './queries.ts';
import {
  createTaskBody,
  historyQuery,
  pauseTaskBody,
  runTaskBody,
  taskAnswer,
  taskDeleted,
  taskDetail,
  taskList,
  taskQuery,
  taskSummaryView,
  taskView,
  updateTaskBody,
} from './schemas.ts';
import { createTask, deleteTask, pauseTask, resumeTask, runTask, updateTask } from './tasks.ts';

/** Tasks: what is to be run and when. */
export function taskRoutes(app: App, { db }: Deps): void {
  const read = { access: { rule: 'owner', scopes: ['read'] } } as const;
  const write = { access: { rule: 'owner', scopes: ['write'] } } as const;
  const tags = ['tasks'];
  const readTask = taskReader(db);

  app.post(
    '/tasks',
    {
      config: write,
      schema: {
        tags,
        summary: 'Create a task',
        description:
          'It runs by `schedule_cron` or once at `run_at`; with neither, only when asked to by `POST /tasks/{id}/run`.',
        headers: idempotencyHeaders,
        body: createTaskBody,
        response: { 201: taskAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const task = await createTask(tx, request.actor, request.body);
        const headers = { location: `/api/v1/tasks/${task.id}`, etag: etag(task) };
        return { status: 201, headers, body: taskView(task) };
      }),
  );

  app.get(
    '/tasks',
    {
      config: read,
      schema: {
        tags,
        summary: 'List tasks, newest first unless asked otherwise',
        querystring: taskQuery,
        response: { 200: taskList },
      },
    },
    async (request) => {
      const { rows, ...page } = await listTasks(db, request.actor, request.query);
      return { tasks: rows.map(taskSummaryView), ...page };
    },
  );

  app.get(
    '/tasks/:id',
    {
      config: read,
      schema: {
        tags,
        summary: 'Get a task and its latest runs',
        params: idParams,
        querystring: historyQuery,
        response: { 200: taskDetail },
      },
    },
    async (request, reply) => {
      const task = await readTask(request.actor, request.params.id);
      const executions = await recentExecutions(db, task.id, request.query.history_limit);
      return reply
        .header('etag', etag(task))
        .send({ ...taskView(task), executions: executions.map(executionSummaryView) });
    },
  );

  app.put(
    '/tasks/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Change the given fields of a task',
        description:
          '`null` empties a field that can be empty. A new schedule sets the next time. What changes nothing does nothing.',
        params: idParams,
        headers: ifMatchHeaders,
        body: updateTaskBody,
        response: { 200: taskAnswer },
      },
    },
    async (request, reply) => {
      const task = await db.transaction((tx) =>
        updateTask(tx, request.actor, request.params.id, request.body, versions(request.headers['if-match'])),
      );
      return reply.header('etag', etag(task)).send(taskView(task));
    },
  );

  app.delete(
    '/tasks/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Delete a task and cancel its queued runs',
        params: idParams,
        headers: ifMatchHeaders,
        response: { 200: taskDeleted },
      },
    },
    async (request) => {
      const task = await db.transaction((tx) =>
        deleteTask(tx, request.actor, request.params.id, versions(request.headers['if-match'])),
      );
      return { message: `The task ${task.id} was deleted.`, task_id: task.id, status: 'deleted' as const };
    },
  );

  app.post(
    '/tasks/:id/run',
    {
      config: write,
      schema: {
        tags,
        summary: 'Run a task now',
        description: 'Queues a run whatever the schedule says; paused tasks run too.',
        params: idParams,
        headers: idempotencyHeaders,
        body: runTaskBody,
        response: { 202: executionSummary },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const run = await runTask(tx, request.actor, request.params.id, request.body?.params);
        const headers = { location: `/api/v1/executions/${run.id}` };
        return { status: 202, headers, body: executionSummaryView({ ...run, outputPreview: null }) };
      }),
  );

  app.post(
    '/tasks/:id/backfill',
    {
      config: write,
      schema: {
        tags,
        summary: 'Make up for ticks of the past',
        description:
          'Queues a run for each tick of the schedule from `from` to before `to` that has none which is open or succeeded, 1,000 at the most; of paused tasks too. With `overlap_policy` `allow` they are offered at once, else one after the other. With `dry_run` the answer is a 200 that says what would happen.',
        params: idParams,
        headers: idempotencyHeaders,
        body: backfillBody,
        response: { 200: backfillAnswer, 202: backfillAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => ({
        status: request.body.dry_run ? 200 : 202,
        body: await backfillTask(tx, request.actor, request.params.id, request.body),
      })),
  );

  app.post(
    '/tasks/:id/pause',
    {
      config: write,
      schema: {
        tags,
        summary: 'Pause a task: nothing fires until it is resumed, or until a time',
        description: 'Its ticks meanwhile are noted as `paused`. A paused task gets the new end of its pause.',
        params: idParams,
        body: pauseTaskBody,
        response: { 200: taskAnswer },
      },
    },
    async (request, reply) => {
      const task = await db.transaction((tx) =>
        pauseTask(tx, request.actor, request.params.id, request.body?.until ?? null),
      );
      return reply.header('etag', etag(task)).send(taskView(task));
    },
  );

  app.post(
    '/tasks/:id/resume',
    {
      config: write,
      schema: {
        tags,
        summary: 'Resume a paused task',
        description:
          'A schedule goes on with its next time from now. A one-off whose time passed in the pause runs at once, unless its `misfire_policy` is `skip`.',
        params: idParams,
        response: { 200: taskAnswer },
      },
    },
    async (request, reply) => {
      const task = await db.transaction((tx) => resumeTask(tx, request.actor, request.params.id));
      return reply.header('etag', etag(task)).send(taskView(task));
    },
  );

  app.post(
    '/tasks/bulk',
    {
      config: write,
      schema: {
        tags,
        summary: 'Do one thing to many tasks: pause, resume, delete, run, cancel',
        description: 'In one transaction. The answer says of each task what became of it; `dry_run` what would.',
        headers: idempotencyHeaders,
        body: bulkBody,
        response: { 200: bulkAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => ({
        status: 200,
        body: await bulkTasks(tx, request.actor, request.body),
      })),
  );

  app.get(
    '/tasks/:id/occurrences',
    {
      config: read,
      schema: {
        tags,
        summary: 'Every tick of a task and what became of it, newest first',
        params: idParams,
        querystring: occurrenceQuery,
        response: { 200: occurrenceList },
      },
    },
    async (request) => {
      const task = await getTask(db, request.actor, request.params.id);
      const { rows, ...page } = await listOccurrences(db, task.id, request.query);
      return { occurrences: rows.map(occurrenceView), ...page };
    },
  );

  app.get(
    '/calendar',
    {
      config: { access: { rule: 'self', scopes: ['read'] } },
      schema: {
        tags: ['calendar'],
        summary: 'Every time at which your tasks fired or will fire in a window',
        description: 'The past as it was recorded, the future by the schedules; soonest first, 5,000 at the most.',
        querystring: calendarQuery,
        response: { 200: calendarAnswer },
      },
    },
    async (request) => {
      const { actor, query } = request;
      const { from, to, project_id: projectId, skill_name: skillName, user_id: userId = actor.userId } = query;
      if (!mayAccess(actor, userId))
        throw new Problem('forbidden', 'Only an admin may look at the calendar of others.');
      const { entries, truncated } = await calendar(db, { userId, from, to, projectId, skillName, limit: 5_000 });
      return { from: toTime(from), to: toTime(to), entries: entries.map(calendarView), truncated };
    },
  );

  app.get(
    '/forecast',
    {
      config: { access: { rule: 'self', scopes: ['read'] } },
      schema: {
        tags: ['calendar'],
        summary: 'How much your schedules will ask of your agents, and what to shift',
        description:
          'The times of the active tasks, each for as long as 95 % of its runs took, give how many runs go at once, minute by minute. A task whose runs may not overlap counts once. The proposals are what one finds who puts the tasks down one by one, those that have the least room to move first, each at the next whole minute where it fits. Shared agents and retries play no part.',
        querystring: forecastQuery,
        response: { 200: forecastAnswer },
      },
    },
    async (request) => {
      const { actor, query } = request;
      const { user_id: userId = actor.userId } = query;
      if (!mayAccess(actor, userId)) throw new Problem('forbidden', 'Only an admin may look at the load of others.');
      return forecastTasks(db, userId, query);
    },
  );

  app.get(
    '/tasks/:id/preview',
    {
      config: read,
      schema: {
        tags,
        summary: 'The next times of a task',
        description: 'By its schedule alone: whether it is paused plays no part.',
        params: idParams,
        querystring: previewQuery,
        response: { 200: previewAnswer },
      },
    },
    async (request) => {
      const { from, count } = request.query;
      const task = await getTask(db, request.actor, request.params.id);
      return { runs: await previewTask(task, from, await databaseNow(db), count) };
    },
  );

  app.post(
    '/tasks/preview',
    {
      config: { access: { rule: 'self', scopes: ['read'] } },
      schema: {
        tags,
        summary: 'The next times of a schedule, before a task is made of it',
        body: previewBody,
        response: { 200: previewAnswer },
      },
    },
    async (request) => ({ runs: await previewSchedule(request.body, request.body.from ?? (await databaseNow(db))) }),
  );
}
