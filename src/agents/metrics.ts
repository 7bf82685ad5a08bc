import type { Queryable } from '../db/database.ts';
import { EXECUTION_CAUSES } from '../db/schema.ts';

// How good an agent is, from counts by hour that are kept as runs end (executions/settle.ts). Nothing here reads runs, so
// it costs the same after a million of them, and stays true when old runs are dropped.
//
// Durations are counted on a logarithmic scale: place b holds those from 1.1^b to 1.1^(b+1) ms. A percentile is the middle
// of the place that it falls into, which is off by 5 % at the most.
//
// A span of time is the hours that it touches: a run that ended within it always counts, and one that ended up to an hour
// before it may.

const BASE = 1.1;

/** The place of a duration, given as an expression in ms, on the scale. */
export const durationBucket = (ms: string) => `floor(ln(greatest(${ms}, 1)) / ln(${BASE}))::smallint`;

/** The middle of a place on the scale, in whole ms. */
const bucketMiddle = (bucket: number) => Math.round(BASE ** (bucket + 0.5));

/** Served by the primary key of agent_stats_hourly. Durations are those of runs that the agent itself ended. */
const METRICS = {
  name: 'agent-metrics',
  text: `
    with counted as (
      select outcome, duration_bucket, runs, duration_ms_sum
      from agent_stats_hourly where agent_id = $1 and hour > now() - ($2::int + 1) * interval '1 hour'
    ), timed as (
      select duration_bucket, sum(sum(runs)) over (order by duration_bucket) as up_to, sum(sum(runs)) over () as all_runs
      from counted where outcome in ('success', 'agent_failed') group by duration_bucket
    )
    select
      (select coalesce(jsonb_object_agg(outcome, runs), '{}') from (
        select outcome, sum(runs)::int as runs from counted group by outcome) by_outcome) as outcomes,
      (select (sum(duration_ms_sum) / nullif(sum(runs), 0))::float8 from counted
        where outcome in ('success', 'agent_failed')) as average,
      (select min(duration_bucket) from timed where up_to >= 0.5 * all_runs) as p50,
      (select min(duration_bucket) from timed where up_to >= 0.95 * all_runs) as p95,
      (select coalesce(sum(runs), 0)::int from agent_stats_hourly
        where agent_id = $1 and hour > now() - interval '25 hours') as last_day`,
};

/** Why a run that an agent had did not succeed: one that no agent took is nobody's. */
type AgentCause = Exclude<(typeof EXECUTION_CAUSES)[number], 'queue_expired'>;
const AGENT_CAUSES = EXECUTION_CAUSES.filter((cause): cause is AgentCause => cause !== 'queue_expired');

export interface AgentMetrics {
  /** How many runs the success rate is made of: all that ended, but for those that were cancelled. */
  n: number;
  successes: number;
  /** 0 to 1; null with no run. */
  successRate: number | null;
  /** The 95 % interval of the success rate (Wilson 1927); null with no run. */
  confidence: { low: number; high: number } | null;
  failures: Record<AgentCause, number>;
  averageMs: number | null;
  p50Ms: number | null;
  p95Ms: number | null;
  /** Of all that ended, in the hours that the last 24 hours touch. */
  runsLastDay: number;
}

/** The metrics of an agent over the hours that the last `hours` hours touch. */
export async function agentMetrics(q: Queryable, agentId: number, hours: number): Promise<AgentMetrics> {
  const { rows } = await q.query<{
    outcomes: Record<string, number>;
    average: number | null;
    p50: number | null;
    p95: number | null;
    last_day: number;
  }>({ ...METRICS, values: [agentId, hours] });
  const [row] = rows;
  if (!row) throw new Error('The metrics answered no row.');
  const failures = Object.fromEntries(AGENT_CAUSES.map((cause) => [cause, row.outcomes[cause] ?? 0])) as Record<
    AgentCause,
    number
  >;
  const successes = row.outcomes['success'] ?? 0;
  const n = successes + failures.agent_failed + failures.lease_lost + failures.run_timeout;
  return {
    n,
    successes,
    successRate: n === 0 ? null : successes / n,
    confidence: n === 0 ? null : wilson(successes, n),
    failures,
    averageMs: row.average === null ? null : Math.round(row.average),
    p50Ms: row.p50 === null ? null : bucketMiddle(row.p50),
    p95Ms: row.p95 === null ? null : bucketMiddle(row.p95),
    runsLastDay: row.last_day,
  };
}

/** The Wilson score interval at 95 %: unlike the plain one it stays within 0 to 1 and means something for few runs. */
export function wilson(successes: number, n: number): { low: number; high: number } {
  const z = 1.959964;
  const rate = successes / n;
  const middle = rate + z ** 2 / (2 * n);
  const reach = z * Math.sqrt((rate * (1 - rate)) / n + z ** 2 / (4 * n ** 2));
  const scale = 1 + z ** 2 / n;
  return { low: Math.max(0, (middle - reach) / scale), high: Math.min(1, (middle + reach) / scale) };
}
