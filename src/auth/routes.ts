import type { FastifyReply, FastifyRequest } from 'fastify';
import { z } from 'zod';
import type { App, Deps } from '../http/app.ts';
import { unauthorized } from '../http/authenticate.ts';
import { answerOnce, idempotencyHeaders } from '../http/idempotency.ts';
import { invalid, Problem } from '../http/problem.ts';
import { addressKey } from '../http/rate-limit.ts';
import { idParams } from '../http/validation.ts';
import type { AccessTokens } from './access-tokens.ts';
import { createApiKey, listApiKeys, revokeApiKey } from './api-keys.ts';
import { hashPassword, passwordFault, verifyPassword } from './passwords.ts';
import {
  apiKeyBody,
  apiKeyList,
  apiKeyQuery,
  apiKeyView,
  loginBody,
  newApiKeyAnswer,
  refreshBody,
  registerBody,
  ticketAnswer,
  tokenAnswer,
  userAnswer,
  userView,
} from './schemas.ts';
import { endSession, recordRefusedLogin, rotateSession, startSession } from './sessions.ts';
import { createTicket, TICKET_SECONDS } from './tickets.ts';
import { hashSecret } from './tokens.ts';
import { createUser, findUser, findUserByEmail, type Visitor } from './users.ts';

/** How many wrong passwords an address may give for one email in a minute, and for all emails together. */
const WRONG_PER_EMAIL = 5;
const WRONG_PER_ADDRESS = 50;

/** Signing in and out, and API keys. */
export function authRoutes(app: App, deps: Deps & { tokens: AccessTokens }): void {
  const { db, config, limits, tokens } = deps;
  const tags = ['auth'];
  const open = { access: { rule: 'public' } } as const;
  const self = (scope: 'read' | 'write') => ({ access: { rule: 'self', scopes: [scope] } }) as const;

  // Counted are wrong answers, per address: who guesses elsewhere cannot lock a user out.
  const wrongForEmail = limits.create({
    name: 'wrong-for-email',
    max: WRONG_PER_EMAIL,
    key: (request) => `${addressKey(request)} ${hashSecret(String((request.body as { email?: unknown }).email))}`,
  });
  const wrongFromAddress = limits.create({ name: 'wrong-from-address', max: WRONG_PER_ADDRESS, key: addressKey });

  app.post(
    '/auth/register',
    {
      config: open,
      schema: { tags, summary: 'Register as a user', body: registerBody, response: { 201: userAnswer } },
    },
    async (request, reply) => {
      if (!config.registrationOpen) {
        throw new Problem('forbidden', 'Registration is closed here: ask an admin for an account.');
      }
      const { email, password, name } = request.body;
      const fault = passwordFault(password, email);
      if (fault) throw invalid('body.password', fault);
      const passwordHash = await hashPassword(password);
      const user = await db.transaction((tx) =>
        createUser(tx, visitor(request), { email, name: name ?? null, role: 'user', passwordHash }),
      );
      return reply.code(201).send(userView(user));
    },
  );

  app.post(
    '/auth/login',
    { config: open, schema: { tags, summary: 'Log in', body: loginBody, response: { 200: tokenAnswer } } },
    async (request, reply) => {
      requireOwnTokens(tokens);
      const turnAwayGuessers = async () => {
        await wrongForEmail.peek(request, reply);
        await wrongFromAddress.peek(request, reply);
      };
      await turnAwayGuessers();
      const { email, password } = request.body;
      const user = await findUserByEmail(db, email);
      const right = await verifyPassword(password, user?.passwordHash);
      // Guesses that came at once had all passed by then: those that are checked too late must learn nothing.
      await turnAwayGuessers();
      if (!right || !user || user.disabledAt) {
        await wrongForEmail.hit(request, reply);
        await wrongFromAddress.hit(request, reply);
        await db.transaction(async (tx) => recordRefusedLogin(tx, visitor(request), email, user?.id ?? null));
        throw unauthorized('The email address or the password is wrong.');
      }
      const session = await db.transaction((tx) =>
        startSession(tx, visitor(request), user.id, config.REFRESH_TOKEN_TTL_SECONDS),
      );
      return sendTokens(reply, { ...session, userId: user.id });
    },
  );

  app.post(
    '/auth/refresh',
    {
      config: open,
      schema: {
        tags,
        summary: 'Exchange a refresh token for new tokens',
        body: refreshBody,
        response: { 200: tokenAnswer },
      },
    },
    async (request, reply) => {
      requireOwnTokens(tokens);
      const next = await db.transaction((tx) =>
        rotateSession(tx, visitor(request), request.body.refresh_token, config.REFRESH_TOKEN_TTL_SECONDS),
      );
      if (!next) throw unauthorized('The refresh token is not good any more: log in again.');
      return sendTokens(reply, next);
    },
  );

  app.post(
    '/auth/logout',
    {
      config: open,
      schema: {
        tags,
        summary: 'Log out: ends the login of a refresh token',
        body: refreshBody,
        response: { 204: z.null() },
      },
    },
    async (request, reply) => {
      await db.transaction((tx) => endSession(tx, visitor(request), request.body.refresh_token));
      return reply.code(204).send(null);
    },
  );

  app.get(
    '/auth/me',
    { config: self('read'), schema: { tags, summary: 'Who you are', response: { 200: userAnswer } } },
    async (request) => {
      const user = await findUser(db, request.actor.userId);
      if (!user) throw unauthorized('There is no such user any more.');
      return userView(user);
    },
  );

  app.post(
    '/auth/ws-ticket',
    {
      config: { ...self('read'), limit: 'activity' },
      schema: {
        tags,
        summary: 'Get a ticket that opens one WebSocket or event stream',
        description:
          'For browsers, so that no token stands in a URL: `/ws?ticket=…`. It is good once, for half a minute.',
        response: { 200: ticketAnswer },
      },
    },
    async (request, reply) => {
      if (!request.identity) throw new Error('The call has no identity.');
      const ticket = await createTicket(db, request.identity);
      return reply.header('cache-control', 'no-store').send({ ticket, expires_in: TICKET_SECONDS });
    },
  );

  app.post(
    '/auth/api-keys',
    {
      config: self('write'),
      schema: {
        tags,
        summary: 'Make an API key',
        headers: idempotencyHeaders,
        body: apiKeyBody,
        response: { 201: newApiKeyAnswer },
      },
    },
    async (request, reply) => {
      const { name, scopes, expires_at: expiresAt = null } = request.body;
      if (expiresAt && expiresAt.getTime() <= Date.now()) throw invalid('body.expires_at', 'must be in the future');
      reply.header('cache-control', 'no-store');
      return answerOnce(
        db,
        request,
        reply,
        async (tx) => {
          const wanted = { name, scopes: scopes ?? request.actor.scopes, expiresAt };
          const { key, apiKey } = await createApiKey(tx, request.actor, wanted);
          return { status: 201, body: { ...apiKeyView(apiKey), key } };
        },
        { secret: true },
      );
    },
  );

  app.get(
    '/auth/api-keys',
    {
      config: self('read'),
      schema: { tags, summary: 'List your API keys', querystring: apiKeyQuery, response: { 200: apiKeyList } },
    },
    async (request) => {
      const { rows, ...page } = await listApiKeys(db, request.actor, request.query);
      return { api_keys: rows.map(apiKeyView), ...page };
    },
  );

  app.delete(
    '/auth/api-keys/:id',
    {
      config: { access: { rule: 'owner', scopes: ['write'] } },
      schema: { tags, summary: 'Revoke an API key', params: idParams, response: { 204: z.null() } },
    },
    async (request, reply) => {
      await db.transaction((tx) => revokeApiKey(tx, request.actor, request.params.id));
      return reply.code(204).send(null);
    },
  );

  function sendTokens(reply: FastifyReply, login: { userId: number; family: string; refreshToken: string }) {
    return reply.header('cache-control', 'no-store').send({
      access_token: requireOwnTokens(tokens)(login.userId, login.family),
      refresh_token: login.refreshToken,
      token_type: 'bearer',
      expires_in: config.ACCESS_TOKEN_TTL_SECONDS,
    });
  }
}

function requireOwnTokens({ sign }: AccessTokens): NonNullable<AccessTokens['sign']> {
  if (!sign) {
    throw new Problem(
      'forbidden',
      'Tokens come from the issuer that this server is set up with: log in there, or use an API key.',
    );
  }
  return sign;
}

const visitor = (request: FastifyRequest): Visitor => ({
  ip: request.ip,
  userAgent: request.headers['user-agent']?.slice(0, 512) ?? null,
  requestId: request.id,
});
