import { eq, inArray, or } from 'drizzle-orm';
import { changedFields, recordAudit } from '../audit/record.ts';
import type { Queryable, Tx } from '../db/database.ts';
import { users } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { conflict } from '../http/problem.ts';

export type User = typeof users.$inferSelect;

/** Who acts when nobody is signed in: what the audit log keeps of a registration. */
export type Visitor = Pick<Actor, 'ip' | 'userAgent' | 'requestId'>;

/** Makes a user; 409 when the address (lower case) has one already. The new user is the one that the audit log names. */
export async function createUser(
  tx: Tx,
  visitor: Visitor,
  input: { email: string; name: string | null; role: User['role']; passwordHash: string | null },
): Promise<User> {
  const [user] = await tx.orm.insert(users).values(input).onConflictDoNothing({ target: users.email }).returning();
  if (!user) throw conflict('There is a user with this email address already: log in, or use another.');
  const { email, name, role, passwordHash } = user;
  recordAudit(
    tx,
    { ...visitor, userId: user.id },
    {
      operation: 'CREATE',
      entityType: 'user',
      entityId: user.id,
      ownerId: user.id,
      changedFields: changedFields(null, { email, name, role, passwordHash }),
    },
  );
  return user;
}

/** The user of an address in lower case. */
export async function findUserByEmail(q: Queryable, email: string): Promise<User | undefined> {
  const [user] = await q.orm.select().from(users).where(eq(users.email, email));
  return user;
}

/** The user of an id. */
export async function findUser(q: Queryable, id: number): Promise<User | undefined> {
  const [user] = await q.orm.select().from(users).where(eq(users.id, id));
  return user;
}

/** The users of these addresses (in lower case) or ids. */
export async function findUsers(q: Queryable, emails: readonly string[], ids: readonly number[]): Promise<User[]> {
  return q.orm
    .select()
    .from(users)
    .where(or(inArray(users.email, [...emails]), inArray(users.id, [...ids])));
}
