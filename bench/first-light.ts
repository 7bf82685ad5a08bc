// npm run bench: how fast time becomes work. Prints one table: what, ours, floor, ratio, goal. Each figure is the median of
// its rounds, and a floor is measured in the same run, its rounds between ours.
import { availableParallelism } from 'node:os';
import { resolve } from 'node:path';
import type pg from 'pg';
import { bareBatch, seedRuns } from './bare-sql.ts';
import {
  type BenchDatabase,
  benchDatabase,
  benchServer,
  benchUser,
  median,
  post,
  quantile,
  startProcess,
} from './support.ts';

const ROUNDS = 3;
const PORT = 18_080;

interface Line {
  what: string;
  ours: string;
  floor?: string;
  ratio?: string;
  goal: string;
}

interface Claim {
  executions: { execution_id: number; lease_token: string }[];
}

/** A fleet's tasks: yearly crons at every second of an hour, of which `due` are due in three seconds. */
async function seedTasks(pool: pg.Pool, userId: number, total: number, due: number): Promise<void> {
  await pool.query(
    `insert into tasks (user_id, skill_name, schedule_cron, overlap_policy, next_run_at)
     select $1, 'bench', (i % 60) || ' ' || (i / 60 % 60) || ' 5 1 1 *', 'allow',
       case when i <= $3 then now() + interval '3 seconds' else now() + interval '1 day' end
     from generate_series(1, $2::int) i`,
    [userId, total, due],
  );
  await pool.query('analyze tasks');
  await ring(pool);
}

/** What was written past the server is told to it as a server would tell another. */
const ring = (pool: pg.Pool) =>
  pool.query(`select pg_notify('muster', '{"from":"bench","rings":[["schedule",null],["queue",null]]}')`);

/** Fires per second: from the due time until all are fired, by the server, and by the same work in bare SQL. */
async function fires(db: BenchDatabase): Promise<Line> {
  const DUE = 10_000;
  const ours: number[] = [];
  const floor: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await db.clear();
    const user = await benchUser(db.pool);
    const server = await benchServer(db.url, PORT);
    await seedTasks(db.pool, user.id, 100_000, DUE);
    const { rows } = await db.pool.query<{ ms: number }>(
      `select (extract(epoch from min(next_run_at) - clock_timestamp()) * 1000)::float8 as ms from tasks`,
    );
    const dueAt = performance.now() + (rows[0]?.ms ?? 0);
    for (;;) {
      const fired = await db.pool.query<{ n: number }>('select count(*)::int as n from executions');
      if ((fired.rows[0]?.n ?? 0) >= DUE) break;
      await new Promise((done) => setTimeout(done, 10));
    }
    ours.push(DUE / ((performance.now() - dueAt) / 1000));
    await server.stop();

    await db.clear();
    const other = await benchUser(db.pool);
    await seedTasks(db.pool, other.id, 100_000, DUE);
    await db.pool.query(`update tasks set next_run_at = now() where next_run_at < now() + interval '1 hour'`);
    const start = performance.now();
    for (let n = 1; n > 0; ) n = await bareBatch(db.pool);
    floor.push(DUE / ((performance.now() - start) / 1000));
  }
  return {
    what: 'fires/s, 10,000 due of 100,000, 1 process',
    ours: median(ours).toFixed(0),
    floor: `${median(floor).toFixed(0)} (one SQL statement a batch)`,
    ratio: (median(ours) / median(floor)).toFixed(2),
    goal: '≥ 10,000/s, ≥ 0.7',
  };
}

/** Due time to claim, by the database's clock: one-offs 20 ms apart, an agent that waits. */
async function latency(db: BenchDatabase): Promise<Line> {
  const p50: number[] = [];
  const p99: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await db.clear();
    const user = await benchUser(db.pool);
    const server = await benchServer(db.url, PORT);
    const N = 250;
    const agent = await post<{ id: number }>(`${server.url}/api/v1/agents`, user.key, {
      name: 'bench',
      max_concurrency: 1000,
    });
    await db.pool.query(
      `insert into tasks (user_id, skill_name, run_at, next_run_at)
       select $1, 'bench', t, t from (select now() + interval '2 seconds' + i * interval '20 milliseconds' as t
       from generate_series(1, $2::int) i) s`,
      [user.id, N],
    );
    await ring(db.pool);
    let claimed = 0;
    const poll = async () => {
      while (claimed < N) {
        const { executions } = await post<Claim>(`${server.url}/api/v1/agents/${agent.id}/claim`, user.key, {
          max: 1,
          wait_ms: 2_000,
        });
        claimed += executions.length;
      }
    };
    await Promise.all([poll(), poll()]);
    const { rows } = await db.pool.query<{ ms: number }>(
      `select (extract(epoch from started_at - scheduled_for) * 1000)::float8 as ms from executions`,
    );
    const waits = rows.map((row) => row.ms);
    p50.push(quantile(waits, 0.5));
    p99.push(quantile(waits, 0.99));
    await server.stop();
  }
  return {
    what: 'due → claimed by a waiting agent, ms p50 / p99',
    ours: `${median(p50).toFixed(1)} / ${median(p99).toFixed(1)}`,
    goal: 'p99 ≤ 20',
  };
}

/** Claim and complete a no-op run over HTTP, eight at a time, against the same two statements in bare SQL. */
async function claims(db: BenchDatabase, processes: number): Promise<Line> {
  const N = 2_000;
  const WORKERS = 8;
  const ours: number[] = [];
  const floor: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await db.clear();
    const user = await benchUser(db.pool);
    const servers = await Promise.all(Array.from({ length: processes }, (_, i) => benchServer(db.url, PORT + i)));
    await seedRuns(db.pool, user.id, N);
    let done = 0;
    const work = async (worker: number) => {
      const { url } = servers[worker % processes] ?? { url: '' };
      const agent = await post<{ id: number }>(`${url}/api/v1/agents`, user.key, {
        name: `bench-${worker}`,
        max_concurrency: 100,
      });
      while (done < N) {
        const { executions } = await post<Claim>(`${url}/api/v1/agents/${agent.id}/claim`, user.key, { max: 10 });
        if (executions.length === 0) break;
        for (const run of executions) {
          await post(`${url}/api/v1/executions/${run.execution_id}/complete`, user.key, {
            lease_token: run.lease_token,
            status: 'success',
          });
          done++;
        }
      }
    };
    const start = performance.now();
    await Promise.all(Array.from({ length: WORKERS }, (_, i) => work(i)));
    ours.push(done / ((performance.now() - start) / 1000));
    await Promise.all(servers.map((server) => server.stop()));

    await db.clear();
    const other = await benchUser(db.pool);
    await seedRuns(db.pool, other.id, N);
    const bareStart = performance.now();
    await Promise.all(Array.from({ length: WORKERS }, () => bareClaims(db.pool)));
    floor.push(N / ((performance.now() - bareStart) / 1000));
  }
  return {
    what: `claim + complete over HTTP, runs/s, ${processes} process${processes > 1 ? 'es' : ''}`,
    ours: median(ours).toFixed(0),
    floor: `${median(floor).toFixed(0)} (bare SQL, no audit, no events)`,
    ratio: (median(ours) / median(floor)).toFixed(2),
    goal: '–',
  };
}

const claimsBy = (processes: number) => (db: BenchDatabase) => claims(db, processes);

async function bareClaims(pool: pg.Pool): Promise<void> {
  for (;;) {
    const { rows } = await pool.query<{ id: string; lease_token: string }>({
      name: 'bare-claim',
      text: `
        update executions e set status = 'running', lease_token = gen_random_uuid(), started_at = now(),
          lease_expires_at = now() + interval '30 seconds'
        from (select id from executions where status = 'queued' and available_at <= now()
          order by priority desc, available_at, id limit 10 for update skip locked) q
        where q.id = e.id returning e.id, e.lease_token`,
    });
    if (rows.length === 0) return;
    for (const row of rows) {
      await pool.query({
        name: 'bare-complete',
        text: `update executions set status = 'success', ended_at = now(), lease_token = null, lease_expires_at = null
          where id = $1 and lease_token = $2 and status = 'running'`,
        values: [row.id, row.lease_token],
      });
    }
  }
}

/** Memory and start of the idle server, against a process that has imported and opened the same libraries. */
async function idle(db: BenchDatabase): Promise<Line[]> {
  const [ours, floor]: [number[], number[]] = [[], []];
  const [oursMs, floorMs]: [number[], number[]] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    const server = await benchServer(db.url, PORT);
    await new Promise((done) => setTimeout(done, 3_000));
    ours.push(server.rss());
    oursMs.push(server.startMs);
    await server.stop();
    const bare = await startProcess([resolve('bench/floors/idle.mjs')], PORT, '/', {
      PORT: String(PORT),
      DATABASE_URL: db.url,
      PATH: process.env['PATH'] ?? '',
    });
    await new Promise((done) => setTimeout(done, 3_000));
    floor.push(bare.rss());
    floorMs.push(bare.startMs);
    await bare.stop();
  }
  return [
    {
      what: 'idle server, MiB resident',
      ours: median(ours).toFixed(0),
      floor: `${median(floor).toFixed(0)} (Fastify + pg)`,
      ratio: (median(ours) / median(floor)).toFixed(2),
      goal: '≤ 1.5 ×',
    },
    {
      what: 'start to first 200, ms (Postgres up)',
      ours: median(oursMs).toFixed(0),
      floor: `${median(floorMs).toFixed(0)} (the same)`,
      ratio: (median(oursMs) / median(floorMs)).toFixed(2),
      goal: '≤ 1.5 ×',
    },
  ];
}

const db = await benchDatabase();
try {
  const lines: Line[] = [];
  for (const measure of [fires, latency, claimsBy(1), claimsBy(2), idle]) {
    const measured = await measure(db);
    for (const line of [measured].flat()) {
      console.log(`${line.what}: ${line.ours}${line.floor ? `, floor ${line.floor}, ratio ${line.ratio}` : ''}`);
      lines.push(line);
    }
  }
  console.log(`Node ${process.version}, ${availableParallelism()} cores, medians of ${ROUNDS} rounds`);
  console.table(lines);
} finally {
  await db.stop();
}
