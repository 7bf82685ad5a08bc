import { randomBytes } from 'node:crypto';
import { parseArgs } from 'node:util';
import { z } from 'zod';
import { readConfig } from '../config.ts';
import { createDatabase } from '../db/database.ts';
import { migrateDatabase } from '../db/migrate.ts';
import { Problem } from '../http/problem.ts';
import { createLogger } from '../platform/logger.ts';
import { createPool } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';
import { hashPassword } from './passwords.ts';
import { createUser } from './users.ts';

// npm run admin:create -- --email ada@example.com [--name Ada]: makes an admin and prints a password for it, once.

const USAGE = 'Usage: npm run admin:create -- --email ada@example.com [--name Ada]';

async function main(): Promise<void> {
  const { email, name } = readArguments();
  const config = readConfig();
  if (config.DATABASE_URL === undefined) {
    throw new StartupError(
      `DATABASE_URL is not set: the embedded mode has a first admin already, whose API key is in ${config.DATA_DIR}/admin-key.`,
    );
  }
  await migrateDatabase(config.DATABASE_DIRECT_URL ?? config.DATABASE_URL);
  const logger = createLogger('warn', false);
  const pool = createPool({ url: config.DATABASE_URL, size: 2, name: 'muster-admin', logger });
  const bus = { ring() {}, on: () => () => {}, connected: () => true, close: async () => {} };
  try {
    const password = randomBytes(18).toString('base64url');
    const passwordHash = await hashPassword(password);
    const visitor = { ip: 'local', userAgent: null, requestId: 'admin:create' };
    await createDatabase(pool, bus).transaction((tx) =>
      createUser(tx, visitor, { email, name, role: 'admin', passwordHash }),
    );
    console.log(`Made the admin ${email}. Its password, shown this once:\n${password}`);
  } finally {
    await pool.end();
  }
}

function readArguments(): { email: string; name: string | null } {
  let values: { email?: string | undefined; name?: string | undefined };
  try {
    ({ values } = parseArgs({ options: { email: { type: 'string' }, name: { type: 'string' } } }));
  } catch (error) {
    throw new StartupError(`${(error as Error).message}. ${USAGE}`);
  }
  const email = z.email().max(254).toLowerCase().safeParse(values.email);
  if (!email.success) throw new StartupError(`--email must be an email address. ${USAGE}`);
  return { email: email.data, name: values.name ?? null };
}

main().catch((error: unknown) => {
  const known = error instanceof StartupError || error instanceof Problem;
  process.stderr.write(`${known ? error.message : `The admin could not be made: ${String(error)}`}\n`);
  process.exit(1);
});
