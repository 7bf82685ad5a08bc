import { eq, type SQL } from 'drizzle-orm';
import type { PgColumn } from 'drizzle-orm/pg-core';
import type { FastifyInstance } from 'fastify';
import type { API_KEY_SCOPES, USER_ROLES } from '../db/schema.ts';
import { notFound, Problem } from './problem.ts';

// Who may do what, in one place. Each route names the rule it uses; a route without one does not start.

export type Scope = (typeof API_KEY_SCOPES)[number];
export type Role = (typeof USER_ROLES)[number];

/** Whoever is behind a request, and what the audit log keeps of it. */
export interface Actor {
  userId: number;
  role: Role;
  /** What the credential allows; tokens of a login allow everything. */
  scopes: readonly Scope[];
  ip: string;
  userAgent: string | null;
  requestId: string;
}

/** A rule and, unless it is public, the scopes of which the credential needs one. */
export type Access =
  /** Everybody, without a credential. */
  | { rule: 'public' }
  /** Whoever is signed in; the route concerns the caller alone. */
  | { rule: 'self'; scopes: readonly Scope[] }
  /** The owner of the thing, or an admin; lists hold only what the caller owns. */
  | { rule: 'owner'; scopes: readonly Scope[] }
  /** Admins. */
  | { rule: 'admin'; scopes: readonly Scope[] };

declare module 'fastify' {
  interface FastifyContextConfig {
    access?: Access;
  }
  interface FastifyInstance {
    /** Every route there is, with the rule that it declares, for whoever proves that it is kept. */
    declaredRoutes: { method: string; url: string; access: Access }[];
  }
}

/** Whether `actor` may see and change what belongs to `ownerId`. */
export function mayAccess(actor: Pick<Actor, 'userId' | 'role'>, ownerId: number): boolean {
  return actor.role === 'admin' || actor.userId === ownerId;
}

/**
 * The owner rule for one thing: answers the row, or throws 404 when there is none and 403 when it is somebody else's.
 */
export function requireAccess<T extends { userId: number }>(
  actor: Pick<Actor, 'userId' | 'role'>,
  row: T | undefined,
  what: string,
  id: number,
): T {
  if (row === undefined) throw notFound(what, id);
  if (!mayAccess(actor, row.userId)) throw new Problem('forbidden', `The ${what} ${id} belongs to somebody else.`);
  return row;
}

/** Throws 403 unless the credential has one of the scopes that are `allowed`; tokens of a login have all. */
export function requireScope(scopes: readonly Scope[], allowed: readonly Scope[]): void {
  if (allowed.some((scope) => scopes.includes(scope))) return;
  throw new Problem('forbidden', `This needs an API key with the scope ${allowed.join(' or ')}.`);
}

/** The owner rule for lists: a condition on the owner column, or undefined for admins, who see all. */
export function ownedBy(actor: Pick<Actor, 'userId' | 'role'>, owner: PgColumn): SQL | undefined {
  return actor.role === 'admin' ? undefined : eq(owner, actor.userId);
}

/** Routes of plugins, which cannot say it themselves: preflights (@fastify/cors) and the docs page (@fastify/swagger-ui). */
const PUBLIC_ROUTES_OF_PLUGINS = /^(\*|\/docs(\/.*)?)$/;

/** Makes every route of `app` declare its rule: one that does not stops the start. */
export function requireAccessRules(app: FastifyInstance): void {
  const declared: FastifyInstance['declaredRoutes'] = [];
  app.decorate('declaredRoutes', declared);
  app.addHook('onRoute', (route) => {
    if (route.config?.access) {
      for (const method of [route.method].flat())
        declared.push({ method, url: route.url, access: route.config.access });
      return;
    }
    if (!PUBLIC_ROUTES_OF_PLUGINS.test(route.url)) {
      throw new Error(`${String(route.method)} ${route.url} declares no access rule.`);
    }
    route.config = { ...route.config, access: { rule: 'public' }, limit: 'none' };
  });
}
