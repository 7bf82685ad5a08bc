import { createPublicKey, type KeyObject, randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import jwt from '@fastify/jwt';
import { createRemoteJWKSet, errors, jwtVerify } from 'jose';
import { z } from 'zod';
import type { Config } from '../config.ts';
import type { App } from '../http/app.ts';
import { unauthorized } from '../http/authenticate.ts';
import { Problem, unavailable } from '../http/problem.ts';
import { StartupError } from '../platform/startup-error.ts';

// Access tokens are JWTs: signed and verified here with JWT_SECRET (HS256), or made by another issuer and verified with its
// public key. Which algorithms are taken follows from the key and never from the token (RFC 8725, 3.1).

/** What a good token says. */
export interface AccessToken {
  userId: number;
  /** The login it came from; null in tokens of another issuer. */
  family: string | null;
  expiresAt: Date;
}

export interface AccessTokens {
  /** Verifies a token; throws the 401 problem for every one that is not good. */
  verify(token: string): Promise<AccessToken>;
  /** Signs a token for a login; undefined where tokens come from another issuer. */
  sign: ((userId: number, family: string) => string) | undefined;
}

/** The longest life of our own tokens, and of those of another issuer, whose choice it is within reason. */
const MAX_LIFE_SECONDS = 3_600;
const MAX_EXTERNAL_LIFE_SECONDS = 86_400;
const CLOCK_SLACK_SECONDS = 60;
const MAX_TOKEN_LENGTH = 4_096;

const claims = z.object({
  sub: z.string().regex(/^[1-9]\d{0,15}$/),
  iat: z.int(),
  exp: z.int(),
  nbf: z.int().optional(),
  fam: z.uuid().optional(),
  use: z.string().optional(),
});

/** Registers token handling on `app`; `secret` is JWT_SECRET or the one that was made for want of it. */
export async function accessTokens(app: App, config: Config, secret: string | undefined): Promise<AccessTokens> {
  const external = externalVerifier(config);
  if (external === undefined && secret === undefined) {
    throw new StartupError('There is no key to verify tokens with: set JWT_SECRET.');
  }
  if (external === undefined) {
    await app.register(jwt, {
      secret: secret ?? '',
      sign: { algorithm: 'HS256', iss: config.JWT_ISSUER, aud: config.JWT_AUDIENCE },
      verify: {
        algorithms: ['HS256'],
        allowedIss: config.JWT_ISSUER,
        allowedAud: config.JWT_AUDIENCE,
        requiredClaims: ['iss', 'aud', 'sub', 'iat', 'exp'],
        cache: false,
      },
    });
  }
  return {
    async verify(token) {
      const refused = unauthorized('The access token is not valid, or has expired: log in again.');
      if (token.length > MAX_TOKEN_LENGTH) throw refused;
      let payload: unknown;
      try {
        checkHeader(token);
        payload = external ? await external(token) : app.jwt.verify(token);
      } catch (error) {
        if (error instanceof Problem) throw error;
        throw refused;
      }
      const parsed = claims.safeParse(payload);
      if (!parsed.success) throw refused;
      const { sub, iat, exp, nbf, fam, use } = parsed.data;
      const now = Date.now() / 1000;
      const current =
        exp > now && iat <= now + CLOCK_SLACK_SECONDS && (nbf === undefined || nbf <= now + CLOCK_SLACK_SECONDS);
      const shortLived = exp - iat <= (external ? MAX_EXTERNAL_LIFE_SECONDS : MAX_LIFE_SECONDS);
      const ofALogin = external !== undefined || (fam !== undefined && use === 'access');
      if (!current || !shortLived || !ofALogin || !Number.isSafeInteger(Number(sub))) throw refused;
      return { userId: Number(sub), family: external ? null : (fam ?? null), expiresAt: new Date(exp * 1000) };
    },
    sign: external
      ? undefined
      : (userId, family) =>
          app.jwt.sign(
            { sub: String(userId), fam: family, use: 'access', jti: randomUUID() },
            { expiresIn: config.ACCESS_TOKEN_TTL_SECONDS },
          ),
  };
}

/**
 * Refuses a header that asks for an extension, since it must be understood (RFC 7515, 4.1.11) and there is none that we do,
 * and one that says it is another kind of token.
 */
function checkHeader(token: string): void {
  const header: unknown = JSON.parse(Buffer.from(token.split('.', 1)[0] ?? '', 'base64url').toString('utf8'));
  if (typeof header !== 'object' || header === null || 'crit' in header) throw new Error('header not taken');
  if ('typ' in header && !/^(at\+)?jwt$/i.test(String(header.typ))) throw new Error('another kind of token');
}

/** Verifies tokens of another issuer by its public key or its key set; undefined when tokens are our own. */
function externalVerifier(config: Config): ((token: string) => Promise<unknown>) | undefined {
  const expected = { issuer: config.JWT_ISSUER, audience: config.JWT_AUDIENCE, requiredClaims: ['sub', 'iat', 'exp'] };
  if (config.JWT_PUBLIC_KEY_FILE) {
    const { key, algorithm } = readPublicKey(config.JWT_PUBLIC_KEY_FILE);
    return async (token) => (await jwtVerify(token, key, { ...expected, algorithms: [algorithm] })).payload;
  }
  if (config.JWT_JWKS_URL) {
    // The set is fetched without following redirects, with a timeout, and for unknown keys at most every 30 s, so that
    // made-up key ids cannot hammer the issuer.
    const keys = createRemoteJWKSet(new URL(config.JWT_JWKS_URL), { timeoutDuration: 5_000, cooldownDuration: 30_000 });
    return async (token) => {
      try {
        return (await jwtVerify(token, keys, { ...expected, algorithms: ['RS256', 'ES256', 'EdDSA'] })).payload;
      } catch (error) {
        const faultOfToken = error instanceof errors.JOSEError && !(error instanceof errors.JWKSTimeout);
        if (faultOfToken && error.code !== 'ERR_JOSE_GENERIC') throw error;
        throw unavailable('The keys of the token issuer cannot be had at the moment.', 5, error);
      }
    };
  }
  return undefined;
}

function readPublicKey(file: string): { key: KeyObject; algorithm: string } {
  let pem: string;
  try {
    pem = readFileSync(file, 'utf8');
  } catch (error) {
    throw new StartupError(`JWT_PUBLIC_KEY_FILE cannot be read (${(error as NodeJS.ErrnoException).code}).`);
  }
  const algorithms: Record<string, string> = { rsa: 'RS256', ec: 'ES256', ed25519: 'EdDSA' };
  let key: KeyObject | undefined;
  try {
    key = createPublicKey(pem);
  } catch {
    key = undefined;
  }
  const algorithm = algorithms[key?.asymmetricKeyType ?? ''];
  if (!key || !algorithm) {
    throw new StartupError('JWT_PUBLIC_KEY_FILE must be the PEM of an RSA, P-256 or Ed25519 public key.');
  }
  return { key, algorithm };
}
