import { createHash } from 'node:crypto';

/** An entry of the audit log as it is hashed, by its names on the wire. */
export interface ChainedEntry {
  id: number;
  user_id: number | null;
  owner_id: number | null;
  operation: string;
  entity_type: string;
  entity_id: number;
  changed_fields: unknown;
  ip_address: string | null;
  user_agent: string | null;
  request_id: string | null;
  /** RFC 3339 in UTC with milliseconds. */
  created_at: string;
}

/** What comes before the first entry of a chain. */
export const FIRST_HASH = '0'.repeat(64);

const HASHED = [
  'id',
  'user_id',
  'owner_id',
  'operation',
  'entity_type',
  'entity_id',
  'changed_fields',
  'ip_address',
  'user_agent',
  'request_id',
  'created_at',
] as const satisfies (keyof ChainedEntry)[];

/**
 * A time of Postgres as it is hashed: RFC 3339 in UTC with milliseconds. One that no entry is written with, such as infinity,
 * has a text all the same, by which the entry is found to be changed.
 */
export function hashedTime(time: Date | number): string {
  return time instanceof Date && !Number.isNaN(time.getTime()) ? time.toISOString() : String(time);
}

/** The hash of an entry in its chain: SHA-256, in hex, over the hash before it and the entry as canonical JSON. */
export function chainHash(prevHash: string, entry: ChainedEntry): string {
  const hashed = Object.fromEntries(HASHED.map((field) => [field, entry[field]]));
  return createHash('sha256').update(prevHash).update(canonicalJson(hashed)).digest('hex');
}

/** JSON with the keys of every object in rising order of their UTF-16 units and no space (RFC 8785, 3.2). */
export function canonicalJson(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(',')}]`;
  if (typeof value === 'object' && value !== null) {
    const record = value as Record<string, unknown>;
    const members = Object.keys(record)
      .sort()
      .map((key) => `${JSON.stringify(key)}:${canonicalJson(record[key])}`);
    return `{${members.join(',')}}`;
  }
  return JSON.stringify(value);
}
