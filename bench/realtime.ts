// npm run bench:realtime: what dashboards cost, beside a bare ws server in the same run. BENCH_SOCKETS for another number
// than 10,000. Rounds of ours and of the floor take turns; medians.
import { type ChildProcess, spawn } from 'node:child_process';
import { resolve } from 'node:path';
import { Redis } from 'ioredis';
import { type Clients, openClients } from './socket-clients.ts';
import {
  type BenchServer,
  benchDatabase,
  benchServer,
  benchUser,
  createTable,
  median,
  post,
  quantile,
  startProcess,
} from './support.ts';

const SOCKETS = Number(process.env['BENCH_SOCKETS'] ?? 10_000);
const ROUNDS = 3;
const PORT = 18_180;
const REDIS_PORT = 18_190;
const BOUNDS = { WS_MAX_CONNECTIONS_PER_USER: '1000000', WS_MAX_CONNECTIONS_PER_ADDRESS: '1000000' };
const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

const { row, print } = createTable();

const db = await benchDatabase();
await db.clear();
const user = await benchUser(db.pool);
const path = `/ws?token=${user.key}`;
const floorEnv = (port: number, redis?: string) => ({
  PORT: String(port),
  PATH: process.env['PATH'] ?? '',
  ...(redis ? { REDIS_URL: redis } : {}),
});
const startFloor = (port: number, redis?: string) =>
  startProcess([resolve('bench/floors/ws.mjs')], port, '/', floorEnv(port, redis));

/** Memory of idle sockets, and one event to all of them. */
async function crowd(): Promise<void> {
  const memory: [number[], number[]] = [[], []];
  const rates: [number[], number[]] = [[], []];
  const lasts: [number[], number[]] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    for (const side of [0, 1] as const) {
      const server: BenchServer = side === 0 ? await benchServer(db.url, PORT, BOUNDS) : await startFloor(PORT);
      const warm = await openClients(PORT, 500, () => path);
      warm.closeAll();
      await pause(1_000);
      const before = server.rss();
      const clients = await openClients(PORT, SOCKETS, () => path);
      await pause(2_000);
      memory[side].push(((server.rss() - before) * 1_024) / SOCKETS);
      for (let i = 0; i < 3; i++) {
        const told = clients.next(SOCKETS);
        const start = performance.now();
        if (side === 0) await post(`${server.url}/api/v1/tasks`, user.key, { skill_name: 'x', name: 'y'.repeat(60) });
        else await fetch(server.url, { method: 'POST' });
        const { first, last } = await told;
        if (i === 0) continue; // Warming up.
        rates[side].push(SOCKETS / ((last - first) / 1_000));
        lasts[side].push(last - start);
      }
      clients.closeAll();
      await server.stop();
    }
  }
  row(`memory of an idle socket of ${SOCKETS}, KiB`, median(memory[0]), median(memory[1]), '≤ 1.3');
  row(`one event to ${SOCKETS}, messages/s`, median(rates[0]), median(rates[1]), '≥ 0.8');
  row('the same, ms from the call to the last', median(lasts[0]), median(lasts[1]));
}

/** 100 events a second to 1,000 clients of two workers over Redis; what one of fifty clients sees. */
async function steady(redisUrl: string): Promise<void> {
  const publisher = new Redis(redisUrl);
  const tails: [number[], number[]] = [[], []];
  const middles: [number[], number[]] = [[], []];
  for (let round = 0; round < ROUNDS; round++) {
    for (const side of [0, 1] as const) {
      const servers =
        side === 0
          ? [await benchServer(db.url, PORT, { ...BOUNDS, REDIS_URL: redisUrl, WORKERS: '2' })]
          : [await startFloor(PORT, redisUrl), await startFloor(PORT + 1, redisUrl)];
      const crowds: Clients[] = [];
      for (const [i] of servers.entries()) {
        // Each call makes one event of this topic, whose title carries the time of the call.
        crowds.push(await openClients(PORT + i, 1_000 / servers.length, () => `${path}&topics=calendar`));
      }
      const times: number[] = [];
      for (const clients of crowds) {
        clients.look(50, (text) => {
          const sent = /sent-(\d+\.\d+)/.exec(text)?.[1];
          if (sent !== undefined) times.push(performance.now() - Number(sent));
        });
      }
      const sending: Promise<unknown>[] = [];
      for (let i = 0; i < 1_000; i++) {
        const mark = `sent-${performance.now().toFixed(3)}`;
        if (side === 0) {
          const task = { skill_name: 'x', schedule_cron: '0 0 1 1 *', name: mark };
          sending.push(post(`http://127.0.0.1:${PORT}/api/v1/tasks`, user.key, task));
        } else sending.push(publisher.publish('floor', JSON.stringify({ mark, filler: 'x'.repeat(300) })));
        await pause(10);
      }
      await Promise.all(sending);
      await pause(500);
      middles[side].push(quantile(times, 0.5));
      tails[side].push(quantile(times, 0.99));
      for (const clients of crowds) clients.closeAll();
      for (const server of servers) await server.stop();
    }
  }
  row('published → received over 2 workers, p50 ms', median(middles[0]), median(middles[1]));
  row('published → received over 2 workers, p99 ms', median(tails[0]), median(tails[1]), '≤ 1.5, ≤ 25 ms');
  publisher.disconnect();
}

/** Everybody comes back at once, each with a hundred events to catch up on. */
async function storm(): Promise<void> {
  const count = Math.min(SOCKETS, 5_000);
  const server = await benchServer(db.url, PORT, BOUNDS);
  const { headers } = await fetch(`${server.url}/api/v1/tasks?limit=1`, {
    headers: { authorization: `Bearer ${user.key}` },
  });
  const cursor = headers.get('x-event-cursor');
  for (let i = 0; i < 100; i++) await post(`${server.url}/api/v1/tasks`, user.key, { skill_name: 'x' });
  await pause(1_000);
  const probe = async (until: () => boolean) => {
    const times: number[] = [];
    while (!until()) {
      const start = performance.now();
      const answer = await fetch(`${server.url}/api/v1/tasks?limit=1&total=false`, {
        headers: { authorization: `Bearer ${user.key}` },
      });
      await answer.text();
      times.push(performance.now() - start);
      await pause(20);
    }
    return quantile(times, 0.99);
  };
  const calmEnds = performance.now() + 3_000;
  const calm = await probe(() => performance.now() > calmEnds);
  let back = false;
  const probing = probe(() => back);
  const start = performance.now();
  const clients = await openClients(PORT, count, () => `${path}&last_event_id=${cursor}`, count);
  // An ack and a hundred events each.
  while (clients.count() < count * 101) await pause(10);
  const took = performance.now() - start;
  back = true;
  row(`${count} sockets resume 100 events each, s`, took / 1_000, undefined, '≤ 10');
  row('REST p99 meanwhile, ms, against before', await probing, calm, '≤ 3');
  clients.closeAll();
  await server.stop();
}

let redis: ChildProcess | undefined;
try {
  await crowd();
  redis = spawn('redis-server', ['--port', String(REDIS_PORT), '--bind', '127.0.0.1', '--save', ''], {
    stdio: 'ignore',
  });
  redis.on('error', () => {});
  await pause(1_000);
  if (redis.pid === undefined) console.log('without redis-server on the PATH, two workers over Redis are not measured');
  else await steady(`redis://127.0.0.1:${REDIS_PORT}`);
  await storm();
  print(ROUNDS);
} finally {
  redis?.kill('SIGKILL');
  await db.stop();
}
