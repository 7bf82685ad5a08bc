// Time zones as segments of constant offset, from the zone data that Node carries (Intl), since a search through the wall
// clock is simple where the offset does not change. Intl answers only "what does the clock show at this instant", at 3 µs
// a question, so the changes are looked for once and kept: steps of a week through a stretch of time, and a bisection to
// the second where the offset differs. That is about a hundred questions a year of a zone.
//
// Stretches are kept for themselves, so that a question about the year 9000 does not pay for those before it. Each reaches
// a margin over its neighbours: no gap or fold is longer than a day, so the end of a stretch never cuts what a change
// within it does.

/** A stretch of time with one offset: from `start` (inclusive) to `end` (exclusive), in ms of UTC. */
export interface Segment {
  readonly start: number;
  readonly end: number;
  /** Local time minus UTC, in ms. */
  readonly offset: number;
  /** The offset just before `start`, and the one at `end`; the same as `offset` where a stretch is merely cut. */
  readonly before: number;
  readonly after: number;
}

const DAY = 86_400_000;
/** Two changes of one zone lie further apart than this (Morocco's Ramadan: about a month). */
const STEP = 7 * DAY;
const STRETCH = 366 * DAY;
const MARGIN = 2 * DAY;
/** As many as the longest search walks through. */
const MAX_STRETCHES = 64;
const MAX_NAMES = 1_000;

/** Names that ICU knows from Java and System V, but the IANA database does not. */
const NOT_IANA =
  /^(?:ACT|AET|AGT|ART|AST|BET|BST|CAT|CNT|CST|CTT|EAT|ECT|IET|IST|JST|MIT|NET|NST|PLT|PNT|PRT|PST|SST|VST|SystemV\/.*|US\/Pacific-New)$/i;

interface Zone {
  readonly format: Intl.DateTimeFormat;
  readonly stretches: Map<number, readonly Segment[]>;
  latest: Segment | undefined;
}

/** By the name that Intl gives them; there are about 450. */
const zones = new Map<string, Zone>();
/** By the names they are called, which are many more: links, and any case. */
const named = new Map<string, Zone>();

/** Whether `name` is the name of an IANA time zone; links such as Asia/Calcutta are. Offsets such as +02:00 are not. */
export function isTimeZone(name: string): boolean {
  try {
    zoneOf(name);
    return true;
  } catch {
    return false;
  }
}

/** The segment that holds an instant. Throws RangeError for what is no zone or no instant. */
export function segmentAt(name: string, at: number): Segment {
  const zone = zoneOf(name);
  const { latest } = zone;
  if (latest && latest.start <= at && at < latest.end) return latest;
  const segment = stretchOf(zone, Math.floor(at / STRETCH)).findLast(({ start }) => start <= at);
  if (!segment) throw new RangeError(`There is no segment of ${name} at ${at}.`);
  zone.latest = segment;
  return segment;
}

function zoneOf(name: string): Zone {
  const known = named.get(name);
  if (known) return known;
  if (!/^[A-Za-z][A-Za-z0-9_+/-]{1,63}$/.test(name) || NOT_IANA.test(name)) {
    throw new RangeError(`${name.slice(0, 64)} is no time zone of the IANA database.`);
  }
  const format = new Intl.DateTimeFormat('en-US', {
    timeZone: name,
    hourCycle: 'h23',
    year: 'numeric',
    month: 'numeric',
    day: 'numeric',
    hour: 'numeric',
    minute: 'numeric',
    second: 'numeric',
  });
  const canonical = format.resolvedOptions().timeZone;
  const zone = zones.get(canonical) ?? { format, stretches: new Map(), latest: undefined };
  zones.set(canonical, zone);
  forgetOldest(named, MAX_NAMES);
  named.set(name, zone);
  return zone;
}

function stretchOf(zone: Zone, index: number): readonly Segment[] {
  const known = zone.stretches.get(index);
  if (known) return known;
  const start = index * STRETCH - MARGIN;
  const end = (index + 1) * STRETCH + MARGIN;
  const changes: { at: number; offset: number }[] = [];
  let offset = offsetAt(zone, start);
  for (let from = start; from < end; from += STEP) {
    let low = from;
    const high = Math.min(from + STEP, end);
    // More than one change in a step is none that zones make, but costs nothing to allow while they do not cancel out.
    while (offsetAt(zone, high) !== offset) {
      low = firstChange(zone, low, high, offset);
      offset = offsetAt(zone, low);
      changes.push({ at: low, offset });
    }
  }
  const segments: Segment[] = [];
  let before = offsetAt(zone, start - 1_000);
  let now = { at: start, offset: offsetAt(zone, start) };
  for (const next of [...changes, { at: end, offset }]) {
    if (next.at > now.at) {
      segments.push({ start: now.at, end: next.at, offset: now.offset, before, after: next.offset });
      before = now.offset;
    }
    now = next;
  }
  forgetOldest(zone.stretches, MAX_STRETCHES);
  zone.stretches.set(index, segments);
  return segments;
}

/** The first second after `low` and up to `high` at which the offset is not `offset`, which it is at `low`. */
function firstChange(zone: Zone, low: number, high: number, offset: number): number {
  let [same, other] = [low / 1000, high / 1000];
  while (other - same > 1) {
    const middle = Math.floor((same + other) / 2);
    if (offsetAt(zone, middle * 1000) === offset) same = middle;
    else other = middle;
  }
  return other * 1000;
}

/** Local time minus UTC at a whole second from the year 1 on, in ms. */
function offsetAt({ format }: Zone, at: number): number {
  // Numbers in the order of en-US, whatever stands between them; formatToParts costs twice as much.
  const [month = 1, day = 1, year = 0, hour = 0, minute = 0, second = 0] = (format.format(at).match(/\d+/g) ?? []).map(
    Number,
  );
  const local = new Date(Date.UTC(2000, month - 1, day, hour, minute, second));
  // Date.UTC takes the years 0 to 99 for 1900 to 1999.
  return local.setUTCFullYear(year, month - 1, day) - at;
}

/** Makes room for one more; the oldest goes, since a map keeps the order in which keys came. */
function forgetOldest<K>(map: Map<K, unknown>, size: number): void {
  if (map.size < size) return;
  for (const key of map.keys()) {
    map.delete(key);
    return;
  }
}
