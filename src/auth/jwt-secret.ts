import { randomBytes } from 'node:crypto';
import { join } from 'node:path';
import type { Config } from '../config.ts';
import { readSecret, writeSecret } from './secret-file.ts';

/**
 * What access tokens are signed with: JWT_SECRET; else, outside production, one that is made at the first start and kept in
 * `<dataDir>/jwt-secret`; undefined where tokens come from another issuer.
 */
export async function loadJwtSecret(config: Config): Promise<string | undefined> {
  if (config.JWT_SECRET !== undefined) return config.JWT_SECRET;
  if (config.JWT_JWKS_URL !== undefined || config.JWT_PUBLIC_KEY_FILE !== undefined) return undefined;
  const file = join(config.DATA_DIR, 'jwt-secret');
  return (await readSecret(file)) ?? (await writeSecret(file, randomBytes(48).toString('base64url'), true));
}
