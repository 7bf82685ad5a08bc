import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { retryDelayMs } from '../../src/schedule/backoff.ts';
import { type MisfirePolicy, resolveDue } from '../../src/schedule/misfire.ts';

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
        expect(result.truncated).toBe(false);
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
      truncated: false,
      next: undefined,
    });
    expect(resolveDue({ ...once, policy: 'skip' }).ticks[0]?.verdict).toBe('skipped_misfire');
  });

  test('a long silence is listed to its newest end only, and not walked through', () => {
    let asked = 0;
    const nextAfter = (ms: number) => {
      asked++;
      return every(1_000)(ms);
    };
    const now = 365 * 86_400_000;
    const { ticks, truncated, next } = resolveDue({
      nextAfter,
      dueAt: 0,
      now,
      policy: 'fire_last',
      toleranceMs: 60_000,
      maxCatchUp: 5,
    });
    expect(truncated).toBe(true);
    expect(ticks.length).toBeLessThanOrEqual(1_001);
    expect(ticks.at(-1)).toEqual({ scheduledFor: now, verdict: 'fired' });
    expect(next).toBe(now + 1_000);
    expect(asked).toBeLessThan(5_000);
  });
});

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
