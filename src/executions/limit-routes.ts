import { z } from 'zod';
import type { App, Deps } from '../http/app.ts';
import { etag, ifMatchHeaders, versions } from '../http/etag.ts';
import { idParams } from '../http/validation.ts';
import { limitAnswer, limitList, limitQuery, limitView, setLimitBody } from './limit-schemas.ts';
import { deleteLimit, getLimit, listLimits, setLimit } from './limits.ts';

/** Concurrency limits: how many runs of an owner, or of one of its skills, may be under way at once. */
export function limitRoutes(app: App, { db }: Deps): void {
  const read = { access: { rule: 'owner', scopes: ['read'] } } as const;
  const write = { access: { rule: 'owner', scopes: ['write'] } } as const;
  const tags = ['concurrency limits'];

  app.put(
    '/concurrency-limits',
    {
      config: write,
      schema: {
        tags,
        summary: 'Limit how many runs are under way at once, of a skill or of all together',
        description:
          'Makes the limit, or changes the one that there is; what changes nothing does nothing. No agent is given a run beyond it. What is under way goes on.',
        headers: ifMatchHeaders,
        body: setLimitBody,
        response: { 200: limitAnswer, 201: limitAnswer },
      },
    },
    async (request, reply) => {
      const { actor, headers } = request;
      const { user_id: userId, skill_name: skillName = null, max_running: maxRunning } = request.body;
      const { limit, created } = await db.transaction((tx) =>
        setLimit(tx, actor, { userId, skillName, maxRunning }, versions(headers['if-match'])),
      );
      if (created) reply.code(201).header('location', `/api/v1/concurrency-limits/${limit.id}`);
      return reply.header('etag', etag(limit)).send(limitView(limit));
    },
  );

  app.get(
    '/concurrency-limits',
    {
      config: read,
      schema: {
        tags,
        summary: 'List concurrency limits, newest first unless asked otherwise',
        querystring: limitQuery,
        response: { 200: limitList },
      },
    },
    async (request) => {
      const { rows, ...page } = await listLimits(db, request.actor, request.query);
      return { concurrency_limits: rows.map(limitView), ...page };
    },
  );

  app.get(
    '/concurrency-limits/:id',
    {
      config: read,
      schema: { tags, summary: 'Get a concurrency limit', params: idParams, response: { 200: limitAnswer } },
    },
    async (request, reply) => {
      const limit = await getLimit(db, request.actor, request.params.id);
      return reply.header('etag', etag(limit)).send(limitView(limit));
    },
  );

  app.delete(
    '/concurrency-limits/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Remove a concurrency limit',
        params: idParams,
        headers: ifMatchHeaders,
        response: { 204: z.null() },
      },
    },
    async (request, reply) => {
      const { actor, params, headers } = request;
      await db.transaction((tx) => deleteLimit(tx, actor, params.id, versions(headers['if-match'])));
      return reply.code(204).send(null);
    },
  );
}
