import { type CronFields, daysIn } from './cron.ts';
import { type Segment, segmentAt } from './zone.ts';

// When a schedule fires.
//
// Between two changes of a zone's offset the wall clock runs straight, so the search goes segment by segment and looks for
// the next matching wall time inside each. At the seams two things happen, and both have a rule:
//
//   gap   Clocks go forward, and a stretch of wall time does not exist (02:00–03:00). Its ticks are skipped, or shifted
//         forward by the length of the gap: the wall time is read with the offset before it (RFC 5545, section 3.3.5),
//         so 02:30 fires at 03:30. Ticks that come to lie on the same instant fire once.
//   fold  Clocks go back, and a stretch of wall time happens twice (01:00–02:00). Its ticks fire at the first, or at both.
//
// Unless told otherwise, a schedule whose hour field holds all 24 hours follows elapsed time: gap skipped, fold both, so a
// minutely job neither pauses for an hour nor bursts. Any other means a time of day: gap shifted, fold first, so a daily
// job runs once every day.

export type GapPolicy = 'skip' | 'shift';
export type FoldPolicy = 'first' | 'both';
export interface DstPolicy {
  gap?: GapPolicy | undefined;
  fold?: FoldPolicy | undefined;
}

export interface Occurrence {
  /** The instant it fires, in ms of UTC. */
  scheduledFor: number;
  /** What a clock change does to it, as a sentence; absent where nothing does. */
  note?: string;
}

const DAY = 86_400_000;
/** The longest silence of a schedule that fires at all: the same date on the same weekday in a leap year, over 1900 or 2100. */
const HORIZON_YEARS = 41;

/** The first occurrence after `afterMs`; undefined when there is none within 41 years or before the year 10000. */
export function nextOccurrence(
  cron: CronFields,
  zone: string,
  afterMs: number,
  policy: DstPolicy = {},
): Occurrence | undefined {
  const gap = policy.gap ?? (cron.everyHour ? 'skip' : 'shift');
  const fold = policy.fold ?? (cron.everyHour ? 'both' : 'first');
  // Ticks are whole seconds: the first one after.
  const from = Math.floor(afterMs / 1000) * 1000 + 1000;
  const horizon = Math.min(from + HORIZON_YEARS * 365.25 * DAY, Date.UTC(9999, 11, 30));
  for (let at = from; at < horizon; ) {
    const segment = segmentAt(zone, at);
    const found = nextInSegment(cron, zone, segment, at, gap, fold);
    if (found) return found;
    // What lies in years to come is looked for on a clock without zones first: only where it says there may be something
    // are segments worth their making. No zone is further than a day from it, and no gap or fold is longer.
    const ahead = nextWall(cron, segment.end - DAY, horizon + DAY);
    if (ahead === undefined) return undefined;
    at = Math.max(segment.end, ahead - 2 * DAY);
  }
  return undefined;
}

/** The first `count` occurrences after `afterMs`. */
export function nextOccurrences(
  cron: CronFields,
  zone: string,
  afterMs: number,
  count: number,
  policy: DstPolicy = {},
): Occurrence[] {
  const found: Occurrence[] = [];
  let next = nextOccurrence(cron, zone, afterMs, policy);
  while (next && found.length < count) {
    found.push(next);
    next = nextOccurrence(cron, zone, next.scheduledFor, policy);
  }
  return found;
}

function nextInSegment(
  cron: CronFields,
  zone: string,
  { start, end, offset }: Segment,
  from: number,
  gap: GapPolicy,
  fold: FoldPolicy,
): Occurrence | undefined {
  const before = segmentAt(zone, start - 1).offset;
  // Wall times that the segment before has had already.
  const repeatedUntil = start + before;
  const first = fold === 'first' ? Math.max(from + offset, repeatedUntil) : from + offset;
  const wall = nextWall(cron, first, end + offset);
  const natural = wall === undefined ? undefined : wall - offset;

  if (gap === 'shift' && offset > before) {
    const missing = nextWall(cron, from + before, start + offset);
    if (missing !== undefined) {
      const shifted = missing - before;
      if (natural === undefined || shifted < natural) {
        return {
          scheduledFor: shifted,
          note: `${wallText(missing)} does not exist in ${zone}, where clocks go forward; it runs at ${clockText(shifted + offset)}.`,
        };
      }
    }
  }
  if (natural === undefined || wall === undefined) return undefined;
  if (wall < repeatedUntil) {
    return { scheduledFor: natural, note: `${wallText(wall)} happens twice in ${zone}; this is the second time.` };
  }
  const after = segmentAt(zone, end).offset;
  if (after < offset && wall >= end + after) {
    return { scheduledFor: natural, note: `${wallText(wall)} happens twice in ${zone}; this is the first time.` };
  }
  return { scheduledFor: natural };
}

/** The first matching wall time in [from, until), as ms of a clock that knows no zones. */
function nextWall(cron: CronFields, from: number, until: number): number | undefined {
  if (from >= until) return undefined;
  let day = Math.floor(from / DAY) * DAY;
  let inDay = from - day;
  while (day < until) {
    const date = new Date(day);
    const [year, month] = [date.getUTCFullYear(), date.getUTCMonth() + 1];
    if (!cron.months.has(month)) {
      day = Date.UTC(year, month, 1);
      inDay = 0;
      continue;
    }
    if (cron.matchesDay(date.getUTCDate(), date.getUTCDay(), daysIn(year, month))) {
      const time = nextInDay(cron, inDay);
      if (time !== undefined) return day + time < until ? day + time : undefined;
    }
    day += DAY;
    inDay = 0;
  }
  return undefined;
}

/** The first matching time of day at or after `from` (ms since midnight). */
function nextInDay(cron: CronFields, from: number): number | undefined {
  const fromSecond = Math.ceil(from / 1000);
  const [h, m, s] = [Math.floor(fromSecond / 3600), Math.floor(fromSecond / 60) % 60, fromSecond % 60];
  const firstMinute = cron.minutes[0] ?? 0;
  const firstSecond = cron.seconds[0] ?? 0;
  for (const hour of cron.hours) {
    if (hour < h) continue;
    if (hour > h) return ((hour * 60 + firstMinute) * 60 + firstSecond) * 1000;
    for (const minute of cron.minutes) {
      if (minute < m) continue;
      if (minute > m) return ((hour * 60 + minute) * 60 + firstSecond) * 1000;
      for (const second of cron.seconds) {
        if (second >= s) return ((hour * 60 + minute) * 60 + second) * 1000;
      }
    }
  }
  return undefined;
}

const wallText = (wall: number) => new Date(wall).toISOString().slice(0, 16).replace('T', ' ');
const clockText = (wall: number) => new Date(wall).toISOString().slice(11, 16);
