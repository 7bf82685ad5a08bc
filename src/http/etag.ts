import { z } from 'zod';
import { Problem } from './problem.ts';

// Conditional changes, RFC 9110 section 13. A tag stands for what people write of a thing, its `version`, and not for what
// its runs do to it. It is strong, since If-Match compares strongly; the weak form is taken too, since compressing proxies
// make one out of the other.

const entityTags = /^\s*(\*|(W\/)?"[^"]*"(\s*,\s*(W\/)?"[^"]*")*)\s*$/;

/** The header of a conditional change. */
export const ifMatchHeaders = z.looseObject({
  'if-match': z
    .string()
    .regex(entityTags, { error: 'must be * or an ETag that a GET answered, such as "3"' })
    .optional()
    .meta({ description: 'Make the change only while the thing is still at this ETag; else 412.', example: '"1"' }),
});

/** The tag of a thing. */
export const etag = (thing: { version: number }) => `"${thing.version}"`;

/** The versions that an If-Match allows; undefined when it allows any. */
export function versions(ifMatch: string | undefined): number[] | undefined {
  if (ifMatch === undefined || ifMatch.trim() === '*') return undefined;
  return [...ifMatch.matchAll(/"(\d+)"/g)].map(([, version]) => Number(version));
}

/** Throws the 412 when the thing is at none of the `expected` versions; undefined expects nothing. */
export function requireVersion(
  what: string,
  thing: { id: number; version: number },
  expected: readonly number[] | undefined,
): void {
  if (expected === undefined || expected.includes(thing.version)) return;
  throw new Problem(
    'precondition-failed',
    `The ${what} ${thing.id} has changed and is at version ${thing.version}: get it and make the change to that.`,
  );
}
