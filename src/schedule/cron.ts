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
  readonly months: ReadonlySet<number>;
  /** Whether the day of a month matches; `weekday` 0 is Sunday, `last` the number of days of the month. */
  matchesDay(day: number, weekday: number, last: number): boolean;
  /** True where the hours are all 24: such a schedule follows elapsed time through clock changes. */
  readonly everyHour: boolean;
}

const MAX_LENGTH = 255;
const CACHE = 10_000;
const parsed = new Map<string, CronFields>();

const FIELDS: readonly { name: CronFieldName; allowed: string }[] = [
  { name: 'second', allowed: '0-59' },
  { name: 'minute', allowed: '0-59' },
  { name: 'hour', allowed: '0-23' },
  { name: 'day_of_month', allowed: '1-31 or L' },
  { name: 'month', allowed: '1-12 or JAN-DEC' },
  { name: 'day_of_week', allowed: '0-7 or SUN-SAT, with #1 to #5 or L behind it' },
];

/**
 * Parses an expression of five fields, or six with leading seconds, or a name such as @daily. The library cron-parser reads
 * the fields; refused besides what it refuses are blanks, `?`, `H` (which it would choose at random) and what never fires.
 * Throws CronError.
 */
export function parseCron(expression: string): CronFields {
  const known = parsed.get(expression);
  if (known) return known;
  const fields = parse(expression);
  // The oldest goes: a map keeps the order in which keys came.
  if (parsed.size >= CACHE) parsed.delete(parsed.keys().next().value ?? '');
  parsed.set(expression, fields);
  return fields;
}

function parse(expression: string): CronFields {
  const text = expression.trim();
  if (text === '')
    throw new CronError('expression', 'The expression is empty: write five fields, or six with seconds.');
  if (text.length > MAX_LENGTH)
    throw new CronError('expression', `The expression is longer than ${MAX_LENGTH} characters.`);
  if (!/^[\x21-\x7e]+(?: +[\x21-\x7e]+)*$/.test(text)) {
    throw new CronError('expression', 'The expression may hold only plain characters, with spaces between the fields.');
  }
  const parts = text.startsWith('@') ? undefined : text.split(/ +/);
  // `?` and `H` would be taken, as `*` and as a choice at random; letters of names are no `H`.
  if (parts && (parts.length < 5 || parts.length > 6 || /[?H]/.test(text.replace(/thu|mar/gi, '')))) checkFields(parts);
  let fields: ReturnType<typeof CronExpressionParser.parse>['fields'];
  try {
    fields = CronExpressionParser.parse(text.startsWith('@') ? text.toLowerCase() : text.replace(/ +/g, ' ')).fields;
  } catch {
    if (text.startsWith('@')) {
      throw new CronError(
        'expression',
        `${text} is no name of a schedule: use @yearly, @monthly, @weekly, @daily or @hourly.`,
      );
    }
    if (parts) checkFields(parts);
    // Each field is good by itself, so it is the day that no named month has.
    throw neverFires(text);
  }
  const days = new Set<number>();
  for (const value of fields.dayOfMonth.values) if (typeof value === 'number') days.add(value);
  const lastDay = fields.dayOfMonth.values.length > days.size;
  const weekdays = new Set<number>();
  const lastWeekdays = new Set<number>();
  for (const value of fields.dayOfWeek.values) {
    if (typeof value === 'number') weekdays.add(value % 7);
    else lastWeekdays.add(Number.parseInt(value, 10) % 7);
  }
  const nth = fields.dayOfWeek.nthDay;
  const anyDay = fields.dayOfMonth.isWildcard;
  const anyWeekday = fields.dayOfWeek.isWildcard;
  const hours = [...fields.hour.values].map(Number);
  const result: CronFields = {
    seconds: [...fields.second.values].map(Number),
    minutes: [...fields.minute.values].map(Number),
    hours,
    months: new Set([...fields.month.values].map(Number)),
    everyHour: hours.length === 24,
    matchesDay(day, weekday, last) {
      const byDay = days.has(day) || (lastDay && day === last);
      const byWeekday =
        (weekdays.has(weekday) && (nth <= 0 || Math.ceil(day / 7) === nth)) ||
        (lastWeekdays.has(weekday) && day > last - 7);
      if (anyDay) return anyWeekday || byWeekday;
      if (anyWeekday) return byDay;
      // Both are given: either will do, as in Vixie cron.
      return byDay || byWeekday;
    },
  };
  if (!everFires(result)) {
    throw neverFires(text);
  }
  return result;
}

const neverFires = (text: string) =>
  new CronError('day_of_month', `${text} never fires: no month it names has such a day.`);

/** Checks each field by itself, so that the error can name it. */
function checkFields(parts: string[]): void {
  if (parts.length < 5 || parts.length > 6) {
    throw new CronError(
      'expression',
      `The expression has ${parts.length} fields: write five, or six with seconds first.`,
    );
  }
  const fields = parts.length === 5 ? FIELDS.slice(1) : FIELDS;
  for (const [i, { name, allowed }] of fields.entries()) {
    const part = parts[i] ?? '';
    const shown = part.length > 40 ? `${part.slice(0, 40)}…` : part;
    const refused = new CronError(
      name,
      `The ${name.replaceAll('_', ' ')} field "${shown}" is not valid: allowed are ${allowed}, *, lists, ranges and steps.`,
    );
    if (/[?H]/.test(part.replace(/thu|mar/gi, ''))) throw refused;
    const alone = FIELDS.map((field) => (field.name === name ? part : field.name === 'second' ? '0' : '*'));
    try {
      CronExpressionParser.parse(alone.join(' '));
    } catch {
      throw refused;
    }
  }
}

/** Whether some day from 2000 on matches: a cycle of 28 years and the leap day of 2000 cover every calendar year there is. */
function everFires(fields: CronFields): boolean {
  for (let year = 2000; year < 2029; year++) {
    for (const month of fields.months) {
      const last = daysIn(year, month);
      const first = new Date(Date.UTC(year, month - 1, 1)).getUTCDay();
      for (let day = 1; day <= last; day++) {
        if (fields.matchesDay(day, (first + day - 1) % 7, last)) return true;
      }
    }
  }
  return false;
}

/** The number of days of a month (1–12). */
export function daysIn(year: number, month: number): number {
  return new Date(Date.UTC(year, month, 0)).getUTCDate();
}
