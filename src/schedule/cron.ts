import { CronExpressionParser } from 'cron-parser';

export type CronFieldName = 'second' | 'minute' | 'hour' | 'day_of_month' | 'month' | 'day_of_week' | 'expression';

/** A cron expression that is refused: the field at fault, and a sentence that says what is allowed. */
export class CronError extends Error {
  override readonly name = 'CronError';
  readonly field: CronFieldName;

  constructor(field: CronFieldName, message: string) {
    super(message);
    this.field = field;
  }
}

/** An expression as sets of values, sorted; what the search walks. */
export interface CronFields {
  readonly seconds: readonly number[];
  readonly minutes: readonly number[];
  readonly hours: readonly number[];
  /** True where the hours are all 24: such a schedule follows elapsed time through clock changes. */
  readonly everyHour: boolean;
  /**
   * The matching days of a month (1 to 12) that has `length` days and begins on `weekday` (0 is Sunday), as bits: the
   * lowest is the first day.
   */
  daysOf(month: number, weekday: number, length: number): number;
}

const MAX_LENGTH = 255;
const MAX_PARSED = 10_000;
const parsed = new Map<string, CronFields>();

const MONTHS = 'JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC';
const WEEKDAYS = 'SUN|MON|TUE|WED|THU|FRI|SAT';

/** In their order; `allowed` is for people, and `grammar` is what of it the library would be too lenient with. */
const FIELDS: readonly { name: CronFieldName; allowed: string; grammar: RegExp }[] = [
  { name: 'second', allowed: '0-59', grammar: listOf('\\d+') },
  { name: 'minute', allowed: '0-59', grammar: listOf('\\d+') },
  { name: 'hour', allowed: '0-23', grammar: listOf('\\d+') },
  { name: 'day_of_month', allowed: '1-31, L for the last', grammar: listOf('\\d+', 'L') },
  { name: 'month', allowed: '1-12 or JAN-DEC', grammar: listOf(`\\d+|${MONTHS}`) },
  {
    name: 'day_of_week',
    allowed: '0-7 or SUN-SAT, L behind a day for its last of the month, #1 to #5 behind a lone day',
    grammar: listOf(`\\d+|${WEEKDAYS}`, `(?:\\d|${WEEKDAYS})(?:L|#\\d)`),
  },
];

/** Lists of values, of ranges of them, of `*`, each with a step or without, and of what else there may be. */
function listOf(value: string, other?: string): RegExp {
  const item = `(?:\\*|(?:${value})(?:-(?:${value}))?)(?:/\\d+)?${other === undefined ? '' : `|${other}`}`;
  return new RegExp(`^(?:${item})(?:,(?:${item}))*$`, 'i');
}

/**
 * Parses an expression of five fields, or six with leading seconds, or a name such as @daily. The library cron-parser reads
 * the fields; refused besides what it refuses are blanks, `?`, `H` (which it would choose at random), names that run into
 * each other (it would read JANFEB as 12), and what never fires. Where both days are restricted either will do, and where
 * one begins with `*` both must match, as in Vixie cron (crontab(5)). Throws CronError.
 */
export function parseCron(expression: string): CronFields {
  const known = parsed.get(expression);
  if (known) return known;
  const fields = parse(expression);
  // The oldest goes: a map keeps the order in which keys came.
  if (parsed.size >= MAX_PARSED) parsed.delete(parsed.keys().next().value ?? '');
  parsed.set(expression, fields);
  return fields;
}

function parse(expression: string): CronFields {
  const text = plainText(expression);
  return text.startsWith('@') ? parseName(text) : parseFields(text);
}

/** An expression without the blanks around it. Throws CronError where it is too long, empty, or not of plain characters. */
export function plainText(expression: string): string {
  if (expression.length > MAX_LENGTH) {
    throw new CronError('expression', `The expression is longer than ${MAX_LENGTH} characters.`);
  }
  const text = expression.trim();
  if (text === '') {
    throw new CronError('expression', 'The expression is empty: write five fields, or six with seconds.');
  }
  if (!/^[\x20-\x7e]+$/.test(text)) {
    throw new CronError('expression', 'The expression may hold only plain characters, with spaces between the fields.');
  }
  return text;
}

function parseName(text: string): CronFields {
  const name = text.toLowerCase();
  try {
    const { fields } = CronExpressionParser.parse(name === '@midnight' ? '@daily' : name);
    return compile(fields, fields.dayOfMonth.isWildcard || fields.dayOfWeek.isWildcard);
  } catch {
    throw new CronError(
      'expression',
      `${shorten(text)} is no name of a schedule: use @yearly, @monthly, @weekly, @weekdays, @weekends, @daily or @hourly, or an interval such as @every 90m.`,
    );
  }
}

function parseFields(text: string): CronFields {
  const parts = text.split(/ +/);
  if (parts.length < 5 || parts.length > 6) {
    throw new CronError(
      'expression',
      `The expression has ${parts.length} field${parts.length === 1 ? '' : 's'}: write five, or six with seconds first.`,
    );
  }
  if (parts.length === 5) parts.unshift('0');
  for (const [i, part] of parts.entries()) if (!FIELDS[i]?.grammar.test(part)) throw refused(i, part);
  const [, , , day = '', , weekday = ''] = parts;
  let compiled: CronFields | undefined;
  try {
    compiled = compile(
      CronExpressionParser.parse(parts.join(' ')).fields,
      day.startsWith('*') || weekday.startsWith('*'),
    );
  } catch {
    for (const [i, part] of parts.entries()) if (!isGoodAlone(i, part)) throw refused(i, part);
    // Each field is good by itself, so it is the day that no named month has.
  }
  if (compiled && everFires(compiled)) return compiled;
  throw new CronError('day_of_month', `${shorten(text)} never fires: no month it names has such a day.`);
}

function refused(index: number, part: string): CronError {
  const { name, allowed } = FIELDS[index] ?? { name: 'expression', allowed: '' };
  return new CronError(
    name,
    `The ${name.replaceAll('_', ' ')} field "${shorten(part)}" is not valid: allowed are ${allowed}, and *, lists, ranges and steps that name no value twice.`,
  );
}

function isGoodAlone(index: number, part: string): boolean {
  try {
    CronExpressionParser.parse(FIELDS.map((_, i) => (i === index ? part : '*')).join(' '));
    return true;
  } catch {
    return false;
  }
}

/** As much of a text as a sentence can quote. */
export const shorten = (text: string) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);

/** The library's fields as what the search needs; `both` says whether a day must match by month and by week. */
function compile(fields: ReturnType<typeof CronExpressionParser.parse>['fields'], both: boolean): CronFields {
  const hours = fields.hour.values.map(Number);
  const months = new Set(fields.month.values.map(Number));
  const days = new Set<number | string>(fields.dayOfMonth.values);
  const weekdays = new Set(
    fields.dayOfWeek.values.filter((value) => typeof value === 'number').map((value) => value % 7),
  );
  // "5L": the last Friday.
  const lastWeekdays = new Set(
    fields.dayOfWeek.values.filter((value) => typeof value === 'string').map((value) => Number.parseInt(value, 10) % 7),
  );
  const { nthDay } = fields.dayOfWeek;
  const matches = (day: number, weekday: number, length: number) => {
    const byDay = days.has(day) || (days.has('L') && day === length);
    const byWeekday =
      (weekdays.has(weekday) && (nthDay <= 0 || Math.ceil(day / 7) === nthDay)) ||
      (lastWeekdays.has(weekday) && day > length - 7);
    return both ? byDay && byWeekday : byDay || byWeekday;
  };
  const known = new Map<number, number>();
  return {
    seconds: fields.second.values.map(Number),
    minutes: fields.minute.values.map(Number),
    hours,
    everyHour: hours.length === 24,
    daysOf(month, weekday, length) {
      if (!months.has(month)) return 0;
      const key = length * 7 + weekday;
      let bits = known.get(key);
      if (bits === undefined) {
        bits = 0;
        for (let day = 1; day <= length; day++)
          if (matches(day, (weekday + day - 1) % 7, length)) bits |= 1 << (day - 1);
        known.set(key, bits);
      }
      return bits;
    },
  };
}

/** Whether some day of some year matches: a month of any length begins on any day of the week sooner or later. */
function everFires(fields: CronFields): boolean {
  const lengths = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
  return lengths.some((length, i) =>
    [0, 1, 2, 3, 4, 5, 6].some((weekday) => fields.daysOf(i + 1, weekday, length) !== 0),
  );
}
