import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { retryDelayMs } from '../../src/schedule/backoff.ts';
import { parseCron } from '../../src/schedule/cron.ts';
import { type MisfirePolicy, resolveDue } from '../../src/schedule/misfire.ts';
import { nextOccurrence } from '../../src/schedule/occurrences.ts';

const every = (periodMs: number) => (ms: number) => (Math.floor(ms / periodMs) + 1) * periodMs;

describe('due ticks', () => {
  const input = fc.record({
    period: fc.integer({ min: 1, max: 50 }),
    due: fc.integer({ min: 0, max: 100 }),
    late: fc.integer({ min: 0, max: 900 }),
    tolerance: fc.integer({ min: 0, max: 100 }),
    cap: fc.integer({ min: 1, max: 20 }),
  });
  const resolve = (
    policy: MisfirePolicy,
    {
      period,
      due,
      late,
      tolerance,
      cap,
    }: { period: number; due: number; late: number; tolerance: number; cap: number },
  ) => {
    const dueAt = due * period;
    const now = dueAt + late;
    const times: number[] = [];
    for (let at = dueAt; at <= now; at += period) times.push(at);
    const result = resolveDue({
      nextAfter: every(period),
      dueAt,
      now,
      policy,
      toleranceMs: tolerance,
      maxCatchUp: cap,
    });
    const isLate = (time: number) => now - time > tolerance;
    return { result, times, now, isLate };
  };

  test('every due tick gets one verdict, in order, and the next lies after now', () => {
    fc.assert(
      fc.property(input, fc.constantFrom<MisfirePolicy[]>('skip', 'fire_last', 'fire_all'), (given, policy) => {
        const { result, times, now } = resolve(policy, given);
        expect(result.ticks.map((tick) => tick.scheduledFor)).toEqual(times);
        expect(result.unlisted).toBeUndefined();
        expect(result.next).toBeGreaterThan(now);
        expect((result.next ?? 0) - (times.at(-1) ?? 0)).toBe(given.period);
      }),
    );
  });

  test('on time fires whatever the policy; skip fires nothing that is late', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, isLate } = resolve('skip', given);
        for (const { scheduledFor, verdict } of result.ticks) {
          expect(verdict).toBe(isLate(scheduledFor) ? 'skipped_misfire' : 'fired');
        }
      }),
    );
  });

  test('fire_last runs one late tick at most, the latest, and none when a younger one is on time', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, times, isLate } = resolve('fire_last', given);
        const late = result.ticks.filter((tick) => tick.verdict === 'late').map((tick) => tick.scheduledFor);
        const latest = times.at(-1) ?? 0;
        expect(late).toEqual(isLate(latest) ? [latest] : []);
        expect(result.ticks.some((tick) => tick.verdict === 'skipped_misfire')).toBe(false);
      }),
    );
  });

  test('fire_all runs all that are late, of more than the cap the newest', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, times, isLate } = resolve('fire_all', given);
        const missed = times.filter(isLate);
        expect(result.ticks.filter((tick) => tick.verdict === 'late').map((tick) => tick.scheduledFor)).toEqual(
          missed.slice(-given.cap),
        );
      }),
    );
  });

  test('a one-off has one tick and nothing after it', () => {
    const once = { nextAfter: () => undefined, dueAt: 1_000, now: 5_000, toleranceMs: 100, maxCatchUp: 5 };
    expect(resolveDue({ ...once, policy: 'fire_last' })).toEqual({
      ticks: [{ scheduledFor: 1_000, verdict: 'late' }],
      next: undefined,
    });
    expect(resolveDue({ ...once, policy: 'skip' }).ticks[0]?.verdict).toBe('skipped_misfire');
  });

  test('what is not due yet is left for its time', () => {
    const early = { nextAfter: every(1_000), dueAt: 5_000, now: 4_999, toleranceMs: 0, maxCatchUp: 5 };
    expect(resolveDue({ ...early, policy: 'fire_all' })).toEqual({ ticks: [], next: 5_000 });
  });

  test('a long silence is listed to its newest end only, and not walked through', () => {
    let asked = 0;
    const nextAfter = (ms: number) => {
      asked++;
      return every(1_000)(ms);
    };
    const now = 365 * 86_400_000;
    const due = { nextAfter, dueAt: 0, now, toleranceMs: 60_000, maxCatchUp: 5 };
    const { ticks, unlisted, next } = resolveDue({ ...due, policy: 'fire_last' });
    expect(ticks.length).toBe(1_061);
    expect(ticks.at(-1)).toEqual({ scheduledFor: now, verdict: 'fired' });
    expect(unlisted).toEqual({ from: 0, until: ticks[0]?.scheduledFor, verdict: 'coalesced' });
    expect(next).toBe(now + 1_000);
    expect(asked).toBeLessThan(10_000);
    expect(resolveDue({ ...due, policy: 'skip' }).unlisted?.verdict).toBe('skipped_misfire');
  });

  test('more than are listed may run, if so many are allowed, and all that are on time fire', () => {
    const due = { nextAfter: every(1_000), dueAt: 0, now: 10_000_000, policy: 'fire_all' as const };
    const all = resolveDue({ ...due, toleranceMs: 3_000_000, maxCatchUp: 5_000 }).ticks;
    expect(all.filter((tick) => tick.verdict === 'fired').length).toBe(3_001);
    expect(all.filter((tick) => tick.verdict === 'late').length).toBe(5_000);
  });

  test('working hours, asked on a Sunday after a week of silence: the last tick of Friday runs', () => {
    const cron = parseCron('* 9-17 * * 1-5');
    const { ticks, unlisted } = resolveDue({
      nextAfter: (ms) => nextOccurrence(cron, 'Europe/Rome', ms)?.scheduledFor,
      dueAt: Date.parse('2026-01-05T08:00:00Z'),
      now: Date.parse('2026-01-11T12:00:00Z'),
      policy: 'fire_last',
      toleranceMs: 60_000,
      maxCatchUp: 100,
    });
    expect(ticks.length).toBe(1_000);
    expect(ticks.at(-1)).toEqual({ scheduledFor: Date.parse('2026-01-09T16:59:00Z'), verdict: 'late' });
    expect(unlisted?.from).toBe(Date.parse('2026-01-05T08:00:00Z'));
    expect(unlisted?.until).toBe(ticks[0]?.scheduledFor);
  });

  test('however unevenly ticks lie, the newest are listed, and the cost is bounded', () => {
    // Clusters: how many ticks, how far apart, and the silence after them.
    const cluster = fc.record({
      count: fc.integer({ min: 1, max: 4_000 }),
      period: fc.integer({ min: 1, max: 100_000 }),
      silence: fc.integer({ min: 1, max: 100_000_000_000 }),
    });
    const clusters = fc.array(cluster, { minLength: 1, maxLength: 8 });
    fc.assert(
      fc.property(
        clusters,
        fc.boolean(),
        fc.constantFrom<MisfirePolicy[]>('skip', 'fire_last'),
        (made, end, policy) => {
          const times: number[] = [];
          let at = 0;
          for (const { count, period, silence } of made) {
            for (let i = 0; i < count; i++) {
              at += period;
              times.push(at);
            }
            at += silence;
          }
          const now = end ? (times.at(-1) ?? 0) : at;
          let asked = 0;
          const nextAfter = (ms: number) => {
            asked++;
            return times[firstIndexAfter(times, ms)];
          };
          const dueAt = times[0] ?? 0;
          const { ticks, unlisted, next } = resolveDue({
            nextAfter,
            dueAt,
            now,
            policy,
            toleranceMs: 0,
            maxCatchUp: 1,
          });
          const onTime = times.at(-1) === now ? 1 : 0;
          const listed = times.slice(-1_000 - onTime);
          expect(ticks.map((tick) => tick.scheduledFor)).toEqual(listed);
          expect(unlisted?.until).toBe(listed.length < times.length ? listed[0] : undefined);
          expect(next).toBeUndefined();
          const ran = ticks.filter(({ verdict }) => verdict === 'late' || verdict === 'fired');
          expect(ran.length).toBe(policy === 'fire_last' ? 1 : onTime);
          expect(asked).toBeLessThan(60_000);
        },
      ),
    );
  });
});

function firstIndexAfter(times: readonly number[], ms: number): number {
  let [low, high] = [0, times.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((times[middle] ?? 0) <= ms) low = middle + 1;
    else high = middle;
  }
  return low;
}

describe('backoff', () => {
  test('doubles with every attempt, up to an hour, and is spread over all of it', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 20 }),
        fc.integer({ min: 0, max: 3_600 }),
        fc.double({ min: 0, max: 0.999_999, noNaN: true }),
        (attempt, base, random) => {
          const delay = retryDelayMs(attempt, base, () => random);
          const ceiling = Math.min(3_600_000, base * 1000 * 2 ** (attempt - 1));
          expect(Number.isInteger(delay)).toBe(true);
          expect(delay).toBeGreaterThanOrEqual(0);
          expect(delay).toBeLessThanOrEqual(ceiling);
          expect(Math.abs(delay - random * ceiling)).toBeLessThanOrEqual(1);
        },
      ),
    );
  });
});
