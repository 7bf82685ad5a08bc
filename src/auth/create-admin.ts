import { randomBytes } from 'node:crypto';
import { parseArgs } from 'node:util';
import { type Config, readConfig } from '../config.ts';
import { createDatabase, type Database, sqlState } from '../db/database.ts';
import { migrateDatabase } from '../db/migrate.ts';
import { API_KEY_SCOPES } from '../db/schema.ts';
import { Problem } from '../http/problem.ts';
import { silentBus } from '../platform/bus.ts';
import { createLogger } from '../platform/logger.ts';
import { createPool } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';
import { createApiKey } from './api-keys.ts';
import { hashPassword } from './passwords.ts';
import { registerBody } from './schemas.ts';
import { createUser } from './users.ts';

// npm run admin:create -- --email ada@example.com [--name Ada]: makes an admin and prints a password for it, once; an API
// key instead where tokens come from another issuer, since nobody can log in with a password there.

const USAGE = 'Usage: npm run admin:create -- --email ada@example.com [--name Ada]';

interface Admin {
  email: string;
  name: string | null;
}

async function main(): Promise<void> {
  const admin = readArguments();
  const config = readConfig();
  if (config.DATABASE_URL === undefined) {
    throw new StartupError(
      `DATABASE_URL is not set: the embedded mode has a first admin already, whose API key is in ${config.DATA_DIR}/admin-key.`,
    );
  }
  await migrateDatabase(config.DATABASE_DIRECT_URL ?? config.DATABASE_URL);
  const logger = createLogger('warn', false);
  const pool = createPool({ url: config.DATABASE_URL, size: 2, name: 'muster-admin', logger });
  try {
    console.log(await createAdmin(createDatabase(pool, silentBus), config, admin));
  } finally {
    await pool.end();
  }
}

/** Makes the admin; answers what to print. */
async function createAdmin(db: Database, config: Config, { email, name }: Admin): Promise<string> {
  const external = config.JWT_JWKS_URL !== undefined || config.JWT_PUBLIC_KEY_FILE !== undefined;
  const password = external ? undefined : randomBytes(18).toString('base64url');
  const passwordHash = password === undefined ? null : await hashPassword(password);
  const visitor = { ip: 'local', userAgent: null, requestId: 'admin:create' };
  return db.transaction(async (tx) => {
    const { id } = await createUser(tx, visitor, { email, name, role: 'admin', passwordHash });
    if (password !== undefined) return `Made the admin ${email}. Its password, shown this once:\n${password}`;
    const actor = { ...visitor, userId: id, role: 'admin', scopes: API_KEY_SCOPES } as const;
    const { key } = await createApiKey(tx, actor, { name: 'first admin', scopes: API_KEY_SCOPES, expiresAt: null });
    return `Made the admin ${email}, whom tokens of your issuer name as sub "${id}". Its API key, shown this once:\n${key}`;
  });
}

function readArguments(): Admin {
  let values: { email?: string | undefined; name?: string | undefined };
  try {
    ({ values } = parseArgs({ options: { email: { type: 'string' }, name: { type: 'string' } } }));
  } catch (error) {
    throw new StartupError(`${(error as Error).message}. ${USAGE}`);
  }
  const { email, name } = registerBody.shape;
  const parsedEmail = email.safeParse(values.email);
  if (!parsedEmail.success) throw new StartupError(`--email must be an email address. ${USAGE}`);
  const parsedName = name.safeParse(values.name);
  if (!parsedName.success) throw new StartupError(`--name must have 1 to 255 characters. ${USAGE}`);
  return { email: parsedEmail.data, name: parsedName.data ?? null };
}

/** Why it failed. Never an error of the database driver as it is: with the statement go its parameters. */
function sentence(error: unknown): string {
  if (error instanceof StartupError || error instanceof Problem) return error.message;
  const state = sqlState(error);
  if (state !== undefined) return `Postgres at DATABASE_URL refuses (SQLSTATE ${state}): see its log.`;
  let cause = error;
  while (cause instanceof Error && cause.cause !== undefined) cause = cause.cause;
  return `The admin could not be made: ${cause instanceof Error ? cause.message : String(cause)}`;
}

main().catch((error: unknown) => {
  process.stderr.write(`${sentence(error)}\n`);
  process.exit(1);
});
