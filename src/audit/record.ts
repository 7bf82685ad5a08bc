import type { Tx } from '../db/database.ts';
import type { AUDIT_OPERATIONS } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';

export type ChangedFields = Record<string, { old: unknown; new: unknown }>;

/** Fields whose values are never written down: only that they changed is. */
const SECRET_FIELDS = new Set(['password', 'passwordHash', 'keyHash', 'tokenHash', 'leaseToken']);
const REDACTED = '[redacted]';

/** The entries, and with each a note that it waits for its place in the chain (seal.ts). */
const WRITE = {
  name: 'audit-write',
  text: `
    with written as (
      insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields, ip_address, user_agent,
        request_id)
      select $1, e.owner_id, e.operation, e.entity_type, e.entity_id, e.changed_fields, $3, $4, $5
      from jsonb_to_recordset($2) as e(
        owner_id bigint, operation text, entity_type text, entity_id bigint, changed_fields jsonb)
      returning id
    )
    insert into audit_pending (audit_id) select id from written`,
};

/** What entries are about. Complete: a search by id alone goes through them (queries.ts). */
export const ENTITY_TYPES = [
  'task',
  'project',
  'agent',
  'execution',
  'orphan_result',
  'concurrency_limit',
  'memory',
  'user',
  'session',
  'login',
  'api_key',
] as const satisfies string[];

/** What an entry of the audit log says of one change. */
export interface AuditEntry {
  operation: (typeof AUDIT_OPERATIONS)[number];
  entityType: (typeof ENTITY_TYPES)[number];
  entityId: number;
  /** Who may read it besides admins; null when the thing is nobody's. */
  ownerId: number | null;
  changedFields: ChangedFields;
}

/** Writes one entry of the audit log, in the transaction of the change it tells of. `actor` null means Muster itself. */
export function recordAudit(tx: Tx, actor: AuditActor | null, entry: AuditEntry): void {
  recordAudits(tx, actor, [entry]);
}

/** Who did it, as far as the log keeps it. */
export type AuditActor = Pick<Actor, 'ip' | 'userAgent' | 'requestId'> & { userId: number | null };

/** Writes any number of entries in one statement. */
export function recordAudits(tx: Tx, actor: AuditActor | null, entries: readonly AuditEntry[]): void {
  if (entries.length === 0) return;
  const rows = entries.map((entry) => ({
    owner_id: entry.ownerId,
    operation: entry.operation,
    entity_type: entry.entityType,
    entity_id: entry.entityId,
    changed_fields: entry.changedFields,
  }));
  tx.write({
    ...WRITE,
    values: [
      actor?.userId ?? null,
      JSON.stringify(rows),
      actor?.ip ?? null,
      actor?.userAgent ?? null,
      actor?.requestId ?? null,
    ],
  });
}

/**
 * The fields that differ between two states of a row, by their names on the wire (snake_case). `before` null makes every
 * field new, `after` null makes every field old. Bookkeeping (version, times of writing) is left out.
 */
export function changedFields(before: object | null, after: object | null): ChangedFields {
  const changed: ChangedFields = {};
  for (const field of new Set([...Object.keys(before ?? {}), ...Object.keys(after ?? {})])) {
    if (field === 'version' || field === 'createdAt' || field === 'updatedAt') continue;
    const from = plain(before, field);
    const to = plain(after, field);
    if (JSON.stringify(from) === JSON.stringify(to)) continue;
    const secret = SECRET_FIELDS.has(field);
    changed[snakeCase(field)] = secret ? { old: from && REDACTED, new: to && REDACTED } : { old: from, new: to };
  }
  return changed;
}

function plain(row: object | null, field: string): unknown {
  return (row as Record<string, unknown> | null)?.[field] ?? null;
}

const snakeCase = (name: string) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
