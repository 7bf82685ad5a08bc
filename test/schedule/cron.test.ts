import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { CronError, parseCron } from '../../src/schedule/cron.ts';
import { nextOccurrence } from '../../src/schedule/occurrences.ts';
import { isTimeZone } from '../../src/schedule/zone.ts';

const refusal = (expression: string) => {
  try {
    parseCron(expression);
  } catch (error) {
    if (error instanceof CronError) return error;
    throw error;
  }
  return undefined;
};

describe('cron expressions', () => {
  test.each([
    '* * * * *',
    '0 9 * * MON-FRI',
    '*/15 * * * * *',
    '0 0 1 JAN,jul *',
    '0 0 L * *',
    '0 0 * * 5L',
    '0 0 * * 1#2',
    '0 0 * * THU',
    '0 0 1 MAR *',
    '@hourly',
    '@daily',
    '@weekly',
    '@monthly',
    '@yearly',
    '0-30/5 8-18 * * 1-5',
    '0 0 * * 7',
    '0 0 29 2 *',
    '0 0 * 2 1#5',
    '0 0 30 2 1',
    '@midnight',
    '@WEEKDAYS',
    ' 0   9 * * * ',
    '00 09 * * fri',
    '0 0 * * 1,3L',
  ])('%s is taken', (expression) => {
    expect(refusal(expression)).toBeUndefined();
  });

  test.each([
    ['', 'expression'],
    ['   ', 'expression'],
    ['* * * *', 'expression'],
    ['* * * * * * *', 'expression'],
    ['@often', 'expression'],
    ['@', 'expression'],
    ['? * * * *', 'minute'],
    ['* * ? * *', 'day_of_month'],
    ['H * * * *', 'minute'],
    ['* H(0-7) * * *', 'hour'],
    ['60 * * * *', 'minute'],
    ['* 24 * * *', 'hour'],
    ['* * 0 * *', 'day_of_month'],
    ['* * 32 * *', 'day_of_month'],
    ['* * * 13 *', 'month'],
    ['* * * FOO *', 'month'],
    ['* * * * 8', 'day_of_week'],
    ['* * * * 1#6', 'day_of_week'],
    ['60 * * * * *', 'second'],
    ['*/0 * * * *', 'minute'],
    ['5-1 * * * *', 'minute'],
    ['1,,2 * * * *', 'minute'],
    ['-1 * * * *', 'minute'],
    ['0 0 30 2 *', 'day_of_month'],
    ['0 0 31 4,6,9,11 *', 'day_of_month'],
    ['٣ * * * *', 'expression'],
    ['* * * *\n*', 'expression'],
    ['*\t* * * *', 'expression'],
    [`${'1,'.repeat(600)}1 * * * *`, 'expression'],
    ['__proto__', 'expression'],
    ['constructor * * * *', 'minute'],
    ['toString * * * *', 'minute'],
    ['@constructor', 'expression'],
    ['@daily @daily', 'expression'],
    [`${' '.repeat(250)}@daily`, 'expression'],
    ['* * * JANFEB *', 'month'],
    ['* * * 1feb *', 'month'],
    ['* * * * sunmon', 'day_of_week'],
    ['* * * * fri-mon', 'day_of_week'],
    ['* * * * 5#3,1', 'day_of_week'],
    ['* * * * 5#3L', 'day_of_week'],
    ['* * * * L', 'day_of_week'],
    ['* * 15W * *', 'day_of_month'],
    ['* * L-3 * *', 'day_of_month'],
    ['* * 31 2 */2', 'day_of_month'],
    ['1e1 * * * *', 'minute'],
    ['0x1 * * * *', 'minute'],
    ['1.5 * * * *', 'minute'],
    ['NaN * * * *', 'minute'],
    ['-0 * * * *', 'minute'],
    ['* 1e309 * * *', 'hour'],
    [`${'9'.repeat(200)} * * * *`, 'minute'],
    ['* * * *\u0000 *', 'expression'],
    ['* * * * *\u202e', 'expression'],
  ])('%j is refused, and the field at fault is named', (expression, field) => {
    const error = refusal(expression);
    expect(error?.field).toBe(field);
    expect(error?.message).toMatch(/^[^\n]{10,300}\.$/);
  });

  test('whatever is written, it is refused by a CronError or fires, the same each time', () => {
    const atom = fc.oneof(
      fc.constantFrom(
        '*',
        '?',
        'H',
        'L',
        '1L',
        '5#3',
        'mon',
        'JAN',
        '*/15',
        '1-5',
        '10-20/3',
        '0',
        '7',
        '31',
        '60',
        '',
      ),
      fc.string({ maxLength: 4 }),
      fc.integer({ min: 0, max: 70 }).map(String),
    );
    const field = fc.array(atom, { minLength: 1, maxLength: 3 }).map((atoms) => atoms.join(','));
    const expressions = fc.oneof(
      fc.array(fc.oneof({ weight: 3, arbitrary: fc.constant('*') }, field), { minLength: 4, maxLength: 7 }),
      fc.array(fc.string({ unit: 'binary', maxLength: 5 }), { maxLength: 7 }),
    );
    fc.assert(
      fc.property(expressions, (fields) => {
        const expression = fields.join(' ');
        const error = refusal(expression);
        if (error) {
          expect(error.message).toMatch(/^[^\n]{10,300}\.$/);
          return;
        }
        const next = nextOccurrence(parseCron(expression), 'Europe/Berlin', 0);
        expect(next?.scheduledFor).toBeGreaterThan(0);
        expect(nextOccurrence(parseCron(` ${expression}`), 'Europe/Berlin', 0)).toEqual(next);
      }),
      { numRuns: 5_000 },
    );
  });
});

describe('time zones', () => {
  test.each([
    'UTC',
    'Europe/Berlin',
    'America/Argentina/Buenos_Aires',
    'Asia/Calcutta',
    'Etc/GMT+5',
    'EST5EDT',
    'GB',
    'europe/berlin',
  ])('%s is one', (name) => {
    expect(isTimeZone(name)).toBe(true);
  });
  test.each([
    '',
    'Mars/X',
    "UTC'; drop",
    '+02:00',
    'UTC+2',
    'x'.repeat(10_000),
    'Europe/Berlin ',
    '../etc',
    'ünder/ground',
    'PST',
    'IST',
    'SystemV/EST5',
    'Etc/Unknown',
    'Europe/Berlin\u0000',
    '__proto__',
    'constructor',
  ])('%j is none', (name) => {
    expect(isTimeZone(name)).toBe(false);
  });

  test('all that Intl lists are', () => {
    expect(Intl.supportedValuesOf('timeZone').filter((name) => !isTimeZone(name))).toEqual([]);
  });
});
