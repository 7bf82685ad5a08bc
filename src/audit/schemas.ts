import { z } from 'zod';
import { AUDIT_OPERATIONS } from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, idText, instant, integerText, time, toTime } from '../http/validation.ts';
import type { AuditRow } from './queries.ts';

/** How large the values are that lists carry: two of 64 KiB in each of a hundred entries would be 13 MB. */
const LISTED_VALUE_BYTES = 8_192;

const filters = {
  entity_type: z
    .string()
    .regex(/^[a-z_]{1,64}$/, {
      error: 'must be a word such as task, project, agent, execution, user, session or api_key',
    })
    .optional()
    .meta({ example: 'task' }),
  entity_id: idText.optional(),
  user_id: idText.optional().meta({ description: 'Who did it. Another than yourself: admins only.' }),
  operation: z.enum(AUDIT_OPERATIONS, { error: `must be ${AUDIT_OPERATIONS.join(', ')}` }).optional(),
  from: instant.optional().meta({ description: 'Not before this.' }),
  to: instant.optional().meta({ description: 'Before this.' }),
};

export const auditQuery = z.strictObject({
  ...pageQuery(),
  // Without its default, which would look like a limit that was asked for.
  limit: integerText(1, 100).optional(),
  ...filters,
  format: z.enum(['json', 'ndjson'], { error: 'must be json or ndjson' }).optional().meta({
    description: 'ndjson: every entry, oldest first, one JSON object a line; without limit, offset and cursor.',
  }),
});
export type AuditQuery = z.output<typeof auditQuery>;
export type AuditFilters = Pick<AuditQuery, keyof typeof filters>;

export const auditEntry = z
  .object({
    id,
    user_id: id.nullable().meta({ description: 'Who did it; null when Muster did.' }),
    owner_id: id.nullable().meta({ description: 'Whose thing it is; null when it is nobody’s.' }),
    operation: z.enum(AUDIT_OPERATIONS),
    entity_type: z.string(),
    entity_id: z.int().min(0),
    changed_fields: z.record(
      z.string(),
      z.object({
        old: z.unknown(),
        new: z.unknown(),
        omitted: z
          .boolean()
          .optional()
          .meta({
            description: `In lists, a value larger than ${LISTED_VALUE_BYTES} bytes is null and this is true; format=ndjson has all.`,
          }),
      }),
    ),
    ip_address: z.string().nullable(),
    user_agent: z.string().nullable(),
    request_id: z.string().nullable(),
    created_at: time,
    seq: z.int().nullable().meta({ description: 'Its place in its owner’s chain; null for the first second.' }),
    prev_hash: z.string().nullable(),
    hash: z
      .string()
      .nullable()
      .meta({ description: 'SHA-256 over prev_hash and the entry; see npm run audit:verify.' }),
  })
  .meta({ id: 'AuditEntry' });
export const auditList = z.object({ entries: z.array(auditEntry), ...pageAnswer });

/** An entry on the wire. */
export function auditView(row: AuditRow): z.input<typeof auditEntry> {
  return {
    id: row.id,
    user_id: row.userId,
    owner_id: row.ownerId,
    operation: row.operation,
    entity_type: row.entityType,
    entity_id: row.entityId,
    changed_fields: row.changedFields,
    ip_address: row.ipAddress,
    user_agent: row.userAgent,
    request_id: row.requestId,
    created_at: toTime(row.createdAt),
    seq: row.seq,
    prev_hash: row.prevHash,
    hash: row.hash,
  };
}

/** An entry as lists have it: of the values only small ones. */
export function auditSummaryView(row: AuditRow): z.input<typeof auditEntry> {
  const entry = auditView(row);
  const changed = Object.entries(entry.changed_fields).map(([field, change]) => {
    const shown = { old: small(change.old), new: small(change.new) };
    const omitted = shown.old !== change.old || shown.new !== change.new;
    return [field, omitted ? { ...shown, omitted } : change];
  });
  return { ...entry, changed_fields: Object.fromEntries(changed) };
}

const small = (value: unknown) => (Buffer.byteLength(JSON.stringify(value) ?? '') > LISTED_VALUE_BYTES ? null : value);
