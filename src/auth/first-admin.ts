import { join } from 'node:path';
import { and, eq, isNull } from 'drizzle-orm';
import type { Database } from '../db/database.ts';
import { API_KEY_SCOPES, apiKeys } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { LOCKS } from '../platform/locks.ts';
import { createApiKey, revokeApiKey } from './api-keys.ts';
import { readSecret, writeSecret } from './secret-file.ts';
import { hashSecret } from './tokens.ts';
import { createUser, findUserByEmail } from './users.ts';

export interface FirstAdmin {
  key: string;
  /** Where the key is kept. */
  file: string;
  /** True when the key is new. */
  made: boolean;
}

const EMAIL = 'admin@localhost';
const KEY_NAME = 'first admin';

/**
 * Makes sure that there is a first admin whose API key stands in `<dataDir>/admin-key`, for our own command line tools. A
 * file that is lost, or whose key is none any more, is healed by a new key that takes the old one's place. `made` is true
 * when the key is new. The file is written before the commit: a crash in between leaves a file whose key is none, and the
 * next start heals it.
 */
export async function ensureFirstAdmin(db: Database, dataDir: string): Promise<FirstAdmin> {
  const file = join(dataDir, 'admin-key');
  return db.transaction(async (tx) => {
    await tx.query({ text: 'select pg_advisory_xact_lock($1, $2)', values: [...LOCKS.firstAdmin] });
    const visitor = { ip: 'local', userAgent: null, requestId: 'first-start' };
    const admin =
      (await findUserByEmail(tx, EMAIL)) ??
      (await createUser(tx, visitor, { email: EMAIL, name: 'First admin', role: 'admin', passwordHash: null }));
    const kept = await readSecret(file);
    if (kept !== undefined) {
      const good = await tx.orm
        .select({ id: apiKeys.id })
        .from(apiKeys)
        .where(and(eq(apiKeys.keyHash, hashSecret(kept)), eq(apiKeys.userId, admin.id), isNull(apiKeys.revokedAt)));
      if (good.length > 0) return { key: kept, file, made: false };
    }
    const actor: Actor = { ...visitor, userId: admin.id, role: 'admin', scopes: API_KEY_SCOPES };
    const lost = await tx.orm
      .select({ id: apiKeys.id })
      .from(apiKeys)
      .where(and(eq(apiKeys.userId, admin.id), eq(apiKeys.name, KEY_NAME), isNull(apiKeys.revokedAt)));
    for (const { id } of lost) await revokeApiKey(tx, actor, id);
    const { key } = await createApiKey(tx, actor, { name: KEY_NAME, scopes: API_KEY_SCOPES, expiresAt: null });
    await writeSecret(file, key);
    return { key, file, made: true };
  });
}
