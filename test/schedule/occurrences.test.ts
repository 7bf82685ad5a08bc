import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { parseCron } from '../../src/schedule/cron.ts';
import { type DstPolicy, nextOccurrence } from '../../src/schedule/occurrences.ts';

const ticksAfter = (cron: string, zone: string, from: string, count: number, policy: DstPolicy = {}) => {
  const found: string[] = [];
  let at = Date.parse(from);
  for (let i = 0; i < count; i++) {
    const next = nextOccurrence(parseCron(cron), zone, at, policy);
    if (!next) break;
    at = next.scheduledFor;
    found.push(new Date(at).toISOString().replace('.000Z', 'Z'));
  }
  return found;
};

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
    expect(notes('30 2 * * *', '2026-03-09T12:00:00Z')).toBeUndefined();
    expect(notes('30 2 * * *', '2026-11-01T04:00:00Z')).toBeUndefined();
  });
});

/** The slow and obvious way: every minute of a stretch, asked what the clock on the wall shows. */
function scan(minute: number[], hour: number[], zone: string, from: number, minutes: number): number[] {
  const format = new Intl.DateTimeFormat('en-GB', {
    timeZone: zone,
    hour: '2-digit',
    minute: '2-digit',
    hourCycle: 'h23',
  });
  const found: number[] = [];
  for (let i = 1; i <= minutes; i++) {
    const at = from + i * 60_000;
    const [h, m] = format.format(at).split(':').map(Number);
    if (hour.includes(h ?? -1) && minute.includes(m ?? -1)) found.push(at);
  }
  return found;
}

describe('against a slow and obvious model', () => {
  const changes = [
    ['America/New_York', '2026-03-07T18:00:00Z'],
    ['America/New_York', '2026-10-31T18:00:00Z'],
    ['Europe/Berlin', '2026-03-28T18:00:00Z'],
    ['Europe/Berlin', '2026-10-24T18:00:00Z'],
    ['Australia/Lord_Howe', '2026-10-03T06:00:00Z'],
    ['Australia/Lord_Howe', '2026-04-04T06:00:00Z'],
    ['Africa/Casablanca', '2026-02-14T18:00:00Z'],
    ['Asia/Tokyo', '2026-05-01T00:00:00Z'],
  ] as const;
  const some = (max: number) => fc.uniqueArray(fc.integer({ min: 0, max }), { minLength: 1, maxLength: 4 });

  test('gap skipped and fold both: exactly the minutes whose wall clock matches', () => {
    fc.assert(
      fc.property(fc.constantFrom(...changes), some(59), some(6), ([zone, start], minute, hour) => {
        const from = Date.parse(start);
        const expected = scan(minute, hour, zone, from, 24 * 60);
        const cron = parseCron(`${minute.join(',')} ${hour.join(',')} * * *`);
        const found: number[] = [];
        for (let at = from; ; ) {
          const next = nextOccurrence(cron, zone, at, { gap: 'skip', fold: 'both' });
          if (!next || next.scheduledFor > from + 24 * 60 * 60_000) break;
          at = next.scheduledFor;
          found.push(at);
        }
        expect(found).toEqual(expected);
      }),
      { numRuns: 150 },
    );
  });

  test('gap shifted and fold first: every wall time of every day once, at most an hour late', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(...changes),
        fc.integer({ min: 0, max: 59 }),
        fc.integer({ min: 0, max: 23 }),
        ([zone, start], minute, hour) => {
          const cron = parseCron(`${minute} ${hour} * * *`);
          let at = Date.parse(start) - 5 * 86_400_000;
          const times: number[] = [];
          for (let i = 0; i < 10; i++) {
            at = nextOccurrence(cron, zone, at)?.scheduledFor ?? Number.NaN;
            times.push(at);
          }
          for (const [i, time] of times.entries()) {
            const before = times[i - 1];
            if (before !== undefined) expect(Math.abs(time - before - 86_400_000)).toBeLessThanOrEqual(3_600_000);
          }
        },
      ),
      { numRuns: 150 },
    );
  });

  test('in every zone there is, ticks rise strictly and lie after the moment asked for', () => {
    for (const zone of Intl.supportedValuesOf('timeZone')) {
      for (const pattern of ['30 2 * * *', '0 0 * * *', '*/20 * * * *', '15 10 1 */3 *']) {
        const cron = parseCron(pattern);
        let at = Date.parse('2026-03-01T00:00:00Z');
        for (let i = 0; i < 40; i++) {
          const next = nextOccurrence(cron, zone, at)?.scheduledFor ?? 0;
          if (!(next > at)) expect.fail(`${pattern} in ${zone} after ${new Date(at).toISOString()}: ${next}`);
          at = next;
        }
      }
    }
  });
});
