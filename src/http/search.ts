import { type SQL, sql } from 'drizzle-orm';

/** Below this a text has no trigram of its own, and an index of trigrams cannot find it inside of words. */
const TRIGRAM = 3;

/**
 * Whether `expression` holds `text`, in any case. `expression` must be the one that a trigram index is over, to the letter.
 * Texts of one or two characters are looked for at the starts of words, which the index can do: a hit inside of words is
 * what hardly anybody means, and would cost a walk through everything.
 */
export function contains(expression: SQL, text: string): SQL {
  if (text.length >= TRIGRAM || !/^[\p{L}\p{N}]+$/u.test(text)) {
    return sql`${expression} ilike ${`%${text.replace(/[\\%_]/g, '\\$&')}%`}`;
  }
  return sql`${expression} ~* ${`\\m${text}`}`;
}
