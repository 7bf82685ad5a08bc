import { randomUUID } from 'node:crypto';
import { and, asc, eq, isNull, sql } from 'drizzle-orm';
import { recordAudit } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import { refreshTokens, users } from '../db/schema.ts';
import { CREDENTIALS_TOPIC } from '../http/authenticate.ts';
import { hashSecret, newSecret } from './tokens.ts';
import type { Visitor } from './users.ts';

// A login starts a family of refresh tokens, of which one at a time is good: each is spent for the next. A spent one that
// comes again was stolen, by whom there is no telling, so the whole family ends, and with it the access tokens that name it.
//
// Whatever spends or ends tokens holds their user's row while it does: without that, a family that ends while its token is
// being spent would not see the next token, which is not committed yet, and that one would outlive the end.

/** Starts a family; answers its id and its first refresh token. */
export async function startSession(
  tx: Tx,
  visitor: Visitor,
  userId: number,
  ttlSeconds: number,
): Promise<{ family: string; refreshToken: string }> {
  const family = randomUUID();
  const { id, token } = await issue(tx, userId, family, ttlSeconds);
  recordAudit(
    tx,
    { ...visitor, userId },
    {
      operation: 'CREATE',
      entityType: 'session',
      entityId: id,
      ownerId: userId,
      changedFields: { family: { old: null, new: family } },
    },
  );
  return { family, refreshToken: token };
}

/** Notes that somebody tried to log in and was refused; `userId` is whose email was given, null for nobody's. */
export function recordRefusedLogin(tx: Tx, visitor: Visitor, email: string, userId: number | null): void {
  recordAudit(
    tx,
    { ...visitor, userId: null },
    {
      operation: 'CREATE',
      entityType: 'login',
      entityId: userId ?? 0,
      ownerId: userId,
      changedFields: { email: { old: null, new: email }, outcome: { old: null, new: 'refused' } },
    },
  );
}

async function issue(
  tx: Tx,
  userId: number,
  familyId: string,
  ttlSeconds: number,
): Promise<{ id: number; token: string }> {
  const token = newSecret('mrt_');
  const [row] = await tx.orm
    .insert(refreshTokens)
    .values({
      userId,
      familyId,
      tokenHash: hashSecret(token),
      expiresAt: sql`now() + ${ttlSeconds} * interval '1 second'`,
    })
    .returning({ id: refreshTokens.id });
  if (!row) throw new Error('The insert answered no row.');
  return { id: row.id, token };
}

/**
 * Spends a refresh token for the next one; undefined when it is not good. A spent one ends its family. It answers instead
 * of throwing, since that end must be committed although the caller gets a 401.
 */
export async function rotateSession(
  tx: Tx,
  visitor: Visitor,
  token: string,
  ttlSeconds: number,
): Promise<{ userId: number; family: string; refreshToken: string } | undefined> {
  const user = await lockUserOf(tx, token);
  if (!user) return undefined;
  const [row] = await tx.orm
    .select({
      id: refreshTokens.id,
      userId: refreshTokens.userId,
      familyId: refreshTokens.familyId,
      spentAt: refreshTokens.spentAt,
      revokedAt: refreshTokens.revokedAt,
      expired: sql<boolean>`${refreshTokens.expiresAt} <= now()`,
    })
    .from(refreshTokens)
    .where(eq(refreshTokens.tokenHash, hashSecret(token)));
  if (!row || row.revokedAt || row.expired) return undefined;
  if (row.spentAt) {
    await revokeFamily(tx, row.familyId);
    recordAudit(
      tx,
      { ...visitor, userId: row.userId },
      {
        operation: 'UPDATE',
        entityType: 'session',
        entityId: await sessionId(tx, row.familyId),
        ownerId: row.userId,
        changedFields: { revoked: { old: null, new: 'a spent refresh token was used again' } },
      },
    );
    return undefined;
  }
  if (user.disabledAt) return undefined;
  await tx.orm.update(refreshTokens).set({ spentAt: sql`now()` }).where(eq(refreshTokens.id, row.id));
  const { token: refreshToken } = await issue(tx, row.userId, row.familyId, ttlSeconds);
  return { userId: row.userId, family: row.familyId, refreshToken };
}

/** Ends the session of a refresh token, whatever became of the token; one that does not exist ends nothing. */
export async function endSession(tx: Tx, visitor: Visitor, token: string): Promise<void> {
  if (!(await lockUserOf(tx, token))) return;
  const [row] = await tx.orm
    .select({ userId: refreshTokens.userId, familyId: refreshTokens.familyId })
    .from(refreshTokens)
    .where(eq(refreshTokens.tokenHash, hashSecret(token)));
  if (!row || !(await revokeFamily(tx, row.familyId))) return;
  recordAudit(
    tx,
    { ...visitor, userId: row.userId },
    {
      operation: 'DELETE',
      entityType: 'session',
      entityId: await sessionId(tx, row.familyId),
      ownerId: row.userId,
      changedFields: { family: { old: row.familyId, new: null } },
    },
  );
}

/** Locks the user of a token until the transaction ends; undefined when there is no such token. */
async function lockUserOf(tx: Tx, token: string): Promise<{ disabledAt: Date | null } | undefined> {
  const [found] = await tx.orm
    .select({ userId: refreshTokens.userId })
    .from(refreshTokens)
    .where(eq(refreshTokens.tokenHash, hashSecret(token)));
  if (!found) return undefined;
  // Not a plain FOR UPDATE: that would also make everything wait that refers to the user, such as the insert of a task.
  const [user] = await tx.orm
    .select({ disabledAt: users.disabledAt })
    .from(users)
    .where(eq(users.id, found.userId))
    .for('no key update');
  return user;
}

/** What the audit log knows a session by: the id of its first token, under which its start was noted. */
async function sessionId(tx: Tx, familyId: string): Promise<number> {
  const [row] = await tx.orm
    .select({ id: refreshTokens.id })
    .from(refreshTokens)
    .where(eq(refreshTokens.familyId, familyId))
    .orderBy(asc(refreshTokens.id))
    .limit(1);
  if (!row) throw new Error('The session has no tokens.');
  return row.id;
}

/** Ends a family; false when it had ended. */
async function revokeFamily(tx: Tx, familyId: string): Promise<boolean> {
  const { rowCount } = await tx.orm
    .update(refreshTokens)
    .set({ revokedAt: sql`now()` })
    .where(and(eq(refreshTokens.familyId, familyId), isNull(refreshTokens.revokedAt)));
  tx.ring(CREDENTIALS_TOPIC);
  return (rowCount ?? 0) > 0;
}
