import type { Database } from '../db/database.ts';
import type { Role, Scope } from '../http/access.ts';
import { type Identity, type StillGood, unauthorized } from '../http/authenticate.ts';
import { hashSecret, newSecret } from './tokens.ts';

// A ticket opens one WebSocket or event stream, within half a minute, with the rights of the credential that it was got
// with, and for as long as that one is good. It is for browsers, which can only say who they are in a URL, where a token
// would stay in histories and logs: a ticket that is found there is spent. Tickets are kept in Postgres, so that the server
// that is asked to open need not be the one that gave it.

export const TICKET_PREFIX = 'mwt_';
export const TICKET_SECONDS = 30;
const TICKET = new RegExp(`^${TICKET_PREFIX}[\\w-]{43}$`);

const MAKE = {
  name: 'ticket-make',
  text: `
    insert into ws_tickets (ticket_hash, user_id, role, scopes, api_key_id, family_id, credential_expires_at, expires_at)
    values ($1, $2, $3, $4, $5, $6, $7, now() + interval '${TICKET_SECONDS} seconds')`,
};
const SPEND = {
  name: 'ticket-spend',
  text: `
    delete from ws_tickets where ticket_hash = $1 and expires_at > now()
    returning user_id, role, scopes, api_key_id, family_id, credential_expires_at`,
};
const EXPIRE = {
  name: 'tickets-expire',
  text: `
    delete from ws_tickets where ticket_hash in (
      select ticket_hash from ws_tickets where expires_at <= now() order by expires_at limit $1 for update skip locked)`,
};

/** Makes a ticket with the rights of `identity`. */
export async function createTicket(db: Database, identity: Identity): Promise<string> {
  const ticket = newSecret(TICKET_PREFIX);
  const { userId, role, scopes, apiKeyId, family, expiresAt } = identity;
  await db.query({ ...MAKE, values: [hashSecret(ticket), userId, role, scopes, apiKeyId, family, expiresAt] });
  return ticket;
}

/** Spends a ticket; throws 401 for one that is spent, too old, or got with a credential that has ended since. */
export async function redeemTicket(db: Database, stillGood: StillGood, ticket: string): Promise<Identity> {
  const refused = () => unauthorized('The ticket is spent or older than half a minute: get another one.');
  if (!TICKET.test(ticket)) throw refused();
  const { rows } = await db.query<{
    user_id: number;
    role: Role;
    scopes: Scope[];
    api_key_id: number | null;
    family_id: string | null;
    credential_expires_at: Date | null;
  }>({ ...SPEND, values: [hashSecret(ticket)] });
  const [row] = rows;
  if (!row) throw refused();
  const identity: Identity = {
    userId: row.user_id,
    role: row.role,
    scopes: row.scopes,
    apiKeyId: row.api_key_id,
    family: row.family_id,
    expiresAt: row.credential_expires_at,
  };
  const [good] = await stillGood([identity]);
  if (!good) throw refused();
  return identity;
}

/** Deletes up to `limit` tickets that are too old; answers how many. */
export async function expireTickets(db: Database, limit: number): Promise<number> {
  const { rowCount } = await db.query({ ...EXPIRE, values: [limit] });
  return rowCount ?? 0;
}
