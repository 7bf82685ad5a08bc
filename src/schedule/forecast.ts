// What a set of schedules will ask of the agents: how many runs at once, minute by minute; which start together; and by how
// much some would have to start later so that neither more run than can nor two start in the same minute.
//
// Time is cut into seconds, and a run takes every second that it touches; a minute has the most that any of its seconds has.
// The shifts are found as one colours a map by hand: the tasks are put down one by one, those with the least room to move
// first, each at the smallest number of whole minutes where it fits among those before it. That is not the least of all
// possible changes, which would be a search without end, but each shift by itself is the smallest that does.
//
// Everything here may be long, so it is a generator that yields between pieces of work of a millisecond or so, for whoever
// calls to let others run. And it is bounded: after so many steps the tasks that are left stay where they are.

const SECOND = 1_000;
const MINUTE = 60_000;
/** A task is not shifted further, nor as far as its next start. */
const MAX_SHIFT_MINUTES = 12 * 60;
/** How many steps lie between two yields, and how many the search for shifts may take. */
const SLICE = 50_000;
const MAX_STEPS = 50_000_000;

/** A task as it is planned. Times in ms of UTC. */
export interface Planned {
  id: number;
  /** When its runs start, in rising order; those before the window may still run in it. */
  starts: readonly number[];
  /** How long each takes; more than 0. */
  durationMs: number;
  /** Its runs never overlap each other, whatever their length: they count once. */
  alone: boolean;
}

export interface Shift {
  id: number;
  shiftSeconds: number;
  /** The most that run at once when this and the shifts before it in the list are made. */
  peakAfter: number;
}

interface Totals {
  peak: number;
  /** In how many minutes more run than can. */
  minutesOver: number;
  /** In how many minutes two tasks or more start. */
  collisions: number;
}

export interface Forecast {
  /** The minutes in which something starts or runs. */
  minutes: { at: number; starts: number; running: number }[];
  /** Minutes in which two tasks or more start, and which. */
  collisions: { at: number; ids: number[] }[];
  before: Totals;
  /** Smallest first. */
  shifts: Shift[];
  /** With all of these made. */
  after: Totals;
  /** Tasks for which there is no place that fits. */
  stuck: number[];
  /** False when the search ended before every task was looked at. */
  complete: boolean;
}

/** A stretch of seconds [from, until), counted from the start of the grid, in which a task has `runs` at once. */
interface Stretch {
  from: number;
  until: number;
  runs: number;
}

interface Placed {
  task: Planned;
  stretches: Stretch[];
  /** In ms from the start of the grid. */
  starts: number[];
  /** How far it may go, in minutes. */
  room: number;
}

/** How many run in each second, and how many seconds have how many. */
interface Load {
  seconds: Int32Array;
  levels: number[];
}

/**
 * The forecast for `from` (inclusive) to `until` (exclusive), in ms of UTC; `capacity` is how many can run at once, undefined
 * when nobody knows.
 */
export function* forecast(
  planned: readonly Planned[],
  { from, until, capacity }: { from: number; until: number; capacity: number | undefined },
): Generator<void, Forecast, void> {
  const origin = Math.floor(from / MINUTE) * MINUTE;
  const minutes = Math.ceil((until - origin) / MINUTE);
  const window = { first: from - origin, last: until - origin, minutes };
  const tasks: Placed[] = [];
  for (const task of planned) {
    tasks.push(place(task, origin));
    yield;
  }
  const load = yield* loadOf(tasks, minutes);
  const starts = yield* startsOf(tasks, new Map(), window);
  const running = yield* peaks(load, minutes);
  const before = totals(load, running, starts, capacity);

  const search = yield* findShifts(tasks, window, capacity);
  const byId = new Map(tasks.map((task) => [task.task.id, task]));
  const shifts: Shift[] = [];
  for (const [id, shift] of [...search.shifts].sort(([a, x], [b, y]) => x - y || a - b)) {
    const stretches = byId.get(id)?.stretches ?? [];
    yield* add(load, stretches, 0, -1);
    yield* add(load, stretches, shift * 60, 1);
    shifts.push({ id, shiftSeconds: shift * 60, peakAfter: peakOf(load) });
  }
  const after = totals(load, yield* peaks(load, minutes), yield* startsOf(tasks, search.shifts, window), capacity);

  const at = (minute: number) => origin + minute * MINUTE;
  return {
    minutes: Array.from(running, (running, minute) => ({
      at: at(minute),
      starts: starts.counts[minute] ?? 0,
      running,
    })).filter(({ starts, running }) => starts > 0 || running > 0),
    collisions: [...starts.ids].filter(([, ids]) => ids.length > 1).map(([minute, ids]) => ({ at: at(minute), ids })),
    before,
    shifts,
    after,
    stuck: search.stuck,
    complete: search.complete,
  };
}

interface Window {
  /** In ms from the start of the grid: what starts from here on and before there starts in the window. */
  first: number;
  last: number;
  minutes: number;
}

function place(task: Planned, origin: number): Placed {
  const starts = task.starts.map((start) => start - origin);
  let gap = Number.POSITIVE_INFINITY;
  for (let i = 1; i < starts.length; i++) gap = Math.min(gap, (starts[i] ?? 0) - (starts[i - 1] ?? 0));
  const spans = starts.map((start) => ({
    from: Math.floor(start / SECOND),
    until: Math.ceil((start + task.durationMs) / SECOND),
  }));
  return {
    task,
    starts,
    stretches: stretchesOf(spans, task.alone),
    room: Math.min(MAX_SHIFT_MINUTES, Math.ceil(gap / MINUTE) - 1),
  };
}

/** Spans that begin and end in rising order, as stretches that do not overlap. */
function stretchesOf(spans: readonly { from: number; until: number }[], alone: boolean): Stretch[] {
  const found: Stretch[] = [];
  let [runs, ended, last] = [0, 0, Number.NEGATIVE_INFINITY];
  const upTo = (second: number) => {
    const counted = alone ? Math.min(runs, 1) : runs;
    const before = found.at(-1);
    if (counted > 0 && second > last) {
      if (before?.until === last && before.runs === counted) before.until = second;
      else found.push({ from: last, until: second, runs: counted });
    }
    last = second;
  };
  const endUpTo = (second: number) => {
    for (let span = spans[ended]; span && span.until <= second; span = spans[++ended]) {
      upTo(span.until);
      runs -= 1;
    }
  };
  for (const { from } of spans) {
    endUpTo(from);
    upTo(from);
    runs += 1;
  }
  endUpTo(Number.POSITIVE_INFINITY);
  return found;
}

/** The load of tasks where they are. */
function* loadOf(tasks: readonly Placed[], minutes: number): Generator<void, Load, void> {
  // First by how much it changes at each second, so that long runs cost no more than short ones.
  const seconds = new Int32Array(minutes * 60);
  let steps = 0;
  for (const { stretches } of tasks) {
    for (const { from, until, runs } of stretches) {
      if (++steps % SLICE === 0) yield;
      const [start, end] = [Math.max(0, from), Math.max(0, until)];
      if (start < seconds.length) seconds[start] = (seconds[start] ?? 0) + runs;
      if (end < seconds.length) seconds[end] = (seconds[end] ?? 0) - runs;
    }
  }
  const levels: number[] = [];
  for (let i = 0; i < seconds.length; i++) {
    const level = (seconds[i] ?? 0) + (seconds[i - 1] ?? 0);
    seconds[i] = level;
    levels[level] = (levels[level] ?? 0) + 1;
    if ((i + 1) % SLICE === 0) yield;
  }
  return { seconds, levels };
}

/** Adds the runs of a task to the load, or takes them away. */
function* add(
  { seconds, levels }: Load,
  stretches: readonly Stretch[],
  shift: number,
  sign: 1 | -1,
): Generator<void, void, void> {
  let steps = 0;
  for (const { from, until, runs } of stretches) {
    const end = Math.min(seconds.length, until + shift);
    for (let i = Math.max(0, from + shift); i < end; i++) {
      const now = seconds[i] ?? 0;
      const next = now + sign * runs;
      levels[now] = (levels[now] ?? 0) - 1;
      levels[next] = (levels[next] ?? 0) + 1;
      seconds[i] = next;
      if (++steps % SLICE === 0) yield;
    }
  }
}

/** The most that run at once in any second. */
function peakOf({ levels }: Load): number {
  for (let level = levels.length - 1; level > 0; level--) if (levels[level]) return level;
  return 0;
}

/** The most that run at once in each minute. */
function* peaks({ seconds }: Load, minutes: number): Generator<void, Int32Array, void> {
  const peaks = new Int32Array(minutes);
  for (let i = 0; i < seconds.length; i++) {
    const minute = Math.floor(i / 60);
    peaks[minute] = Math.max(peaks[minute] ?? 0, seconds[i] ?? 0);
    if ((i + 1) % SLICE === 0) yield;
  }
  return peaks;
}

/** How many runs start in each minute of the window, and of which tasks, with shifts in minutes. */
function* startsOf(
  tasks: readonly Placed[],
  shifts: ReadonlyMap<number, number>,
  window: Window,
): Generator<void, { counts: Int32Array; ids: Map<number, number[]> }, void> {
  const counts = new Int32Array(window.minutes);
  const ids = new Map<number, number[]>();
  let steps = 0;
  for (const { task, starts } of tasks) {
    const shift = (shifts.get(task.id) ?? 0) * MINUTE;
    for (const start of starts) {
      if (++steps % SLICE === 0) yield;
      const at = start + shift;
      if (at < window.first || at >= window.last) continue;
      const minute = Math.floor(at / MINUTE);
      counts[minute] = (counts[minute] ?? 0) + 1;
      const here = ids.get(minute);
      if (!here) ids.set(minute, [task.id]);
      else if (here.at(-1) !== task.id) here.push(task.id);
    }
  }
  return { counts, ids: new Map([...ids].sort(([a], [b]) => a - b)) };
}

function totals(
  load: Load,
  running: Int32Array,
  { ids }: { ids: ReadonlyMap<number, readonly number[]> },
  capacity: number | undefined,
): Totals {
  return {
    peak: peakOf(load),
    minutesOver: capacity === undefined ? 0 : running.filter((most) => most > capacity).length,
    collisions: [...ids.values()].filter((tasks) => tasks.length > 1).length,
  };
}

/** Puts the tasks down one by one; answers by how many minutes each has to move that has to. */
function* findShifts(
  tasks: readonly Placed[],
  window: Window,
  capacity: number | undefined,
): Generator<void, { shifts: Map<number, number>; stuck: number[]; complete: boolean }, void> {
  const { minutes } = window;
  const seconds = new Int32Array(minutes * 60);
  /** The most that run in a second of each minute, and whether a task starts in it. */
  const most = new Int32Array(minutes);
  const taken = new Uint8Array(minutes);
  const shifts = new Map<number, number>();
  const stuck: number[] = [];
  let steps = 0;

  const startsFree = ({ starts }: Placed, shift: number): boolean => {
    for (const start of starts) {
      steps += 1;
      const at = start + shift * MINUTE;
      if (at >= window.first && at < window.last && taken[Math.floor(at / MINUTE)]) return false;
    }
    return true;
  };
  const fits = ({ stretches }: Placed, shift: number): boolean => {
    if (capacity === undefined) return true;
    for (const { from, until, runs } of stretches) {
      const end = Math.min(seconds.length, until + shift * 60);
      for (let i = Math.max(0, from + shift * 60); i < end; ) {
        steps += 1;
        const minute = Math.floor(i / 60);
        // A minute that has room enough in its fullest second need not be looked at second by second.
        if ((most[minute] ?? 0) + runs <= capacity) i = (minute + 1) * 60;
        else if ((seconds[i] ?? 0) + runs > capacity) return false;
        else i += 1;
      }
    }
    return true;
  };
  const order = tasks.toSorted(
    (a, b) => a.room - b.room || b.task.durationMs - a.task.durationMs || a.task.id - b.task.id,
  );
  for (const task of order) {
    if (steps >= MAX_STEPS) break;
    let shift: number | undefined;
    let within: number | undefined;
    for (let minute = 0; minute <= task.room && shift === undefined && steps < MAX_STEPS; minute++) {
      const before = steps;
      // Once a place within the capacity is known, only one that is also free of others is better.
      if (startsFree(task, minute)) {
        if (fits(task, minute)) shift = minute;
      } else if (within === undefined && fits(task, minute)) within = minute;
      if (Math.floor(before / SLICE) !== Math.floor(steps / SLICE)) yield;
    }
    // Where no place is free, staying within the capacity is what counts; where none is even that, it stays.
    if (shift === undefined && steps < MAX_STEPS) stuck.push(task.task.id);
    const chosen = shift ?? within ?? 0;
    if (chosen > 0) shifts.set(task.task.id, chosen);
    for (const { from, until, runs } of task.stretches) {
      const end = Math.min(seconds.length, until + chosen * 60);
      for (let i = Math.max(0, from + chosen * 60); i < end; i++) {
        const minute = Math.floor(i / 60);
        const level = (seconds[i] ?? 0) + runs;
        seconds[i] = level;
        if (level > (most[minute] ?? 0)) most[minute] = level;
        if (++steps % SLICE === 0) yield;
      }
    }
    for (const start of task.starts) {
      const at = start + chosen * MINUTE;
      if (at >= window.first && at < window.last) taken[Math.floor(at / MINUTE)] = 1;
    }
    yield;
  }
  return { shifts, stuck: stuck.sort((a, b) => a - b), complete: steps < MAX_STEPS };
}
