import { createHash } from 'node:crypto';
import { and, asc, desc, type SQL, sql } from 'drizzle-orm';
import { z } from 'zod';
import { invalid } from './problem.ts';
import { booleanText, integerText } from './validation.ts';

// Lists: offset or cursor, a total that may be left out, and an order whose ties are broken by id.

/** The query parameters that every list takes besides its filters. */
export const pageQuery = (options: { max?: number; default?: number } = {}) => ({
  limit: integerText(1, options.max ?? 100)
    .optional()
    .transform((limit) => limit ?? options.default ?? 20),
  offset: integerText(0, 1_000_000).optional(),
  cursor: z.string().max(512).optional(),
  total: booleanText.optional(),
  sort_order: z.enum(['asc', 'desc'], { error: 'must be asc or desc' }).optional(),
});

/** What every list answers besides its things. */
export const pageAnswer = {
  total: z.int().min(0).nullable().meta({ description: 'How many there are in all; null with total=false.' }),
  limit: z.int().min(1),
  offset: z.int().min(0),
  has_more: z.boolean(),
  next_cursor: z.string().nullable(),
};

export interface PageRequest {
  limit: number;
  offset?: number | undefined;
  cursor?: string | undefined;
  total?: boolean | undefined;
}

export interface Page<T> {
  rows: T[];
  total: number | null;
  limit: number;
  offset: number;
  has_more: boolean;
  next_cursor: string | null;
}

/** A sort key: the expression that rows are ordered by, and the Postgres type that its values are cast to. */
export interface SortKey {
  by: SQL;
  type: 'timestamptz' | 'text' | 'bigint' | 'smallint';
}

/**
 * One page of a list. `select` runs the query with the conditions, order and limits it is given, and answers with each row
 * the sort key's value as text; `count` counts with the filter alone. The cursor is bound to `scope` (who asks, for what,
 * in which order): with any other it is refused, since its place would mean nothing there.
 */
export async function paginate<T>(options: {
  page: PageRequest;
  scope: unknown;
  sort: SortKey;
  order: 'asc' | 'desc';
  id: SQL;
  filter: SQL | undefined;
  select: (parts: {
    where: SQL | undefined;
    orderBy: SQL[];
    limit: number;
    offset: number;
    key: SQL<string>;
  }) => Promise<{ row: T; id: number; key: string }[]>;
  count: (where: SQL | undefined) => Promise<number>;
}): Promise<Page<T>> {
  const { page, sort, order, id, filter } = options;
  if (page.cursor !== undefined && page.offset !== undefined) {
    throw invalid('query.cursor', 'cannot be combined with offset; give one of them');
  }
  const scope = createHash('sha256').update(JSON.stringify(options.scope)).digest('base64url').slice(0, 16);
  const offset = page.offset ?? 0;
  const direction = order === 'asc' ? asc : desc;
  const after = page.cursor === undefined ? undefined : afterCursor(page.cursor, scope, sort, order, id);
  const found = await options.select({
    where: and(filter, after),
    orderBy: [direction(sort.by), direction(id)],
    limit: page.limit + 1,
    offset,
    key: sql<string>`(${sort.by})::text`,
  });
  const rows = found.slice(0, page.limit);
  const last = rows.at(-1);
  const more = found.length > page.limit;
  return {
    rows: rows.map(({ row }) => row),
    total: page.total === false ? null : await options.count(filter),
    limit: page.limit,
    offset,
    has_more: more,
    next_cursor: more && last ? Buffer.from(JSON.stringify([scope, last.key, last.id])).toString('base64url') : null,
  };
}

const cursorShape = z.tuple([z.string(), z.string(), z.int().min(1)]);

function afterCursor(cursor: string, scope: string, sort: SortKey, order: 'asc' | 'desc', id: SQL): SQL {
  const refused = invalid(
    'query.cursor',
    'is not one that this list gave for the same filters and order; leave it out to start over',
  );
  let decoded: unknown;
  try {
    decoded = JSON.parse(Buffer.from(cursor, 'base64url').toString('utf8'));
  } catch {
    throw refused;
  }
  const parsed = cursorShape.safeParse(decoded);
  if (!parsed.success || parsed.data[0] !== scope || !isKey(parsed.data[1], sort.type)) throw refused;
  const [, key, lastId] = parsed.data;
  const place = sql`(${key}::${sql.raw(sort.type)}, ${lastId}::bigint)`;
  return order === 'asc' ? sql`(${sort.by}, ${id}) > ${place}` : sql`(${sort.by}, ${id}) < ${place}`;
}

/** Whether a cursor's value can be cast: it comes from outside, and Postgres must not be the one to refuse it. */
function isKey(key: string, type: SortKey['type']): boolean {
  if (type === 'timestamptz')
    return /^(infinity|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?[+-]\d\d(:\d\d)?)$/.test(key);
  if (type === 'text') return !key.includes('\0') && key.isWellFormed();
  return /^-?\d{1,15}$/.test(key) && (type === 'bigint' || Math.abs(Number(key)) < 32_768);
}
