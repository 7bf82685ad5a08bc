import type { CronFields } from './cron.ts';
import { countWalls, nextWall } from './wall.ts';
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
//
// The iterator of cron-parser is not used: it steps a date of a zone from field to field (4,449 a second), shifts over a
// gap of an hour but loses the day of one of half an hour, and cannot be told what to do with a fold.

export type GapPolicy = 'skip' | 'shift';
export type FoldPolicy = 'first' | 'both';
export interface DstPolicy {
  gap?: GapPolicy | undefined;
  fold?: FoldPolicy | undefined;
}

export interface Occurrence {
  /** The instant it fires, in ms of UTC. */
  scheduledFor: number;
  /**
   * What a clock change does to it, as a sentence; absent where nothing does. One that is skipped is no occurrence: the
   * next one says so.
   */
  note?: string;
}

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
/** How far ahead ticks are looked for that a clock change leaves out: a zone that still changes its clocks does so twice a year. */
const GAP_HORIZON = 2 * 366 * DAY;
/** The longest silence of a schedule that fires at all: the same date on the same weekday in a leap year, over 1900 or 2100. */
const HORIZON = 41 * 365.25 * DAY;
/** No tick of any schedule lies before this, or at `LAST` and after it. */
export const FIRST = Date.UTC(1900, 0, 1);
export const LAST = Date.UTC(9999, 11, 30);

/**
 * The first occurrence after `afterMs`, from 1900 on; undefined when there is none within 41 years or before the year
 * 10000. Throws RangeError for what is no time zone.
 */
export function nextOccurrence(
  cron: CronFields,
  zone: string,
  afterMs: number,
  policy: DstPolicy = {},
): Occurrence | undefined {
  const from = Math.max(FIRST, secondAfter(afterMs));
  return search(rules(cron, zone, policy), from, Math.min(from + HORIZON, LAST));
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
  let at = afterMs;
  while (found.length < count) {
    const next = nextOccurrence(cron, zone, at, policy);
    if (!next) break;
    found.push(next);
    at = next.scheduledFor;
  }
  return found;
}

/**
 * The occurrences from `fromMs` (inclusive) to `untilMs` (exclusive), one at a time, so that a caller can let others run
 * between two of them. Nothing is searched beyond `untilMs`.
 */
export function* occurrencesBetween(
  cron: CronFields,
  zone: string,
  fromMs: number,
  untilMs: number,
  policy: DstPolicy = {},
): Generator<Occurrence, void, undefined> {
  const applied = rules(cron, zone, policy);
  const until = Math.min(untilMs, LAST);
  for (let at = Math.max(FIRST, secondAfter(fromMs - 1)); ; ) {
    const next = search(applied, at, until);
    if (!next) return;
    yield next;
    at = secondAfter(next.scheduledFor);
  }
}

/** How many occurrences lie from `fromMs` (inclusive) to `untilMs` (exclusive); computed, not walked through. */
export function countOccurrences(
  cron: CronFields,
  zone: string,
  fromMs: number,
  untilMs: number,
  policy: DstPolicy = {},
): number {
  const applied = rules(cron, zone, policy);
  const until = Math.min(untilMs, LAST);
  let count = 0;
  for (let at = Math.max(FIRST, secondAfter(fromMs - 1)); at < until; ) {
    const segment = segmentAt(zone, at);
    const end = Math.min(segment.end, until);
    const gapEnd = Math.min(segment.start + segment.offset - segment.before, end);
    if (applied.gap === 'shift' && at < gapEnd) {
      // Shifted ticks may lie on others here, so these few are looked at one by one.
      const next = search(applied, at, gapEnd);
      if (next) count += 1;
      at = next ? secondAfter(next.scheduledFor) : gapEnd;
    } else {
      count += countWalls(cron, firstWall(applied, segment, at), end + segment.offset);
      at = end;
    }
  }
  return count;
}

/**
 * The first tick after `afterMs` that clocks going forward leave out under gap `skip`, told as the instant at which `shift`
 * would run it; one that would run together with a tick of its own is not left out. Undefined when none lies within two
 * years. Throws RangeError for what is no time zone.
 */
export function nextLeftOut(cron: CronFields, zone: string, afterMs: number): Occurrence | undefined {
  const from = Math.max(FIRST, secondAfter(afterMs));
  const until = Math.min(from + GAP_HORIZON, LAST);
  for (let at = from; at < until; ) {
    const segment = segmentAt(zone, at);
    const found = leftOutBy(cron, segment, at);
    if (found !== undefined) {
      const scheduledFor = found - segment.before;
      if (scheduledFor >= until) return undefined;
      return {
        scheduledFor,
        note: `${wallText(found)} does not exist in ${zone}, where clocks go forward, and is skipped.`,
      };
    }
    at = segment.end;
  }
  return undefined;
}

/** The wall time of the first tick that the gap before a segment leaves out, of those that would be shifted to `from` or later. */
function leftOutBy(cron: CronFields, { start, offset, before }: Segment, from: number): number | undefined {
  const gap = offset - before;
  let wall = from + before;
  // Where every hour has its ticks, whole hours later on the same day there is one as well: thousands need no look.
  if (cron.everyHour && gap % HOUR === 0) wall = Math.max(wall, (Math.floor(wall / DAY) + 1) * DAY - gap);
  for (;;) {
    const missing = nextWall(cron, wall, start + offset);
    if (missing === undefined) return undefined;
    if (nextWall(cron, missing + gap, missing + gap + 1000) === undefined) return missing;
    wall = missing + 1000;
  }
}

/** What one search goes by. */
interface Rules {
  cron: CronFields;
  zone: string;
  gap: GapPolicy;
  fold: FoldPolicy;
}

function rules(cron: CronFields, zone: string, { gap, fold }: DstPolicy): Rules {
  return {
    cron,
    zone,
    gap: gap ?? (cron.everyHour ? 'skip' : 'shift'),
    fold: fold ?? (cron.everyHour ? 'both' : 'first'),
  };
}

/** Ticks are whole seconds: the first one after. */
const secondAfter = (ms: number) => Math.floor(ms / 1000) * 1000 + 1000;

/** The first occurrence in [from, until). */
function search(applied: Rules, from: number, until: number): Occurrence | undefined {
  const { cron, zone } = applied;
  let skipped: number | undefined;
  for (let at = from; at < until; ) {
    const segment = segmentAt(zone, at);
    if (applied.gap === 'skip' && !cron.everyHour && at === segment.start) {
      skipped = nextWall(cron, at + segment.before, at + segment.offset) ?? skipped;
    }
    const found = nextInSegment(applied, segment, at);
    if (found) {
      if (found.scheduledFor >= until) return undefined;
      if (skipped === undefined) return found;
      return {
        ...found,
        note: `${wallText(skipped)} does not exist in ${zone}, where clocks go forward, and is skipped; this is the next time.`,
      };
    }
    // What lies in years to come is looked for on a clock without zones first: only where it says there may be something
    // are segments worth their making. No zone is further than a day from it, and no gap or fold is longer.
    const ahead = nextWall(cron, segment.end - DAY, until + DAY);
    if (ahead === undefined) return undefined;
    at = Math.max(segment.end, ahead - 2 * DAY);
  }
  return undefined;
}

/** The first wall time to look at for ticks from `at` on: with fold first, not those that were there before. */
function firstWall({ fold }: Rules, { start, offset, before }: Segment, at: number): number {
  return fold === 'first' ? Math.max(at + offset, start + before) : at + offset;
}

function nextInSegment(applied: Rules, segment: Segment, from: number): Occurrence | undefined {
  const { cron, zone, gap } = applied;
  const { start, end, offset, before, after } = segment;
  const wall = nextWall(cron, firstWall(applied, segment, from), end + offset);
  if (gap === 'shift' && from + before < start + offset) {
    const missing = nextWall(cron, from + before, start + offset);
    const shifted = missing === undefined ? Number.POSITIVE_INFINITY : missing - before;
    if (missing !== undefined && (wall === undefined || shifted <= wall - offset)) {
      return {
        scheduledFor: shifted,
        note: `${wallText(missing)} does not exist in ${zone}, where clocks go forward; it runs at ${clockText(shifted + offset)}.`,
      };
    }
  }
  if (wall === undefined) return undefined;
  const scheduledFor = wall - offset;
  if (wall < start + before) {
    return { scheduledFor, note: `${wallText(wall)} happens twice in ${zone}; this is the second time.` };
  }
  if (wall >= end + after) {
    return { scheduledFor, note: `${wallText(wall)} happens twice in ${zone}; this is the first time.` };
  }
  return { scheduledFor };
}

const wallText = (wall: number) => `${new Date(wall).toISOString().slice(0, 10)} ${clockText(wall)}`;
/** Seconds only where there are some. */
const clockText = (wall: number) => new Date(wall).toISOString().slice(11, wall % 60_000 === 0 ? 16 : 19);
