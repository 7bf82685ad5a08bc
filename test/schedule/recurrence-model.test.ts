import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { type Recurrence, recurrence } from '../../src/schedule/recurrence.ts';
import { shownAt, type Wall, wallClock } from '../support/wall-clock.ts';

// Whatever a recurrence answers, against a model that looks at the wall clock of a zone in every minute, or at every second of
// elapsed time, and asks of each whether it ticks.

const SECOND = 1_000;
const MINUTE = 60_000;
const DAY = 86_400_000;

interface Stretch {
  zone: string;
  from: number;
  until: number;
  walls: Wall[];
}

const stretches = new Map<string, Stretch>();
/** Three days of a zone's wall clock; in their middle is what is compared, since changes at their ends are cut. */
function stretchAt(zone: string, from: number): Stretch {
  const key = `${zone} ${from}`;
  const until = from + 3 * DAY;
  const stretch = stretches.get(key) ?? { zone, from, until, walls: wallClock(zone, from, until, MINUTE) };
  stretches.set(key, stretch);
  return stretch;
}

const [FROM, UNTIL] = [Date.UTC(2025, 0, 1), Date.UTC(2028, 0, 1)];
const changes = new Map<string, number[]>();
/** The days before those on which the clocks of a zone are changed, found by looking at the midnight of UTC. */
function changesOf(zone: string): number[] {
  const days = changes.get(zone) ?? [];
  if (changes.has(zone)) return days;
  let offset = shownAt(zone, FROM) - FROM;
  for (let at = FROM; at < UNTIL; at += DAY) {
    const after = shownAt(zone, at + DAY) - at - DAY;
    if (after !== offset) days.push(at - DAY);
    offset = after;
  }
  changes.set(zone, days);
  return days;
}

const ODD: [string, number][] = [
  ['America/Sao_Paulo', Date.UTC(2018, 10, 3)],
  ['America/Sao_Paulo', Date.UTC(2019, 1, 15)],
  ['Pacific/Apia', Date.UTC(2011, 11, 29)],
  ['Pacific/Apia', Date.UTC(2012, 2, 30, 12)],
  ['Pacific/Kiritimati', Date.UTC(1994, 11, 30, 12)],
  ['Asia/Kathmandu', Date.UTC(1985, 11, 31)],
  ['America/Caracas', Date.UTC(2007, 11, 8)],
  ['America/Caracas', Date.UTC(2016, 3, 30)],
  ['Asia/Pyongyang', Date.UTC(2015, 7, 13)],
  ['Asia/Pyongyang', Date.UTC(2018, 4, 3)],
  ['Europe/Volgograd', Date.UTC(2020, 11, 26)],
];
const zones = Intl.supportedValuesOf('timeZone');
/** A place to look: mostly at a change of a zone's clocks, where it has some. */
const place = fc.oneof(
  { weight: 1, arbitrary: fc.constantFrom(...ODD) },
  {
    weight: 4,
    arbitrary: fc
      .tuple(
        fc.oneof(
          fc.constantFrom(
            'America/New_York',
            'Europe/Berlin',
            'Australia/Lord_Howe',
            'Africa/Casablanca',
            'Africa/Cairo',
          ),
          fc.constantFrom('Antarctica/Troll', 'America/Havana', 'America/Nuuk', 'America/Scoresbysund', 'Asia/Beirut'),
          fc.constantFrom('Europe/Dublin', 'America/Asuncion', 'Pacific/Chatham', 'Asia/Gaza', 'America/St_Johns'),
          fc.constantFrom(...zones),
        ),
        fc.nat(1_000),
      )
      .map(([zone, which]): [string, number] => {
        const days = changesOf(zone);
        return [zone, days[which % days.length] ?? FROM + which * DAY];
      }),
  },
);

const some = (min: number, max: number, most: number) =>
  fc.uniqueArray(fc.integer({ min, max }), { minLength: 1, maxLength: most });
const all = (count: number) => fc.constant(Array.from({ length: count }, (_, i) => i));
const pattern = fc
  .record({
    seconds: fc.option(some(0, 59, 3), { nil: undefined }),
    minutes: fc.oneof(some(0, 59, 4), all(60)),
    hours: fc.oneof(some(0, 23, 5), some(0, 4, 3), all(24)),
    weekdays: fc.oneof({ weight: 3, arbitrary: all(7) }, { weight: 1, arbitrary: some(0, 6, 4) }),
  })
  .map((given) => {
    const list = (values: readonly number[], count: number) => (values.length === count ? '*' : values.join(','));
    const { seconds, minutes, hours, weekdays } = given;
    const fields = [list(minutes, 60), list(hours, 24), '*', '*', list(weekdays, 7)];
    return {
      expression: (seconds ? [list(seconds, 60), ...fields] : fields).join(' '),
      seconds: [...(seconds ?? [0])].sort((a, b) => a - b),
      everyHour: hours.length === 24,
      matches: (wall: number) => {
        const time = new Date(wall);
        return (
          minutes.includes(time.getUTCMinutes()) &&
          hours.includes(time.getUTCHours()) &&
          weekdays.includes(time.getUTCDay())
        );
      },
    };
  });

/** What happens at the matching times of a wall clock, and what a clock change leaves out. */
function slowly(
  { walls }: Stretch,
  { seconds, matches }: { seconds: readonly number[]; matches: (wall: number) => boolean },
  gap: 'skip' | 'shift',
  fold: 'first' | 'both',
): { ticks: number[]; leftOut: number[] } {
  const ticks = new Set<number>();
  const missing: number[] = [];
  for (const { wall, shown, unchanged } of walls) {
    if (!matches(wall)) continue;
    for (const second of seconds) {
      for (const at of fold === 'both' ? shown : shown.slice(0, 1)) ticks.add(at + second * SECOND);
      if (shown.length === 0) missing.push(unchanged + second * SECOND);
    }
  }
  const leftOut = gap === 'skip' ? missing.filter((at) => !ticks.has(at)) : [];
  if (gap === 'shift') for (const at of missing) ticks.add(at);
  return { ticks: [...ticks].sort((a, b) => a - b), leftOut };
}

const times = (found: Iterable<{ scheduledFor: number }>) => Array.from(found, ({ scheduledFor }) => scheduledFor);

/** That a recurrence has these ticks from `from` to before `until`, whichever way it is asked, at `cuts` of the way as well. */
function expectTicks(
  ticks: Recurrence,
  expected: readonly number[],
  from: number,
  until: number,
  cuts: number[],
): void {
  const found = times(ticks.between(from, until));
  expect(found).toEqual(expected);
  expect(ticks.count(from, until)).toBe(expected.length);
  for (const cut of cuts) {
    const at = Math.floor(from + cut * (until - from));
    const following = expected.filter((tick) => tick >= at);
    expect(times(ticks.between(at, until))).toEqual(following);
    expect(ticks.count(from, at) + ticks.count(at, until)).toBe(expected.length);
    for (const after of [at - 1, following[0] ?? at]) {
      const next = ticks.next(after)?.scheduledFor;
      const wanted = following.find((tick) => tick > after);
      if (wanted !== undefined) expect(next).toBe(wanted);
      else expect(next ?? until).toBeGreaterThanOrEqual(until);
    }
  }
}

const share = fc.double({ min: 0, max: 1, noNaN: true });
const cuts = fc.array(share, { minLength: 1, maxLength: 4 });
/** Shares of a stretch, on any ms or on a round one, where ticks may be. */
const bound = fc.option(fc.tuple(share, fc.constantFrom(1, MINUTE, 60 * MINUTE)));
const bounds = fc.record({ startsAt: bound, endsAt: bound });
const boundAt = (bound: [number, number] | null, from: number, length: number) =>
  bound && Math.floor((from + bound[0] * length) / bound[1]) * bound[1];

describe('against a slow and obvious model', () => {
  test('cron: the ticks of every zone, under every policy, between all bounds, and what is left out', () => {
    const policies = fc.record({
      dstGap: fc.constantFrom('skip' as const, 'shift' as const, null),
      dstFold: fc.constantFrom('first' as const, 'both' as const, null),
    });
    fc.assert(
      fc.property(place, pattern, policies, bounds, cuts, ([zone, start], cron, policy, bounds, parts) => {
        const stretch = stretchAt(zone, start);
        const { dstGap, dstFold } = policy;
        const gap = dstGap ?? (cron.everyHour ? 'skip' : 'shift');
        const fold = dstFold ?? (cron.everyHour ? 'both' : 'first');
        const { ticks, leftOut } = slowly(stretch, cron, gap, fold);
        const [from, until] = [start + DAY / 4, start + 2.75 * DAY];
        const startsAt = boundAt(bounds.startsAt, start, 3 * DAY);
        const endsAt = boundAt(bounds.endsAt, start, 3 * DAY);
        const { expression } = cron;
        const found = recurrence({ expression, timezone: zone, ...policy, startsAt, endsAt });
        const inside = (tick: number) => tick >= (startsAt ?? tick) && tick < (endsAt ?? Number.POSITIVE_INFINITY);
        const expected = ticks.filter((tick) => inside(tick) && tick >= from && tick < until);
        const [first, last] = [Math.max(from, startsAt ?? from), Math.min(until, endsAt ?? until)];
        expect(times(found.between(from, until))).toEqual(expected);
        expect(found.count(from, until)).toBe(expected.length);
        if (first < last) expectTicks(found, expected, first, last, parts);
        if (endsAt !== null) expect(found.next(endsAt - 1)).toBeUndefined();
        if (fold === 'first') expect(new Set(expected.map((tick) => shownAt(zone, tick))).size).toBe(expected.length);

        const gaps = dstGap === 'skip' ? leftOut.filter((tick) => inside(tick) && tick >= from && tick < until) : [];
        let after = from - 1;
        for (const tick of gaps) {
          const told = found.nextGap(after);
          expect(told?.scheduledFor).toBe(tick);
          expect(told?.note).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)? does not exist in .* and is skipped\.$/);
          after = tick;
        }
        expect(found.nextGap(after)?.scheduledFor ?? until).toBeGreaterThanOrEqual(until);
      }),
      { numRuns: 300 },
    );
  }, 300_000);

  test('intervals: every second of elapsed time, whatever the clocks do', () => {
    const unit = fc.constantFrom(['s', 1] as const, ['m', 60] as const, ['h', 3_600] as const);
    const interval = fc.tuple(fc.integer({ min: 1, max: 90 }), unit, fc.integer({ min: 0, max: 59 }), share);
    const length = 6 * 3_600;
    fc.assert(
      fc.property(
        place,
        interval,
        bounds,
        cuts,
        ([timezone, start], [count, [name, size], odd, part], bounds, parts) => {
          const seconds = count * size + (name === 's' ? 0 : odd);
          const phase = Math.min(seconds - 1, Math.floor(part * seconds));
          const text = `${count}${name}${name === 's' || odd === 0 ? '' : `${odd}s`}`;
          const from = start + 13 * 3_600 * SECOND;
          const until = from + length * SECOND;
          const startsAt = boundAt(bounds.startsAt, from, length * SECOND);
          const endsAt = boundAt(bounds.endsAt, from, length * SECOND);
          const expected: number[] = [];
          for (let second = from / SECOND; second < until / SECOND; second++) {
            const tick = second * SECOND;
            if (tick < (startsAt ?? tick) || tick >= (endsAt ?? until)) continue;
            if ((second - phase) % seconds === 0) expected.push(tick);
          }
          const spec = { expression: `@every ${text}/${phase}s`, timezone, dstGap: 'skip', dstFold: 'both' } as const;
          const found = recurrence({ ...spec, startsAt, endsAt });
          const [first, last] = [Math.max(from, startsAt ?? from), Math.min(until, endsAt ?? until)];
          expect(times(found.between(from, until))).toEqual(expected);
          if (first < last) expectTicks(found, expected, first, last, parts);
          if (endsAt !== null) expect(found.next(endsAt - 1)).toBeUndefined();
          expect(found.nextGap(from)).toBeUndefined();
        },
      ),
      { numRuns: 300 },
    );
  }, 300_000);
});
