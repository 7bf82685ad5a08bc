import type { Tx } from '../db/database.ts';
import type { AUDIT_OPERATIONS } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';

export type ChangedFields = Record<string, { old: unknown; new: unknown }>;

/** Fields whose values are never written down: only that they changed is. */
const SECRET_FIELDS = new Set(['password', 'passwordHash', 'keyHash', 'tokenHash', 'leaseToken']);
const REDACTED = '[redacted]';

const WRITE = {
  name: 'audit-write',
  text: `
    insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields, ip_address, user_agent, request_id)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9)`,
};

/** Writes one entry of the audit log, in the transaction of the change it tells of. `actor` null means Muster itself. */
export async function recordAudit(
  tx: Tx,
  actor: Actor | null,
  entry: {
    operation: (typeof AUDIT_OPERATIONS)[number];
    entityType: string;
    entityId: number;
    ownerId: number;
    changedFields: ChangedFields;
  },
): Promise<void> {
  await tx.query({
    ...WRITE,
    values: [
      actor?.userId ?? null,
      entry.ownerId,
      entry.operation,
      entry.entityType,
      entry.entityId,
      JSON.stringify(entry.changedFields),
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
