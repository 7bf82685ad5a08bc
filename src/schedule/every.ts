import { CronError, plainText, shorten } from './cron.ts';
import { FIRST, LAST } from './occurrences.ts';

// Intervals, as Temporal has them: `@every 90m`, or `@every 1d/6h` with a phase. Their ticks lie at whole intervals from
// 1970 on, and a phase later: a schedule that is read again, moved or stopped for a while keeps its ticks, which one that
// counted from its last run would not. Elapsed time knows neither zones nor clock changes.

/** An interval, in ms. */
export interface Every {
  readonly interval: number;
  /** How far behind a whole interval the ticks lie; less than the interval. */
  readonly phase: number;
}

const SECOND = 1_000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const MAX_INTERVAL = 366 * DAY;

const DURATION = /^(?=\d)(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?$/i;
const HOW = 'write days, hours, minutes and seconds in that order, such as 90m, 1h30m or 7d, and a phase after a slash';

/** Reads `@every <interval>[/<phase>]`; undefined for an expression that does not begin so. Throws CronError. */
export function parseEvery(expression: string): Every | undefined {
  const text = plainText(expression);
  if (!/^@every(?![a-z])/i.test(text)) return undefined;
  const [, first = '', second] = /^@every +([^ /]+)(?:\/([^ /]+))?$/i.exec(text) ?? [];
  const interval = duration(first);
  const phase = second === undefined ? 0 : duration(second);
  if (interval === undefined || phase === undefined) {
    throw new CronError('expression', `${shorten(text)} is no interval: ${HOW}, such as @every 1d/6h.`);
  }
  if (interval < SECOND || interval > MAX_INTERVAL) {
    throw new CronError('expression', `The interval of ${shorten(text)} must be from 1s to 366d.`);
  }
  if (phase >= interval) {
    throw new CronError(
      'expression',
      `The phase of ${shorten(text)} must be shorter than its interval: it says how long after each whole interval a tick comes.`,
    );
  }
  return { interval, phase };
}

/** A duration such as 1h30m in ms; undefined for what is none. */
function duration(text: string): number | undefined {
  const match = DURATION.exec(text);
  if (!match) return undefined;
  const [days = 0, hours = 0, minutes = 0, seconds = 0] = match.slice(1).map((digits) => Number(digits ?? 0));
  return days * DAY + hours * HOUR + minutes * MINUTE + seconds * SECOND;
}

/** The first tick of an interval at `fromMs` or later; undefined after the year 9999. */
export function firstEvery({ interval, phase }: Every, fromMs: number): number | undefined {
  const from = Math.max(FIRST, fromMs);
  if (from >= LAST) return undefined;
  const tick = Math.ceil((from - phase) / interval) * interval + phase;
  return tick < LAST ? tick : undefined;
}

/** How many ticks of an interval lie from `fromMs` (inclusive) to `untilMs` (exclusive). */
export function countEvery(every: Every, fromMs: number, untilMs: number): number {
  const first = firstEvery(every, fromMs);
  const until = Math.min(untilMs, LAST);
  return first === undefined || first >= until ? 0 : Math.ceil((until - first) / every.interval);
}
