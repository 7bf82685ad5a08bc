// npm run bench:runs: how soon and how many runs get done, beside other queues, and what a tick costs among many tasks. Rounds
// of ours and of what it is compared with take turns; medians. BENCH_SECONDS, BENCH_JOBS and BENCH_TASKS make it smaller.
import { loadavg } from 'node:os';
import { createDatabase } from '../src/db/database.ts';
import { silentBus } from '../src/platform/bus.ts';
import { createLogger } from '../src/platform/logger.ts';
import { createPool } from '../src/platform/postgres.ts';
import { fireDue } from '../src/scheduler/fire.ts';
import { bareBatch } from './bare-sql.ts';
import { bullMq, graphileWorker, inProcess, overHttp, pgBoss, SLOTS, WORKERS } from './queues.ts';
import { benchDatabase, benchServer, benchUser, createTable, median, post, quantile } from './support.ts';

const SECONDS = Number(process.env['BENCH_SECONDS'] ?? 10);
const JOBS = Number(process.env['BENCH_JOBS'] ?? 5_000);
const TASKS = Number(process.env['BENCH_TASKS'] ?? 1_000_000);
const ROUNDS = 3;
const PORT = 18_280;

const { row, print } = createTable();
const db = await benchDatabase();

/** From a tick's time to its claim, by the database's clock: one-offs at an even pace, and agents that wait for them. */
async function latency(perSecond: number): Promise<void> {
  const POLLS = 8;
  const [p50, p99]: [number[], number[]] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    await db.clear();
    const user = await benchUser(db.pool);
    const server = await benchServer(db.url, PORT, { LEASE_SECONDS: '3600' });
    const runs = perSecond * SECONDS;
    const agents = await Promise.all(
      Array.from({ length: Math.ceil(runs / 1_000) }, (_, i) =>
        post<{ id: number }>(`${server.url}/api/v1/agents`, user.key, { name: `bench-${i}`, max_concurrency: 1_000 }),
      ),
    );
    await db.pool.query(
      `insert into tasks (user_id, skill_name, run_at, next_run_at)
       select $1, 'bench', t, t from (
         select now() + interval '2 seconds' + i * interval '1 second' / $3::int as t from generate_series(1, $2::int) i) s`,
      [user.id, runs, perSecond],
    );
    await db.pool.query(`select pg_notify('muster', '{"from":"bench","rings":[["schedule",null]]}')`);
    let claimed = 0;
    const poll = async (place: number) => {
      for (let turn = place; claimed < runs; turn++) {
        const { id } = agents[turn % agents.length] ?? { id: 0 };
        const answer = await post<{ executions: unknown[] }>(`${server.url}/api/v1/agents/${id}/claim`, user.key, {
          max: 100,
          wait_ms: 1_000,
        });
        claimed += answer.executions.length;
      }
    };
    await Promise.all(Array.from({ length: POLLS }, (_, place) => poll(place)));
    const { rows } = await db.pool.query<{ ms: number }>(
      'select (extract(epoch from started_at - scheduled_for) * 1000)::float8 as ms from executions',
    );
    const waits = rows.map(({ ms }) => ms);
    p50.push(quantile(waits, 0.5));
    p99.push(quantile(waits, 0.99));
    await server.stop();
  }
  const what = `due → claimed by a waiting agent, ${perSecond} fires/s, ms`;
  row(`${what}, p50`, median(p50));
  row(`${what}, p99`, median(p99), undefined, perSecond >= 1_000 ? '≤ 100' : '≤ 20');
}

/** Jobs that do nothing, taken and finished, by ours and by others. */
async function queues(): Promise<void> {
  const ours = [overHttp(db, PORT), inProcess(db), inProcess(db, WORKERS * SLOTS)];
  const others = [
    await graphileWorker(db),
    await pgBoss(db, { batch: false }),
    await pgBoss(db, { batch: true }),
    await bullMq(PORT + 10),
  ];
  const all = [...ours, ...others];
  const rates = new Map(all.map((contender) => [contender, [] as number[]]));
  try {
    for (let round = -1; round < ROUNDS; round++) {
      for (const contender of all) {
        const rate = await contender.rate(round < 0 ? Math.ceil(JOBS / 5) : JOBS);
        if (round >= 0) rates.get(contender)?.push(rate); // The first one is for warming up.
      }
    }
  } finally {
    for (const contender of all) await contender.stop();
  }
  const rateOf = (contender: (typeof all)[number]) => median(rates.get(contender) ?? []);
  console.log(`${JOBS} jobs, ${WORKERS} workers of ${SLOTS} at a time; the floor is the other queue:`);
  for (const one of ours) {
    for (const other of others) {
      const goal = other.name.startsWith('BullMQ') ? '–' : '≥ 1';
      row(`runs/s ${one.name}; ${other.name}`, rateOf(one), rateOf(other), goal);
    }
  }
}

/** Fires per second when 10,000 tasks are due at once among `tasks`, by the scheduler, and by bare SQL. */
async function ticks(tasks: number): Promise<void> {
  const DUE = Math.min(10_000, tasks);
  await db.clear();
  const user = await benchUser(db.pool);
  await seedTasks(user.id, tasks);
  const pool = createPool({ url: db.url, size: 2, name: 'muster-bench', logger: createLogger('warn', false) });
  const ours = createDatabase(pool, silentBus);
  const rates: [number[], number[]] = [[], []];
  for (let round = -1; round < ROUNDS; round++) {
    for (const side of [0, 1] as const) {
      await db.pool.query('truncate executions, occurrences, event_outbox, audit_pending cascade');
      // Spread over the table, as tasks that were made at different times are.
      await db.pool.query(`update tasks set next_run_at = now() - interval '1 second' where id % $1 = 0`, [
        Math.floor(tasks / DUE),
      ]);
      await db.pool.query('vacuum analyze tasks');
      const start = performance.now();
      let fired = 0;
      for (let n = 1; n > 0; fired += n) n = side === 0 ? (await fireDue(ours)).tasks : await bareBatch(db.pool);
      if (round >= 0) rates[side].push(fired / ((performance.now() - start) / 1_000));
    }
  }
  await pool.end();
  row(`fires/s, ${DUE} due of ${tasks}, one loop`, median(rates[0]), median(rates[1]), '≥ 0.7, ≥ 10,000/s');
}

/** A fleet's tasks: yearly crons. The indexes are made afterwards, which takes a fraction of the time. */
async function seedTasks(userId: number, tasks: number): Promise<void> {
  const { rows: indexes } = await db.pool.query<{ name: string; text: string }>(
    `select i.indexrelid::regclass::text as name, pg_get_indexdef(i.indexrelid) as text
     from pg_index i where i.indrelid = 'tasks'::regclass and not i.indisprimary`,
  );
  for (const { name } of indexes) await db.pool.query(`drop index ${name}`);
  try {
    await db.pool.query(
      `insert into tasks (user_id, skill_name, schedule_cron, overlap_policy, next_run_at)
       select $1, 'skill-' || i % 100, (i % 60) || ' ' || (i / 60 % 60) || ' 5 1 1 *', 'allow', now() + interval '1 day'
       from generate_series(1, $2::int) i`,
      [userId, tasks],
    );
  } finally {
    for (const { text } of indexes) await db.pool.query(text);
  }
}

// A machine that is busy with something else makes every figure smaller, and ours most, which takes more steps a run.
console.log(`load at the start: ${loadavg()[0]?.toFixed(1)}`);
try {
  for (const perSecond of [1, 100, 1_000]) await latency(perSecond);
  await queues();
  for (const tasks of [TASKS / 10, TASKS]) await ticks(tasks);
  print(ROUNDS);
} finally {
  await db.stop();
}
