import { z } from 'zod';
import type { Queryable } from '../db/database.ts';
import { type ChainedEntry, chainHash, FIRST_HASH } from './chain.ts';

/** A place of a chain, and its entry unless that is gone. */
export interface Place {
  seq: number;
  prev_hash: string;
  hash: string;
  entry: ChainedEntry | null;
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

/** What a look at the whole log found: of each chain the first fault. */
export interface Report {
  entries: number;
  /** Entries that have been written just now and have no place yet. */
  waiting: number;
  faults: Fault[];
  heads: Heads;
}

/**
 * Follows one chain, place by place in rising order, and answers what is wrong at the first place where something is. With
 * `partial` places may be missing, as in an export with filters; what is there is checked all the same.
 */
function createVerifier(ownerId: number, { partial = false } = {}) {
  let last = { seq: 0, hash: FIRST_HASH };
  const fault = (place: Place, what: string): Fault => ({
    ownerId,
    seq: place.seq,
    entryId: place.entry?.id ?? null,
    what,
  });
  return {
    /** The newest place that was seen. */
    head: () => last,
    check(place: Place): Fault | undefined {
      const expected = last.seq + 1;
      const next = place.seq === expected;
      const { hash } = last;
      last = { seq: place.seq, hash: place.hash };
      if (!next && !partial) {
        return fault(
          place,
          place.seq < expected ? 'its place is taken twice' : `places from ${expected} on were removed`,
        );
      }
      if (next && place.prev_hash !== hash) return fault(place, 'it does not follow the place before it');
      if (place.entry === null) return fault(place, 'its entry was removed');
      if (chainHash(place.prev_hash, place.entry) !== place.hash) return fault(place, 'its entry was changed');
      return undefined;
    },
  };
}

/** Collects what the verifiers of all chains find. */
function createReport(known: Heads, partial: boolean) {
  const report: Report = { entries: 0, waiting: 0, faults: [], heads: {} };
  const verifiers = new Map<number, ReturnType<typeof createVerifier>>();
  const broken = new Set<number>();
  const fault = (found: Fault) => {
    if (found.seq !== null && broken.has(found.ownerId)) return;
    if (found.seq !== null) broken.add(found.ownerId);
    report.faults.push(found);
  };
  return {
    report,
    fault,
    place(ownerId: number, place: Place) {
      const verifier = verifiers.get(ownerId) ?? createVerifier(ownerId, { partial });
      verifiers.set(ownerId, verifier);
      report.entries += place.entry === null ? 0 : 1;
      const found = verifier.check(place);
      if (found) fault(found);
      const was = known[ownerId];
      if (was?.seq === place.seq && was.hash !== place.hash) {
        fault({
          ownerId,
          seq: place.seq,
          entryId: place.entry?.id ?? null,
          what: 'the chain was another one when its head was saved',
        });
      }
    },
    finish(): Report {
      for (const [owner, verifier] of verifiers) report.heads[owner] = verifier.head();
      for (const [owner, { seq }] of Object.entries(known)) {
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

const PLACES = {
  name: 'audit-verify-places',
  text: `
    select c.owner_id as chain, c.seq, c.prev_hash, c.hash, l.id, l.user_id, l.owner_id, l.operation, l.entity_type,
      l.entity_id, l.changed_fields, l.ip_address, l.user_agent, l.request_id, l.created_at
    from audit_chain c left join audit_log l on l.id = c.audit_id and coalesce(l.owner_id, 0) = c.owner_id
    where (c.owner_id, c.seq) > ($1::bigint, $2::bigint) order by c.owner_id, c.seq limit ${PAGE}`,
};

/** Entries that were never given a place, and do not wait for one either. */
const PLACELESS = {
  name: 'audit-verify-placeless',
  text: `
    select l.id, coalesce(l.owner_id, 0) as owner_id from audit_log l
    where not exists (select from audit_chain c where c.audit_id = l.id)
      and not exists (select from audit_pending p where p.audit_id = l.id)
    order by l.id limit ${PAGE}`,
};

type PlaceRow = Omit<Place, 'entry'> & { chain: number; id: number | null } & Omit<
    ChainedEntry,
    'id' | 'created_at'
  > & {
    created_at: Date;
  };

/** Verifies every chain in the database, a page at a time; `known` are heads that were saved before. */
export async function verifyDatabase(q: Queryable, known: Heads): Promise<Report> {
  const { report, place, fault, finish } = createReport(known, false);
  for (let [owner, seq] = [-1, 0]; ; ) {
    const { rows } = await q.query<PlaceRow>({ ...PLACES, values: [owner, seq] });
    for (const { chain, seq, prev_hash, hash, id, created_at, ...rest } of rows) {
      const entry = id === null ? null : { id, ...rest, created_at: created_at.toISOString() };
      place(chain, { seq, prev_hash, hash, entry });
    }
    const last = rows.at(-1);
    if (!last || rows.length < PAGE) break;
    [owner, seq] = [last.chain, last.seq];
  }
  const placeless = await q.query<{ id: number; owner_id: number }>(PLACELESS);
  for (const { id, owner_id: ownerId } of placeless.rows) {
    fault({ ownerId, seq: null, entryId: id, what: 'the entry has no place in a chain: it was put in by hand' });
  }
  const waiting = await q.query<{ n: number }>({ text: 'select count(*)::int as n from audit_pending' });
  report.waiting = waiting.rows[0]?.n ?? 0;
  return finish();
}

/** An entry of the newest moments may wait for its place while it is exported; an older one may not. */
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

/** Verifies an export (`GET /audit?format=ndjson`), given line by line, without a database. */
export async function verifyExport(
  lines: AsyncIterable<string>,
  known: Heads,
  { partial }: { partial: boolean },
): Promise<Report> {
  const { report, place, fault, finish } = createReport(known, partial);
  // An export is in the order of writing; places are given in the order of ids, which may differ by neighbours.
  const chains = new Map<number, Place[]>();
  let newest = 0;
  const unplaced: ChainedEntry[] = [];
  let number = 0;
  for await (const line of lines) {
    number += 1;
    if (line === '') continue;
    const { seq, prev_hash, hash, ...entry } = readLine(line, number);
    newest = Math.max(newest, Date.parse(entry.created_at));
    if (seq === null || prev_hash === null || hash === null) unplaced.push(entry);
    else {
      const owner = entry.owner_id ?? 0;
      const places = chains.get(owner) ?? [];
      places.push({ seq, prev_hash, hash, entry });
      chains.set(owner, places);
    }
  }
  for (const [owner, places] of chains) {
    for (const found of places.sort((a, b) => a.seq - b.seq)) place(owner, found);
  }
  for (const { id, owner_id, created_at } of unplaced) {
    if (newest - Date.parse(created_at) <= MAY_WAIT_MS) report.waiting += 1;
    else
      fault({
        ownerId: owner_id ?? 0,
        seq: null,
        entryId: id,
        what: 'the entry has no place in a chain: it was put in by hand',
      });
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
