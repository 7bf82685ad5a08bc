import type { App, Deps } from '../http/app.ts';
import { idParams, toTime } from '../http/validation.ts';
import { cancelExecution, completeExecution, getExecution, heartbeatExecution, listExecutions } from './executions.ts';
import {
  completeBody,
  executionDetail,
  executionDetailView,
  executionList,
  executionQuery,
  executionSummaryView,
  heartbeatAnswer,
  heartbeatBody,
} from './schemas.ts';

/** Runs: what people look at and cancel, and what agents report. */
export function executionRoutes(app: App, { db, config }: Deps): void {
  const tags = ['executions'];
  const read = { access: { rule: 'owner', scopes: ['read'] }, limit: 'activity' } as const;
  const report = { access: { rule: 'owner', scopes: ['agent'] }, limit: 'activity' } as const;

  app.get(
    '/executions',
    {
      config: read,
      schema: { tags, summary: 'List runs', querystring: executionQuery, response: { 200: executionList } },
    },
    async (request) => {
      const { rows, ...page } = await listExecutions(db, request.actor, request.query);
      return { executions: rows.map(executionSummaryView), ...page };
    },
  );

  app.get(
    '/executions/:id',
    {
      config: read,
      schema: {
        tags,
        summary: 'One run with the whole of its output',
        params: idParams,
        response: { 200: executionDetail },
      },
    },
    async (request) => executionDetailView(await getExecution(db, request.actor, request.params.id)),
  );

  app.post(
    '/executions/:id/heartbeat',
    {
      config: report,
      schema: {
        tags,
        summary: 'Extend the lease on a run and tell its progress',
        params: idParams,
        body: heartbeatBody,
        response: { 200: heartbeatAnswer },
      },
    },
    async (request) => {
      const { lease_token: leaseToken, progress } = request.body;
      const beat = await db.transaction((tx) =>
        heartbeatExecution(tx, request.actor, request.params.id, {
          leaseToken,
          progress: progress as { percent?: number; message?: string } | undefined,
          leaseSeconds: config.LEASE_SECONDS,
        }),
      );
      return { cancel_requested: beat.cancelRequested, lease_expires_at: toTime(beat.leaseExpiresAt) };
    },
  );

  app.post(
    '/executions/:id/complete',
    {
      config: report,
      schema: {
        tags,
        summary: 'Report the result of a run',
        params: idParams,
        body: completeBody,
        response: { 200: executionDetail },
      },
      // An output of the longest kind grows when it is written as JSON; what is too long is cut, not refused.
      bodyLimit: Math.max(config.BODY_LIMIT_BYTES, 8 * 1_048_576),
    },
    async (request) => {
      const { lease_token: leaseToken, ...rest } = request.body;
      return executionDetailView(
        await db.transaction((tx) => completeExecution(tx, request.actor, request.params.id, { leaseToken, ...rest })),
      );
    },
  );

  app.post(
    '/executions/:id/cancel',
    {
      config: { access: { rule: 'owner', scopes: ['write'] }, limit: 'activity' },
      schema: { tags, summary: 'Cancel a run', params: idParams, response: { 200: executionDetail } },
    },
    async (request) =>
      executionDetailView(await db.transaction((tx) => cancelExecution(tx, request.actor, request.params.id))),
  );
}
