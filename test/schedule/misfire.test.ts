import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { retryDelayMs } from '../../src/schedule/backoff.ts';
import { parseCron } from '../../src/schedule/cron.ts';
import { type Due, type MisfirePolicy, resolveDue, type Tick } from '../../src/schedule/misfire.ts';
import { countOccurrences, nextOccurrence } from '../../src/schedule/occurrences.ts';

const every = (periodMs: number) => (ms: number) => (Math.floor(ms / periodMs) + 1) * periodMs;

const countEvery = (periodMs: number) => (from: number, until: number) =>
  Math.ceil(until / periodMs) - Math.ceil(from / periodMs);
const SECOND = 1_000;

describe('due ticks', () => {
  const input = fc.record({
    period: fc.integer({ min: 1, max: 50 }),
    due: fc.integer({ min: 0, max: 100 }),
    late: fc.integer({ min: 0, max: 900 }),
    lateness: fc.integer({ min: 0, max: 100 }),
    cap: fc.integer({ min: 1, max: 20 }),
  });
  const resolve = (
    policy: MisfirePolicy,
    given: { period: number; due: number; late: number; lateness: number; cap: number },
  ) => {
    const period = given.period * SECOND;
    const lateness = given.lateness * SECOND;
    const dueAt = given.due * period;
    const now = dueAt + given.late * SECOND;
    const times: number[] = [];
    for (let at = dueAt; at <= now; at += period) times.push(at);
    const result = resolveDue({
      nextAfter: every(period),
      countBetween: countEvery(period),
      dueAt,
      now,
      policy,
      maxLatenessMs: lateness,
      maxCatchUp: given.cap,
      maxListed: 1_000,
    });
    const isMissed = (time: number) => now - time > lateness;
    const isOnTime = (time: number) => !isMissed(time) && now - time <= 5 * SECOND;
    return { result, times, now, period, isMissed, isOnTime };
  };

  test('every due tick gets one verdict, in order, and the next lies after now', () => {
    fc.assert(
      fc.property(input, fc.constantFrom<MisfirePolicy[]>('skip', 'fire_last', 'fire_all'), (given, policy) => {
        const { result, times, now, period } = resolve(policy, given);
        expect(result.ticks.map((tick) => tick.scheduledFor)).toEqual(times);
        expect(result.unlisted).toBeUndefined();
        expect(result.next).toBeGreaterThan(now);
        expect((result.next ?? 0) - (times.at(-1) ?? 0)).toBe(period);
      }),
    );
  });

  test('in time runs whatever the policy, fired or late; skip runs nothing that was missed', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, isMissed, isOnTime } = resolve('skip', given);
        for (const { scheduledFor, verdict } of result.ticks) {
          const inTime = isOnTime(scheduledFor) ? 'fired' : 'late';
          expect(verdict).toBe(isMissed(scheduledFor) ? 'skipped_misfire' : inTime);
        }
      }),
    );
  });

  test('fire_last runs one missed tick at most, the latest, and none when a younger one is in time', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, times, isMissed } = resolve('fire_last', given);
        const missed = result.ticks.filter((tick) => isMissed(tick.scheduledFor));
        const latest = times.at(-1) ?? 0;
        expect(missed.filter((tick) => tick.verdict === 'late').map((tick) => tick.scheduledFor)).toEqual(
          isMissed(latest) ? [latest] : [],
        );
        expect(missed.every((tick) => tick.verdict === 'late' || tick.verdict === 'coalesced')).toBe(true);
      }),
    );
  });

  test('fire_all runs all that were missed, of more than the cap the newest', () => {
    fc.assert(
      fc.property(input, (given) => {
        const { result, times, isMissed } = resolve('fire_all', given);
        const late = result.ticks.filter((tick) => tick.verdict === 'late' && isMissed(tick.scheduledFor));
        expect(late.map((tick) => tick.scheduledFor)).toEqual(times.filter(isMissed).slice(-given.cap));
      }),
    );
  });

  describe('against a slow and obvious model', () => {
    interface Case {
      /** Those that are due, oldest first. */
      times: number[];
      next: number | undefined;
      now: number;
      policy: MisfirePolicy;
      lateness: number | null;
      cap: number;
      maxTicks: number | undefined;
    }
    /** Looks at one tick after the other, each with its own idea of how late it may be. */
    function slowly({ times, next, now, policy, lateness, cap, maxTicks }: Case): Pick<Due, 'ticks' | 'next'> {
      const missed: number[] = [];
      const inTime: number[] = [];
      for (const [i, time] of times.entries()) {
        const following = times[i + 1] ?? next;
        const allowed =
          lateness ??
          (following === undefined
            ? 3600 * SECOND
            : Math.max(5 * SECOND, Math.min((following - time) / 2, 3600 * SECOND)));
        (now - time <= allowed ? inTime : missed).push(time);
      }
      const ticks: Tick[] = [];
      let runs = 0;
      for (const time of times) {
        let verdict: Tick['verdict'];
        if (inTime.includes(time)) verdict = now - time <= 5 * SECOND ? 'fired' : 'late';
        else if (policy === 'skip') verdict = 'skipped_misfire';
        else if (policy === 'fire_all') verdict = missed.slice(-cap).includes(time) ? 'late' : 'skipped_misfire';
        else verdict = inTime.length === 0 && time === missed.at(-1) ? 'late' : 'coalesced';
        if (runs === maxTicks) break;
        if (verdict === 'fired' || verdict === 'late') runs += 1;
        ticks.push({ scheduledFor: time, verdict });
      }
      return { ticks, next: runs === maxTicks ? undefined : next };
    }

    const spacing = fc.oneof(
      fc.integer({ min: 1, max: 10 * SECOND }),
      fc.integer({ min: 1, max: 300 }).map((seconds) => seconds * SECOND),
      fc.integer({ min: 1, max: 300 }).map((minutes) => minutes * 60 * SECOND),
    );
    const cases = fc
      .record({
        spacings: fc.array(spacing, { maxLength: 40 }),
        ends: fc.boolean(),
        // Just now, or as late as a share of the way to what follows.
        late: fc.oneof(fc.integer({ min: 0, max: 6 * SECOND }), fc.double({ min: 0, max: 0.999, noNaN: true })),
        after: spacing,
        policy: fc.constantFrom<MisfirePolicy[]>('skip', 'fire_last', 'fire_all'),
        lateness: fc.option(fc.oneof(fc.constant(0), spacing)),
        cap: fc.integer({ min: 1, max: 20 }),
        maxTicks: fc.option(fc.integer({ min: 0, max: 30 }), { nil: undefined }),
      })
      .map(({ spacings, ends, late, after, ...rest }): Case => {
        const times = [0];
        for (const ms of spacings) times.push((times.at(-1) ?? 0) + ms);
        const latest = times.at(-1) ?? 0;
        const wait = late >= 1 ? late : Math.floor(late * after);
        return { ...rest, times, now: latest + wait, next: ends ? undefined : latest + Math.max(after, wait + 1) };
      });

    test('each due tick has the verdict that it would get by itself', () => {
      fc.assert(
        fc.property(cases, (given) => {
          const all = given.next === undefined ? given.times : [...given.times, given.next];
          const { ticks, unlisted, next } = resolveDue({
            nextAfter: (ms) => all.find((time) => time > ms),
            countBetween: () => expect.fail('there is nothing to count'),
            dueAt: 0,
            now: given.now,
            policy: given.policy,
            maxLatenessMs: given.lateness,
            maxCatchUp: given.cap,
            maxListed: 1_000,
            maxTicks: given.maxTicks,
          });
          expect({ ticks, next }).toEqual(slowly(given));
          expect(unlisted).toBeUndefined();
        }),
        { numRuns: 3_000 },
      );
    });
  });

  test.each<[string, number, number | undefined, number, Tick['verdict']]>([
    ['every 10 min, half of it late', 600, 600, 300, 'late'],
    ['every 10 min, a second more', 600, 600, 301, 'skipped_misfire'],
    ['every 2 s, five seconds late', 2, 2, 5, 'fired'],
    ['every 8 s, between on time and its next', 8, 8, 6, 'skipped_misfire'],
    ['daily, an hour late', 86_400, 86_400, 3_600, 'late'],
    ['daily, a second more', 86_400, 86_400, 3_601, 'skipped_misfire'],
    ['the last of a minutely one, an hour late', 60, undefined, 3_600, 'late'],
    ['the last of a working day, an hour late', 60, 54_000, 3_600, 'late'],
  ])('unless the task says how late it may be, by the spacing: %s', (_what, before, after, late, verdict) => {
    const [first, second] = [0, before * SECOND];
    const third = after === undefined ? undefined : second + after * SECOND;
    const { ticks } = resolveDue({
      nextAfter: (ms) => [second, third].find((time) => time !== undefined && time > ms),
      countBetween: () => 0,
      dueAt: first,
      now: second + late * SECOND,
      policy: 'skip',
      maxLatenessMs: null,
      maxCatchUp: 1,
      maxListed: 1_000,
    });
    expect(ticks.find(({ scheduledFor }) => scheduledFor === second)?.verdict).toBe(verdict);
    expect(ticks[0]).toEqual({ scheduledFor: first, verdict: 'skipped_misfire' });
  });

  test('when few more may run, those are the oldest, and nothing comes after the last', () => {
    const due = {
      nextAfter: every(60 * SECOND),
      countBetween: countEvery(60 * SECOND),
      dueAt: 0,
      now: 600 * SECOND,
      maxLatenessMs: null,
      maxCatchUp: 4,
      maxListed: 1_000,
    };
    expect(resolveDue({ ...due, policy: 'fire_all', maxTicks: 2 })).toEqual({
      ticks: [
        ...[0, 60, 120, 180, 240, 300].map((at) => ({ scheduledFor: at * SECOND, verdict: 'skipped_misfire' })),
        ...[360, 420].map((at) => ({ scheduledFor: at * SECOND, verdict: 'late' })),
      ],
      next: undefined,
    });
    expect(resolveDue({ ...due, policy: 'skip', maxTicks: 2 })).toMatchObject({ next: 660 * SECOND });
    expect(resolveDue({ ...due, policy: 'skip', maxTicks: 1 })).toMatchObject({ next: undefined });
    expect(resolveDue({ ...due, policy: 'skip', maxTicks: 0 })).toEqual({ ticks: [], next: undefined });
    const early = { ...due, dueAt: 660 * SECOND, policy: 'skip' as const };
    expect(resolveDue({ ...early, maxTicks: 1 })).toEqual({ ticks: [], next: 660 * SECOND });
    expect(resolveDue({ ...early, maxTicks: 0 })).toEqual({ ticks: [], next: undefined });
  });

  test('a one-off has one tick and nothing after it', () => {
    const none = { nextAfter: () => undefined, countBetween: () => 0 };
    const once = { ...none, dueAt: 1_000, now: 5_000, maxLatenessMs: 100, maxCatchUp: 5 };
    expect(resolveDue({ ...once, policy: 'fire_last' })).toEqual({
      ticks: [{ scheduledFor: 1_000, verdict: 'late' }],
      next: undefined,
    });
    expect(resolveDue({ ...once, policy: 'skip' }).ticks[0]?.verdict).toBe('skipped_misfire');
  });

  test('what is not due yet is left for its time', () => {
    const seconds = { nextAfter: every(1_000), countBetween: countEvery(1_000) };
    const early = { ...seconds, dueAt: 5_000, now: 4_999, maxLatenessMs: 0, maxCatchUp: 5 };
    expect(resolveDue({ ...early, policy: 'fire_all' })).toEqual({ ticks: [], next: 5_000 });
  });

  test('a long silence is listed to its newest end only, and not walked through', () => {
    let asked = 0;
    const nextAfter = (ms: number) => {
      asked++;
      return every(1_000)(ms);
    };
    const now = 365 * 86_400_000;
    const due = { nextAfter, countBetween: countEvery(1_000), dueAt: 0, now, maxLatenessMs: 60_000, maxCatchUp: 5 };
    const { ticks, unlisted, next } = resolveDue({ ...due, policy: 'fire_last' });
    expect(ticks.length).toBe(20 + 61);
    expect(ticks.at(-1)).toEqual({ scheduledFor: now, verdict: 'fired' });
    const until = ticks[0]?.scheduledFor ?? 0;
    expect(unlisted).toEqual({ from: 0, until, count: until / 1_000, verdict: 'coalesced' });
    expect(next).toBe(now + 1_000);
    expect(asked).toBeLessThan(10_000);
    expect(resolveDue({ ...due, policy: 'skip' }).unlisted?.verdict).toBe('skipped_misfire');
    // The oldest is one even where the schedule, which was changed, has it no longer.
    const odd = resolveDue({ ...due, dueAt: 500, policy: 'skip' });
    expect(odd.unlisted).toMatchObject({ from: 500, count: until / 1_000 });
  });

  test('more than are listed may run, if so many are allowed, and of those in time a thousand', () => {
    const seconds = { nextAfter: every(1_000), countBetween: countEvery(1_000) };
    const due = { ...seconds, dueAt: 0, now: 10_000_000, policy: 'fire_all' as const };
    const all = resolveDue({ ...due, maxLatenessMs: 3_000_000, maxCatchUp: 5_000 }).ticks;
    expect(all.filter((tick) => tick.verdict === 'fired').length).toBe(6);
    expect(all.filter((tick) => tick.verdict === 'late').length).toBe(5_000 + 1_000 - 6);
  });

  test('working hours, asked on a Sunday after a week of silence: the last tick of Friday runs', () => {
    const cron = parseCron('* 9-17 * * 1-5');
    const { ticks, unlisted } = resolveDue({
      nextAfter: (ms) => nextOccurrence(cron, 'Europe/Rome', ms)?.scheduledFor,
      countBetween: (from, until) => countOccurrences(cron, 'Europe/Rome', from, until),
      dueAt: Date.parse('2026-01-05T08:00:00Z'),
      now: Date.parse('2026-01-11T12:00:00Z'),
      policy: 'fire_last',
      maxLatenessMs: null,
      maxCatchUp: 100,
      maxListed: 1_000,
    });
    expect(ticks.length).toBe(1_000);
    expect(ticks.at(-1)).toEqual({ scheduledFor: Date.parse('2026-01-09T16:59:00Z'), verdict: 'late' });
    expect(unlisted?.from).toBe(Date.parse('2026-01-05T08:00:00Z'));
    expect(unlisted?.until).toBe(ticks[0]?.scheduledFor);
    expect(unlisted?.count).toBe(5 * 9 * 60 - 1_000);
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
            countBetween: (from, until) => times.filter((time) => time >= from && time < until).length,
            dueAt,
            now,
            policy,
            maxLatenessMs: 0,
            maxCatchUp: 1,
            maxListed: 1_000,
          });
          const onTime = times.at(-1) === now ? 1 : 0;
          const listed = times.slice(-1_000 - onTime);
          expect(ticks.map((tick) => tick.scheduledFor)).toEqual(listed);
          expect(unlisted?.until).toBe(listed.length < times.length ? listed[0] : undefined);
          expect(unlisted?.count).toBe(listed.length < times.length ? times.length - listed.length : undefined);
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
