import { describe, expect, test } from 'vitest';
import { CronError } from '../../src/schedule/cron.ts';
import { recurrence, spreadOffsetMs } from '../../src/schedule/recurrence.ts';

const SECOND = 1_000;
const HOUR = 3_600_000;
const DAY = 24 * HOUR;

const iso = (ms: number | undefined) =>
  ms === undefined ? undefined : new Date(ms).toISOString().replace('.000Z', 'Z');
const refusal = (expression: string) => {
  try {
    recurrence({ expression, timezone: 'UTC' });
  } catch (error) {
    if (error instanceof CronError) return error;
    throw error;
  }
  return undefined;
};

describe('intervals', () => {
  test.each([
    ['@every 1s', SECOND, 0],
    ['@every 45s', 45 * SECOND, 0],
    ['@every 90m', 1.5 * HOUR, 0],
    ['@every 1h30m', 1.5 * HOUR, 0],
    ['@every 36h', 36 * HOUR, 0],
    ['@every 7d', 7 * DAY, 0],
    ['@every 366d', 366 * DAY, 0],
    ['@every 1d2h3m4s/1d2h3m3s', DAY + 2 * HOUR + 184 * SECOND, DAY + 2 * HOUR + 183 * SECOND],
    ['@every 1h/0s', HOUR, 0],
    ['@every 1d/6h', DAY, 6 * HOUR],
    ['  @EVERY   1H/15m ', HOUR, HOUR / 4],
  ])('%s ticks at whole intervals from 1970 on, and a phase later', (expression, interval, phase) => {
    const ticks = recurrence({ expression, timezone: 'Europe/Rome' });
    const at = [0, 1, 2, 2_000].map((n) => n * interval + phase);
    for (const tick of at) {
      expect(ticks.next(tick - 1)).toEqual({ scheduledFor: tick });
      expect(ticks.next(tick)).toEqual({ scheduledFor: tick + interval });
      expect([...ticks.between(tick, tick + 2 * interval)].map(({ scheduledFor }) => scheduledFor)).toEqual([
        tick,
        tick + interval,
      ]);
      expect(ticks.count(tick, tick + 2 * interval)).toBe(2);
      expect(ticks.count(tick + 1, tick + 2 * interval)).toBe(1);
    }
    expect(ticks.next(phase - interval - 1)?.scheduledFor).toBe(phase - interval);
  });

  test.each([
    '@every',
    '@every ',
    '@every 5',
    '@every 0s',
    '@every 0m',
    '@every 500ms',
    '@every 1.5h',
    '@every -1h',
    '@every 30m1h',
    '@every 1h1h',
    '@every 367d',
    '@every 366d1s',
    '@every 999999999d',
    '@every 1w',
    '@every h',
    '@every 1h/',
    '@every /1h',
    '@every 1h/1h',
    '@every 1h/2h',
    '@every 1h / 5m',
    '@every 1h/5m/5m',
    '@every 1h 5m',
    '@every1h',
    '@every 1h\u0000',
    '@every 1h\n@every 2h',
    '@every ١h',
    `@every ${'1'.repeat(300)}s`,
  ])('%j is refused, and told what to write', (expression) => {
    const error = refusal(expression);
    expect(error?.field).toBe('expression');
    expect(error?.message).toMatch(/^[^\n]{10,300}\.$/);
  });

  test('a name that only begins like one is a name', () => {
    expect(refusal('@everyday')?.message).toMatch(/is no name of a schedule/);
  });
});

describe('between its bounds', () => {
  const at = (text: string) => Date.parse(text);
  const bounded = {
    timezone: 'UTC',
    startsAt: at('2026-01-02T00:00:00Z'),
    endsAt: at('2026-01-04T00:00:00Z'),
  };

  test.each(['@daily', '@every 1d'])('%s ticks from its first instant on, and not at its last', (expression) => {
    const ticks = recurrence({ ...bounded, expression });
    expect(iso(ticks.next(0)?.scheduledFor)).toBe('2026-01-02T00:00:00Z');
    expect(iso(ticks.next(at('2026-01-02T00:00:00Z'))?.scheduledFor)).toBe('2026-01-03T00:00:00Z');
    expect(ticks.next(at('2026-01-03T00:00:00Z'))).toBeUndefined();
    expect(ticks.next(at('2030-01-01T00:00:00Z'))).toBeUndefined();
    expect([...ticks.between(0, at('2030-01-01T00:00:00Z'))].map(({ scheduledFor }) => iso(scheduledFor))).toEqual([
      '2026-01-02T00:00:00Z',
      '2026-01-03T00:00:00Z',
    ]);
    expect(ticks.count(0, at('2030-01-01T00:00:00Z'))).toBe(2);
    expect(ticks.count(at('2026-01-02T00:00:00.001Z'), at('2026-01-03T00:00:00Z'))).toBe(0);
    expect(recurrence({ ...bounded, expression, endsAt: bounded.startsAt }).next(0)).toBeUndefined();
  });

  test('nothing comes after the year 9999', () => {
    for (const expression of ['@daily', '@every 1d']) {
      const ticks = recurrence({ expression, timezone: 'UTC' });
      expect(ticks.next(at('9999-12-31T00:00:00Z'))).toBeUndefined();
      expect(ticks.count(at('9999-12-28T00:00:00Z'), Number.POSITIVE_INFINITY)).toBe(2);
      expect([...ticks.between(at('9999-12-28T00:00:00Z'), Number.POSITIVE_INFINITY)].length).toBe(2);
      expect(iso(ticks.next(Number.NEGATIVE_INFINITY)?.scheduledFor)).toBe('1900-01-01T00:00:00Z');
    }
  });
});

describe('what a clock change leaves out', () => {
  const gapAfter = (expression: string, timezone: string, from: string, bounds: object = {}) => {
    const found = recurrence({ expression, timezone, dstGap: 'skip', ...bounds }).nextGap(Date.parse(from));
    return found && [iso(found.scheduledFor), found.note];
  };

  test('is told with the instant to which it would be shifted', () => {
    expect(gapAfter('30 2 * * *', 'America/New_York', '2026-01-01T00:00:00Z')).toEqual([
      '2026-03-08T07:30:00Z',
      '2026-03-08 02:30 does not exist in America/New_York, where clocks go forward, and is skipped.',
    ]);
    expect(gapAfter('30 2 * * *', 'America/New_York', '2026-03-08T07:29:59.999Z')?.[0]).toBe('2026-03-08T07:30:00Z');
    expect(gapAfter('30 2 * * *', 'America/New_York', '2026-03-08T07:30:00Z')?.[0]).toBe('2027-03-14T07:30:00Z');
    expect(gapAfter('0,45 2 * * *', 'America/New_York', '2026-03-08T07:00:00Z')?.[0]).toBe('2026-03-08T07:45:00Z');
    expect(gapAfter('0 12 30 12 *', 'Pacific/Apia', '2011-12-01T00:00:00Z')?.[0]).toBe('2011-12-30T22:00:00Z');
    // Half an hour: 02:15 is shown as 02:45, which is no tick of its own.
    expect(gapAfter('15 * * * *', 'Australia/Lord_Howe', '2026-01-01T00:00:00Z')?.[0]).toBe('2026-10-03T15:45:00Z');
  });

  test('is only told where skipping was asked for in so many words', () => {
    for (const dstGap of ['shift', null, undefined] as const) {
      const ticks = recurrence({
        expression: '30 2 * * *',
        timezone: 'America/New_York',
        ...(dstGap === undefined ? {} : { dstGap }),
      });
      expect(ticks.nextGap(0)).toBeUndefined();
    }
    expect(
      recurrence({ expression: '@every 1h', timezone: 'America/New_York', dstGap: 'skip' }).nextGap(0),
    ).toBeUndefined();
  });

  test('is not told where a tick of its own runs at that instant', () => {
    expect(gapAfter('30 2,3 * * *', 'America/New_York', '2026-01-01T00:00:00Z')).toBeUndefined();
    expect(gapAfter('0 12 * * *', 'Pacific/Apia', '2011-12-01T00:00:00Z')).toBeUndefined();
    expect(gapAfter('* * * * * *', 'America/New_York', '2026-01-01T00:00:00Z')).toBeUndefined();
    // Of 02:00 and 02:30 in half an hour that is left out, 02:00 would be 02:30.
    expect(gapAfter('0,30 2 * * *', 'Australia/Lord_Howe', '2026-01-01T00:00:00Z')).toBeUndefined();
    // Every hour, but only on the day that there was not: none on the next, to which it would be shifted.
    expect(gapAfter('0 * 30 12 *', 'Pacific/Apia', '2011-12-01T00:00:00Z')?.[0]).toBe('2011-12-30T10:00:00Z');
  });

  test('is looked for between the bounds, and for two years', () => {
    const year = '2026-01-01T00:00:00Z';
    expect(
      gapAfter('30 2 * * *', 'America/New_York', year, { endsAt: Date.parse('2026-03-08T07:30:00Z') }),
    ).toBeUndefined();
    expect(
      gapAfter('30 2 * * *', 'America/New_York', year, { endsAt: Date.parse('2026-03-08T07:30:01Z') }),
    ).toBeDefined();
    expect(
      gapAfter('30 2 * * *', 'America/New_York', year, { startsAt: Date.parse('2026-03-08T07:30:01Z') })?.[0],
    ).toBe('2027-03-14T07:30:00Z');
    expect(gapAfter('30 2 * * *', 'Asia/Tokyo', year)).toBeUndefined();
    expect(gapAfter('0 0 * * *', 'America/Sao_Paulo', year)).toBeUndefined();
  });
});

describe('the spread', () => {
  test('gives a task the same place always', () => {
    // FNV-1a of "a" is 0xe40c292c, which the finalizer of MurmurHash3 turns into 0x1a80b1b3: a tenth of all there are.
    expect(spreadOffsetMs('a', 86_400)).toBe(8_944_665);
    expect(spreadOffsetMs('a', 0)).toBe(0);
  });

  test.each([1, 60, 3_600, 86_400])('of %d s is even over consecutive tasks', (seconds) => {
    const slots = new Array(100).fill(0);
    for (let id = 1; id <= 100_000; id++) {
      const offset = spreadOffsetMs(`task:${id}`, seconds);
      if (!Number.isInteger(offset) || offset < 0 || offset >= seconds * 1000) expect.fail(`${id}: ${offset}`);
      slots[Math.floor((offset / (seconds * 1000)) * 100)] += 1;
    }
    // A thousand in each on average; chance alone makes the fullest of a hundred about 80 more.
    expect(Math.min(...slots)).toBeGreaterThan(850);
    expect(Math.max(...slots)).toBeLessThan(1_150);
  });
});
