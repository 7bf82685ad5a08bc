const format = new Map<string, Intl.DateTimeFormat>();

/** What a clock of a zone shows at an instant, in ms as UTC would have it, by Intl alone. */
export function shownAt(zone: string, at: number): number {
  const clock =
    format.get(zone) ??
    new Intl.DateTimeFormat('en-CA', {
      timeZone: zone,
      year: 'numeric',
      month: '2-digit',
      day: '2-digit',
      hour: '2-digit',
      minute: '2-digit',
      second: '2-digit',
      hourCycle: 'h23',
    });
  format.set(zone, clock);
  const [y = 0, mo = 0, d = 0, h = 0, m = 0, s = 0] = (clock.format(at).match(/\d+/g) ?? []).map(Number);
  return Date.UTC(y, mo - 1, d, h, m, s);
}

export interface Wall {
  /** A time of a clock without zones, in ms. */
  wall: number;
  /** When it is shown; never, where it is left out. */
  shown: number[];
  /** When it would be, had the clock not been changed since the step before it. */
  unchanged: number;
}

/**
 * Every step that the wall could show from `from` to before `until`, found by looking at the wall at each. A step must divide
 * what clocks are changed by, and when: a minute does always, and a quarter of an hour in this century.
 */
export function wallClock(zone: string, from: number, until: number, step: number): Wall[] {
  const shown = new Map<number, number[]>();
  for (let at = from; at < until; at += step) {
    const wall = shownAt(zone, at);
    const instants = shown.get(wall);
    if (instants) instants.push(at);
    else shown.set(wall, [at]);
  }
  const walls: Wall[] = [];
  let [first, last] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
  for (const wall of shown.keys()) {
    first = Math.min(first, wall);
    last = Math.max(last, wall);
  }
  let unchanged = from;
  for (let wall = first; wall <= last; wall += step) {
    const instants = shown.get(wall) ?? [];
    unchanged = instants.at(-1) ?? unchanged + step;
    walls.push({ wall, shown: instants, unchanged });
  }
  return walls;
}
