import { CommitUnknownError, sqlState } from '../db/database.ts';

/** One thing wrong with the input: where it is (`body.params.x`, `query.limit`) and what would be right. */
export interface FieldError {
  path: string;
  message: string;
}

/** Every kind of problem that Muster answers: its `type` on the wire, status and title (RFC 9457). */
export const PROBLEMS = {
  'invalid-request': { status: 400, title: 'Invalid request' },
  'invalid-json': { status: 400, title: 'Invalid JSON' },
  unauthorized: { status: 401, title: 'Not authenticated' },
  forbidden: { status: 403, title: 'Not allowed' },
  'not-found': { status: 404, title: 'Not found' },
  'method-not-allowed': { status: 405, title: 'Method not allowed' },
  timeout: { status: 408, title: 'Request timeout' },
  conflict: { status: 409, title: 'Conflict' },
  'precondition-failed': { status: 412, title: 'Precondition failed' },
  'body-too-large': { status: 413, title: 'Body too large' },
  'unsupported-media-type': { status: 415, title: 'Unsupported media type' },
  'rate-limited': { status: 429, title: 'Too many requests' },
  'internal-error': { status: 500, title: 'Internal error' },
  unavailable: { status: 503, title: 'Unavailable' },
} as const;

export type ProblemKind = keyof typeof PROBLEMS;

/** An error that is an answer: thrown where the cause is known, turned into HTTP once, in error-handler.ts. */
export class Problem extends Error {
  override readonly name = 'Problem';
  readonly kind: ProblemKind;
  readonly status: number;
  readonly errors: readonly FieldError[] | undefined;
  readonly headers: Readonly<Record<string, string>>;

  constructor(
    kind: ProblemKind,
    detail: string,
    extra: { errors?: readonly FieldError[]; headers?: Record<string, string>; cause?: unknown } = {},
  ) {
    super(detail, { cause: extra.cause });
    this.kind = kind;
    this.status = PROBLEMS[kind].status;
    this.errors = extra.errors;
    this.headers = extra.headers ?? {};
  }
}

/** A 400 that names the field and the remedy. */
export function invalid(path: string, message: string): Problem {
  return new Problem('invalid-request', `${path}: ${message}`, { errors: [{ path, message }] });
}

/** A 404 for a thing that does not exist or was deleted. */
export function notFound(what: string, id: number): Problem {
  return new Problem('not-found', `There is no ${what} ${id}.`);
}

/** A 409 for a thing that is in the wrong state; `detail` says what to do. */
export function conflict(detail: string): Problem {
  return new Problem('conflict', detail);
}

/** A 503; `retryAfterSeconds` goes out as Retry-After. */
export function unavailable(detail: string, retryAfterSeconds = 1, cause?: unknown): Problem {
  return new Problem('unavailable', detail, { headers: { 'retry-after': String(retryAfterSeconds) }, cause });
}

/** SQLSTATEs that say the input could not be stored. A validator has a hole where one of them is seen, so they are logged. */
const BAD_INPUT = new Set(['22021', '22P05', '22P02', '22003', '22007', '22008', '2201W', '2201B', '22023', '54001']);
/** SQLSTATEs, besides the classes 08 and 53, that pass by themselves: shutting down, starting, failing over, locked. */
const PASSING = new Set(['57P01', '57P02', '57P03', '57P05', '57014', '25006', '25P03', '55P03', '40001', '40P01']);
const NETWORK = new Set(['ECONNREFUSED', 'ECONNRESET', 'ENOENT', 'EPIPE', 'ETIMEDOUT', 'EHOSTUNREACH', 'ENOTFOUND']);
/** What pg says, without a code, of a connection that is gone or too slow. */
const LOST_CONNECTION =
  /^(Query read timeout|timeout exceeded when trying to connect|Connection terminated|Client has encountered a connection error|Cannot use a pool after calling end)/;

/** Whether an error says that the database cannot be reached or will not answer just now. */
export function isDatabaseAway(error: unknown): boolean {
  const state = sqlState(error);
  if (state !== undefined) return PASSING.has(state) || state.startsWith('08') || state.startsWith('53');
  for (let e = error; e instanceof Error; e = e.cause) {
    if (LOST_CONNECTION.test(e.message)) return true;
    if ('code' in e && typeof e.code === 'string' && NETWORK.has(e.code)) return true;
  }
  return false;
}

/** The problem behind an error of the database, if it is one that a caller can do something about. */
export function databaseProblem(error: unknown): Problem | undefined {
  if (error instanceof CommitUnknownError) {
    return unavailable('The database did not confirm the change: look whether it happened, then try again.', 1, error);
  }
  if (isDatabaseAway(error)) return unavailable('The database is not available: try again.', 1, error);
  const state = sqlState(error);
  if (state === undefined) return undefined;
  if (BAD_INPUT.has(state)) return new Problem('invalid-request', 'A value cannot be stored.', { cause: error });
  if (state === '23505') return new Problem('conflict', 'That already exists.', { cause: error });
  if (state === '23503') return new Problem('conflict', 'It refers to something that is gone.', { cause: error });
  return undefined;
}
