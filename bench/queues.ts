import { spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { Agent, request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Queue, Worker } from 'bullmq';
import { Logger, makeWorkerUtils, run } from 'graphile-worker';
import { Redis } from 'ioredis';
import pg from 'pg';
import PgBoss from 'pg-boss';
import { registerAgent } from '../src/agents/agents.ts';
import { readConfig } from '../src/config.ts';
import { claimExecutions } from '../src/executions/lease.ts';
import { completeExecution } from '../src/executions/reports.ts';
import type { Actor } from '../src/http/access.ts';
import { createLogger } from '../src/platform/logger.ts';
import { startMuster } from '../src/start.ts';
import { seedRuns } from './bare-sql.ts';
import { type BenchDatabase, benchServer, benchUser } from './support.ts';

// Queues that take and finish jobs that do nothing. Each is asked for the same: `jobs` that are there, two workers of
// `SLOTS` jobs at a time each, ten connections, each job finished by itself. They are not the same, though, and what each
// does for a job is said beside its figure.

export const WORKERS = 2;
export const SLOTS = 12;
const POOL = 10;

export interface Contender {
  name: string;
  /** Jobs a second. */
  rate(jobs: number): Promise<number>;
  stop(): Promise<void>;
}

const perSecond = (jobs: number, start: number) => jobs / ((performance.now() - start) / 1_000);

interface Claim {
  executions: { execution_id: number; lease_token: string }[];
}

/** Ours as agents use it. */
export function overHttp(db: BenchDatabase, port: number): Contender {
  return {
    name: `over HTTP, ${WORKERS} agents (history, audit, events)`,
    async rate(jobs) {
      await db.clear();
      const user = await benchUser(db.pool);
      const server = await benchServer(db.url, port, { LEASE_SECONDS: '3600' });
      const http = new Agent({ keepAlive: true, maxSockets: WORKERS * SLOTS });
      const post = <T>(path: string, body: object) =>
        new Promise<T>((resolve, reject) => {
          const headers = { authorization: `Bearer ${user.key}`, 'content-type': 'application/json' };
          request(`${server.url}/api/v1${path}`, { method: 'POST', agent: http, headers }, (answer) => {
            let text = '';
            answer.setEncoding('utf8').on('data', (chunk: string) => {
              text += chunk;
            });
            answer.on('end', () =>
              answer.statusCode === 200 || answer.statusCode === 201
                ? resolve(JSON.parse(text))
                : reject(new Error(text)),
            );
          })
            .on('error', reject)
            .end(JSON.stringify(body));
        });
      const agents = await Promise.all(
        Array.from({ length: WORKERS }, (_, i) =>
          post<{ id: number }>('/agents', { name: `bench-${i}`, max_concurrency: SLOTS }),
        ),
      );
      await seedRuns(db.pool, user.id, jobs);
      const start = performance.now();
      await Promise.all(
        agents.map(async ({ id }) => {
          for (;;) {
            const { executions } = await post<Claim>(`/agents/${id}/claim`, { max: SLOTS });
            if (executions.length === 0) return;
            await Promise.all(
              executions.map((run) =>
                post(`/executions/${run.execution_id}/complete`, { lease_token: run.lease_token, status: 'success' }),
              ),
            );
          }
        }),
      );
      const rate = perSecond(jobs, start);
      http.destroy();
      await server.stop();
      return rate;
    },
    stop: async () => {},
  };
}

/**
 * Ours without HTTP: the functions that the routes call, in a process where everything else of the server runs too. What is
 * done for one agent goes one after the other; `agents` of one slot each show what that costs.
 */
export function inProcess(db: BenchDatabase, agents = WORKERS): Contender {
  const slots = (WORKERS * SLOTS) / agents;
  return {
    name: `in process, ${agents} agents (history, audit, events)`,
    async rate(jobs) {
      await db.clear();
      const user = await benchUser(db.pool);
      const folder = await mkdtemp(join(tmpdir(), 'muster-bench-'));
      const config = readConfig(
        {
          PORT: '0',
          DATA_DIR: folder,
          DATABASE_URL: db.url,
          LOG_LEVEL: 'warn',
          JWT_SECRET: 'bench-only-0123456789-abcdefghijklmnop',
        },
        folder,
      );
      const running = await startMuster({
        config,
        logger: createLogger('warn', false),
        databaseUrl: db.url,
        directUrl: db.url,
        jwtSecret: config.JWT_SECRET,
        version: 'bench',
      });
      const actor: Actor = {
        userId: user.id,
        role: 'user',
        scopes: ['agent'],
        ip: '127.0.0.1',
        userAgent: null,
        requestId: 'bench',
      };
      const ids: number[] = [];
      for (let i = 0; i < agents; i++) {
        const wish = { name: `bench-${i}`, type: 'custom', maxConcurrency: slots } as const;
        ids.push(
          (await running.db.transaction((tx) => registerAgent(tx, actor, { ...wish, capabilities: [] }))).agent.id,
        );
      }
      await seedRuns(db.pool, user.id, jobs);
      const start = performance.now();
      await Promise.all(
        ids.map(async (id) => {
          for (;;) {
            const { claimed } = await running.db.transaction((tx) =>
              claimExecutions(tx, actor, id, { max: slots, leaseSeconds: 3_600 }),
            );
            if (claimed.length === 0) return;
            await Promise.all(
              claimed.map(({ executionId, leaseToken }) =>
                running.db.transaction((tx) =>
                  completeExecution(tx, actor, executionId, { leaseToken, status: 'success' }),
                ),
              ),
            );
          }
        }),
      );
      const rate = perSecond(jobs, start);
      await running.stop();
      await rm(folder, { recursive: true, force: true });
      return rate;
    },
    stop: async () => {},
  };
}

/** graphile-worker: a job is deleted when it is done. Its workers wait before the jobs come, in one statement. */
export async function graphileWorker(db: BenchDatabase): Promise<Contender> {
  const logger = new Logger(() => () => {});
  const utils = await makeWorkerUtils({ connectionString: db.url, logger });
  await utils.migrate();
  return {
    name: 'graphile-worker (no history)',
    async rate(jobs) {
      let left = jobs;
      let over: () => void = () => {};
      const done = new Promise<void>((resolve) => {
        over = resolve;
      });
      const taskList = {
        noop: () => {
          left -= 1;
          if (left === 0) over();
        },
      };
      const pools = Array.from(
        { length: WORKERS },
        () => new pg.Pool({ connectionString: db.url, max: POOL / WORKERS }),
      );
      const runners = await Promise.all(
        pools.map((pgPool) => run({ pgPool, concurrency: SLOTS, taskList, noHandleSignals: true, logger })),
      );
      const start = performance.now();
      await db.pool.query(
        `select count(*) from graphile_worker.add_jobs(array(
          select ('noop', '{}'::json, null, now(), null, null, null, null)::graphile_worker.job_spec from generate_series(1, $1::int)))`,
        [jobs],
      );
      await done;
      // The last ones are finished when they are deleted.
      for (;;) {
        const { rows } = await db.pool.query<{ n: number }>('select count(*)::int as n from graphile_worker.jobs');
        if (rows[0]?.n === 0) break;
        await new Promise((next) => setTimeout(next, 2));
      }
      const rate = perSecond(jobs, start);
      await Promise.all(runners.map((runner) => runner.stop()));
      await Promise.all(pools.map((pool) => pool.end()));
      return rate;
    },
    stop: async () => utils.release(),
  };
}

/** pg-boss: jobs stay for half a day. Fetched by twelve, each completed by itself, or with `batch` twelve in one statement. */
export async function pgBoss(db: BenchDatabase, { batch }: { batch: boolean }): Promise<Contender> {
  const boss = new PgBoss({ connectionString: db.url, max: POOL, supervise: false, schedule: false });
  boss.on('error', () => {});
  await boss.start();
  const name = batch ? 'noop-batch' : 'noop';
  await boss.createQueue(name);
  return {
    name: batch ? 'pg-boss, completed by twelve (history)' : 'pg-boss (history)',
    async rate(jobs) {
      await boss.clearStorage();
      for (let n = 0; n < jobs; n += 1_000) {
        await boss.insert(Array.from({ length: Math.min(1_000, jobs - n) }, () => ({ name })));
      }
      const start = performance.now();
      await Promise.all(
        Array.from({ length: WORKERS }, async () => {
          for (;;) {
            const fetched = await boss.fetch(name, { batchSize: SLOTS });
            if (fetched.length === 0) return;
            const ids = fetched.map(({ id }) => id);
            if (batch) await boss.complete(name, ids);
            else await Promise.all(ids.map((id) => boss.complete(name, id)));
          }
        }),
      );
      return perSecond(jobs, start);
    },
    stop: () => boss.stop({ graceful: false, wait: true }),
  };
}

/** BullMQ on a Redis of its own that writes its log once a second, as people run it: an end may lose the last second. */
export async function bullMq(port: number): Promise<Contender> {
  const folder = await mkdtemp(join(tmpdir(), 'muster-bench-'));
  const args = ['--port', String(port), '--bind', '127.0.0.1', '--dir', folder, '--save', '', '--appendonly', 'yes'];
  const server = spawn('redis-server', args, { stdio: 'ignore' });
  const ended = new Promise((done) => server.once('exit', done));
  const connection = { host: '127.0.0.1', port };
  const admin = new Redis({ ...connection, maxRetriesPerRequest: null });
  admin.on('error', () => {});
  await admin.ping();
  return {
    name: 'BullMQ (history; Redis, fsync once a second)',
    async rate(jobs) {
      await admin.flushall();
      const queue = new Queue('noop', { connection });
      await queue.addBulk(Array.from({ length: jobs }, () => ({ name: 'noop', data: {} })));
      let left = jobs;
      let over: () => void = () => {};
      const done = new Promise<void>((resolve) => {
        over = resolve;
      });
      const workers = Array.from(
        { length: WORKERS },
        () => new Worker('noop', async () => {}, { connection, concurrency: SLOTS, autorun: false }),
      );
      await Promise.all(workers.map((worker) => worker.waitUntilReady()));
      const start = performance.now();
      for (const worker of workers) {
        worker.on('completed', () => {
          left -= 1;
          if (left === 0) over();
        });
        worker.on('error', () => {});
        void worker.run();
      }
      await done;
      const rate = perSecond(jobs, start);
      await Promise.all(workers.map((worker) => worker.close()));
      await queue.close();
      return rate;
    },
    async stop() {
      admin.disconnect();
      server.kill('SIGTERM');
      await ended;
      await rm(folder, { recursive: true, force: true });
    },
  };
}
