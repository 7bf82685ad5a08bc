import { and, eq, isNull, sql } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { apiKeys } from '../db/schema.ts';
import { type Actor, ownedBy, requireAccess, type Scope } from '../http/access.ts';
import { CREDENTIALS_TOPIC } from '../http/authenticate.ts';
import { type Page, type PageRequest, paginate } from '../http/pagination.ts';
import { Problem } from '../http/problem.ts';
import { hashSecret, newSecret } from './tokens.ts';

/** What every API key starts with, so that leaked ones can be found. */
export const KEY_PREFIX = 'muster_';
const SHOWN_CHARACTERS = KEY_PREFIX.length + 6;

export type ApiKey = Omit<typeof apiKeys.$inferSelect, 'keyHash'>;

const shown = {
  id: apiKeys.id,
  userId: apiKeys.userId,
  name: apiKeys.name,
  prefix: apiKeys.prefix,
  scopes: apiKeys.scopes,
  expiresAt: apiKeys.expiresAt,
  lastUsedAt: apiKeys.lastUsedAt,
  revokedAt: apiKeys.revokedAt,
  createdAt: apiKeys.createdAt,
};

/** Makes a key for the caller; the key itself is answered this once. It cannot do more than the credential that made it. */
export async function createApiKey(
  tx: Tx,
  actor: Actor,
  input: { name: string; scopes: readonly Scope[]; expiresAt: Date | null },
): Promise<{ key: string; apiKey: ApiKey }> {
  const beyond = input.scopes.filter((scope) => !actor.scopes.includes(scope));
  if (beyond.length > 0) {
    throw new Problem('forbidden', `The credential that makes a key needs its scopes itself: ${beyond.join(', ')}.`);
  }
  const key = newSecret(KEY_PREFIX);
  const [apiKey] = await tx.orm
    .insert(apiKeys)
    .values({
      userId: actor.userId,
      name: input.name,
      scopes: [...input.scopes],
      expiresAt: input.expiresAt,
      prefix: key.slice(0, SHOWN_CHARACTERS),
      keyHash: hashSecret(key),
    })
    .returning(shown);
  if (!apiKey) throw new Error('The insert answered no row.');
  recordAudit(tx, actor, {
    operation: 'CREATE',
    entityType: 'api_key',
    entityId: apiKey.id,
    ownerId: actor.userId,
    changedFields: {
      name: { old: null, new: apiKey.name },
      scopes: { old: null, new: apiKey.scopes },
      expires_at: { old: null, new: apiKey.expiresAt },
    },
  });
  return { key, apiKey };
}

/** A page of the caller's keys that are not revoked, newest first. */
export async function listApiKeys(q: Queryable, actor: Actor, page: PageRequest): Promise<Page<ApiKey>> {
  // A list of keys is one's own, for admins too.
  const filter = and(eq(apiKeys.userId, actor.userId), isNull(apiKeys.revokedAt));
  return paginate({
    page,
    scope: ['api-keys', actor.userId],
    sort: { by: sql`${apiKeys.createdAt}`, type: 'timestamptz' },
    order: 'desc',
    id: sql`${apiKeys.id}`,
    filter,
    select: async ({ where, orderBy, limit, offset, key }) => {
      const rows = await q.orm
        .select({ ...shown, key })
        .from(apiKeys)
        .where(where)
        .orderBy(...orderBy)
        .limit(limit)
        .offset(offset);
      return rows.map(({ key: rowKey, ...row }) => ({ row, id: row.id, key: rowKey }));
    },
    count: (where) => q.orm.$count(apiKeys, where),
  });
}

/** Revokes a key by the owner rule, for good; one that is revoked already is gone (404). */
export async function revokeApiKey(tx: Tx, actor: Actor, id: number): Promise<void> {
  const [found] = await tx.orm
    .select(shown)
    .from(apiKeys)
    .where(and(eq(apiKeys.id, id), isNull(apiKeys.revokedAt)))
    .for('update');
  const apiKey = requireAccess(actor, found, 'API key', id);
  await tx.orm
    .update(apiKeys)
    .set({ revokedAt: sql`now()` })
    .where(and(eq(apiKeys.id, id), ownedBy(actor, apiKeys.userId)));
  tx.ring(CREDENTIALS_TOPIC);
  recordAudit(tx, actor, {
    operation: 'DELETE',
    entityType: 'api_key',
    entityId: id,
    ownerId: apiKey.userId,
    changedFields: changedFields({ name: apiKey.name, scopes: apiKey.scopes, expiresAt: apiKey.expiresAt }, null),
  });
}
