import { z } from 'zod';
import type { Queryable } from '../db/database.ts';
import { type ChainedEntry, chainHash, FIRST_HASH, hashedTime } from './chain.ts';

/** A place of a chain, and what became of its entry. */
interface Place {
  seq: number;
  prev_hash: string;
  hash: string;
  entryId: number;
  entry: 'whole' | 'changed' | 'removed';
}

/** What is wrong, as a sentence, and where; `seq` is null for an entry that has no place. */
export interface Fault {
  ownerId: number;
  seq: number | null;
  entryId: number | null;
  what: string;
}

/** The newest place of each chain, by its owner's id. */
export type Heads = Record<string, { seq: number; hash: string }>;

/** What a look at the whole log found: of each chain the first fault, and of each owner the first entry without a place. */
export interface Report {
  entries: number;
  /** Entries that have been written just now and have no place yet. */
  waiting: number;
  faults: Fault[];
  heads: Heads;
}

/** The place of a chain that an entry (null when it is gone) claims to have. */
function placeOf(
  ownerId: number,
  place: { seq: number; prev_hash: string; hash: string; entryId: number },
  entry: ChainedEntry | null,
): Place {
  const whole = entry && (entry.owner_id ?? 0) === ownerId && chainHash(place.prev_hash, entry) === place.hash;
  return { ...place, entry: entry === null ? 'removed' : whole ? 'whole' : 'changed' };
}

/**
 * Follows one chain, place by place in rising order, and answers what is wrong at each. With `partial` places may be
 * missing, as in an export with filters; what is there is checked all the same.
 */
function createVerifier(ownerId: number, { partial = false } = {}) {
  let last = { seq: 0, hash: FIRST_HASH };
  const fault = ({ seq, entryId }: Place, what: string): Fault => ({ ownerId, seq, entryId, what });
  return {
    /** The newest place that was seen. */
    head: () => last,
    check(place: Place): Fault | undefined {
      const expected = last.seq + 1;
      const next = place.seq === expected;
      const { hash } = last;
      last = { seq: place.seq, hash: place.hash };
      if (place.seq < expected) return fault(place, 'its place is taken twice');
      if (!next && !partial) return fault(place, `places from ${expected} on were removed`);
      if (next && place.prev_hash !== hash) return fault(place, 'it does not follow the place before it');
      return place.entry === 'whole' ? undefined : fault(place, `its entry was ${place.entry}`);
    },
  };
}

/** Collects what the verifiers of all chains find. */
function createReport(known: Heads, partial: boolean) {
  const report: Report = { entries: 0, waiting: 0, faults: [], heads: {} };
  const verifiers = new Map<number, ReturnType<typeof createVerifier>>();
  const broken = new Set<string>();
  const fault = (found: Fault) => {
    const where = `${found.seq === null ? 'beside' : 'in'} ${found.ownerId}`;
    if (broken.has(where)) return;
    broken.add(where);
    report.faults.push(found);
  };
  return {
    report,
    fault,
    place(ownerId: number, place: Place) {
      const verifier = verifiers.get(ownerId) ?? createVerifier(ownerId, { partial });
      verifiers.set(ownerId, verifier);
      report.entries += place.entry === 'removed' ? 0 : 1;
      const found = verifier.check(place);
      if (found) fault(found);
      const was = known[ownerId];
      if (was?.seq === place.seq && was.hash !== place.hash) {
        fault({
          ownerId,
          seq: place.seq,
          entryId: place.entryId,
          what: 'the chain was another one when its head was saved',
        });
      }
    },
    finish(): Report {
      for (const [owner, verifier] of verifiers) report.heads[owner] = verifier.head();
      for (const [owner, { seq }] of Object.entries(partial ? {} : known)) {
        if ((report.heads[owner]?.seq ?? 0) >= seq) continue;
        fault({
          ownerId: Number(owner),
          seq,
          entryId: null,
          what: 'the chain was longer when its head was saved: its end was cut off',
        });
      }
      return report;
    },
  };
}

const PAGE = 1_000;

/** Places in the order of chains. Served by the primary keys. */
const PLACES = {
  name: 'audit-verify-places',
  text: `
    select c.owner_id as chain, c.seq, c.prev_hash, c.hash, c.audit_id, l.id, l.user_id, l.owner_id, l.operation, l.entity_type,
      l.entity_id, l.changed_fields, l.ip_address, l.user_agent, l.request_id, l.created_at
    from audit_chain c left join audit_log l on l.id = c.audit_id
    where (c.owner_id, c.seq) > ($1::bigint, $2::bigint) order by c.owner_id, c.seq limit ${PAGE}`,
};

/** Entries, and whether they have a place or wait for one. By pages, since a statement has five seconds. */
const ENTRIES = {
  name: 'audit-verify-entries',
  text: `
    select l.id, coalesce(l.owner_id, 0) as owner_id,
      exists (select from audit_chain c where c.audit_id = l.id)
        or exists (select from audit_pending p where p.audit_id = l.id) as placed
    from (select id, owner_id from audit_log where id > $1 order by id limit ${PAGE}) l order by l.id`,
};

type PlaceRow = {
  chain: number;
  seq: number;
  prev_hash: string;
  hash: string;
  audit_id: number;
  id: number | null;
} & Omit<ChainedEntry, 'id' | 'created_at'> & { created_at: Date | number };

const PUT_IN = 'the entry has no place in a chain: it was put in by hand';

/** Verifies every chain in the database, a page at a time; `known` are heads that were saved before. */
export async function verifyDatabase(q: Queryable, known: Heads): Promise<Report> {
  const { report, place, fault, finish } = createReport(known, false);
  for (let [owner, seq] = [Number.MIN_SAFE_INTEGER, 0]; ; ) {
    const { rows } = await q.query<PlaceRow>({ ...PLACES, values: [owner, seq] });
    for (const { chain, seq, prev_hash, hash, audit_id: entryId, id, created_at, ...rest } of rows) {
      const entry = id === null ? null : { id, ...rest, created_at: hashedTime(created_at) };
      place(chain, placeOf(chain, { seq, prev_hash, hash, entryId }, entry));
    }
    const last = rows.at(-1);
    if (!last || rows.length < PAGE) break;
    [owner, seq] = [last.chain, last.seq];
  }
  // From far below 1, the first id that the log gives: who puts an entry in by hand chooses its id.
  for (let after = Number.MIN_SAFE_INTEGER; ; ) {
    const { rows } = await q.query<{ id: number; owner_id: number; placed: boolean }>({ ...ENTRIES, values: [after] });
    for (const { id, owner_id: ownerId, placed } of rows) {
      if (!placed) fault({ ownerId, seq: null, entryId: id, what: PUT_IN });
    }
    const last = rows.at(-1);
    if (!last || rows.length < PAGE) break;
    after = last.id;
  }
  const waiting = await q.query<{ n: number }>({ text: 'select count(*)::int as n from audit_pending' });
  report.waiting = waiting.rows[0]?.n ?? 0;
  return finish();
}

/**
 * How much older than the newest entry with a place one without may be. Places are given by id, which is drawn while the
 * transaction runs; what waits because the sealer is behind is newer than all that has a place.
 */
const MAY_WAIT_MS = 60_000;

const exportLine = z.object({
  id: z.int(),
  user_id: z.int().nullable(),
  owner_id: z.int().nullable(),
  operation: z.string(),
  entity_type: z.string(),
  entity_id: z.int(),
  changed_fields: z.unknown(),
  ip_address: z.string().nullable(),
  user_agent: z.string().nullable(),
  request_id: z.string().nullable(),
  created_at: z.string(),
  seq: z.int().nullable(),
  prev_hash: z.string().nullable(),
  hash: z.string().nullable(),
});

/**
 * Verifies an export (`GET /audit?format=ndjson`), given line by line, without a database. Keeps of each entry its hashes
 * alone. `known` are heads of the same log; with `partial` they are compared only where the export has their place.
 */
export async function verifyExport(
  lines: AsyncIterable<string>,
  known: Heads,
  { partial }: { partial: boolean },
): Promise<Report> {
  const { report, place, fault, finish } = createReport(known, partial);
  // An export is in the order of writing; places are given in the order of ids, which may differ by neighbours.
  const chains = new Map<number, Place[]>();
  let newestPlaced = Number.NEGATIVE_INFINITY;
  const unplaced: { ownerId: number; entryId: number; at: number }[] = [];
  let number = 0;
  for await (const line of lines) {
    number += 1;
    if (line === '') continue;
    const { seq, prev_hash, hash, ...entry } = readLine(line, number);
    const owner = entry.owner_id ?? 0;
    const at = Date.parse(entry.created_at);
    if (seq === null || prev_hash === null || hash === null) unplaced.push({ ownerId: owner, entryId: entry.id, at });
    else {
      if (at > newestPlaced) newestPlaced = at;
      const places = chains.get(owner) ?? [];
      places.push(placeOf(owner, { seq, prev_hash, hash, entryId: entry.id }, entry));
      chains.set(owner, places);
    }
  }
  for (const [owner, places] of chains) {
    for (const found of places.sort((a, b) => a.seq - b.seq)) place(owner, found);
  }
  for (const { at, ...entry } of unplaced) {
    if (newestPlaced - at <= MAY_WAIT_MS) report.waiting += 1;
    else fault({ ...entry, seq: null, what: PUT_IN });
  }
  return finish();
}

function readLine(line: string, number: number): z.output<typeof exportLine> {
  try {
    return exportLine.parse(JSON.parse(line));
  } catch {
    throw new Error(`line ${number} is no entry of an export`);
  }
}
