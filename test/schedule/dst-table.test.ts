import { describe, expect, test } from 'vitest';
import { recurrence } from '../../src/schedule/recurrence.ts';

// Days on which clocks change, by hand from the rules of each zone: no parser had a part in it. Each is a day of its zone, from
// its midnight to the next, in UTC. Where clocks go forward only dst_gap matters, and where they go back only dst_fold: each
// row holds under both values of the other one as well. Times are of the first date of the day in UTC unless they say more;
// of ticks too many to list there is the number.

type Ticks = readonly string[] | number;

interface Day {
  what: string;
  zone: string;
  from: string;
  until: string;
}

/** [expression, with skip, with shift]. */
const forward: [Day, [string, Ticks, Ticks][]][] = [
  [
    {
      what: 'New York: 02:00 EST (-5) becomes 03:00 EDT (-4) on the second Sunday of March',
      zone: 'America/New_York',
      from: '2027-03-14T05:00Z',
      until: '2027-03-15T04:00Z',
    },
    [
      ['30 2 * * *', [], ['07:30']],
      ['45 1,2 * * *', ['06:45'], ['06:45', '07:45']],
      ['*/30 2 * * *', [], ['07:00', '07:30']],
      ['*/30 1 * * *', ['06:00', '06:30'], ['06:00', '06:30']],
      ['*/30 1-3 * * *', ['06:00', '06:30', '07:00', '07:30'], ['06:00', '06:30', '07:00', '07:30']],
      ['0 3 * * *', ['07:00'], ['07:00']],
      ['20 15 2 * * 0', [], ['07:15:20']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
      ['*/10 * * * * *', 8_280, 8_280],
    ],
  ],
  [
    {
      what: 'Berlin: 02:00 CET (+1) becomes 03:00 CEST (+2) on the last Sunday of March',
      zone: 'Europe/Berlin',
      from: '2027-03-27T23:00Z',
      until: '2027-03-28T22:00Z',
    },
    [
      ['30 2 * * *', [], ['03-28T01:30']],
      ['*/20 2 * * *', [], ['03-28T01:00', '03-28T01:20', '03-28T01:40']],
      ['0 2-4 * * *', ['03-28T01:00', '03-28T02:00'], ['03-28T01:00', '03-28T02:00']],
      ['30 0 * * *', ['23:30'], ['23:30']],
      ['0 2 28 3 *', [], ['03-28T01:00']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
    ],
  ],
  [
    {
      what: 'Lord Howe: 02:00 (+10:30) becomes 02:30 (+11) on the first Sunday of October',
      zone: 'Australia/Lord_Howe',
      from: '2027-10-02T13:30Z',
      until: '2027-10-03T13:00Z',
    },
    [
      ['5 2 * * *', [], ['15:35']],
      ['45 2 * * *', ['15:45'], ['15:45']],
      ['*/15 2 * * *', ['15:30', '15:45'], ['15:30', '15:45']],
      ['0,20,50 2 * * *', ['15:50'], ['15:30', '15:50']],
      ['*/30 1 * * *', ['14:30', '15:00'], ['14:30', '15:00']],
      // 02:00 is 02:30, which is no full hour.
      ['0 * * * *', 23, 24],
      ['* * * * *', 1_410, 1_410],
    ],
  ],
  [
    {
      what: 'Casablanca, after Ramadan: 02:00 (+0) becomes 03:00 (+1) on April 6 of 2025',
      zone: 'Africa/Casablanca',
      from: '2025-04-06T00:00Z',
      until: '2025-04-06T23:00Z',
    },
    [
      ['30 2 * * *', [], ['02:30']],
      ['*/30 2 * * *', [], ['02:00', '02:30']],
      ['*/30 1 * * *', ['01:00', '01:30'], ['01:00', '01:30']],
      ['0 3 * * *', ['02:00'], ['02:00']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
    ],
  ],
  [
    {
      what: 'Kathmandu: 00:00 (+5:30) becomes 00:15 (+5:45) on the first of 1986',
      zone: 'Asia/Kathmandu',
      from: '1985-12-31T18:30Z',
      until: '1986-01-01T18:15Z',
    },
    [
      ['10 0 * * *', [], ['18:40']],
      ['*/10 0 * * *', ['18:35', '18:45', '18:55', '19:05'], ['18:30', '18:35', '18:40', '18:45', '18:55', '19:05']],
      ['30 1 * * *', ['19:45'], ['19:45']],
      ['0 0 1 1 *', [], ['18:30']],
      ['0 * * * *', 23, 24],
      ['* * * * *', 1_425, 1_425],
    ],
  ],
  [
    {
      what: 'São Paulo, when it had summer time: 00:00 (-3) becomes 01:00 (-2) on the third Sunday of October',
      zone: 'America/Sao_Paulo',
      from: '2017-10-15T03:00Z',
      until: '2017-10-16T02:00Z',
    },
    [
      ['0 0 * * *', [], ['03:00']],
      ['30 0 * * 0', [], ['03:30']],
      ['*/30 1 * * *', ['03:00', '03:30'], ['03:00', '03:30']],
      ['*/30 0,1 * * *', ['03:00', '03:30'], ['03:00', '03:30']],
      ['30 23 * * *', ['10-16T01:30'], ['10-16T01:30']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
    ],
  ],
  [
    {
      what: 'Apia: December 30 of 2011 is left out, between 24:00 of the 29th (-10) and 00:00 of the 31st (+14)',
      zone: 'Pacific/Apia',
      from: '2011-12-29T10:00Z',
      until: '2011-12-31T10:00Z',
    },
    [
      ['0 12 30 12 *', [], ['12-30T22:00']],
      // The 30th would have been a Friday.
      ['0 9 * * 5', [], ['12-30T19:00']],
      ['*/30 1 30 * *', [], ['12-30T11:00', '12-30T11:30']],
      ['0 6,18 30,31 12 *', ['12-30T16:00', '12-31T04:00'], ['12-30T16:00', '12-31T04:00']],
      ['0 6 30 12 *', [], ['12-30T16:00']],
      ['0 * 30 * *', [], 24],
      ['0 * * * *', 48, 48],
      ['* * * * *', 2_880, 2_880],
    ],
  ],
  [
    {
      what: 'Apia, when it had summer time: 03:00 (+13) becomes 04:00 (+14) on the last Sunday of September',
      zone: 'Pacific/Apia',
      from: '2012-09-29T11:00Z',
      until: '2012-09-30T10:00Z',
    },
    [
      ['30 3 * * *', [], ['14:30']],
      ['*/30 1 * * *', ['12:00', '12:30'], ['12:00', '12:30']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
    ],
  ],
  [
    {
      what: 'Troll: 01:00 (+0) becomes 03:00 (+2) on the last Sunday of March',
      zone: 'Antarctica/Troll',
      from: '2027-03-28T00:00Z',
      until: '2027-03-28T22:00Z',
    },
    [
      ['30 2 * * *', [], ['02:30']],
      ['30 1,2 * * *', [], ['01:30', '02:30']],
      ['*/30 1 * * *', [], ['01:00', '01:30']],
      ['0 1-4 * * *', ['01:00', '02:00'], ['01:00', '02:00']],
      ['15 1-3 * * *', ['01:15'], ['01:15', '02:15']],
      ['0 * * * *', 22, 22],
      ['* * * * *', 1_320, 1_320],
    ],
  ],
  [
    {
      what: 'Cairo: 00:00 (+2) becomes 01:00 (+3) on the last Friday of April',
      zone: 'Africa/Cairo',
      from: '2025-04-24T22:00Z',
      until: '2025-04-25T21:00Z',
    },
    [
      ['0 0 * * *', [], ['22:00']],
      ['0 0 * * 5', [], ['22:00']],
      ['*/30 0 * * *', [], ['22:00', '22:30']],
      ['*/30 1 * * *', ['22:00', '22:30'], ['22:00', '22:30']],
      ['30 0,1 * * *', ['22:30'], ['22:30']],
      ['0 * * * *', 23, 23],
      ['* * * * *', 1_380, 1_380],
    ],
  ],
];

/** [expression, with first, with both]. */
const back: [Day, [string, Ticks, Ticks][]][] = [
  [
    {
      what: 'New York: 02:00 EDT (-4) becomes 01:00 EST (-5) on the first Sunday of November',
      zone: 'America/New_York',
      from: '2027-11-07T04:00Z',
      until: '2027-11-08T05:00Z',
    },
    [
      ['30 1 * * *', ['05:30'], ['05:30', '06:30']],
      ['*/30 1 * * *', ['05:00', '05:30'], ['05:00', '05:30', '06:00', '06:30']],
      ['59 0 * * *', ['04:59'], ['04:59']],
      ['0 2 * * *', ['07:00'], ['07:00']],
      ['10 59 1 * * *', ['05:59:10'], ['05:59:10', '06:59:10']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
      ['*/10 * * * * *', 8_640, 9_000],
    ],
  ],
  [
    {
      what: 'Berlin: 03:00 CEST (+2) becomes 02:00 CET (+1) on the last Sunday of October',
      zone: 'Europe/Berlin',
      from: '2027-10-30T22:00Z',
      until: '2027-10-31T23:00Z',
    },
    [
      ['30 2 * * *', ['10-31T00:30'], ['10-31T00:30', '10-31T01:30']],
      ['*/30 2 * * *', ['10-31T00:00', '10-31T00:30'], ['10-31T00:00', '10-31T00:30', '10-31T01:00', '10-31T01:30']],
      ['*/30 1 * * *', ['23:00', '23:30'], ['23:00', '23:30']],
      ['0 3 * * *', ['10-31T02:00'], ['10-31T02:00']],
      ['0 2,3 31 10 *', ['10-31T00:00', '10-31T02:00'], ['10-31T00:00', '10-31T01:00', '10-31T02:00']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
    ],
  ],
  [
    {
      what: 'Lord Howe: 02:00 (+11) becomes 01:30 (+10:30) on the first Sunday of April',
      zone: 'Australia/Lord_Howe',
      from: '2027-04-03T13:00Z',
      until: '2027-04-04T13:30Z',
    },
    [
      ['45 1 * * *', ['14:45'], ['14:45', '15:15']],
      ['15 1 * * *', ['14:15'], ['14:15']],
      ['*/15 1 * * *', ['14:00', '14:15', '14:30', '14:45'], ['14:00', '14:15', '14:30', '14:45', '15:00', '15:15']],
      ['*/30 1 * * *', ['14:00', '14:30'], ['14:00', '14:30', '15:00']],
      ['0 2 * * *', ['15:30'], ['15:30']],
      ['0 * * * *', 24, 24],
      ['30 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_470],
    ],
  ],
  [
    {
      what: 'Casablanca, before Ramadan: 03:00 (+1) becomes 02:00 (+0) on February 23 of 2025',
      zone: 'Africa/Casablanca',
      from: '2025-02-22T23:00Z',
      until: '2025-02-24T00:00Z',
    },
    [
      ['30 2 * * *', ['02-23T01:30'], ['02-23T01:30', '02-23T02:30']],
      ['*/30 2 * * *', ['02-23T01:00', '02-23T01:30'], ['02-23T01:00', '02-23T01:30', '02-23T02:00', '02-23T02:30']],
      ['*/30 1 * * *', ['02-23T00:00', '02-23T00:30'], ['02-23T00:00', '02-23T00:30']],
      ['0 3 * * *', ['02-23T03:00'], ['02-23T03:00']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
    ],
  ],
  [
    {
      what: 'São Paulo, when it had summer time: 24:00 (-2) becomes 23:00 (-3) on the third Saturday of February',
      zone: 'America/Sao_Paulo',
      from: '2019-02-16T02:00Z',
      until: '2019-02-17T03:00Z',
    },
    [
      ['30 23 * * *', ['02-17T01:30'], ['02-17T01:30', '02-17T02:30']],
      ['*/30 23 * * 6', ['02-17T01:00', '02-17T01:30'], ['02-17T01:00', '02-17T01:30', '02-17T02:00', '02-17T02:30']],
      ['0 0 * * *', ['02:00'], ['02:00']],
      ['*/30 1 * * *', ['03:00', '03:30'], ['03:00', '03:30']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
    ],
  ],
  [
    {
      what: 'Apia, when it had summer time: 04:00 (+14) becomes 03:00 (+13) on the first Sunday of April',
      zone: 'Pacific/Apia',
      from: '2012-03-31T10:00Z',
      until: '2012-04-01T11:00Z',
    },
    [
      ['30 3 * * *', ['13:30'], ['13:30', '14:30']],
      ['0 4 * * *', ['15:00'], ['15:00']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
    ],
  ],
  [
    {
      what: 'Troll: 03:00 (+2) becomes 01:00 (+0) on the last Sunday of October',
      zone: 'Antarctica/Troll',
      from: '2027-10-30T22:00Z',
      until: '2027-11-01T00:00Z',
    },
    [
      ['30 1 * * *', ['23:30'], ['23:30', '10-31T01:30']],
      ['30 2 * * *', ['10-31T00:30'], ['10-31T00:30', '10-31T02:30']],
      ['0 1,2 * * *', ['23:00', '10-31T00:00'], ['23:00', '10-31T00:00', '10-31T01:00', '10-31T02:00']],
      ['*/30 1 * * *', ['23:00', '23:30'], ['23:00', '23:30', '10-31T01:00', '10-31T01:30']],
      ['0 3 * * *', ['10-31T03:00'], ['10-31T03:00']],
      ['0 * * * *', 24, 26],
      ['* * * * *', 1_440, 1_560],
    ],
  ],
  [
    {
      what: 'Cairo: 24:00 (+3) becomes 23:00 (+2) on the last Thursday of October',
      zone: 'Africa/Cairo',
      from: '2025-10-29T21:00Z',
      until: '2025-10-30T22:00Z',
    },
    [
      ['30 23 * * *', ['10-30T20:30'], ['10-30T20:30', '10-30T21:30']],
      ['*/30 23 * * 4', ['10-30T20:00', '10-30T20:30'], ['10-30T20:00', '10-30T20:30', '10-30T21:00', '10-30T21:30']],
      ['0 0 * * *', ['21:00'], ['21:00']],
      ['*/30 1 * * *', ['22:00', '22:30'], ['22:00', '22:30']],
      ['0 * * * *', 24, 25],
      ['* * * * *', 1_440, 1_500],
    ],
  ],
];

/** Days that might be taken for such, and are none: [expression, under every policy]. */
const still: [Day, [string, Ticks][]][] = [
  [
    {
      what: 'São Paulo, after summer time was abolished, on the third Sunday of October',
      zone: 'America/Sao_Paulo',
      from: '2019-10-20T03:00Z',
      until: '2019-10-21T03:00Z',
    },
    [
      ['0 0 * * *', ['03:00']],
      ['*/30 1 * * *', ['04:00', '04:30']],
      ['0 * * * *', 24],
      ['* * * * *', 1_440],
    ],
  ],
  [
    {
      what: 'Kathmandu (+5:45), which has no summer time',
      zone: 'Asia/Kathmandu',
      from: '2027-03-27T18:15Z',
      until: '2027-03-28T18:15Z',
    },
    [
      ['30 2 * * *', ['20:45']],
      ['*/30 1 * * *', ['19:15', '19:45']],
      ['0 * * * *', 24],
      ['* * * * *', 1_440],
    ],
  ],
];

const GAPS = ['skip', 'shift'] as const;
const FOLDS = ['first', 'both'] as const;
/** Schedules of every hour go by elapsed time unless told otherwise, others by the time of day. */
const everyHour = (expression: string) => expression.split(' ').at(-4) === '*';

const rows: [string, Day, string, Ticks, (typeof GAPS)[number] | null, (typeof FOLDS)[number] | null][] = [];
for (const [day, patterns] of forward) {
  for (const [expression, skip, shift] of patterns) {
    for (const fold of [...FOLDS, null]) {
      rows.push([day.what, day, expression, skip, 'skip', fold], [day.what, day, expression, shift, 'shift', fold]);
      rows.push([day.what, day, expression, everyHour(expression) ? skip : shift, null, fold]);
    }
  }
}
for (const [day, patterns] of back) {
  for (const [expression, first, both] of patterns) {
    for (const gap of [...GAPS, null]) {
      rows.push([day.what, day, expression, first, gap, 'first'], [day.what, day, expression, both, gap, 'both']);
      rows.push([day.what, day, expression, everyHour(expression) ? both : first, gap, null]);
    }
  }
}
for (const [day, patterns] of still) {
  for (const [expression, ticks] of patterns) {
    for (const gap of [...GAPS, null]) {
      for (const fold of [...FOLDS, null]) rows.push([day.what, day, expression, ticks, gap, fold]);
    }
  }
}

const days = new Map<string, typeof rows>();
for (const row of rows) days.set(row[0], [...(days.get(row[0]) ?? []), row]);

describe('days on which clocks change', () => {
  test.each([...days])('%s', (_what, ofDay) => {
    for (const [, day, expression, expected, dstGap, dstFold] of ofDay) {
      const ticks = recurrence({ expression, timezone: day.zone, dstGap, dstFold });
      const row = `${expression} with ${dstGap ?? 'no'} gap and ${dstFold ?? 'no'} fold`;
      const [from, until] = [Date.parse(day.from), Date.parse(day.until)];
      const found = [...ticks.between(from, until)].map(({ scheduledFor }) => scheduledFor);
      if (typeof expected === 'number') {
        expect(found.length, row).toBe(expected);
      } else {
        const wanted = expected.map((text) => instant(text, day));
        expect(
          found.map((ms) => new Date(ms).toISOString()),
          row,
        ).toEqual(wanted);
      }
      expect(ticks.count(from, until), row).toBe(found.length);
      // The same by single steps, the last of which leaves the day.
      const steps: number[] = [];
      for (let at = ticks.next(from - 1)?.scheduledFor; at !== undefined && at < until; ) {
        steps.push(at);
        at = ticks.next(at)?.scheduledFor;
      }
      expect(steps, row).toEqual(found);
    }
  });
});

/** `01:30`, `01:30:10` or `03-28T01:30` of the year and the first date of a day. */
function instant(text: string, { from }: Day): string {
  const [date, time = ''] = text.includes('T')
    ? [from.slice(0, 5) + text.slice(0, 5), text.slice(6)]
    : [from.slice(0, 10), text];
  return new Date(`${date}T${time}Z`).toISOString();
}
