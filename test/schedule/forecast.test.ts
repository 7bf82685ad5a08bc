import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { type Forecast, forecast, type Planned } from '../../src/schedule/forecast.ts';

const MINUTE = 60_000;
const FROM = Date.UTC(2027, 0, 4, 9);

interface Window {
  from: number;
  until: number;
  capacity: number | undefined;
}

function run(tasks: readonly Planned[], window: Window): Forecast {
  const steps = forecast(tasks, window);
  for (let step = steps.next(); ; step = steps.next()) if (step.done) return step.value;
}

/** The same, slow and obvious: every second of every minute, every run of every task. */
function model(
  tasks: readonly Planned[],
  { from, until, capacity }: Window,
  shifts: ReadonlyMap<number, number> = new Map(),
) {
  const minutes: Forecast['minutes'] = [];
  const collisions: Forecast['collisions'] = [];
  for (let at = Math.floor(from / MINUTE) * MINUTE; at < until; at += MINUTE) {
    let running = 0;
    for (let second = at; second < at + MINUTE; second += 1_000) {
      let here = 0;
      for (const { id, starts, durationMs, alone } of tasks) {
        const own = starts
          .map((start) => start + (shifts.get(id) ?? 0) * MINUTE)
          .filter((start) => Math.floor(start / 1_000) * 1_000 <= second && start + durationMs > second).length;
        here += alone ? Math.min(own, 1) : own;
      }
      running = Math.max(running, here);
    }
    const started = tasks.map(({ id, starts }) => ({
      id,
      n: starts
        .map((start) => start + (shifts.get(id) ?? 0) * MINUTE)
        .filter((start) => start >= Math.max(at, from) && start < Math.min(at + MINUTE, until)).length,
    }));
    const total = started.reduce((sum, { n }) => sum + n, 0);
    const ids = started.filter(({ n }) => n > 0).map(({ id }) => id);
    if (total > 0 || running > 0) minutes.push({ at, starts: total, running });
    if (ids.length > 1) collisions.push({ at, ids });
  }
  return {
    minutes,
    collisions,
    totals: {
      peak: Math.max(0, ...minutes.map(({ running }) => running)),
      minutesOver: capacity === undefined ? 0 : minutes.filter(({ running }) => running > capacity).length,
      collisions: collisions.length,
    },
  };
}

const smallestGap = ({ starts }: Planned) =>
  Math.min(Number.POSITIVE_INFINITY, ...starts.slice(1).map((start, i) => start - (starts[i] ?? 0)));
const roomOf = (task: Planned) => Math.min(720, Math.ceil(smallestGap(task) / MINUTE) - 1);

/** Puts tasks down one by one as the page of prose says, by asking the model about every place. */
function modelShifts(tasks: readonly Planned[], window: Window) {
  const order = tasks.toSorted((a, b) => roomOf(a) - roomOf(b) || b.durationMs - a.durationMs || a.id - b.id);
  const placed: Planned[] = [];
  const shifts = new Map<number, number>();
  const stuck: number[] = [];
  for (const task of order) {
    const at = (shift: number): Planned => ({ ...task, starts: task.starts.map((start) => start + shift * MINUTE) });
    const free: number[] = [];
    const within: number[] = [];
    for (let shift = 0; shift <= roomOf(task); shift++) {
      const { collisions } = model([...placed, at(shift)], window);
      const over = worse(placed, at(shift), window);
      const collides = collisions.some(({ ids }) => ids.includes(task.id));
      if (!over) within.push(shift);
      if (!over && !collides) free.push(shift);
      if (free.length > 0) break;
    }
    const chosen = free[0] ?? within[0] ?? 0;
    if (free.length === 0) stuck.push(task.id);
    if (chosen > 0) shifts.set(task.id, chosen);
    placed.push(at(chosen));
  }
  return { shifts, stuck: stuck.sort((a, b) => a - b) };
}

/** Whether a second that the task takes is over the capacity. */
function worse(placed: readonly Planned[], task: Planned, { from, until, capacity }: Window): boolean {
  if (capacity === undefined) return false;
  const start = Math.floor(from / MINUTE) * MINUTE;
  const end = Math.ceil(until / MINUTE) * MINUTE;
  for (let second = start; second < end; second += 1_000) {
    const at = (one: Planned) => {
      const own = one.starts.filter(
        (begin) => Math.floor(begin / 1_000) * 1_000 <= second && begin + one.durationMs > second,
      ).length;
      return one.alone ? Math.min(own, 1) : own;
    };
    const own = at(task);
    if (own > 0 && own + placed.reduce((sum, one) => sum + at(one), 0) > capacity) return true;
  }
  return false;
}

const windows = fc
  .record({
    offset: fc.integer({ min: 0, max: 90_000 }),
    length: fc.integer({ min: 1, max: 8 * MINUTE }),
    capacity: fc.option(fc.integer({ min: 0, max: 4 }), { nil: undefined }),
  })
  .map(({ offset, length, capacity }): Window => ({ from: FROM + offset, until: FROM + offset + length, capacity }));
const planned = fc
  .array(
    fc.record({
      first: fc.integer({ min: -2 * MINUTE, max: 6 * MINUTE }),
      gaps: fc.array(fc.oneof(fc.constantFrom(MINUTE, 2 * MINUTE, 30_000), fc.integer({ min: 1, max: 3 * MINUTE })), {
        maxLength: 4,
      }),
      whole: fc.boolean(),
      durationMs: fc.oneof(fc.constantFrom(1, 1_000, 60_000), fc.integer({ min: 1, max: 150_000 })),
      alone: fc.boolean(),
    }),
    { maxLength: 5 },
  )
  .map((tasks) =>
    tasks.map(({ first, gaps, whole, durationMs, alone }, i): Planned => {
      const step = whole ? MINUTE : 1;
      const starts = [FROM + Math.floor(first / step) * step];
      for (const gap of gaps) starts.push((starts.at(-1) ?? 0) + Math.max(step, Math.floor(gap / step) * step));
      return { id: i + 1, starts, durationMs, alone };
    }),
  );

describe('the forecast', () => {
  test('is what every second of every run says, and so it is with the shifts made', () => {
    fc.assert(
      fc.property(planned, windows, (tasks, window) => {
        const found = run(tasks, window);
        const now = model(tasks, window);
        expect(found.minutes).toEqual(now.minutes);
        expect(found.collisions).toEqual(now.collisions);
        expect(found.before).toEqual(now.totals);
        const made = new Map<number, number>();
        for (const { id, shiftSeconds, peakAfter } of found.shifts) {
          made.set(id, shiftSeconds / 60);
          expect(peakAfter).toBe(model(tasks, window, made).totals.peak);
        }
        expect(found.after).toEqual(model(tasks, window, made).totals);
        expect(found.shifts.map(({ shiftSeconds }) => shiftSeconds)).toEqual(
          found.shifts.map(({ shiftSeconds }) => shiftSeconds).toSorted((a, b) => a - b),
        );
        // Where every task has its place, nothing is over and nothing starts together.
        if (found.stuck.length === 0) expect(found.after).toMatchObject({ minutesOver: 0, collisions: 0 });
      }),
      { numRuns: 150 },
    );
  }, 300_000);

  test('shifts each task by the smallest number of minutes at which it fits among those before it', () => {
    fc.assert(
      fc.property(planned, windows, (tasks, window) => {
        const { shifts, stuck } = run(tasks, window);
        const expected = modelShifts(tasks, window);
        expect(new Map(shifts.map(({ id, shiftSeconds }) => [id, shiftSeconds / 60]))).toEqual(expected.shifts);
        expect(stuck).toEqual(expected.stuck);
      }),
      { numRuns: 40 },
    );
  }, 300_000);

  test('of a herd at midnight spreads it over the minutes after', () => {
    const midnight = Date.UTC(2027, 0, 5);
    const herd = [1, 2, 3, 4].map((id) => ({ id, starts: [midnight], durationMs: 90_000, alone: true }));
    const found = run(herd, { from: FROM, until: FROM + 24 * 60 * MINUTE, capacity: 2 });
    expect(found.before).toEqual({ peak: 4, minutesOver: 2, collisions: 1 });
    expect(found.minutes).toEqual([
      { at: midnight, starts: 4, running: 4 },
      { at: midnight + MINUTE, starts: 0, running: 4 },
    ]);
    expect(found.shifts).toEqual([
      { id: 2, shiftSeconds: 60, peakAfter: 4 },
      { id: 3, shiftSeconds: 120, peakAfter: 3 },
      { id: 4, shiftSeconds: 180, peakAfter: 2 },
    ]);
    expect(found.after).toEqual({ peak: 2, minutesOver: 0, collisions: 0 });
  });

  test('of what nothing can help says so', () => {
    const always = [1, 2].map((id) => ({
      id,
      starts: Array.from({ length: 60 }, (_, i) => FROM + i * MINUTE),
      durationMs: 10_000,
      alone: true,
    }));
    const found = run(always, { from: FROM, until: FROM + 60 * MINUTE, capacity: 1 });
    expect(found).toMatchObject({ shifts: [], stuck: [2], complete: true, after: { minutesOver: 60, collisions: 60 } });
  });

  test('holds nobody up: the work comes in pieces, and ends', () => {
    const until = FROM + 7 * 1_440 * MINUTE;
    const busy = Array.from({ length: 400 }, (_, i) => ({
      id: i + 1,
      starts: Array.from({ length: 168 }, (_, hour) => FROM + hour * 60 * MINUTE),
      durationMs: 3_600_000,
      alone: true,
    }));
    let pieces = 0;
    const steps = forecast(busy, { from: FROM, until, capacity: 10 });
    let step = steps.next();
    for (; !step.done; step = steps.next()) pieces += 1;
    expect(pieces).toBeGreaterThan(1_000);
    expect(step.value.before.peak).toBe(400);
    expect(step.value.complete).toBe(false);
  });
});
