import { randomBytes, scrypt, timingSafeEqual } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { unavailable } from '../http/problem.ts';
import { COMMON_PASSWORDS } from './common-passwords.ts';

// Passwords are kept as scrypt hashes (RFC 7914) with the cost that OWASP's Password Storage Cheat Sheet names for 16 MiB:
// N=2^14, r=8, p=5; about 60 ms. The parameters are kept with the hash, so that raising them leaves old ones readable.

const COST = { N: 2 ** 14, r: 8, p: 5 } as const;
const KEY_BYTES = 32;
const SALT_BYTES = 16;
/** How many hashes are computed at once: each takes a thread of a pool that everything else shares, and 16 MiB. */
export const PARALLEL = Math.max(1, Math.min(2, availableParallelism() - 1));
/** How many may wait for their turn, which is some twelve seconds; whoever comes then is told to come later. */
export const MAX_WAITING = 200;

let running = 0;
/** Those who wait, each for the slot of one that is done. */
const queue: (() => void)[] = [];

async function derive(
  password: string,
  salt: Buffer,
  { N, r, p }: { N: number; r: number; p: number },
): Promise<Buffer> {
  if (running < PARALLEL) running++;
  else if (queue.length < MAX_WAITING) await new Promise<void>((resolve) => queue.push(resolve));
  else throw unavailable('Too many are logging in or registering at the moment: try again soon.', 5);
  try {
    return await new Promise((resolve, reject) => {
      scrypt(normal(password), salt, KEY_BYTES, { N, r, p, maxmem: 64 * 1024 * 1024 }, (error, key) =>
        error ? reject(error) : resolve(key),
      );
    });
  } finally {
    // The slot is handed over, not given back: whoever comes in between must not take it too.
    const next = queue.shift();
    if (next) next();
    else running--;
  }
}

/** One text for all the ways to write the same characters, which differ between keyboards (NIST SP 800-63B, 5.1.1.2). */
const normal = (password: string) => password.normalize('NFKC');

/** The hash to keep of a password, with its salt and cost. Throws 503, as verifyPassword does, when too many wait. */
export async function hashPassword(password: string): Promise<string> {
  const salt = randomBytes(SALT_BYTES);
  const key = await derive(password, salt, COST);
  return `scrypt$${COST.N}$${COST.r}$${COST.p}$${salt.toString('base64url')}$${key.toString('base64url')}`;
}

/** A hash that no password has, of the usual cost. */
const NO_PASSWORD = `scrypt$${COST.N}$${COST.r}$${COST.p}$${'A'.repeat(22)}$${'A'.repeat(43)}`;

/**
 * Whether a password is the one that was hashed. Without a hash (no such user, or one without a password) it takes as long
 * and answers false, so that time tells nobody which users there are.
 */
export async function verifyPassword(password: string, hash: string | null | undefined): Promise<boolean> {
  const [, N, r, p, salt = '', key = ''] = (hash ?? NO_PASSWORD).split('$');
  const derived = await derive(password, Buffer.from(salt, 'base64url'), { N: Number(N), r: Number(r), p: Number(p) });
  const expected = Buffer.from(key, 'base64url');
  return timingSafeEqual(derived, expected) && hash != null;
}

/** Why a password is refused, or undefined. There are no rules of composition (NIST SP 800-63B, 5.1.1.2). */
export function passwordFault(password: string, email: string): string | undefined {
  const plain = normal(password).toLowerCase();
  if (COMMON_PASSWORDS.has(plain)) return 'is one of the most common passwords; choose another';
  if (new Set(plain).size < 3) return 'repeats the same characters; choose another';
  const [local = ''] = email.split('@');
  if (plain === email || plain === local.toLowerCase()) return 'must not be the email address';
  return undefined;
}
