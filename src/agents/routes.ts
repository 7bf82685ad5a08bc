import { z } from 'zod';
import { executionsOfAgent } from '../executions/executions.ts';
import { type Claimed, claimExecutions, returnClaims } from '../executions/lease.ts';
import { waitForWork } from '../executions/queue.ts';
import { claimAnswer, claimBody, executionSummaryView } from '../executions/schemas.ts';
import type { App, Deps } from '../http/app.ts';
import type { Drain } from '../http/drain.ts';
import { etag, ifMatchHeaders, versions } from '../http/etag.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { idParams, toTime } from '../http/validation.ts';
import { activityMemory } from '../memory/capture.ts';
import type { Memory } from '../memory/memories.ts';
import type { Memories } from '../memory/memory.ts';
import type { Feed } from '../realtime/feed.ts';
import { recordActivity } from './activity.ts';
import { deleteAgent, heartbeatAgent, registerAgent, requireAgent, updateAgent } from './agents.ts';
import { agentMetrics } from './metrics.ts';
import { getVisibleAgent, listAgents } from './queries.ts';
import {
  activityAnswer,
  activityBody,
  agentAnswer,
  agentDetail,
  agentDetailQuery,
  agentList,
  agentQuery,
  agentView,
  heartbeatBody,
  metricsView,
  registerBody,
  updateAgentBody,
} from './schemas.ts';

/** The registry of agents, and the call by which they take work. */
export function agentRoutes(app: App, deps: Deps & { drain: Drain; feed: Feed; memory: Memories }): void {
  const { db, bus, config, drain, feed, logger, memory } = deps;
  const access = { rule: 'owner', scopes: ['agent'] } as const;

  app.post(
    '/agents',
    {
      config: { access: { rule: 'self', scopes: ['agent', 'write'] } },
      schema: {
        tags: ['agents'],
        summary: 'Register an agent, or bring the one of that name up to date',
        headers: idempotencyHeaders,
        body: registerBody,
        response: { 200: agentAnswer, 201: agentAnswer },
      },
    },
    (request, reply) =>
      answerOnce(db, request, reply, async (tx) => {
        const { max_concurrency: maxConcurrency, ...body } = request.body;
        const { agent, created } = await registerAgent(tx, request.actor, { ...body, maxConcurrency });
        const headers = { location: `/api/v1/agents/${agent.id}`, etag: etag(agent) };
        return { status: created ? 201 : 200, headers, body: agentView(agent) };
      }),
  );

  const read = { access: { rule: 'owner', scopes: ['read'] } } as const;
  const write = { access: { rule: 'owner', scopes: ['write'] } } as const;
  const tags = ['agents'];

  app.get(
    '/agents',
    {
      config: read,
      schema: {
        tags,
        summary: 'List agents: your own and the shared ones',
        querystring: agentQuery,
        response: { 200: agentList },
      },
    },
    async (request) => {
      const { rows, ...page } = await listAgents(db, request.actor, request.query);
      return { agents: rows.map(agentView), ...page };
    },
  );

  app.get(
    '/agents/:id',
    {
      config: read,
      schema: {
        tags,
        summary: 'Get an agent, its latest runs, and how good it is',
        description: 'Of a shared agent everybody sees the metrics, and of its runs their own.',
        params: idParams,
        querystring: agentDetailQuery,
        response: { 200: agentDetail },
      },
    },
    async (request, reply) => {
      const { history_limit: limit, window_hours: hours } = request.query;
      const agent = await getVisibleAgent(db, request.actor, request.params.id);
      const history = await executionsOfAgent(db, request.actor, agent.id, limit);
      const metrics = await agentMetrics(db, agent.id, hours);
      return reply.header('etag', etag(agent)).send({
        ...agentView(agent),
        execution_history: history.map(executionSummaryView),
        ...metricsView(metrics, hours),
      });
    },
  );

  app.put(
    '/agents/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Change the given fields of an agent',
        description: 'What changes nothing does nothing.',
        params: idParams,
        headers: ifMatchHeaders,
        body: updateAgentBody,
        response: { 200: agentAnswer },
      },
    },
    async (request, reply) => {
      const { actor, params, headers } = request;
      const { max_concurrency: maxConcurrency, ...body } = request.body;
      const agent = await db.transaction((tx) =>
        updateAgent(tx, actor, params.id, { ...body, maxConcurrency }, versions(headers['if-match'])),
      );
      return reply.header('etag', etag(agent)).send(agentView(agent));
    },
  );

  app.delete(
    '/agents/:id',
    {
      config: write,
      schema: {
        tags,
        summary: 'Remove an agent',
        description: 'What it is at may still be reported. 409 while tasks or queued runs are pinned to it.',
        params: idParams,
        headers: ifMatchHeaders,
        response: { 204: z.null() },
      },
    },
    async (request, reply) => {
      const { actor, params, headers } = request;
      await db.transaction((tx) => deleteAgent(tx, actor, params.id, versions(headers['if-match'])));
      return reply.code(204).send(null);
    },
  );

  for (const [verb, draining, summary] of [
    ['drain', true, 'Drain an agent: it finishes what it has and is given nothing more'],
    ['resume', false, 'Give a draining agent work again'],
  ] as const) {
    app.post(
      `/agents/:id/${verb}`,
      {
        config: { access: { rule: 'owner', scopes: ['write', 'agent'] } },
        schema: { tags, summary, params: idParams, response: { 200: agentAnswer } },
      },
      async (request, reply) => {
        const agent = await db.transaction((tx) =>
          updateAgent(tx, request.actor, request.params.id, { draining }, undefined),
        );
        return reply.header('etag', etag(agent)).send(agentView(agent));
      },
    );
  }

  app.post(
    '/agents/activity',
    {
      config: { access, limit: 'activity' },
      schema: {
        tags,
        summary: 'Report what an agent does of its own accord',
        description:
          'Writes a run with the trigger `activity`. Report `running` first and the end with the `execution_id` of the answer, or the end alone.',
        headers: idempotencyHeaders,
        body: activityBody,
        response: { 201: activityAnswer },
      },
    },
    async (request, reply) => {
      const { agent_id, task_id, status } = request.body;
      const told = awaitTold(feed, task_id, status);
      try {
        // Awaited here: the answer to the report needs the ears until it is made.
        let remembered: Memory | undefined;
        return await answerOnce(
          db,
          request,
          reply,
          async (tx) => {
            const run = await recordActivity(tx, request.actor, request.body);
            const note = memory.captures('activity') ? activityMemory(run) : undefined;
            remembered = note && (await memory.write(tx, note));
            return {
              status: 201,
              body: {
                status,
                message: `The run ${run.id} is recorded as ${run.status}.`,
                agent_id,
                task_id,
                execution_id: run.id,
                stored_in_memory_mcp: false as boolean,
                broadcasted_via_websocket: false as boolean,
              },
            };
          },
          {
            committed: async (body) => {
              const [stored, broadcasted] = await Promise.all([
                remembered ? memory.deliver(remembered) : false,
                told.of(body.execution_id),
              ]);
              return { ...body, stored_in_memory_mcp: stored, broadcasted_via_websocket: broadcasted };
            },
          },
        );
      } finally {
        told.close();
      }
    },
  );

  app.post(
    '/agents/:id/heartbeat',
    {
      config: { access, limit: 'activity' },
      schema: {
        tags: ['agents'],
        summary: 'Say that an agent is alive, and how it is',
        params: idParams,
        body: heartbeatBody,
        response: { 200: agentAnswer },
      },
    },
    async (request) =>
      agentView(
        await db.transaction((tx) => heartbeatAgent(tx, request.actor, request.params.id, request.body?.status)),
      ),
  );

  app.post(
    '/agents/:id/claim',
    {
      config: { access, limit: 'activity' },
      schema: {
        tags: ['agents'],
        summary: 'Take due runs by lease, waiting for them if there are none',
        params: idParams,
        body: claimBody,
        response: { 200: claimAnswer },
      },
    },
    async (request, reply) => {
      const agent = await requireAgent(db, request.actor, request.params.id);
      const { max, skills, wait_ms: waitMs } = request.body;
      const wish = { max, skills, leaseSeconds: config.LEASE_SECONDS };

      // The wait ends when its time is over, the server drains, or the caller has gone. Of the last only the response's
      // stream knows, since the request was read to its end long ago.
      const ended = new AbortController();
      const end = () => ended.abort();
      const timer = setTimeout(end, waitMs);
      drain.signal.addEventListener('abort', end);
      let claimed: Claimed[] = [];
      let closed = false;
      let outrun = false;
      let gone = false;
      const giveBack = async () => {
        if (claimed.length === 0) return;
        const runs = claimed;
        claimed = [];
        await db
          .transaction((tx) => returnClaims(tx, request.actor, agent, runs))
          .catch((error: unknown) =>
            logger.warn({ err: error }, 'claims of a caller that had gone wait for their lease'),
          );
      };
      reply.raw.once('close', () => {
        if (reply.raw.writableFinished) return;
        gone = true;
        end();
        void giveBack();
      });
      const waiter = waitForWork(bus, agent.shared ? null : agent.userId, skills);
      try {
        for (let lost = 0; !drain.signal.aborted && !gone; ) {
          ({ claimed, closed, outrun } = await db.transaction((tx) =>
            claimExecutions(tx, request.actor, agent.id, wish),
          ));
          if (claimed.length > 0 || closed) break;
          if (outrun && ++lost < CLAIM_TRIES) continue;
          if (ended.signal.aborted) break;
          lost = 0;
          await waiter.next(ended.signal);
        }
      } finally {
        waiter.close();
        clearTimeout(timer);
        drain.signal.removeEventListener('abort', end);
      }
      if (gone) await giveBack();
      return { draining: closed, executions: claimed.map(claimView) };
    },
  );
}

/** How often a claim that others outran is tried in a row. */
const CLAIM_TRIES = 4;

/** How long the answer to a report waits for its event to get its place. */
const TOLD_WITHIN_MS = 500;

/** Listens, from before a change is made, for the event that tells of it: whether it reached this server's sockets. */
function awaitTold(feed: Feed, taskId: number, status: string) {
  const heard = new Set<number>();
  let look: (() => void) | undefined;
  const off = feed.subscribe((event) => {
    if (event.topic !== 'tasks' || event.taskId !== taskId) return;
    const { data } = JSON.parse(String(event.text)) as { data: { execution_id?: number; execution_status?: string } };
    if (data.execution_status !== status || data.execution_id === undefined) return;
    heard.add(data.execution_id);
    look?.();
  });
  return {
    close: off,
    of: (runId: number) =>
      new Promise<boolean>((resolve) => {
        const timer = setTimeout(() => resolve(false), TOLD_WITHIN_MS);
        look = () => {
          if (!heard.has(runId)) return;
          clearTimeout(timer);
          resolve(true);
        };
        look();
      }),
  };
}

const claimView = (run: Claimed) => ({
  execution_id: run.executionId,
  task_id: run.taskId,
  skill_name: run.skillName,
  params: run.params,
  attempt: run.attempt,
  scheduled_for: toTime(run.scheduledFor),
  lease_token: run.leaseToken,
  lease_expires_at: toTime(run.leaseExpiresAt),
  timeout_seconds: run.timeoutSeconds,
});
