import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import pg from 'pg';
import { migrateDatabase } from '../src/db/migrate.ts';
import { startEmbeddedPostgres } from '../src/platform/embedded-postgres.ts';

/** The middle value; of an even number, the lower of the two in the middle. */
export const median = (values: readonly number[]) => quantile(values, 0.5);

/** The value below which the share `q` of the values lies. */
export function quantile(values: readonly number[], q: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(sorted.length * q) - 1)] ?? Number.NaN;
}

export interface BenchDatabase {
  url: string;
  pool: pg.Pool;
  /** Empties every table. */
  clear(): Promise<void>;
  stop(): Promise<void>;
}

/** A migrated database: BENCH_DATABASE_URL, which is emptied, or an embedded Postgres of its own with its usual settings. */
export async function benchDatabase(): Promise<BenchDatabase> {
  const given = process.env['BENCH_DATABASE_URL'];
  const folder = await mkdtemp(join(tmpdir(), 'muster-bench-'));
  const postgres = given ? undefined : await startEmbeddedPostgres({ dataDir: folder });
  const url = given ?? postgres?.url ?? '';
  await migrateDatabase(url);
  const pool = new pg.Pool({ connectionString: url, max: 8 });
  pool.on('error', () => {});
  return {
    url,
    pool,
    clear: async () => {
      await pool.query(
        'set session_replication_role = replica; truncate users, refresh_tokens, api_keys, projects, agents, tasks, executions, occurrences, audit_log, event_outbox, events, audit_chain, audit_pending, agent_stats_hourly, idempotency_keys, ws_tickets, memories, memory_outbox, memory_cursor cascade; set session_replication_role = origin',
      );
    },
    async stop() {
      await pool.end();
      await postgres?.stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

export interface BenchServer {
  url: string;
  pid: number;
  /** From spawn to the first 200 of /health, in milliseconds. */
  startMs: number;
  /** Resident memory now, in MiB. */
  rss(): number;
  stop(): Promise<void>;
}

/** Starts the built server (dist/main.js) as a process of its own on `port`. */
export async function benchServer(
  databaseUrl: string,
  port: number,
  env: Record<string, string> = {},
): Promise<BenchServer> {
  const folder = await mkdtemp(join(tmpdir(), 'muster-bench-'));
  return startProcess([resolve('dist/main.js')], port, '/health', {
    PORT: String(port),
    DATA_DIR: folder,
    DATABASE_URL: databaseUrl,
    NODE_ENV: 'production',
    JWT_SECRET: 'bench-only-0123456789-abcdefghijklmnop',
    LOG_LEVEL: 'warn',
    RATE_LIMIT_PER_MINUTE: '1000000',
    RATE_LIMIT_ACTIVITY_PER_MINUTE: '1000000',
    ...env,
  });
}

/** Starts a Node program and waits until `path` answers 200. */
export async function startProcess(
  args: string[],
  port: number,
  path: string,
  env: Record<string, string>,
): Promise<BenchServer> {
  const start = performance.now();
  const child: ChildProcess = spawn(process.execPath, args, { env, stdio: ['ignore', 'ignore', 'inherit'] });
  const exited = new Promise<void>((done) => child.once('exit', () => done()));
  const url = `http://127.0.0.1:${port}`;
  while (child.exitCode === null) {
    const answer = await fetch(`${url}${path}`).catch(() => undefined);
    if (answer?.status === 200) break;
    await new Promise((done) => setTimeout(done, 10));
  }
  if (child.exitCode !== null || child.pid === undefined) throw new Error(`${args[0]} did not start`);
  const { pid } = child;
  return {
    url,
    pid,
    startMs: performance.now() - start,
    rss: () => Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024,
    async stop() {
      child.kill('SIGTERM');
      await exited;
      if (env['DATA_DIR']) await rm(env['DATA_DIR'], { recursive: true, force: true });
    },
  };
}

/** A user with an API key, made by SQL. */
export async function benchUser(pool: pg.Pool): Promise<{ id: number; key: string }> {
  const { createHash, randomBytes } = await import('node:crypto');
  const key = `muster_${randomBytes(32).toString('base64url')}`;
  const { rows } = await pool.query<{ id: string }>(
    `insert into users (email, role) values ('bench@example.com', 'user') returning id`,
  );
  const id = Number(rows[0]?.id);
  await pool.query(
    `insert into api_keys (user_id, name, prefix, key_hash, scopes) values ($1, 'bench', $2, $3, '{read,write,agent}')`,
    [id, key.slice(0, 12), createHash('sha256').update(key).digest('hex')],
  );
  return { id, key };
}

/** POSTs JSON and answers the parsed body; throws on anything but 2xx. */
export async function post<T>(url: string, key: string, body: unknown): Promise<T> {
  const answer = await fetch(url, {
    method: 'POST',
    headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });
  if (!answer.ok) throw new Error(`${url} answered ${answer.status}: ${await answer.text()}`);
  return (await answer.json()) as T;
}

/** The table of a run: each line is said when it is known, and all of them together at the end. */
export function createTable(): {
  row(what: string, ours: number, floor?: number, goal?: string): void;
  print(rounds: number): void;
} {
  const lines: Record<string, string>[] = [];
  return {
    row(what, ours, floor, goal = '–') {
      const ratio = floor === undefined ? '' : (ours / floor).toFixed(2);
      const line = { what, ours: ours.toFixed(1), floor: floor?.toFixed(1) ?? '', ratio, goal };
      console.log(`${what}: ${line.ours}${floor === undefined ? '' : `, floor ${line.floor}, ratio ${ratio}`}`);
      lines.push(line);
    },
    print(rounds) {
      console.log(`Node ${process.version}, ${availableParallelism()} cores, medians of ${rounds} rounds`);
      console.table(lines);
    },
  };
}
