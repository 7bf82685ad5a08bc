import type { Config } from '../config.ts';
import { coalesced } from '../db/coalesce.ts';
import type { Database } from '../db/database.ts';
import { API_KEY_SCOPES } from '../db/schema.ts';
import type { Role, Scope } from '../http/access.ts';
import type { App } from '../http/app.ts';
import { type StillGood, unauthorized, type VerifyCredential } from '../http/authenticate.ts';
import type { Logger } from '../platform/logger.ts';
import { type AccessTokens, accessTokens } from './access-tokens.ts';
import { KEY_PREFIX } from './api-keys.ts';
import { redeemTicket, TICKET_PREFIX } from './tickets.ts';
import { hashSecret } from './tokens.ts';

// A credential is an API key or an access token. Both end with a look at the database by primary or unique key, so that a
// disabled user, an ended login and a revoked key are refused at the very next call; the looks of calls that come together
// share a query. A credential that is not even well-formed or signed never gets that far.

const KEY = new RegExp(`^${KEY_PREFIX}[\\w-]{43}$`);
/** How precise last_used_at is: a write a minute and key at the most. */
const LAST_USED_SECONDS = 60;

const FIND_KEYS = {
  name: 'credential-keys',
  text: `
    select k.id, k.user_id, k.scopes, k.expires_at, u.role,
      coalesce(k.last_used_at < now() - interval '${LAST_USED_SECONDS} seconds', true) as stale
    from unnest($1::text[]) with ordinality w(hash, n)
    left join (api_keys k join users u on u.id = k.user_id and u.disabled_at is null)
      on k.key_hash = w.hash and k.revoked_at is null and (k.expires_at is null or k.expires_at > now())
    order by w.n`,
};

/** Notes the use of a key. Calls that come at once all find it stale: one writes, and the others do not wait for it. */
const NOTE_USE = {
  name: 'credential-key-used',
  text: `
    update api_keys set last_used_at = now() where id = (
      select id from api_keys
      where id = $1 and coalesce(last_used_at < now() - interval '${LAST_USED_SECONDS} seconds', true)
      for no key update skip locked)`,
};

/** The users of tokens; of our own, only while their login has not ended. Served by refresh_tokens_family_idx. */
const FIND_USERS = {
  name: 'credential-users',
  text: `
    select u.role from unnest($1::bigint[], $2::uuid[]) with ordinality w(user_id, family, n)
    left join users u on u.id = w.user_id and u.disabled_at is null and (w.family is null or exists (
      select from refresh_tokens r where r.family_id = w.family and r.user_id = u.id and r.revoked_at is null))
    order by w.n`,
};

/** Whether credentials that were good once still are. Served by primary keys and refresh_tokens_family_idx. */
const STILL_GOOD = {
  name: 'credential-still-good',
  text: `
    select coalesce(u.role = w.role and
      case when w.api_key_id is not null then exists (
          select from api_keys k where k.id = w.api_key_id and k.revoked_at is null and (k.expires_at is null or k.expires_at > now()))
        when w.family is not null then exists (
          select from refresh_tokens r where r.family_id = w.family and r.user_id = u.id and r.revoked_at is null)
        else true end, false) as good
    from unnest($1::bigint[], $2::text[], $3::bigint[], $4::uuid[]) with ordinality w(user_id, role, api_key_id, family, n)
    left join users u on u.id = w.user_id and u.disabled_at is null
    order by w.n`,
};
/** How many one query looks up. */
const STILL_GOOD_BATCH = 1_000;

interface FoundKey {
  id: number;
  user_id: number;
  scopes: Scope[];
  expires_at: Date | null;
  role: Role;
  stale: boolean;
}

/** Registers token handling on `app`, and answers how credentials are verified and tokens signed. */
export async function credentials(
  app: App,
  deps: { config: Config; db: Database; logger: Logger },
  secret: string | undefined,
): Promise<{ verify: VerifyCredential; stillGood: StillGood; tokens: AccessTokens }> {
  const { db, logger } = deps;
  const tokens = await accessTokens(app, deps.config, secret);
  const findKey = coalesced(async (hashes: string[]) => {
    const { rows } = await db.query<FoundKey | { id: null }>({ ...FIND_KEYS, values: [hashes] });
    return rows.map((row) => (row.id === null ? undefined : row));
  });
  const findRole = coalesced(async (of: { userId: number; family: string | null }[]) => {
    const values = [of.map(({ userId }) => userId), of.map(({ family }) => family)];
    const { rows } = await db.query<{ role: Role | null }>({ ...FIND_USERS, values });
    return rows.map(({ role }) => role);
  });

  const verifyKey: VerifyCredential = async (key) => {
    const refused = () => unauthorized('The API key is not valid: it may be revoked or expired.');
    if (!KEY.test(key)) throw refused();
    const found = await findKey(hashSecret(key));
    if (!found) throw refused();
    if (found.stale) {
      // Nobody waits for it: it is of no use to the call.
      db.query({ ...NOTE_USE, values: [found.id] }).catch((error: unknown) =>
        logger.warn({ err: error }, 'the use of an API key was not noted'),
      );
    }
    return {
      userId: found.user_id,
      role: found.role,
      scopes: found.scopes,
      expiresAt: found.expires_at,
      apiKeyId: found.id,
      family: null,
    };
  };

  const verifyToken: VerifyCredential = async (text) => {
    const token = await tokens.verify(text);
    const role = await findRole(token);
    if (!role) throw unauthorized('This login has ended: log in again.');
    return {
      userId: token.userId,
      role,
      scopes: API_KEY_SCOPES,
      expiresAt: token.expiresAt,
      apiKeyId: null,
      family: token.family,
    };
  };

  const stillGood: StillGood = async (identities) => {
    const good: boolean[] = [];
    for (let from = 0; from < identities.length; from += STILL_GOOD_BATCH) {
      const batch = identities.slice(from, from + STILL_GOOD_BATCH);
      const { rows } = await db.query<{ good: boolean }>({
        ...STILL_GOOD,
        values: [
          batch.map(({ userId }) => userId),
          batch.map(({ role }) => role),
          batch.map(({ apiKeyId }) => apiKeyId),
          batch.map(({ family }) => family),
        ],
      });
      good.push(...rows.map((row) => row.good));
    }
    return good;
  };

  return {
    tokens,
    stillGood,
    verify: (credential, use = 'call') => {
      if (use === 'connection' && credential.startsWith(TICKET_PREFIX)) return redeemTicket(db, stillGood, credential);
      return credential.startsWith(KEY_PREFIX) ? verifyKey(credential) : verifyToken(credential);
    },
  };
}
