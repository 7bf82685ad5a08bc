import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { CronError, parseCron } from '../../src/schedule/cron.ts';
import {
  countOccurrences,
  type DstPolicy,
  nextOccurrence,
  nextOccurrences,
  occurrencesBetween,
} from '../../src/schedule/occurrences.ts';
import { type Wall, wallClock } from '../support/wall-clock.ts';

const DAY = 86_400_000;

const ticksAfter = (cron: string, zone: string, from: string, count: number, policy: DstPolicy = {}) =>
  nextOccurrences(parseCron(cron), zone, Date.parse(from), count, policy).map(({ scheduledFor }) =>
    new Date(scheduledFor).toISOString().replace('.000Z', 'Z'),
  );

describe('the table of clock changes, made by hand from the rules of each zone', () => {
  // [what, cron, zone, from, expected instants, policy]
  const table: [string, string, string, string, string[], DstPolicy?][] = [
    [
      'New York, gap, shifted',
      '30 2 * * *',
      'America/New_York',
      '2026-03-07T12:00:00Z',
      ['2026-03-08T07:30:00Z', '2026-03-09T06:30:00Z'],
    ],
    [
      'New York, gap, skipped',
      '30 2 * * *',
      'America/New_York',
      '2026-03-07T12:00:00Z',
      ['2026-03-09T06:30:00Z'],
      { gap: 'skip' },
    ],
    [
      'New York, fold, first',
      '30 1 * * *',
      'America/New_York',
      '2026-10-31T12:00:00Z',
      ['2026-11-01T05:30:00Z', '2026-11-02T06:30:00Z'],
    ],
    [
      'New York, fold, both',
      '30 1 * * *',
      'America/New_York',
      '2026-10-31T12:00:00Z',
      ['2026-11-01T05:30:00Z', '2026-11-01T06:30:00Z', '2026-11-02T06:30:00Z'],
      { fold: 'both' },
    ],
    [
      'New York, every half hour through the gap',
      '*/30 * * * *',
      'America/New_York',
      '2026-03-08T06:00:00Z',
      ['2026-03-08T06:30:00Z', '2026-03-08T07:00:00Z', '2026-03-08T07:30:00Z'],
    ],
    [
      'New York, every half hour through the fold',
      '*/30 * * * *',
      'America/New_York',
      '2026-11-01T05:00:00Z',
      ['2026-11-01T05:30:00Z', '2026-11-01T06:00:00Z', '2026-11-01T06:30:00Z', '2026-11-01T07:00:00Z'],
    ],
    [
      'New York, every half hour, fold first',
      '*/30 * * * *',
      'America/New_York',
      '2026-11-01T05:00:00Z',
      ['2026-11-01T05:30:00Z', '2026-11-01T07:00:00Z'],
      { fold: 'first' },
    ],
    [
      'New York, shifted onto a natural tick: once',
      '30 2,3 * * *',
      'America/New_York',
      '2026-03-08T06:00:00Z',
      ['2026-03-08T07:30:00Z', '2026-03-09T06:30:00Z'],
    ],
    [
      'Berlin, gap',
      '15 2 * * *',
      'Europe/Berlin',
      '2026-03-28T12:00:00Z',
      ['2026-03-29T01:15:00Z', '2026-03-30T00:15:00Z'],
    ],
    [
      'Berlin, fold',
      '15 2 * * *',
      'Europe/Berlin',
      '2026-10-24T12:00:00Z',
      ['2026-10-25T00:15:00Z', '2026-10-26T01:15:00Z'],
    ],
    ['Rome, at the edge of the gap', '0 3 * * *', 'Europe/Rome', '2026-03-28T12:00:00Z', ['2026-03-29T01:00:00Z']],
    [
      'Lord Howe, gap of half an hour',
      '15 2 * * *',
      'Australia/Lord_Howe',
      '2026-10-03T00:00:00Z',
      ['2026-10-03T15:45:00Z', '2026-10-04T15:15:00Z'],
    ],
    [
      'Lord Howe, fold of half an hour',
      '45 1 * * *',
      'Australia/Lord_Howe',
      '2026-04-03T16:00:00Z',
      ['2026-04-04T14:45:00Z', '2026-04-05T15:15:00Z'],
    ],
    [
      'Lord Howe, fold of half an hour, both',
      '45 1 * * *',
      'Australia/Lord_Howe',
      '2026-04-03T16:00:00Z',
      ['2026-04-04T14:45:00Z', '2026-04-04T15:15:00Z'],
      { fold: 'both' },
    ],
    [
      'Cairo, midnight does not exist',
      '0 0 * * *',
      'Africa/Cairo',
      '2026-04-22T23:00:00Z',
      ['2026-04-23T22:00:00Z', '2026-04-24T21:00:00Z'],
    ],
    [
      'Kathmandu, 5:45',
      '0 6 * * *',
      'Asia/Kathmandu',
      '2026-01-01T00:00:00Z',
      ['2026-01-01T00:15:00Z', '2026-01-02T00:15:00Z'],
    ],
    [
      'São Paulo, summer time abolished',
      '0 0 * * *',
      'America/Sao_Paulo',
      '2026-11-01T12:00:00Z',
      ['2026-11-02T03:00:00Z', '2026-11-03T03:00:00Z'],
    ],
    [
      'São Paulo, when it was: midnight did not exist',
      '0 0 * * *',
      'America/Sao_Paulo',
      '2018-11-03T12:00:00Z',
      ['2018-11-04T03:00:00Z', '2018-11-05T02:00:00Z'],
    ],
    [
      'Apia, the day that was skipped',
      '0 12 * * *',
      'Pacific/Apia',
      '2011-12-28T23:00:00Z',
      ['2011-12-29T22:00:00Z', '2011-12-30T22:00:00Z'],
    ],
    [
      'Apia, that day left out',
      '0 12 * * *',
      'Pacific/Apia',
      '2011-12-28T23:00:00Z',
      ['2011-12-29T22:00:00Z', '2011-12-30T22:00:00Z', '2011-12-31T22:00:00Z'],
      { gap: 'skip' },
    ],
    [
      'Troll, two hours',
      '30 1 * * *',
      'Antarctica/Troll',
      '2026-03-28T12:00:00Z',
      ['2026-03-29T01:30:00Z', '2026-03-29T23:30:00Z'],
    ],
    [
      'Troll, two hours back, both',
      '30 1 * * *',
      'Antarctica/Troll',
      '2026-10-24T12:00:00Z',
      ['2026-10-24T23:30:00Z', '2026-10-25T01:30:00Z', '2026-10-26T01:30:00Z'],
      { fold: 'both' },
    ],
    [
      'Rome, fold, in step with elapsed time',
      '*/30 2 * * *',
      'Europe/Rome',
      '2026-10-24T12:00:00Z',
      ['2026-10-25T00:00:00Z', '2026-10-25T00:30:00Z', '2026-10-26T01:00:00Z'],
    ],
    [
      'Cairo, the last hour of the day twice',
      '30 23 * * *',
      'Africa/Cairo',
      '2026-10-29T00:00:00Z',
      ['2026-10-29T20:30:00Z', '2026-10-30T21:30:00Z'],
    ],
    [
      'São Paulo, when it was: the last hour of the day twice',
      '30 23 * * *',
      'America/Sao_Paulo',
      '2018-02-17T12:00:00Z',
      ['2018-02-18T01:30:00Z', '2018-02-19T02:30:00Z'],
    ],
    [
      'New York, hourly, shifted all the same: onto the natural tick, once',
      '0 * * * *',
      'America/New_York',
      '2026-03-08T05:30:00Z',
      ['2026-03-08T06:00:00Z', '2026-03-08T07:00:00Z', '2026-03-08T08:00:00Z'],
      { gap: 'shift' },
    ],
    [
      'New York, the seconds around the gap',
      '59 59 1,2 * * *',
      'America/New_York',
      '2026-03-08T06:00:00Z',
      ['2026-03-08T06:59:59Z', '2026-03-08T07:59:59Z', '2026-03-09T05:59:59Z'],
    ],
    [
      'Kathmandu, the quarter of an hour of 1986',
      '5 0 * * *',
      'Asia/Kathmandu',
      '1985-12-30T12:00:00Z',
      ['1985-12-30T18:35:00Z', '1985-12-31T18:35:00Z', '1986-01-01T18:20:00Z'],
    ],
    [
      'Apia, the midnight that was skipped comes onto the next, once',
      '0 0 * * *',
      'Pacific/Apia',
      '2011-12-28T12:00:00Z',
      ['2011-12-29T10:00:00Z', '2011-12-30T10:00:00Z', '2011-12-31T10:00:00Z'],
    ],
    [
      'Kiritimati, the last day of 1994 skipped, over the turn of the year',
      '0 20 31 12 *',
      'Pacific/Kiritimati',
      '1994-01-02T00:00:00Z',
      ['1995-01-01T06:00:00Z', '1995-12-31T06:00:00Z'],
    ],
    ['leap day in New York', '0 12 29 2 *', 'America/New_York', '2026-01-01T00:00:00Z', ['2028-02-29T17:00:00Z']],
    [
      'a star with a step leaves the other day in charge: Mondays of odd date',
      '0 0 */2 * 1',
      'UTC',
      '2026-01-01T00:00:00Z',
      ['2026-01-05T00:00:00Z', '2026-01-19T00:00:00Z', '2026-02-09T00:00:00Z'],
    ],
    ['second Monday', '0 0 * * MON#2', 'UTC', '2026-01-01T00:00:00Z', ['2026-01-12T00:00:00Z', '2026-02-09T00:00:00Z']],
    [
      'Mondays, and the last Wednesday',
      '0 0 * * 1,3L',
      'UTC',
      '2026-01-20T00:00:00Z',
      ['2026-01-26T00:00:00Z', '2026-01-28T00:00:00Z', '2026-02-02T00:00:00Z'],
    ],
    ['at midnight, by its other name', '@midnight', 'UTC', '2026-01-01T00:00:00Z', ['2026-01-02T00:00:00Z']],
    ['leap day', '0 0 29 2 *', 'UTC', '2026-01-01T00:00:00Z', ['2028-02-29T00:00:00Z', '2032-02-29T00:00:00Z']],
    ['leap day over 2100', '0 0 29 2 *', 'UTC', '2096-03-01T00:00:00Z', ['2104-02-29T00:00:00Z']],
    ['fifth Monday of February', '0 0 * 2 1#5', 'UTC', '2026-01-01T00:00:00Z', ['2044-02-29T00:00:00Z']],
    [
      'last day of the month',
      '0 0 L * *',
      'UTC',
      '2027-12-31T00:00:00Z',
      ['2028-01-31T00:00:00Z', '2028-02-29T00:00:00Z', '2028-03-31T00:00:00Z'],
    ],
    ['last Friday', '0 0 * * 5L', 'UTC', '2026-01-01T00:00:00Z', ['2026-01-30T00:00:00Z', '2026-02-27T00:00:00Z']],
    [
      'day or weekday: either will do',
      '0 0 13 * 5',
      'UTC',
      '2026-02-01T00:00:00Z',
      [
        '2026-02-06T00:00:00Z',
        '2026-02-13T00:00:00Z',
        '2026-02-20T00:00:00Z',
        '2026-02-27T00:00:00Z',
        '2026-03-06T00:00:00Z',
        '2026-03-13T00:00:00Z',
      ],
    ],
    ['seconds', '*/20 * * * * *', 'UTC', '2026-01-01T00:00:59.999Z', ['2026-01-01T00:01:00Z', '2026-01-01T00:01:20Z']],
  ];
  test.each(table)('%s', (_what, cron, zone, from, expected, policy) => {
    expect(ticksAfter(cron, zone, from, expected.length, policy)).toEqual(expected);
  });

  test('Casablanca, where clocks go back for Ramadan and forward after it', () => {
    // 2026: back on February 15 at 03:00 (+01 → +00), forward on March 22 at 02:00 (+00 → +01).
    expect(ticksAfter('30 2 * * *', 'Africa/Casablanca', '2026-02-14T12:00:00Z', 2)).toEqual([
      '2026-02-15T01:30:00Z',
      '2026-02-16T02:30:00Z',
    ]);
    expect(ticksAfter('30 2 * * *', 'Africa/Casablanca', '2026-03-21T12:00:00Z', 2)).toEqual([
      '2026-03-22T02:30:00Z',
      '2026-03-23T01:30:00Z',
    ]);
  });

  test('what a clock change does to a tick is said in its note, and only then', () => {
    const notes = (cron: string, from: string, policy?: DstPolicy) =>
      nextOccurrence(parseCron(cron), 'America/New_York', Date.parse(from), policy)?.note;
    expect(notes('30 2 * * *', '2026-03-08T06:00:00Z')).toMatch(/02:30 does not exist .* runs at 03:30/);
    expect(notes('30 1 * * *', '2026-11-01T04:00:00Z')).toMatch(/happens twice .* first time/);
    expect(notes('30 1 * * *', '2026-11-01T05:30:00Z', { fold: 'both' })).toMatch(/happens twice .* second time/);
    expect(notes('15 30 2 * * *', '2026-03-08T06:00:00Z')).toMatch(/02:30:15 does not exist .* runs at 03:30:15/);
    expect(notes('30 2 * * *', '2026-03-08T06:00:00Z', { gap: 'skip' })).toMatch(
      /2026-03-08 02:30 does not exist .* skipped; this is the next/,
    );
    expect(notes('30 2 * * *', '2026-03-08T07:00:00Z', { gap: 'skip' })).toBeUndefined();
    expect(notes('30 2,3 * * *', '2026-03-08T06:00:00Z')).toMatch(/02:30 does not exist .* runs at 03:30/);
    expect(notes('*/30 * * * *', '2026-03-08T06:30:00Z')).toBeUndefined();
    expect(notes('30 2 * * *', '2026-03-09T12:00:00Z')).toBeUndefined();
    expect(notes('30 2 * * *', '2026-11-01T04:00:00Z')).toBeUndefined();
  });

  test('nor is it lost where two stretches of what is known of a zone meet', () => {
    // Stretches are 366 days from 1970 on: one ends at midnight, and an hour later Troll goes back by two.
    const from = Date.parse('2367-10-28T12:00:00Z');
    const [first, second] = nextOccurrences(parseCron('30 1 * * *'), 'Antarctica/Troll', from, 2, { fold: 'both' });
    expect(first?.scheduledFor).toBe(Date.parse('2367-10-28T23:30:00Z'));
    expect(first?.note).toMatch(/first time/);
    expect(second?.scheduledFor).toBe(Date.parse('2367-10-29T01:30:00Z'));
    expect(second?.note).toMatch(/second time/);
  });
});

/** The slow and obvious way: each of those minutes, whether it matches, and when that makes it fire. */
function slowly(
  walls: readonly Wall[],
  matches: (minute: number, hour: number) => boolean,
  { gap, fold }: { gap: 'skip' | 'shift'; fold: 'first' | 'both' },
): number[] {
  const found = new Set<number>();
  for (const { wall, shown, unchanged } of walls) {
    const time = new Date(wall);
    if (!matches(time.getUTCMinutes(), time.getUTCHours())) continue;
    for (const at of fold === 'both' ? shown : shown.slice(0, 1)) found.add(at);
    if (shown.length === 0 && gap === 'shift') found.add(unchanged);
  }
  return [...found].sort((a, b) => a - b);
}

describe('against a slow and obvious model', () => {
  const changes = (
    [
      ['America/New_York', '2026-03-07T00:00:00Z'],
      ['America/New_York', '2026-10-31T00:00:00Z'],
      ['Europe/Berlin', '2026-03-28T00:00:00Z'],
      ['Europe/Berlin', '2026-10-24T00:00:00Z'],
      ['Europe/Dublin', '2026-03-28T00:00:00Z'],
      ['Australia/Lord_Howe', '2026-10-03T00:00:00Z'],
      ['Australia/Lord_Howe', '2026-04-04T00:00:00Z'],
      ['Africa/Casablanca', '2026-02-14T00:00:00Z'],
      ['Africa/Casablanca', '2026-03-21T00:00:00Z'],
      ['Africa/Cairo', '2026-04-23T00:00:00Z'],
      ['Africa/Cairo', '2026-10-29T00:00:00Z'],
      ['Antarctica/Troll', '2026-03-28T00:00:00Z'],
      ['Antarctica/Troll', '2026-10-24T00:00:00Z'],
      ['America/Sao_Paulo', '2018-02-17T00:00:00Z'],
      ['Pacific/Apia', '2011-12-29T00:00:00Z'],
      ['Pacific/Kiritimati', '1994-12-30T12:00:00Z'],
      ['Asia/Kathmandu', '1985-12-31T00:00:00Z'],
      ['Asia/Tokyo', '2026-05-01T00:00:00Z'],
    ] as const
  ).map(([zone, start]) => {
    const from = Date.parse(start);
    return { zone, from, walls: wallClock(zone, from, from + 3 * DAY, 60_000) };
  });
  const some = (max: number) => fc.uniqueArray(fc.integer({ min: 0, max }), { minLength: 1, maxLength: 4 });
  const policies = fc.record({
    gap: fc.constantFrom('skip' as const, 'shift' as const),
    fold: fc.constantFrom('first' as const, 'both' as const),
  });

  test('under every policy, exactly the minutes that the wall clock calls for', () => {
    const hours = fc.oneof(some(23), fc.constant(Array.from({ length: 24 }, (_, hour) => hour)));
    fc.assert(
      fc.property(
        fc.constantFrom(...changes.keys()),
        some(59),
        hours,
        fc.option(policies, { nil: undefined }),
        (change, minute, hour, policy) => {
          const { zone, from, walls } = changes[change] ?? expect.fail('no such change');
          const elapsed = { gap: 'skip', fold: 'both' } as const;
          const daytime = { gap: 'shift', fold: 'first' } as const;
          const applied = policy ?? (hour.length === 24 ? elapsed : daytime);
          // Folds and shifts at the ends of the stretch need what lies beyond them: the middle is compared.
          const [start, end] = [from + DAY / 4, from + 2.75 * DAY];
          const expected = slowly(walls, (m, h) => minute.includes(m) && hour.includes(h), applied).filter(
            (at) => at >= start && at < end,
          );
          const cron = parseCron(`${minute.join(',')} ${hour.join(',')} * * *`);
          const found = [...occurrencesBetween(cron, zone, start, end, policy)].map((next) => next.scheduledFor);
          expect(found).toEqual(expected);
          expect(countOccurrences(cron, zone, start, end, policy)).toBe(expected.length);
          const middle = expected[Math.floor(expected.length / 2)];
          if (middle !== undefined) expect(nextOccurrence(cron, zone, middle - 1, policy)?.scheduledFor).toBe(middle);
        },
      ),
      { numRuns: 1_000 },
    );
  });

  test('days of months and weeks: exactly the dates that a calendar calls for', () => {
    const dayOfMonth = fc.oneof(
      fc.constant({ text: '*', match: () => true }),
      fc.constant({ text: 'L', match: (day: number, last: number) => day === last }),
      fc.integer({ min: 2, max: 9 }).map((step) => ({
        text: `*/${step}`,
        match: (day: number) => (day - 1) % step === 0,
      })),
      some(30).map((days) => ({
        text: days.map((day) => day + 1).join(','),
        match: (day: number) => days.includes(day - 1),
      })),
    );
    const dayOfWeek = fc.oneof(
      fc.constant({ text: '*', match: () => true }),
      some(6).map((days) => ({ text: days.join(','), match: (weekday: number) => days.includes(weekday) })),
      fc.tuple(fc.integer({ min: 0, max: 7 }), fc.integer({ min: 1, max: 5 })).map(([which, nth]) => ({
        text: `${which}#${nth}`,
        match: (weekday: number, day: number) => weekday === which % 7 && day > nth * 7 - 7 && day <= nth * 7,
      })),
      fc.integer({ min: 0, max: 7 }).map((which) => ({
        text: `${which}L`,
        match: (weekday: number, day: number, last: number) => weekday === which % 7 && day + 7 > last,
      })),
    );
    fc.assert(
      fc.property(dayOfMonth, dayOfWeek, some(11), fc.integer({ min: 1970, max: 2100 }), (dom, dow, months, year) => {
        const text = `0 0 ${dom.text} ${months.map((month) => month + 1).join(',')} ${dow.text}`;
        const [start, end] = [Date.UTC(year, 0, 1), Date.UTC(year + 2, 0, 1)];
        const expected: string[] = [];
        for (let at = start; at < end; at += DAY) {
          const date = new Date(at);
          const last = new Date(Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 0)).getUTCDate();
          const byMonth = dom.match(date.getUTCDate(), last);
          const byWeek = dow.match(date.getUTCDay(), date.getUTCDate(), last);
          const either = !dom.text.startsWith('*') && !dow.text.startsWith('*');
          if (!months.includes(date.getUTCMonth())) continue;
          if (either ? byMonth || byWeek : byMonth && byWeek) expected.push(date.toISOString());
        }
        let cron: ReturnType<typeof parseCron>;
        try {
          cron = parseCron(text);
        } catch (error) {
          expect(error).toBeInstanceOf(CronError);
          expect(expected).toEqual([]);
          return;
        }
        const found = [...occurrencesBetween(cron, 'UTC', start, end)];
        expect(found.map((next) => new Date(next.scheduledFor).toISOString())).toEqual(expected);
        expect(countOccurrences(cron, 'UTC', start, end)).toBe(expected.length);
      }),
      { numRuns: 1_000 },
    );
  });

  test('counting is walking, with seconds and over whole years', () => {
    const cron = parseCron('*/7 13-50/9 1-3 * * 1-6');
    fc.assert(
      fc.property(
        fc.constantFrom(...changes.keys()),
        fc.integer({ min: 0, max: 20 * DAY }),
        fc.integer({ min: 0, max: 40 * DAY }),
        policies,
        (change, before, length, policy) => {
          const { zone, from } = changes[change] ?? expect.fail('no such change');
          const start = from - before;
          const walked = [...occurrencesBetween(cron, zone, start, start + length, policy)];
          expect(countOccurrences(cron, zone, start, start + length, policy)).toBe(walked.length);
        },
      ),
      { numRuns: 100 },
    );
    const year = [Date.parse('2026-01-01T00:00:00Z'), Date.parse('2027-01-01T00:00:00Z')] as const;
    expect(countOccurrences(parseCron('* * * * * *'), 'Europe/Berlin', ...year)).toBe(31_536_000);
  });
});

describe('the search', () => {
  test('in every zone there is, ticks rise strictly, and a time of day comes once on the clock of its zone', () => {
    const start = Date.parse('2025-12-20T00:00:00Z');
    for (const zone of Intl.supportedValuesOf('timeZone')) {
      const clock = new Intl.DateTimeFormat('en-US', { timeZone: zone, dateStyle: 'short', timeStyle: 'medium' });
      for (const pattern of ['30 2 * * *', '0 0 * * *', '15 1,2,10 */3 * *', '*/20 * * * *']) {
        const cron = parseCron(pattern);
        const count = cron.everyHour ? 200 : 150;
        let last = start;
        const seen = new Set<string>();
        for (const { scheduledFor } of nextOccurrences(cron, zone, start, count)) {
          if (scheduledFor <= last) expect.fail(`${pattern} in ${zone}: ${scheduledFor} after ${last}`);
          last = scheduledFor;
          if (!cron.everyHour) seen.add(clock.format(scheduledFor));
        }
        if (!cron.everyHour && seen.size !== count) expect.fail(`${pattern} in ${zone}: a time of day came twice`);
      }
    }
  });

  test('in every zone there is, noon is noon, for ten years of changes', () => {
    const noon = parseCron('0 12 * * 1');
    const [start, end] = [Date.parse('2026-01-01T00:00:00Z'), Date.parse('2036-01-01T00:00:00Z')];
    for (const zone of Intl.supportedValuesOf('timeZone')) {
      const clock = new Intl.DateTimeFormat('en-GB', {
        timeZone: zone,
        weekday: 'short',
        hour: '2-digit',
        minute: '2-digit',
      });
      for (const { scheduledFor } of occurrencesBetween(noon, zone, start, end)) {
        const shown = clock.format(scheduledFor);
        if (!/^Mon.* 12:00$/.test(shown)) expect.fail(`${zone} at ${new Date(scheduledFor).toISOString()}: ${shown}`);
      }
    }
  });

  test('a window holds its first moment and not its last', () => {
    const hourly = parseCron('@hourly');
    const [from, until] = [Date.parse('2026-01-01T00:00:00Z'), Date.parse('2026-01-01T03:00:00Z')];
    const hours = [...occurrencesBetween(hourly, 'UTC', from, until)].map((next) => next.scheduledFor);
    expect(hours).toEqual([from, from + 3_600_000, from + 7_200_000]);
    expect([...occurrencesBetween(hourly, 'UTC', from + 1, from + 1)]).toEqual([]);
    expect([...occurrencesBetween(hourly, 'UTC', until, from)]).toEqual([]);
  });

  test('what the clocks never let happen is not found, and ends', () => {
    // The second Sunday of March: in New York the very day that has no 02:30.
    const never = parseCron('30 2 * 3 0#2');
    const from = Date.parse('2026-01-01T00:00:00Z');
    expect(nextOccurrence(never, 'America/New_York', from, { gap: 'skip' })).toBeUndefined();
    expect(nextOccurrence(never, 'America/New_York', from)?.scheduledFor).toBe(Date.parse('2026-03-08T07:30:00Z'));
  });

  test('nothing comes after the year 9999, and from before 1900 the first is of then', () => {
    const daily = parseCron('@daily');
    expect(nextOccurrence(daily, 'UTC', Date.parse('9999-12-31T00:00:00Z'))).toBeUndefined();
    expect(nextOccurrences(daily, 'Europe/Berlin', Date.parse('9999-12-28T00:00:00Z'), 5).length).toBe(2);
    expect(nextOccurrence(daily, 'UTC', Date.parse('0000-01-01T00:00:00Z'))?.scheduledFor).toBe(Date.UTC(1900, 0, 1));
  });

  test('what is no zone is a RangeError', () => {
    expect(() => nextOccurrence(parseCron('@daily'), 'Mars/X', 0)).toThrow(RangeError);
  });
});
