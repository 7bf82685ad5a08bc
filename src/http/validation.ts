import { isUtf8 } from 'node:buffer';
import fastJsonStringify from 'fast-json-stringify';
import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { type FieldError, Problem } from './problem.ts';

// One zod schema per wire shape: it validates what comes in, compiles what goes out, and makes the OpenAPI document.

const MAX_DEPTH = 32;
const MAX_KEYS = 1_000;

/** An id in a path or a query: a positive integer up to 2^53−1, in plain decimal digits. */
export const idText = z
  .string()
  .regex(/^[1-9]\d{0,15}$/, { error: 'must be a positive whole number' })
  .transform(Number)
  .refine(Number.isSafeInteger, { error: 'must be at most 9007199254740991' })
  .meta({ type: 'integer', minimum: 1, maximum: Number.MAX_SAFE_INTEGER });

/** An id in a JSON body or an answer. */
export const id = z.int({ error: 'must be a positive whole number' }).min(1).max(Number.MAX_SAFE_INTEGER);

/** The `{id}` of a path. */
export const idParams = z.strictObject({ id: idText });

/** A whole number in a query string: plain decimal digits, nothing that merely converts to a number. */
export function integerText(min: number, max: number) {
  const error = `must be a whole number from ${min} to ${max}`;
  return z
    .string()
    .regex(/^(0|[1-9]\d{0,15})$/, { error })
    .transform(Number)
    .refine((n) => n >= min && n <= max, { error })
    .meta({ type: 'integer', minimum: min, maximum: max });
}

/** `true` or `false` in a query string. */
export const booleanText = z
  .enum(['true', 'false'], { error: 'must be true or false' })
  .transform((text) => text === 'true')
  .meta({ type: 'boolean' });

/** An instant: RFC 3339 with a zone, in the years 1970 to 9999. */
export const instant = z.iso
  .datetime({ offset: true, error: 'must be an RFC 3339 time with a zone, such as 2026-11-23T09:00:00.000Z' })
  .transform((text) => new Date(text))
  .refine((date) => date.getTime() >= 0 && date.getTime() < 253_402_300_800_000, {
    error: 'must be between 1970 and 9999',
  })
  .meta({ type: 'string', format: 'date-time' });

/** An instant in an answer: UTC with milliseconds. */
export const time = z.string().meta({ format: 'date-time', example: '2026-11-23T09:00:00.000Z' });

/** A Date as the wire has it. */
export function toTime(date: Date): string;
export function toTime(date: Date | null): string | null;
export function toTime(date: Date | null): string | null {
  return date === null ? null : date.toISOString();
}

/** JSON Schema as the compilers and the OpenAPI document want it: a nullable is a list of types, not a choice of schemas. */
export function simplifyNullable({ jsonSchema }: { jsonSchema: z.core.JSONSchema.BaseSchema }): void {
  const [first, second, ...more] = jsonSchema.anyOf ?? [];
  if (!first || second === undefined || more.length > 0) return;
  if (typeof first !== 'object' || typeof second !== 'object' || second.type !== 'null') return;
  if (typeof first.type !== 'string') return;
  delete jsonSchema.anyOf;
  Object.assign(jsonSchema, first, { type: [first.type, 'null'] });
  if (first.enum) jsonSchema.enum = [...first.enum, null];
}

/** Validation by zod, answers by compiled serialisers, bodies as JSON only, and the input guard, for every route of `app`. */
export function validateWithZod(app: FastifyInstance): void {
  app.setValidatorCompiler<z.ZodType>(({ schema, httpPart }) => (data: unknown) => {
    const parsed = schema.safeParse(data);
    if (parsed.success) return { value: parsed.data };
    return { error: validationProblem(parsed.error, httpPart ?? 'body') };
  });

  const compiled = new WeakMap<z.ZodType, (data: unknown) => string>();
  app.setSerializerCompiler<z.ZodType>(({ schema }) => {
    let stringify = compiled.get(schema);
    if (!stringify) {
      const { $schema: _, ...jsonSchema } = z.toJSONSchema(schema, { io: 'output', override: simplifyNullable });
      stringify = fastJsonStringify(jsonSchema as object);
      compiled.set(schema, stringify);
    }
    return stringify;
  });

  const parseJson = app.getDefaultJsonParser('error', 'error');
  app.removeAllContentTypeParsers();
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (request, body, done) => {
    // Routes whose body is optional see an empty one as none; the others say what is missing.
    if (body.length === 0) return done(null, undefined);
    if (!isUtf8(body as Buffer)) return done(new Problem('invalid-json', 'The body is not valid UTF-8.'));
    parseJson(request, body.toString('utf8'), done);
  });

  // Compressed bodies are not taken: a small one can stand for any amount of memory (RFC 9110, 15.5.16). Told only now, after
  // the call was counted and its credential checked, and before a byte of the body is read.
  app.addHook('preParsing', async (request) => {
    const encoding = request.headers['content-encoding'];
    if (encoding === undefined || encoding.toLowerCase() === 'identity') return;
    throw new Problem('unsupported-media-type', 'Send the body as it is, without Content-Encoding.', {
      headers: { 'accept-encoding': 'identity' },
    });
  });

  // A query that a route does not declare is refused like any other unknown field.
  app.addHook('onRoute', (route) => {
    route.schema = { querystring: z.strictObject({}), ...route.schema };
  });

  app.addHook('preValidation', async (request) => {
    guardInput([
      [request.params, 'path'],
      [request.query, 'query'],
      [request.body, 'body'],
    ]);
    // A route that declares no body refuses every field of one. Not by a schema, which would tell of a body in the document.
    if (request.body === undefined || request.is404 || request.routeOptions.schema?.body !== undefined) return;
    const parsed = noBody.safeParse(request.body);
    if (!parsed.success) throw validationProblem(parsed.error, 'body');
  });
}

const noBody = z.strictObject({});

function validationProblem(error: z.ZodError, part: string): Problem {
  const place = part === 'querystring' ? 'query' : part === 'params' ? 'path' : part;
  const errors = fieldErrors(error, place);
  const [first] = errors;
  const more = errors.length > 1 ? ` (and ${errors.length - 1} more)` : '';
  return new Problem('invalid-request', `${first?.path} ${first?.message}${more}.`, { errors });
}

/** What zod found, in our words; paths begin with `place`. */
export function fieldErrors(error: z.ZodError, place: string): FieldError[] {
  return error.issues.flatMap((issue) => {
    const path = [place, ...issue.path.map(String)].join('.');
    if (issue.code === 'unrecognized_keys') {
      return issue.keys.map((key) => ({ path: `${path}.${key.slice(0, 64)}`, message: 'is not a known field' }));
    }
    return [{ path, message: message(issue) }];
  });
}

function message(issue: z.core.$ZodIssue): string {
  // A custom sentence starts in lower case by convention here; zod's own starts with a capital.
  if (issue.code === 'invalid_type' && issue.input === undefined && issue.message.startsWith('Invalid input')) {
    return /received undefined/.test(issue.message) ? 'is required' : lower(issue.message);
  }
  return lower(issue.message);
}

const lower = (text: string) => text.charAt(0).toLowerCase() + text.slice(1);

/**
 * Refuses by a 400, before any validation, what no field may hold: U+0000 and lone surrogates (Postgres stores neither, or
 * changes it silently), numbers that are not finite (1e400 parses to Infinity), and nesting or key counts that make
 * later recursion fail. It walks with a stack of its own, since a recursion is what deep nesting would break.
 */
export function guardInput(parts: readonly (readonly [value: unknown, place: string])[]): void {
  let keys = 0;
  const stack: [value: unknown, path: string, depth: number][] = parts.map(([value, place]) => [value, place, 0]);
  const refuse = (path: string, text: string): never => {
    const shown = path.length > 200 ? `${path.slice(0, 200).toWellFormed().replaceAll('\0', '\\0')}…` : path;
    throw new Problem('invalid-request', `${shown} ${text}.`, { errors: [{ path: shown, message: text }] });
  };
  const checkText = (text: string, path: string, what: string) => {
    if (text.includes('\0')) refuse(path, `${what} must not contain U+0000`.trimStart());
    if (!text.isWellFormed()) refuse(path, `${what} must be well-formed Unicode`.trimStart());
  };
  for (let entry = stack.pop(); entry; entry = stack.pop()) {
    const [value, path, depth] = entry;
    if (typeof value === 'string') checkText(value, path, '');
    else if (typeof value === 'number' && !Number.isFinite(value)) refuse(path, 'is a number out of range');
    else if (typeof value === 'object' && value !== null) {
      if (depth > MAX_DEPTH) refuse('body', `must not nest deeper than ${MAX_DEPTH} levels`);
      if (Array.isArray(value)) {
        for (let i = 0; i < value.length; i++) stack.push([value[i], `${path}.${i}`, depth + 1]);
      } else {
        for (const [key, child] of Object.entries(value)) {
          if (++keys > MAX_KEYS) refuse('body', `must not have more than ${MAX_KEYS} keys`);
          checkText(key, path, 'has a key that');
          stack.push([child, `${path}.${key}`, depth + 1]);
        }
      }
    }
  }
}
