import { z } from 'zod';
import type { App, Deps } from '../http/app.ts';
import { etag, ifMatchHeaders, versions } from '../http/etag.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { idParams } from '../http/validation.ts';
import { listTasks } from '../tasks/queries.ts';
import { taskSummaryView } from '../tasks/schemas.ts';
import { createProject, deleteProject, updateProject } from './projects.ts';
import { getProject, listProjects } from './queries.ts';
import {
  createProjectBody,
  projectAnswer,
  projectDetail,
  projectDetailQuery,
  projectList,
  projectQuery,
  projectView,
  updateProjectBody,
} from './schemas.ts';

/** Projects: what tasks are grouped in. */
export function projectRoutes(app: App, { db }: Deps): void {
  const read = { access: { rule: 'owner', scopes: ['read'] } } as const;
  const write = { access: { rule: 'owner', scopes: ['write'] } } as const;
  const tags = ['projects'];

  app.post(
    '/projects',
    {
      config: write,
      schema: {
        tags,
        summary: 'Create a project',
        headers: idempotencyHeaders,
        body: createProjectBody,
        response: { 201: projectAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const project = await createProject(tx, request.actor, request.body);
        const headers = { location: `/api/v1/projects/${project.id}`, etag: etag(project) };
        return { status: 201, headers, body: projectView(project) };
      }),
  );

  app.get(
    '/projects',
    {
      config: read,
      schema: {
        tags,
        summary: 'List projects, newest first unless asked otherwise',
        querystring: projectQuery,
        response: { 200: projectList },
      },
    },
    async (request) => {
      const { rows, ...page } = await listProjects(db, request.actor, request.query);
      return { projects: rows.map(projectView), ...page };
    },
  );

  app.get(
    '/projects/:id',
    {
      config: read,
      schema: {
        tags,
        summary: 'Get a project and its tasks, newest first',
        params: idParams,
        querystring: projectDetailQuery,
        response: { 200: projectDetail },
      },
    },
    async (request, reply) => {
      const { tasks_limit: limit, tasks_cursor: cursor } = request.query;
      const project = await getProject(db, request.actor, request.params.id);
      const tasks = await listTasks(db, request.actor, { project_id: project.id, limit, cursor, total: false });
      return reply.header('etag', etag(project)).send({
        ...projectView(project),
        tasks: tasks.rows.map(taskSummaryView),
        tasks_has_more: tasks.has_more,
        tasks_next_cursor: tasks.next_cursor,
      });
    },
  );

  app.put(
    '/projects/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Change the given fields of a project',
        description: 'What changes nothing does nothing. `status` does what archive and restore do.',
        params: idParams,
        headers: ifMatchHeaders,
        body: updateProjectBody,
        response: { 200: projectAnswer },
      },
    },
    async (request, reply) => {
      const { actor, params, body, headers } = request;
      const project = await db.transaction((tx) =>
        updateProject(tx, actor, params.id, body, versions(headers['if-match'])),
      );
      return reply.header('etag', etag(project)).send(projectView(project));
    },
  );

  app.delete(
    '/projects/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Delete a project with its tasks, and cancel their queued runs',
        params: idParams,
        headers: ifMatchHeaders,
        response: { 204: z.null() },
      },
    },
    async (request, reply) => {
      const { actor, params, headers } = request;
      await db.transaction((tx) => deleteProject(tx, actor, params.id, versions(headers['if-match'])));
      return reply.code(204).send(null);
    },
  );

  for (const [verb, status, summary, description] of [
    [
      'archive',
      'archived',
      'Archive a project',
      'It takes no new tasks, and its tasks that have a next time are paused. What is queued or under way goes on.',
    ],
    [
      'restore',
      'active',
      'Restore an archived project',
      'Resumes the tasks that archiving paused, except those paused or resumed by hand since.',
    ],
  ] as const) {
    app.post(
      `/projects/:id/${verb}`,
      {
        config: write,
        schema: { tags, summary, description, params: idParams, response: { 200: projectAnswer } },
      },
      async (request, reply) => {
        const { actor, params } = request;
        const project = await db.transaction((tx) => updateProject(tx, actor, params.id, { status }, undefined));
        return reply.header('etag', etag(project)).send(projectView(project));
      },
    );
  }
}
