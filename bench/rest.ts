// npm run bench:rest: what REST costs. Two calls against the same calls on bare Fastify, and lists, search, calendar and
// metrics at a million tasks (BENCH_TASKS for another number). Rounds of ours and of the floor take turns; medians.
import { resolve } from 'node:path';
import type pg from 'pg';
import { load, request } from './load.ts';
import {
  type BenchDatabase,
  benchDatabase,
  benchServer,
  benchUser,
  createTable,
  median,
  quantile,
  startProcess,
} from './support.ts';

const ROUNDS = 3;
const SECONDS = 4;
const CONNECTIONS = 32;
const PORT = 18_080;
const SECRET = 'bench-only-0123456789-abcdefghijklmnop';
const TASKS = Number(process.env['BENCH_TASKS'] ?? 1_000_000);

/** A fleet: `count` tasks in 1,000 projects, of 200 skills and 1,440 schedules; an agent with 720 hours of counts. */
async function seed(pool: pg.Pool, userId: number, count: number): Promise<void> {
  await pool.query(
    `insert into projects (user_id, name, tasks_count) select $1, 'project ' || i, $2::int / 1000 from generate_series(1, 1000) i`,
    [userId, count],
  );
  const { rows } = await pool.query<{ first: string }>('select min(id) as first from projects');
  for (let from = 1; from <= count; from += 100_000) {
    await pool.query(
      `insert into tasks (user_id, project_id, name, skill_name, priority, schedule_cron, timezone, next_run_at, status, created_at)
       select $1, $2::bigint + i % 1000, 'task ' || md5(i::text), 'skill-' || i % 200, i % 4,
         (i % 60) || ' ' || (i / 60 % 24) || ' * * *', 'UTC',
         date_trunc('day', now()) + interval '1 day' + (i % 60) * interval '1 minute' + (i / 60 % 24) * interval '1 hour',
         case when i % 1000 = 0 then 'failed' else 'pending' end, now() - (1000000 - i) * interval '1 second'
       from generate_series($3::int, $4::int) i`,
      [userId, rows[0]?.first, from, Math.min(from + 99_999, count)],
    );
  }
  await pool.query(
    `insert into agents (user_id, name, type) select $1, 'agent ' || i, 'custom' from generate_series(1, 1000) i`,
    [userId],
  );
  await pool.query(
    `insert into agent_stats_hourly (agent_id, hour, outcome, duration_bucket, runs, duration_ms_sum)
     select (select min(id) from agents), date_trunc('hour', now()) - h * interval '1 hour',
       (array['success', 'agent_failed', 'run_timeout'])[1 + b % 3], 40 + b, 10, 10000
     from generate_series(1, 720) h, generate_series(1, 30) b`,
  );
  await pool.query('vacuum analyze tasks, projects, agents, agent_stats_hourly');
}

async function login(pool: pg.Pool, userId: number): Promise<string> {
  const { createHmac, randomUUID } = await import('node:crypto');
  const family = randomUUID();
  await pool.query(
    `insert into refresh_tokens (user_id, family_id, token_hash, expires_at) values ($1, $2::uuid, $2::uuid::text, now() + interval '1 day')`,
    [userId, family],
  );
  const now = Math.floor(Date.now() / 1_000);
  const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const claims = {
    sub: String(userId),
    iss: 'muster',
    aud: 'muster',
    iat: now,
    exp: now + 3_600,
    fam: family,
    use: 'access',
    jti: family,
  };
  const signed = `${part({ alg: 'HS256', typ: 'JWT' })}.${part(claims)}`;
  return `${signed}.${createHmac('sha256', SECRET).update(signed).digest('base64url')}`;
}

async function calls(db: BenchDatabase, token: string, taskId: number): Promise<void> {
  const wanted = [
    ['GET /tasks/{id}, requests/s', () => request('GET', `/api/v1/tasks/${taskId}?history_limit=0`, token)],
    ['POST /tasks, requests/s', () => request('POST', '/api/v1/tasks', token, { skill_name: 'bench' })],
  ] as const;
  const ours = await benchServer(db.url, PORT);
  const floor = await startProcess([resolve('bench/floors/rest.mjs')], PORT + 1, '/', {
    PORT: String(PORT + 1),
    DATABASE_URL: db.url,
    JWT_SECRET: SECRET,
    PATH: process.env['PATH'] ?? '',
  });
  try {
    for (const [what, next] of wanted) {
      const rates: [number[], number[]] = [[], []];
      const tails: [number[], number[]] = [[], []];
      for (let round = -1; round < ROUNDS; round++) {
        for (const side of [0, 1] as const) {
          const { rate, times } = await load(PORT + side, next, CONNECTIONS, round < 0 ? 1 : SECONDS);
          if (round < 0) continue; // Warming up.
          rates[side].push(rate);
          tails[side].push(quantile(times, 0.99));
        }
      }
      row(what, median(rates[0]), median(rates[1]), '≥ 0.75');
      row(`${what.split(',')[0]}, p99 ms`, median(tails[0]), median(tails[1]), '≤ 1.5');
    }
  } finally {
    await ours.stop();
    await floor.stop();
  }
}

async function lists(db: BenchDatabase, token: string): Promise<void> {
  const server = await benchServer(db.url, PORT);
  const time = async (path: string, times = 15) => {
    const took: number[] = [];
    for (let i = 0; i < times; i++) {
      const start = performance.now();
      const answer = await fetch(`${server.url}/api/v1${path}`, { headers: { authorization: `Bearer ${token}` } });
      await answer.text();
      if (!answer.ok) throw new Error(`${path} answered ${answer.status}`);
      took.push(performance.now() - start);
    }
    return median(took);
  };
  const get = async (path: string) => {
    const answer = await fetch(`${server.url}/api/v1${path}`, { headers: { authorization: `Bearer ${token}` } });
    return (await answer.json()) as { next_cursor: string };
  };
  try {
    const list = '/tasks?limit=20&total=false';
    const first = await time(list);
    row('tasks, page 1, ms', first);
    // Page 10,000: there by long steps, since the place is what counts and not how one came to it.
    let { next_cursor: cursor } = await get('/tasks?limit=100&total=false');
    for (let page = 1; page < Math.min(2_000, TASKS / 100 - 1); page++) {
      ({ next_cursor: cursor } = await get(`/tasks?limit=100&total=false&cursor=${cursor}`));
    }
    row('tasks, page 10,000 by cursor, ms', await time(`${list}&cursor=${cursor}`), first, '≤ 1.2');
    const project = (await get('/projects?limit=1&total=false')) as unknown as { projects: { id: number }[] };
    for (const [what, path] of [
      ['tasks with total', '/tasks?limit=20'],
      ['tasks by next_run_at', `${list}&sort_by=next_run_at&sort_order=asc`],
      ['tasks by priority', `${list}&sort_by=priority`],
      ['tasks by status', `${list}&sort_by=status`],
      ['tasks of a rare status', `${list}&status=failed`],
      ['tasks of a skill', `${list}&skill_name=skill-7`],
      ['tasks of a project', `${list}&project_id=${project.projects[0]?.id}`],
      ['tasks, search of a rare text', `${list}&search=${'c4ca4238'}`],
      ['tasks, search of a common text', `${list}&search=task`],
      ['tasks, search without a hit', `${list}&search=nowhere-to-be-found`],
      ['tasks, search of two letters', `${list}&search=zz`],
      ['projects, search', '/projects?limit=20&search=project%2099'],
      ['calendar, a day', `/calendar?from=${day(1)}&to=${day(2)}`],
      ['calendar, a quarter that begins in a month', `/calendar?from=${day(30)}&to=${day(120)}`],
      ['agents', '/agents?limit=100'],
    ] as const) {
      row(`${what}, ms`, await time(path, 7));
    }
    const agents = (await get('/agents?sort_by=created_at&sort_order=asc&limit=1')) as unknown as {
      agents: { id: number }[];
    };
    row('an agent with metrics of 720 hours, ms', await time(`/agents/${agents.agents[0]?.id}`, 7));
  } finally {
    await server.stop();
  }
}

const day = (days: number) => new Date(Math.floor(Date.now() / 86_400_000 + days) * 86_400_000).toISOString();

const { row, print } = createTable();

const db = await benchDatabase();
try {
  await db.clear();
  const user = await benchUser(db.pool);
  const token = await login(db.pool, user.id);
  await seed(db.pool, user.id, TASKS);
  console.log(`${TASKS} tasks are there`);
  const { rows } = await db.pool.query<{ id: string }>('select max(id) as id from tasks');
  await lists(db, token);
  await calls(db, token, Number(rows[0]?.id));
  print(ROUNDS);
} finally {
  await db.stop();
}
