import { z } from 'zod';
import { API_KEY_SCOPES, USER_ROLES } from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, instant, time, toTime } from '../http/validation.ts';
import type { ApiKey } from './api-keys.ts';
import type { User } from './users.ts';

const email = z
  .email({ error: 'must be an email address' })
  .max(254, { error: 'must be at most 254 characters' })
  .toLowerCase();

export const registerBody = z
  .strictObject({
    email,
    password: z
      .string()
      .min(8, { error: 'must have at least 8 characters' })
      .max(128, { error: 'must have at most 128 characters' }),
    name: z.string().trim().min(1).max(255).optional(),
  })
  .meta({ examples: [{ email: 'ada@example.com', password: 'correct horse battery', name: 'Ada' }] });

export const loginBody = z
  .strictObject({ email: z.string().max(254).toLowerCase(), password: z.string().max(128) })
  .meta({ examples: [{ email: 'ada@example.com', password: 'correct horse battery' }] });

export const refreshBody = z.strictObject({ refresh_token: z.string().min(1).max(128) });

export const tokenAnswer = z
  .object({
    access_token: z.string(),
    refresh_token: z.string(),
    token_type: z.literal('bearer'),
    expires_in: z.int().meta({ description: 'Seconds until the access token expires.' }),
  })
  .meta({ id: 'Tokens' });

export const userAnswer = z
  .object({
    id,
    email: z.string(),
    name: z.string().nullable(),
    role: z.enum(USER_ROLES),
    created_at: time,
    updated_at: time,
  })
  .meta({ id: 'User' });

export const apiKeyBody = z
  .strictObject({
    name: z.string().trim().min(1).max(255),
    scopes: z
      .array(z.enum(API_KEY_SCOPES, { error: `must be one of ${API_KEY_SCOPES.join(', ')}` }))
      .min(1)
      .max(API_KEY_SCOPES.length)
      .refine((scopes) => new Set(scopes).size === scopes.length, { error: 'must not name a scope twice' })
      .optional()
      .meta({ description: 'All that the calling credential has, unless given.' }),
    expires_at: instant.optional(),
  })
  .meta({ examples: [{ name: 'build agents', scopes: ['agent'] }] });

const apiKeyFields = {
  id,
  name: z.string(),
  prefix: z.string().meta({ description: 'The first characters of the key, to recognise it by.' }),
  scopes: z.array(z.enum(API_KEY_SCOPES)),
  expires_at: time.nullable(),
  last_used_at: time.nullable(),
  created_at: time,
};
export const apiKeyAnswer = z.object(apiKeyFields).meta({ id: 'ApiKey' });
export const newApiKeyAnswer = z
  .object({ ...apiKeyFields, key: z.string().meta({ description: 'Shown this once.' }) })
  .meta({ id: 'NewApiKey' });
export const apiKeyQuery = z.strictObject(pageQuery()).omit({ sort_order: true });
export const apiKeyList = z.object({ api_keys: z.array(apiKeyAnswer), ...pageAnswer });

/** A user on the wire. */
export function userView(user: User): z.input<typeof userAnswer> {
  return {
    id: user.id,
    email: user.email,
    name: user.name,
    role: user.role,
    created_at: toTime(user.createdAt),
    updated_at: toTime(user.updatedAt),
  };
}

/** An API key on the wire. */
export function apiKeyView(apiKey: ApiKey): z.input<typeof apiKeyAnswer> {
  return {
    id: apiKey.id,
    name: apiKey.name,
    prefix: apiKey.prefix,
    scopes: apiKey.scopes,
    expires_at: toTime(apiKey.expiresAt),
    last_used_at: toTime(apiKey.lastUsedAt),
    created_at: toTime(apiKey.createdAt),
  };
}

export const ticketAnswer = z.object({ ticket: z.string(), expires_in: z.int() }).meta({ id: 'WsTicket' });
