import type { App, Deps } from '../http/app.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { conflict } from '../http/problem.ts';
import { idParams, toTime } from '../http/validation.ts';
import { runTaskBody } from '../tasks/schemas.ts';
import { bulkExecutions, bulkRunsAnswer, bulkRunsBody } from './bulk.ts';
import { cancelExecution, getExecution, listExecutions } from './executions.ts';
import { adoptOrphan, listOrphans } from './orphans.ts';
import { appendOutput, readOutput } from './output.ts';
import { replayExecution } from './replay.ts';
import { completeExecution, heartbeatExecution } from './reports.ts';
import {
  completeBody,
  executionDetail,
  executionDetailView,
  executionList,
  executionQuery,
  executionSummary,
  executionSummaryView,
  heartbeatAnswer,
  heartbeatBody,
  orphanList,
  orphanQuery,
  orphanView,
  outputAnswer,
  outputBody,
  outputQuery,
  outputRange,
} from './schemas.ts';

/** Runs: what people look at and cancel, and what agents report. */
export function executionRoutes(app: App, { db, config }: Deps): void {
  const tags = ['executions'];
  const read = { access: { rule: 'owner', scopes: ['read'] }, limit: 'activity' } as const;
  const write = { access: { rule: 'owner', scopes: ['write'] }, limit: 'activity' } as const;
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
        description:
          'Whose lease is over is answered 409 and changes nothing; the first report under a lease that was taken away is kept, for the owner to adopt.',
        params: idParams,
        body: completeBody,
        response: { 200: executionDetail },
      },
      // An output of the longest kind grows when it is written as JSON; what is too long is cut, not refused.
      bodyLimit: Math.max(config.BODY_LIMIT_BYTES, 8 * 1_048_576),
    },
    async (request) => {
      const { actor, params, body } = request;
      const done = await db.transaction((tx) =>
        completeExecution(tx, actor, params.id, {
          leaseToken: body.lease_token,
          status: body.status,
          output: body.output,
          error: body.error,
          result: body.result,
          retryAfterSeconds: body.retry_after_seconds,
          nonRetryable: body.non_retryable,
        }),
      );
      if ('run' in done) return executionDetailView(done.run);
      throw conflict(
        `The lease on execution ${params.id} is not yours any more, and nothing of the run has changed; your report is kept as orphan result ${done.orphan}, which its owner may adopt.`,
      );
    },
  );

  app.post(
    '/executions/:id/output',
    {
      config: report,
      schema: {
        tags,
        summary: 'Send a piece of the output of a run that goes on',
        description:
          'Pieces are put together in their order. One that came already is answered as the first time; one that leaves a gap is a 409 that names the offset that is expected. It does not extend the lease.',
        params: idParams,
        body: outputBody,
        response: { 200: outputAnswer },
      },
    },
    async (request) => {
      const { lease_token: leaseToken, text, offset } = request.body;
      const { nextOffset, truncated } = await db.transaction((tx) =>
        appendOutput(tx, request.actor, request.params.id, { leaseToken, text, offset }),
      );
      return { next_offset: nextOffset, truncated };
    },
  );

  app.get(
    '/executions/:id/output',
    {
      config: read,
      schema: {
        tags,
        summary: 'A range of the output of a run, while it goes on and after',
        params: idParams,
        querystring: outputQuery,
        response: { 200: outputRange },
      },
    },
    async (request) => {
      const { offset } = request.query;
      const { text, nextOffset, length, complete } = await readOutput(
        db,
        request.actor,
        request.params.id,
        request.query,
      );
      return { execution_id: request.params.id, offset, text, next_offset: nextOffset, length, complete };
    },
  );

  app.get(
    '/executions/:id/orphan-results',
    {
      config: read,
      schema: {
        tags,
        summary: 'Late results of a run: reports under a lease that was lost',
        params: idParams,
        querystring: orphanQuery,
        response: { 200: orphanList },
      },
    },
    async (request) => {
      const { rows, ...page } = await listOrphans(db, request.actor, request.query, request.params.id);
      return { orphan_results: rows.map(orphanView), ...page };
    },
  );

  app.get(
    '/orphan-results',
    {
      config: read,
      schema: { tags, summary: 'List late results', querystring: orphanQuery, response: { 200: orphanList } },
    },
    async (request) => {
      const { rows, ...page } = await listOrphans(db, request.actor, request.query);
      return { orphan_results: rows.map(orphanView), ...page };
    },
  );

  app.post(
    '/orphan-results/:id/adopt',
    {
      config: { access: { rule: 'owner', scopes: ['write'] } },
      schema: {
        tags,
        summary: 'Take a late result for the result',
        description:
          'Makes a run of it, with the trigger `adopted`, and cancels a retry that waits. 409 when that was done already, when another attempt has succeeded, and while an agent is at a retry.',
        params: idParams,
        headers: idempotencyHeaders,
        response: { 201: executionDetail },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const run = await adoptOrphan(tx, request.actor, request.params.id);
        return { status: 201, headers: { location: `/api/v1/executions/${run.id}` }, body: executionDetailView(run) };
      }),
  );

  app.post(
    '/executions/:id/cancel',
    {
      config: write,
      schema: { tags, summary: 'Cancel a run', params: idParams, response: { 200: executionDetail } },
    },
    async (request) =>
      executionDetailView(await db.transaction((tx) => cancelExecution(tx, request.actor, request.params.id))),
  );

  app.post(
    '/executions/:id/replay',
    {
      config: write,
      schema: {
        tags,
        summary: 'Run again what a run was',
        description:
          'Queues a run with the skill and the params of one that has ended, for the same tick; what its task has become since plays no part. It waits for no other run.',
        params: idParams,
        headers: idempotencyHeaders,
        body: runTaskBody,
        response: { 202: executionSummary },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const run = await replayExecution(tx, request.actor, request.params.id, request.body?.params);
        const headers = { location: `/api/v1/executions/${run.id}` };
        return { status: 202, headers, body: executionSummaryView({ ...run, outputPreview: null }) };
      }),
  );

  app.post(
    '/executions/bulk',
    {
      config: write,
      schema: {
        tags,
        summary: 'Cancel or replay many runs',
        description: 'In one transaction. The answer says of each run what became of it; `dry_run` what would.',
        headers: idempotencyHeaders,
        body: bulkRunsBody,
        response: { 200: bulkRunsAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => ({
        status: 200,
        body: await bulkExecutions(tx, request.actor, request.body),
      })),
  );
}
