import { type Claimed, claimExecutions, returnClaims } from '../executions/lease.ts';
import { waitForWork } from '../executions/queue.ts';
import { claimAnswer, claimBody } from '../executions/schemas.ts';
import type { App, Deps } from '../http/app.ts';
import type { Drain } from '../http/drain.ts';
import { idParams, toTime } from '../http/validation.ts';
import { heartbeatAgent, registerAgent, requireAgent } from './agents.ts';
import { agentAnswer, agentView, heartbeatBody, registerBody } from './schemas.ts';

/** The registry of agents, and the call by which they take work. */
export function agentRoutes(app: App, deps: Deps & { drain: Drain }): void {
  const { db, bus, config, drain, logger } = deps;
  const access = { rule: 'owner', scopes: ['agent'] } as const;

  app.post(
    '/agents',
    {
      config: { access: { rule: 'self', scopes: ['agent', 'write'] } },
      schema: {
        tags: ['agents'],
        summary: 'Register an agent, or bring the one of that name up to date',
        body: registerBody,
        response: { 200: agentAnswer, 201: agentAnswer },
      },
    },
    async (request, reply) => {
      const { max_concurrency: maxConcurrency, ...body } = request.body;
      const { agent, created } = await db.transaction((tx) =>
        registerAgent(tx, request.actor, { ...body, maxConcurrency }),
      );
      return reply.code(created ? 201 : 200).send(agentView(agent));
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
      let gone = false;
      const giveBack = async () => {
        if (claimed.length === 0) return;
        const runs = claimed;
        claimed = [];
        await db
          .transaction((tx) => returnClaims(tx, agent, runs))
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
        while (!drain.signal.aborted && !gone) {
          claimed = await db.transaction((tx) => claimExecutions(tx, agent, wish));
          if (claimed.length > 0 || ended.signal.aborted) break;
          await waiter.next(ended.signal);
        }
      } finally {
        waiter.close();
        clearTimeout(timer);
        drain.signal.removeEventListener('abort', end);
      }
      if (gone) await giveBack();
      return { executions: claimed.map(claimView) };
    },
  );
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
