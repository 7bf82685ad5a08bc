// Time zones as segments of constant offset, from the zone data that Node carries (Intl), since a search through the wall
// clock is simple where the offset does not change.

/** A stretch of time with one offset: from `start` (inclusive) to `end` (exclusive), in ms of UTC. */
export interface Segment {
  readonly start: number;
  readonly end: number;
  /** Local time minus UTC, in ms. */
  readonly offset: number;
}

const DAY = 86_400_000;
/** Two changes of one zone lie further apart than this (Morocco's Ramadan: about a month). */
const STEP = 7 * DAY;
const MAX_ZONES = 1_000;

interface Zone {
  format: Intl.DateTimeFormat;
  /** By year of UTC, without gaps. */
  years: Map<number, readonly Segment[]>;
}

const zones = new Map<string, Zone>();

/** Whether `name` is the name of an IANA time zone; links such as Asia/Calcutta are. Offsets such as +02:00 are not. */
export function isTimeZone(name: string): boolean {
  if (!/^[A-Za-z][A-Za-z0-9_+/-]{1,63}$/.test(name)) return false;
  try {
    zoneOf(name);
    return true;
  } catch {
    return false;
  }
}

function zoneOf(name: string): Zone {
  const known = zones.get(name);
  if (known) return known;
  const format = new Intl.DateTimeFormat('en-US', {
    timeZone: name,
    hourCycle: 'h23',
    era: 'short',
    year: 'numeric',
    month: 'numeric',
    day: 'numeric',
    hour: 'numeric',
    minute: 'numeric',
    second: 'numeric',
  });
  const zone = { format, years: new Map<number, readonly Segment[]>() };
  if (zones.size >= MAX_ZONES) zones.delete(zones.keys().next().value ?? '');
  zones.set(name, zone);
  return zone;
}

/** Local time minus UTC at an instant, in ms. */
function offsetAt(zone: Zone, at: number): number {
  const part: Record<string, number> = {};
  for (const { type, value } of zone.format.formatToParts(at)) part[type] = Number(value);
  const { year = 0, month = 1, day = 1, hour = 0, minute = 0, second = 0 } = part;
  return Date.UTC(year, month - 1, day, hour, minute, second) - Math.floor(at / 1000) * 1000;
}

function segmentsOf(zone: Zone, year: number): readonly Segment[] {
  const known = zone.years.get(year);
  if (known) return known;
  const segments: Segment[] = [];
  const end = Date.UTC(year + 1, 0, 1);
  let start = Date.UTC(year, 0, 1);
  let offset = offsetAt(zone, start);
  for (let from = start; from < end; ) {
    const to = Math.min(from + STEP, end - 1000);
    const after = offsetAt(zone, to);
    if (after !== offset) {
      let [low, high] = [from / 1000, to / 1000];
      while (high - low > 1) {
        const middle = Math.floor((low + high) / 2);
        if (offsetAt(zone, middle * 1000) === offset) low = middle;
        else high = middle;
      }
      segments.push({ start, end: high * 1000, offset });
      start = high * 1000;
      offset = offsetAt(zone, start);
      from = start;
    } else {
      from = to === end - 1000 ? end : to;
    }
  }
  segments.push({ start, end, offset });
  zone.years.set(year, segments);
  return segments;
}

/** The segment that holds an instant. It is cut at the ends of the year of UTC, where the offset need not change. */
export function segmentAt(name: string, at: number): Segment {
  const segments = segmentsOf(zoneOf(name), new Date(at).getUTCFullYear());
  let found = segments[0];
  for (const segment of segments) if (segment.start <= at) found = segment;
  if (!found) throw new RangeError(`There is no segment of ${name} at ${at}.`);
  return found;
}
