import cluster from 'node:cluster';
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Database } from '../db/database.ts';
import { BREAKER_STATES, OPERATIONS, OUTCOMES } from '../memory/counts.ts';
import type { Memories } from '../memory/memory.ts';
import { createDatabaseGauges } from './database-gauges.ts';

// What Prometheus scrapes. The names are a promise to dashboards: see "Metrics" in README.md. No label has values without a
// bound (an id, a path as it was sent), and none says anything about a user.

const CACHE_MS = 1_000;
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30];

export interface Metrics {
  readonly contentType: string;
  /** Counts a request that was answered; `route` is its pattern, undefined when there is none for it. */
  observe(request: { method: string; route: string | undefined; status: number; ms: number }): void;
  /** Everything as text, at most a second old. Neither hangs nor throws when the database or the memory server does. */
  render(): Promise<string>;
}

/** Makes the metrics of one server; those of the process are shared by all that run in it. */
export function createMetrics({
  db,
  memory,
  version,
}: {
  db: Database;
  memory: Pick<Memories, 'figures'>;
  version: string;
}): Metrics {
  const own = new Registry();
  const registers = [own];
  new Gauge({
    name: 'muster_info',
    help: 'Always 1: the version, and the worker that was scraped (0 where there is one process only).',
    labelNames: ['version', 'worker'],
    registers,
  }).set({ version, worker: String(cluster.worker?.id ?? 0) }, 1);
  const requests = new Histogram({
    name: 'muster_http_request_duration_seconds',
    help: 'Requests by method, pattern of their route and class of status, from their arrival to the end of the answer.',
    labelNames: ['method', 'route', 'status'],
    buckets: SECONDS,
    registers,
  });
  new Gauge({
    name: 'muster_database_connections',
    help: 'Connections of the pool by what they do, and calls that wait for one.',
    labelNames: ['state'],
    registers,
    collect() {
      const { totalCount, idleCount, waitingCount } = db.pool;
      this.set({ state: 'busy' }, totalCount - idleCount);
      this.set({ state: 'idle' }, idleCount);
      this.set({ state: 'waiting' }, waitingCount);
    },
  });
  memoryMetrics(memory, registers);
  const gauges = createDatabaseGauges(db, registers);
  const all = Registry.merge([own, processMetrics()]);

  let running: Promise<string> | undefined;
  let madeAt = Number.NEGATIVE_INFINITY;
  return {
    contentType: all.contentType,
    observe({ method, route = 'none', status, ms }) {
      requests.observe({ method, route, status: `${Math.floor(status / 100)}xx` }, ms / 1000);
    },
    render() {
      const now = performance.now();
      if (!running || now - madeAt > CACHE_MS) {
        madeAt = now;
        running = gauges.look().then(() => all.metrics());
      }
      return running;
    },
  };
}

function memoryMetrics(memory: Pick<Memories, 'figures'>, registers: Registry[]): void {
  // A counter that is read from where it is kept, and never goes back.
  const searches = new Counter({
    name: 'muster_memory_searches_total',
    help: 'Searches of the memory by what answered them.',
    labelNames: ['source'],
    registers,
    collect() {
      searches.reset();
      for (const [source, count] of Object.entries(memory.figures().searches)) searches.inc({ source }, count);
    },
  });
  if (!memory.figures().server) return;
  new Gauge({
    name: 'muster_memory_breaker_state',
    help: 'The state of the breaker before the memory server: 1 for the one it is in.',
    labelNames: ['state'],
    registers,
    collect() {
      for (const state of BREAKER_STATES) this.set({ state }, memory.figures().server?.breaker === state ? 1 : 0);
    },
  });
  const changes = new Counter({
    name: 'muster_memory_breaker_changes_total',
    help: 'How often the breaker before the memory server came into each state.',
    labelNames: ['state'],
    registers,
    collect() {
      changes.reset();
      for (const state of BREAKER_STATES) changes.inc({ state }, memory.figures().server?.changes[state] ?? 0);
    },
  });
  const calls = new Counter({
    name: 'muster_memory_calls_total',
    help: 'Calls of the memory server by what they are for and how they ended.',
    labelNames: ['operation', 'outcome'],
    registers,
    collect() {
      calls.reset();
      for (const operation of OPERATIONS) {
        for (const outcome of OUTCOMES) {
          calls.inc({ operation, outcome }, memory.figures().server?.calls[operation][outcome] ?? 0);
        }
      }
    },
  });
}

let ofTheProcess: Registry | undefined;

/** CPU, memory, the event loop, garbage collection: by prom-client, once in a process. */
function processMetrics(): Registry {
  if (!ofTheProcess) {
    ofTheProcess = new Registry();
    collectDefaultMetrics({ register: ofTheProcess });
  }
  return ofTheProcess;
}
