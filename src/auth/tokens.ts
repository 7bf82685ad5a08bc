import { createHash, randomBytes } from 'node:crypto';

/** A random secret with a name in front: 256 bits, in characters that need no escaping anywhere. */
export function newSecret(prefix: string): string {
  return `${prefix}${randomBytes(32).toString('base64url')}`;
}

/**
 * What is kept of a secret. A plain SHA-256 is enough, since there is nothing to guess in 256 random bits; looking it up
 * by its hash also compares it in a time that tells nothing of the secret.
 */
export function hashSecret(secret: string): string {
  return createHash('sha256').update(secret).digest('hex');
}
