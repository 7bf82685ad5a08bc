import { describe, expect, test } from 'vitest';
import { CronError, parseCron } from '../../src/schedule/cron.ts';
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
  ])('%j is refused, and the field at fault is named', (expression, field) => {
    const error = refusal(expression);
    expect(error?.field).toBe(field);
    expect(error?.message).toMatch(/^[^\n]{10,300}\.$|^[^\n]{10,300}@hourly\.$/);
  });
});

describe('time zones', () => {
  test.each(['UTC', 'Europe/Berlin', 'America/Argentina/Buenos_Aires', 'Asia/Calcutta', 'Etc/GMT+5'])(
    '%s is one',
    (name) => {
      expect(isTimeZone(name)).toBe(true);
    },
  );
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
  ])('%j is none', (name) => {
    expect(isTimeZone(name)).toBe(false);
  });
});
