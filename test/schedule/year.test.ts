import { describe, expect, test } from 'vitest';
import { type MisfirePolicy, resolveDue, type Tick } from '../../src/schedule/misfire.ts';
import { type Recurrence, recurrence, type ScheduleSpec, spreadOffsetMs } from '../../src/schedule/recurrence.ts';
import { wallClock } from '../support/wall-clock.ts';

// A year of ten thousand schedules, under two schedulers that go down, are killed in the middle of a transaction, or stall in
// one while the other goes on, and under a clock that is set forward and back. They use what the real one uses, over a store
// that gives what Postgres gives: a row that is locked is skipped by others, a transaction is written whole or not at all, a
// tick is there once. At the end the record is held against the ticks of each schedule as its wall clock has them, found
// without any of that.

const SECOND = 1_000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const START = Date.UTC(2026, 0, 1);
const END = Date.UTC(2027, 0, 1);
const SCHEDULES = 10_000;
const BATCH = 500;
const MAX_CATCH_UP = 100;

/** Mulberry32: the same year every time. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
const random = randomFrom(20_260_101);
const upTo = (most: number) => Math.floor(random() * most);
const oneOf = <T>(...values: T[]): T => values[upTo(values.length)] as T;
const chance = (share: number) => random() < share;
const few = (count: number, below: number) =>
  [...new Set(Array.from({ length: count }, () => upTo(below)))].sort((a, b) => a - b);
const range = (count: number, step = 1) => Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);

const ZONES = [
  ...['UTC', 'America/New_York', 'Europe/Berlin', 'Europe/Rome', 'Asia/Tokyo', 'Asia/Kolkata', 'Asia/Kathmandu'],
  ...['Australia/Lord_Howe', 'Africa/Casablanca', 'Africa/Cairo', 'Antarctica/Troll', 'America/Sao_Paulo'],
  ...['America/Havana', 'America/St_Johns', 'Pacific/Apia', 'Pacific/Chatham', 'America/Scoresbysund', 'Asia/Gaza'],
];
const QUARTER = 15 * MINUTE;
const clocks = new Map(ZONES.map((zone) => [zone, wallClock(zone, START - 4 * DAY, END + 4 * DAY, QUARTER)]));

/** A schedule as it was written, and its ticks the slow way. */
interface Plan {
  recurrence: Recurrence | undefined;
  /** What it was made of. */
  spec?: ScheduleSpec;
  /** The only time of one that comes once. */
  runAt?: number;
  createdAt: number;
  offset: number;
  policy: MisfirePolicy;
  maxLatenessMs: number | null;
  maxTicks: number | undefined;
  /** All ticks after its creation and within its bounds, up to and with `until`. */
  walk(until: number): number[];
}

interface Times {
  seconds: number[];
  minutes: number[];
  hours: number[];
  day: { text: string; matches: (date: Date) => boolean };
}

const everyDay: Times['day'] = { text: '* * *', matches: () => true };
function someDays(): Times['day'] {
  if (chance(0.4)) {
    const days = few(3, 7);
    return { text: `* * ${days.join(',')}`, matches: (date) => days.includes(date.getUTCDay()) };
  }
  const days = few(2, 28).map((day) => day + 1);
  return { text: `${days.join(',')} * *`, matches: (date) => days.includes(date.getUTCDate()) };
}

const list = (values: number[], count: number) => (values.length === count ? '*' : values.join(','));
const expressionOf = ({ seconds, minutes, hours, day }: Times) =>
  `${list(seconds, 60)} ${list(minutes, 60)} ${list(hours, 24)} ${day.text}`;

function walkWalls(times: Times, spec: ScheduleSpec, from: number, until: number): number[] {
  const walls = clocks.get(spec.timezone) ?? [];
  const everyHour = times.hours.length === 24;
  const gap = spec.dstGap ?? (everyHour ? 'skip' : 'shift');
  const fold = spec.dstFold ?? (everyHour ? 'both' : 'first');
  const first = walls[0]?.wall ?? 0;
  const found: number[] = [];
  for (let day = Math.max(START, from) - 2 * DAY; day < Math.min(END, until) + 2 * DAY; day += DAY) {
    const midnight = Math.floor(day / DAY) * DAY;
    if (!times.day.matches(new Date(midnight))) continue;
    for (const hour of times.hours) {
      for (const minute of times.minutes) {
        const wall = midnight + hour * HOUR + minute * MINUTE;
        const { shown, unchanged } = walls[Math.floor((wall - first) / QUARTER)] ?? { shown: [], unchanged: 0 };
        const instants = shown.length === 0 && gap === 'shift' ? [unchanged] : shown;
        for (const at of fold === 'first' ? instants.slice(0, 1) : instants) {
          for (const second of times.seconds) found.push(at + (wall % QUARTER) + second * SECOND);
        }
      }
    }
  }
  found.sort((a, b) => a - b);
  return found.filter((at, i) => at >= from && at < until && at !== found[i - 1]);
}

function newPlan(id: number): Plan {
  const kind = random();
  const createdAt = chance(0.8) ? START : START + upTo(300) * DAY + upTo(DAY);
  const plan = {
    createdAt,
    offset: chance(0.3) ? spreadOffsetMs(`task:${id}`, oneOf(10, 300, 3_600)) : 0,
    policy: oneOf<MisfirePolicy>('skip', 'fire_last', 'fire_all'),
    maxLatenessMs: chance(0.5) ? null : oneOf(0, SECOND, 30 * SECOND, 10 * MINUTE, 15 * MINUTE),
    maxTicks: chance(0.15) ? 1 + upTo(150) : undefined,
  };
  if (kind < 0.15) {
    const runAt = createdAt + upTo(END - createdAt);
    return { ...plan, recurrence: undefined, runAt, walk: (until) => (runAt <= until ? [runAt] : []) };
  }
  const spec: ScheduleSpec = {
    expression: '',
    timezone: oneOf(...ZONES),
    dstGap: oneOf('skip', 'shift', null),
    dstFold: oneOf('first', 'both', null),
    startsAt: chance(0.2) ? START + upTo(200) * DAY + upTo(DAY) : null,
    endsAt: chance(0.2) ? START + (165 + upTo(200)) * DAY + upTo(DAY) : null,
  };
  let walk: (from: number, until: number) => number[];
  if (kind < 0.3) {
    const interval = oneOf(36 * HOUR, 7 * DAY, 20 * HOUR + 1_234 * SECOND, 86_399 * SECOND, 30 * DAY);
    const phase = chance(0.5) ? upTo(interval / SECOND) * SECOND : 0;
    spec.expression = `@every ${interval / SECOND}s/${phase / SECOND}s`;
    walk = (from, until) => {
      const found: number[] = [];
      for (let at = START - interval - (START % interval) + phase; at < until; at += interval)
        if (at >= from) found.push(at);
      return found;
    };
  } else {
    const times = newTimes(kind);
    spec.expression = expressionOf(times);
    if (times.seconds.length * times.minutes.length > 2) {
      // Dense ones live for hours or days, not for a year.
      spec.startsAt = START + upTo(360 * DAY);
      spec.endsAt = spec.startsAt + upTo(times.seconds.length > 1 ? 6 * HOUR : 3 * DAY);
    }
    walk = (from, until) => walkWalls(times, spec, from, until);
  }
  const [from, end] = [Math.max(createdAt + 1, spec.startsAt ?? 0), spec.endsAt ?? Number.POSITIVE_INFINITY];
  return { ...plan, spec, recurrence: recurrence(spec), walk: (until) => walk(from, Math.min(until + 1, end)) };
}

/** Most are of some hours of some days; some are of every hour, and few of every minute or second. */
function newTimes(kind: number): Times {
  const once = { seconds: [0], minutes: [upTo(60)] };
  if (kind < 0.303) return { ...once, hours: range(24), day: chance(0.5) ? everyDay : someDays() };
  if (kind < 0.306)
    return { ...once, seconds: range(60, oneOf(1, 1, 7, 20)), minutes: range(60), hours: range(24), day: everyDay };
  if (kind < 0.31)
    return { ...once, minutes: range(60, oneOf(1, 5)), hours: oneOf(range(24), few(6, 24)), day: everyDay };
  if (kind < 0.4) return { ...once, hours: [oneOf(0, 1, 2, 3, 23, upTo(24))], day: everyDay };
  return { seconds: [oneOf(0, upTo(60))], minutes: few(oneOf(1, 1, 2), 60), hours: [upTo(24)], day: someDays() };
}

/** A row of tasks, with what belongs to it in other tables. */
interface Row {
  plan: Plan;
  nextRunAt: number | null;
  left: number | undefined;
  occurrences: Map<number, Tick['verdict']>;
  unlisted: { from: number; until: number; count: number }[];
  runs: number;
}

type Written = Pick<Row, 'nextRunAt' | 'left'> & { row: Row; now: number; ticks: Tick[]; unlisted: Row['unlisted'] };

/** Rows by the time at which they are due, as an index has them: a heap of times and rows, soonest first. */
function dueIndex() {
  const heap: { at: number; row: Row }[] = [];
  const swap = (a: number, b: number) => {
    const [one, other] = [heap[a], heap[b]];
    if (one && other) [heap[a], heap[b]] = [other, one];
  };
  const at = (i: number) => heap[i]?.at ?? Number.POSITIVE_INFINITY;
  return {
    soonest: () => at(0),
    add(row: Row) {
      if (row.nextRunAt === null) return;
      let i = heap.push({ at: row.nextRunAt, row }) - 1;
      for (let up = (i - 1) >> 1; i > 0 && at(up) > at(i); up = (i - 1) >> 1) {
        swap(i, up);
        i = up;
      }
    },
    take(): Row {
      swap(0, heap.length - 1);
      const { row } = heap.pop() ?? expect.fail('nothing is due');
      for (let i = 0; ; ) {
        const [left, right] = [2 * i + 1, 2 * i + 2];
        const least = at(right) < at(left) ? right : left;
        if (at(least) >= at(i)) break;
        swap(i, least);
        i = least;
      }
      return row;
    },
  };
}

/** What a scheduler would write of a due row, by the clock of its transaction. */
function decide(row: Row, now: number): Written {
  const { plan, nextRunAt, left } = row;
  const { recurrence: ticking, offset, policy, maxLatenessMs } = plan;
  const due = resolveDue({
    nextAfter: (ms) => ticking?.next(ms)?.scheduledFor,
    countBetween: (from, until) => ticking?.count(from, until) ?? 0,
    dueAt: (nextRunAt ?? now) - offset,
    now: now - offset,
    policy,
    maxLatenessMs,
    maxCatchUp: MAX_CATCH_UP,
    maxTicks: left,
  });
  const ran = due.ticks.filter(({ verdict }) => verdict === 'fired' || verdict === 'late').length;
  return {
    row,
    now: now - offset,
    ticks: due.ticks,
    unlisted: due.unlisted ? [due.unlisted] : [],
    nextRunAt: due.next === undefined ? null : due.next + offset,
    left: left === undefined ? undefined : left - ran,
  };
}

describe('a year', () => {
  test('of ten thousand schedules, through kills, stalls, downtime and clocks set back: each tick once', () => {
    const tally: Record<string, number> = {};
    const count = (what: string, by = 1) => {
      tally[what] = (tally[what] ?? 0) + by;
    };
    const index = dueIndex();
    const rows = Array.from({ length: SCHEDULES }, (_, i): Row => {
      const plan = newPlan(i + 1);
      const first = plan.runAt ?? plan.recurrence?.next(plan.createdAt)?.scheduledFor;
      const nextRunAt = first === undefined ? null : first + plan.offset;
      return { plan, nextRunAt, left: plan.maxTicks, occurrences: new Map(), unlisted: [], runs: 0 };
    });
    for (const row of rows) index.add(row);

    /** Locks a batch of due rows and decides; nothing is written yet. A locked row is not in the index, so others skip it. */
    const begin = (now: number): Written[] => {
      const batch: Row[] = [];
      while (batch.length < BATCH && index.soonest() <= now) batch.push(index.take());
      return batch.map((row) => decide(row, now));
    };
    const rollback = (written: Written[]) => {
      for (const { row } of written) index.add(row);
    };
    const commit = (written: Written[]) => {
      for (const { row, now, ticks, unlisted, nextRunAt, left } of written) {
        for (const { scheduledFor, verdict } of ticks) {
          if (row.occurrences.has(scheduledFor)) count('repeated');
          row.occurrences.set(scheduledFor, verdict);
          count(verdict);
          if (verdict === 'fired' || verdict === 'late') row.runs += 1;
          expectVerdict(row.plan, now - scheduledFor, verdict);
        }
        for (const stretch of unlisted) count('unlisted', stretch.count);
        row.unlisted.push(...unlisted);
        row.nextRunAt = nextRunAt;
        row.left = left;
      }
      rollback(written);
    };

    const stalled: (Written[] | undefined)[] = [undefined, undefined];
    /** One scheduler's turn: it works until nothing is due that it can have, unless something befalls it. */
    const turn = (which: number, now: number, mishaps: boolean) => {
      const waiting = stalled[which];
      if (waiting) {
        if (mishaps && chance(0.6)) return;
        stalled[which] = undefined;
        if (mishaps && chance(0.3)) rollback(waiting);
        else commit(waiting);
      }
      while (index.soonest() <= now) {
        const written = begin(now);
        if (mishaps && chance(0.1)) {
          count('stalled');
          stalled[which] = written;
          return;
        }
        if (mishaps && chance(0.1)) {
          count('killed');
          rollback(written);
          return;
        }
        commit(written);
      }
    };

    let now = START;
    while (now < END) {
      // Mostly it wakes when something is due, or a little after.
      for (let wakes = upTo(30); wakes > 0 && index.soonest() < END; wakes--) {
        now = Math.max(now, index.soonest() + (chance(0.9) ? upTo(SECOND) : upTo(MINUTE)));
        for (const which of chance(0.5) ? [0, 1] : [1, 0]) turn(which, now, true);
      }
      const mishap = random();
      if (mishap < 0.02) {
        count('down');
        now += HOUR + upTo(5 * DAY);
      } else if (mishap < 0.05) {
        count('back');
        now -= upTo(3 * HOUR);
      } else {
        now += upTo(2 * HOUR);
      }
    }
    for (const which of [0, 1]) turn(which, END, false);

    for (const row of rows) expectRecord(row);
    for (const what of [
      'killed',
      'stalled',
      'down',
      'back',
      'unlisted',
      'fired',
      'late',
      'coalesced',
      'skipped_misfire',
    ]) {
      expect(tally[what], what).toBeGreaterThan(20);
    }
    expect(tally['repeated']).toBeUndefined();
  }, 600_000);
});

/** That a tick ran if it was in time, and was only fired when it was on time. */
function expectVerdict({ maxLatenessMs, policy }: Plan, late: number, verdict: Tick['verdict']): void {
  // Millions of these: expect would take most of the time.
  const inTime = maxLatenessMs ?? 5 * SECOND;
  const asItMust = {
    fired: late <= Math.min(5 * SECOND, inTime),
    late: true,
    coalesced: late > inTime && policy === 'fire_last',
    skipped_misfire: late > inTime && policy !== 'fire_last',
  };
  if (late < 0 || !asItMust[verdict]) expect.fail(`${verdict}, ${late} ms late, with ${policy} and ${maxLatenessMs}`);
}

/** That every tick a schedule owes is in its record exactly once, by itself or in a stretch, and nothing else is. */
function expectRecord({ plan, occurrences, unlisted, nextRunAt, runs, left }: Row): void {
  const what = JSON.stringify(plan);
  const last = plan.maxTicks === runs ? ([...occurrences.keys()].at(-1) ?? 0) : END - plan.offset;
  const owed = plan.walk(last);
  const inStretches = unlisted.map(() => 0);
  let listed = 0;
  for (const tick of owed) {
    const holders = unlisted.flatMap(({ from, until }, i) => (tick >= from && tick < until ? [i] : []));
    for (const i of holders) inStretches[i] = (inStretches[i] ?? 0) + 1;
    const alone = occurrences.has(tick) ? 1 : 0;
    listed += alone;
    if (alone + holders.length !== 1) expect.fail(`${alone} and ${holders.length} of ${tick}: ${what}`);
  }
  expect(listed, what).toBe(occurrences.size);
  expect(inStretches, what).toEqual(unlisted.map(({ count }) => count));
  if (plan.maxTicks !== undefined) expect(left, what).toBe(plan.maxTicks - runs);
  if (plan.maxTicks === runs) expect(nextRunAt, what).toBeNull();
  else expect(nextRunAt ?? END + 1, what).toBeGreaterThan(END);
}
