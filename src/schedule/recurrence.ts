import { type CronFields, parseCron } from './cron.ts';
import { countEvery, type Every, firstEvery, parseEvery } from './every.ts';
import {
  countOccurrences,
  type DstPolicy,
  type FoldPolicy,
  type GapPolicy,
  nextLeftOut,
  nextOccurrence,
  type Occurrence,
  occurrencesBetween,
} from './occurrences.ts';

// What a task's schedule comes to: a cron expression on the clock of a zone, or an interval of elapsed time, between two
// bounds. Whoever asks for ticks asks here, so that the preview, the calendar and the scheduler cannot disagree.

/** What decides when a task ticks. Times in ms of UTC. */
export interface ScheduleSpec {
  /** A cron expression, or `@every <interval>[/<phase>]`. */
  expression: string;
  /** An IANA time zone; an interval does without. */
  timezone: string;
  dstGap?: GapPolicy | null;
  dstFold?: FoldPolicy | null;
  /** The first instant at which it may tick. */
  startsAt?: number | null;
  /** The first instant at which it no longer ticks. */
  endsAt?: number | null;
}

export interface Recurrence {
  /** The first tick strictly after an instant; undefined when there is none. */
  next(afterMs: number): Occurrence | undefined;
  /** The ticks from `fromMs` (inclusive) to `untilMs` (exclusive), one at a time. */
  between(fromMs: number, untilMs: number): Generator<Occurrence, void, undefined>;
  /** How many ticks lie from `fromMs` (inclusive) to `untilMs` (exclusive); computed, not walked through. */
  count(fromMs: number, untilMs: number): number;
  /**
   * The first tick strictly after an instant that clocks going forward leave out, where `dstGap` is `skip` in so many
   * words; its `scheduledFor` is when `shift` would run it, and its note says what became of it. Undefined when there is
   * none within two years; one that would run together with another tick is not left out.
   */
  nextGap(afterMs: number): Occurrence | undefined;
}

/** A tick that is at most this late, in ms, is on time: what a loop, a restart of a connection or a take-over costs. */
export const ON_TIME_MS = 5_000;
const MAX_DEFAULT_LATENESS_MS = 3_600_000;

/** What a schedule means. Throws CronError for a bad expression; what it answers with throws RangeError for what is no time zone. */
export function recurrence(spec: ScheduleSpec): Recurrence {
  const timing = parseExpression(spec.expression);
  const startsAt = spec.startsAt ?? Number.NEGATIVE_INFINITY;
  const endsAt = spec.endsAt ?? Number.POSITIVE_INFINITY;
  const ticks = 'interval' in timing ? everyTicks(timing) : cronTicks(timing, spec);
  /** An answer for after `afterMs`, if it lies within the bounds. */
  const within = (afterMs: number, find: (afterMs: number) => Occurrence | undefined) => {
    const after = Math.max(afterMs, startsAt - 1);
    // Nothing is searched for where nothing may be.
    const found = after < endsAt ? find(after) : undefined;
    return found && found.scheduledFor < endsAt ? found : undefined;
  };
  return {
    next: (afterMs) => within(afterMs, ticks.next),
    between: (fromMs, untilMs) => ticks.between(Math.max(fromMs, startsAt), Math.min(untilMs, endsAt)),
    count: (fromMs, untilMs) => ticks.count(Math.max(fromMs, startsAt), Math.min(untilMs, endsAt)),
    nextGap: (afterMs) => within(afterMs, ticks.nextGap),
  };
}

/** Reads a cron expression, or `@every <interval>[/<phase>]`. Throws CronError, which says what to write instead. */
export function parseExpression(expression: string): CronFields | Every {
  return parseEvery(expression) ?? parseCron(expression);
}

function cronTicks(cron: CronFields, { timezone, dstGap, dstFold }: ScheduleSpec): Recurrence {
  const policy: DstPolicy = { gap: dstGap ?? undefined, fold: dstFold ?? undefined };
  return {
    next: (afterMs) => nextOccurrence(cron, timezone, afterMs, policy),
    between: (fromMs, untilMs) => occurrencesBetween(cron, timezone, fromMs, untilMs, policy),
    count: (fromMs, untilMs) => countOccurrences(cron, timezone, fromMs, untilMs, policy),
    nextGap: (afterMs) => (dstGap === 'skip' ? nextLeftOut(cron, timezone, afterMs) : undefined),
  };
}

function everyTicks(every: Every): Recurrence {
  const from = (ms: number): Occurrence | undefined => {
    const scheduledFor = firstEvery(every, ms);
    return scheduledFor === undefined ? undefined : { scheduledFor };
  };
  return {
    next: (afterMs) => from(Math.floor(afterMs) + 1),
    *between(fromMs, untilMs) {
      for (let tick = from(fromMs); tick && tick.scheduledFor < untilMs; tick = from(tick.scheduledFor + 1)) yield tick;
    },
    count: (fromMs, untilMs) => countEvery(every, fromMs, untilMs),
    nextGap: () => undefined,
  };
}

/**
 * How far behind its time a task runs whose ticks are spread over `spreadSeconds`, in whole ms from 0 to before the
 * spread's end: always the same for a `key`, and even over keys, consecutive ones too.
 *
 * The hash is FNV-1a of 32 bits, whose weak spot, keys that differ in their last character only, the finalizer of
 * MurmurHash3 mends. Nobody gains by guessing a place, so it need not be one of node:crypto, which would be the one thing
 * in here that is not arithmetic; and 2³² places are 50 for each ms of a day.
 */
export function spreadOffsetMs(key: string, spreadSeconds: number): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < key.length; i++) hash = Math.imul(hash ^ key.charCodeAt(i), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return Math.floor((((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32) * spreadSeconds * 1000);
}

/**
 * How late a tick may run unless its task says otherwise, in ms: the smaller of half the time to the tick after it and one
 * hour, but always what is on time. The last tick of all has nothing after it, and has the hour.
 */
export function defaultMaxLatenessMs(periodMs: number | undefined): number {
  if (periodMs === undefined) return MAX_DEFAULT_LATENESS_MS;
  return Math.max(ON_TIME_MS, Math.min(Math.floor(periodMs / 2), MAX_DEFAULT_LATENESS_MS));
}
