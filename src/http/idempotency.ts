import { createHash } from 'node:crypto';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { z } from 'zod';
import type { Database, Tx } from '../db/database.ts';
import { conflict, Problem } from './problem.ts';

// Idempotency-Key: a call that creates or triggers something happens once, however often it is sent.
//
// The answer is kept in the transaction of the effect. So after a crash, a lost answer or a commit of which nobody knows
// whether it happened, the row tells: it is there with the effect, or neither is. A twin that comes while the first is under
// way finds its advisory lock taken and is turned away; the lock ends with the transaction, whatever ends that. What failed
// keeps nothing: nothing happened, so the next try may be another.

/** How long an answer is kept. */
export const KEPT_HOURS = 24;

const key = z
  .string()
  .regex(/^[\x21-\x7e]{1,255}$/, { error: 'must be 1 to 255 visible ASCII characters, such as a UUID' })
  .optional()
  .meta({
    description:
      'Make the call happen once: sent again within 24 hours, it is answered with the first answer and the header Idempotency-Replayed. 409 for another body, and while the first is under way.',
    example: '6fd0b1ce-3a0b-4f51-8a3e-0a3d6a7f4c5e',
  });

/** The headers of a call that takes an Idempotency-Key. */
export const idempotencyHeaders = z.looseObject({ 'idempotency-key': key });

/** An answer as a handler makes it: its status, its body by the route's schema, and the headers that belong to it. */
export interface Made<Body> {
  status: number;
  body: Body;
  headers?: Record<string, string>;
}

export interface AnswerOptions<Body> {
  /** The answer must not be stored: sent again, such a call is told that it happened. */
  secret?: boolean;
  /** Brings the body up to what is known after the commit; what is stored is the body as it was before it. */
  committed?: (body: Body) => Body | Promise<Body>;
}

interface Kept {
  request_hash: string;
  status: number;
  headers: Record<string, string>;
  body: string | null;
}

const LOCK = {
  name: 'idempotency-lock',
  text: `select pg_try_advisory_xact_lock(hashtextextended($1, 0)) as mine`,
};
const FIND = {
  name: 'idempotency-find',
  text: `
    select request_hash, status, headers, body from idempotency_keys
    where user_id = $1 and route = $2 and key = $3 and created_at > now() - interval '${KEPT_HOURS} hours'`,
};
const KEEP = {
  name: 'idempotency-keep',
  text: `
    insert into idempotency_keys (user_id, route, key, request_hash, status, headers, body)
    values ($1, $2, $3, $4, $5, $6, $7)
    on conflict (user_id, route, key) do update set request_hash = excluded.request_hash, status = excluded.status,
      headers = excluded.headers, body = excluded.body, created_at = now()`,
};
const EXPIRE = {
  name: 'idempotency-expire',
  text: `
    delete from idempotency_keys where ctid = any(array(
      select ctid from idempotency_keys where created_at < now() - interval '${KEPT_HOURS} hours' limit $1))`,
};

/**
 * Runs `work` in a transaction, sets the status and headers of what it made, and answers with its body, which the handler
 * returns; with an Idempotency-Key, at most once per user, route and key.
 */
export async function answerOnce<Body>(
  db: Database,
  request: FastifyRequest,
  reply: FastifyReply,
  work: (tx: Tx) => Promise<Made<Body>>,
  { secret = false, committed = (body) => body }: AnswerOptions<Body> = {},
): Promise<Body> {
  const { 'idempotency-key': given } = request.headers as { 'idempotency-key'?: string };
  if (given === undefined) {
    const made = await db.transaction(work);
    reply.code(made.status).headers(made.headers ?? {});
    return committed(made.body);
  }
  const scope = [request.actor.userId, `${request.method} ${request.routeOptions.url ?? request.url}`, given] as const;
  const hash = requestHash(request);
  const result = await db.transaction(async (tx) => {
    const lock = await tx.query<{ mine: boolean }>({ ...LOCK, values: [`muster ${scope.join(' ')}`] });
    if (!lock.rows[0]?.mine) {
      throw new Problem('conflict', 'A call with this Idempotency-Key is under way: try again in a moment.', {
        headers: { 'retry-after': '1' },
      });
    }
    const { rows } = await tx.query<Kept>({ ...FIND, values: [...scope] });
    const [kept] = rows;
    if (kept) return { kept };
    const made = await work(tx);
    const { status, headers = {} } = made;
    // The serialiser of a route is that of a status.
    reply.code(status);
    const body = reply.serialize(made.body as object) as string;
    tx.write({ ...KEEP, values: [...scope, hash, status, JSON.stringify(headers), secret ? null : body] });
    return { made };
  });
  if ('made' in result) {
    const { status, headers = {}, body } = result.made;
    reply.code(status).headers(headers);
    return committed(body);
  }
  const { kept } = result;
  if (kept.request_hash !== hash) {
    throw conflict('This Idempotency-Key was used for another request: take a new key.');
  }
  if (kept.body === null) throw conflict('That was already created, and its secret is shown only once.');
  reply.code(kept.status).headers({ ...kept.headers, 'idempotency-replayed': 'true' });
  return JSON.parse(kept.body) as Body;
}

/** What was asked for, whatever the order of its keys: validation has put those of the schemas in order. */
function requestHash(request: FastifyRequest): string {
  const asked = JSON.stringify([request.params, request.query, request.body ?? null], (_name, value: unknown) =>
    typeof value === 'object' && value !== null && !Array.isArray(value)
      ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)))
      : value,
  );
  return createHash('sha256').update(asked).digest('hex');
}

/** Deletes up to `limit` answers that are kept no longer; answers how many. */
export async function expireAnswers(db: Database, limit: number): Promise<number> {
  const { rowCount } = await db.query({ ...EXPIRE, values: [limit] });
  return rowCount ?? 0;
}
