import { createPublicKey, type KeyObject, randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import jwt from '@fastify/jwt';
import {
  createRemoteJWKSet,
  customFetch,
  errors,
  type FetchImplementation,
  type JWTVerifyGetKey,
  jwtVerify,
} from 'jose';
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
/** How many verified tokens are remembered, so that a caller's signature is not computed at every call. */
const MAX_VERIFIED = 10_000;
/** How soon an issuer that did not answer with its keys is asked again. */
const ISSUER_RETRY_SECONDS = 5;
/** What is wrong with a token, and not with the issuer, when no key is found for it. */
const TOKEN_FAULTS = [errors.JWKSNoMatchingKey, errors.JWKSMultipleMatchingKeys, errors.JOSENotSupported];

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

  const refused = () => unauthorized('The access token is not valid, or has expired: log in again.');
  const verify: AccessTokens['verify'] = async (token) => {
    if (token.length > MAX_TOKEN_LENGTH) throw refused();
    let payload: unknown;
    try {
      checkHeader(token);
      payload = external ? await external(token) : app.jwt.verify(token);
    } catch (error) {
      if (error instanceof Problem) throw error;
      throw refused();
    }
    const parsed = claims.safeParse(payload);
    if (!parsed.success) throw refused();
    const { sub, iat, exp, nbf, fam, use } = parsed.data;
    const now = Date.now() / 1000;
    const current =
      exp > now && iat <= now + CLOCK_SLACK_SECONDS && (nbf === undefined || nbf <= now + CLOCK_SLACK_SECONDS);
    const shortLived = exp - iat <= (external ? MAX_EXTERNAL_LIFE_SECONDS : MAX_LIFE_SECONDS);
    const ofALogin = external !== undefined || (fam !== undefined && use === 'access');
    if (!current || !shortLived || !ofALogin || !Number.isSafeInteger(Number(sub))) throw refused();
    return { userId: Number(sub), family: external ? null : (fam ?? null), expiresAt: new Date(exp * 1000) };
  };
  // A signature stays what it is. That its login has not ended is looked up at each call, by whoever calls this.
  const verified = new Map<string, Awaited<ReturnType<AccessTokens['verify']>>>();

  return {
    async verify(token) {
      const known = verified.get(token);
      if (known) {
        if (known.expiresAt.getTime() > Date.now()) return known;
        verified.delete(token);
      }
      const result = await verify(token);
      // Keys of another issuer come and go: whether one still vouches for a token is asked each time.
      if (!external) {
        if (verified.size >= MAX_VERIFIED) verified.clear();
        verified.set(token, result);
      }
      return result;
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
 * and one that says it is another kind of token (RFC 9068, 4, names those of access tokens).
 */
function checkHeader(token: string): void {
  const header: unknown = JSON.parse(Buffer.from(token.split('.', 1)[0] ?? '', 'base64url').toString('utf8'));
  if (typeof header !== 'object' || header === null || 'crit' in header) throw new Error('header not taken');
  if ('typ' in header && !/^(application\/)?(at\+)?jwt$/i.test(String(header.typ)))
    throw new Error('another kind of token');
}

/** Verifies tokens of another issuer by its public key or its key set; undefined when tokens are our own. */
function externalVerifier(config: Config): ((token: string) => Promise<unknown>) | undefined {
  const expected = { issuer: config.JWT_ISSUER, audience: config.JWT_AUDIENCE, requiredClaims: ['sub', 'iat', 'exp'] };
  if (config.JWT_PUBLIC_KEY_FILE) {
    const { key, algorithm } = readPublicKey(config.JWT_PUBLIC_KEY_FILE);
    return async (token) => (await jwtVerify(token, key, { ...expected, algorithms: [algorithm] })).payload;
  }
  if (config.JWT_JWKS_URL) {
    const keys = issuerKeys(new URL(config.JWT_JWKS_URL));
    return async (token) =>
      (await jwtVerify(token, keys, { ...expected, algorithms: ['RS256', 'ES256', 'EdDSA'] })).payload;
  }
  return undefined;
}

/**
 * Finds the key of a token in the issuer's set. The set is fetched without following redirects and with a timeout; for key
 * ids that it does not hold at most every 30 s, and every 5 s when the issuer is down, so that made-up tokens cannot hammer
 * it. Without a set that can be read it throws 503: that is not the token's fault.
 */
function issuerKeys(url: URL): JWTVerifyGetKey {
  let nextFetch = 0;
  const keys = createRemoteJWKSet(url, {
    timeoutDuration: 5_000,
    cooldownDuration: 30_000,
    [customFetch]: async (...request: Parameters<FetchImplementation>) => {
      if (performance.now() < nextFetch) throw new Error('The issuer was asked a moment ago.');
      nextFetch = performance.now() + ISSUER_RETRY_SECONDS * 1000;
      return fetch(...request);
    },
  });
  return async (header, token) => {
    try {
      return await keys(header, token);
    } catch (error) {
      if (TOKEN_FAULTS.some((fault) => error instanceof fault)) throw error;
      throw unavailable('The keys of the token issuer cannot be had at the moment.', ISSUER_RETRY_SECONDS, error);
    }
  };
}

function readPublicKey(file: string): { key: KeyObject; algorithm: string } {
  let pem: string;
  try {
    pem = readFileSync(file, 'utf8');
  } catch (error) {
    throw new StartupError(`JWT_PUBLIC_KEY_FILE cannot be read (${(error as NodeJS.ErrnoException).code}).`);
  }
  let key: KeyObject | undefined;
  try {
    key = createPublicKey(pem);
  } catch {
    key = undefined;
  }
  const algorithm = key && algorithmOf(key);
  if (!key || !algorithm) {
    throw new StartupError(
      'JWT_PUBLIC_KEY_FILE must be the PEM of a public key: RSA of 2048 bits or more, P-256 or Ed25519.',
    );
  }
  return { key, algorithm };
}

/** The one algorithm that a key is used with; undefined for keys that no token is taken from (RFC 7518, 3.3 and 3.4). */
function algorithmOf({ asymmetricKeyType, asymmetricKeyDetails: details }: KeyObject): string | undefined {
  if (asymmetricKeyType === 'rsa' && (details?.modulusLength ?? 0) >= 2_048) return 'RS256';
  if (asymmetricKeyType === 'ec' && details?.namedCurve === 'prime256v1') return 'ES256';
  if (asymmetricKeyType === 'ed25519') return 'EdDSA';
  return undefined;
}
