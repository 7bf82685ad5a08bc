import swagger from '@fastify/swagger';
import swaggerUi from '@fastify/swagger-ui';
import type { FastifyInstance } from 'fastify';
import { createJsonSchemaTransform, createJsonSchemaTransformObject } from 'fastify-type-provider-zod';
import type { OpenAPIV3_1 } from 'openapi-types';
import { z } from 'zod';
import { exampleOf, type Schema } from './openapi-examples.ts';
import { PROBLEMS } from './problem.ts';
import { simplifyNullable } from './validation.ts';

const problemSchema: OpenAPIV3_1.SchemaObject = {
  type: 'object',
  description: 'A problem, RFC 9457.',
  required: ['type', 'title', 'status', 'detail', 'instance', 'request_id'],
  properties: {
    type: { type: 'string', enum: Object.keys(PROBLEMS).map((kind) => `urn:muster:problem:${kind}`) },
    title: { type: 'string' },
    status: { type: 'integer' },
    detail: { type: 'string', description: 'One sentence that says what to do.' },
    instance: { type: 'string' },
    request_id: { type: 'string' },
    errors: {
      type: 'array',
      items: {
        type: 'object',
        required: ['path', 'message'],
        properties: { path: { type: 'string' }, message: { type: 'string' } },
      },
    },
  },
};

/** Any JSON, as what a caller puts into `params`: with a name of its own, or clients would know nothing of it. */
const jsonValue = {
  description: 'Any JSON value.',
  anyOf: [
    { type: 'string' },
    { type: 'number' },
    { type: 'boolean' },
    { type: 'null' },
    { type: 'array', items: { $ref: '#/components/schemas/JsonValue' } },
    { type: 'object', additionalProperties: { $ref: '#/components/schemas/JsonValue' } },
  ],
} as OpenAPIV3_1.SchemaObject;

const options = {
  zodToJsonConfig: {
    override: (context: { zodSchema: unknown; jsonSchema: z.core.JSONSchema.BaseSchema }) => {
      simplifyNullable(context);
      const { zodSchema, jsonSchema } = context;
      if (zodSchema instanceof z.ZodUnknown) Object.assign(jsonSchema, { $ref: '#/components/schemas/JsonValue' });
    },
  },
};
const transform = createJsonSchemaTransform(options);
const transformObject = createJsonSchemaTransformObject(options);

/** Makes the OpenAPI 3.1 document from the routes that follow, and serves it and a page to try calls from. */
export async function describeApi(app: FastifyInstance, version: string): Promise<void> {
  await app.register(swagger, {
    openapi: {
      openapi: '3.1.0',
      info: {
        title: 'Muster',
        version,
        description: 'A control plane for AI agents: tasks on schedules, leased to agents, watched live.',
      },
      components: {
        securitySchemes: {
          bearer: { type: 'http', scheme: 'bearer', description: 'An access token or an API key.' },
        },
        schemas: { Problem: problemSchema, JsonValue: jsonValue },
      },
    },
    transformObject: (document) => withExamples(withoutUnused(transformObject(document))),
    transform: (route) => {
      const { schema, url } = transform(route);
      const access = route.route.config?.access;
      const open = access?.rule === 'public';
      return {
        url,
        schema: {
          ...schema,
          operationId: operationId(String(route.route.method), url),
          security: open ? [] : [{ bearer: [] }],
          ...(access && !open ? { description: describeAccess(schema.description, access) } : {}),
          response: {
            ...(schema.response as object),
            default: {
              description: 'A problem.',
              content: { 'application/problem+json': { schema: { $ref: '#/components/schemas/Problem' } } },
            },
          },
        },
      };
    },
  });
  app.get(
    '/openapi.json',
    { config: { access: { rule: 'public' }, limit: 'none' }, schema: { hide: true } },
    async () => app.swagger(),
  );
  await app.register(swaggerUi, {
    routePrefix: '/docs',
    theme: { title: 'Muster' },
    uiConfig: { layout: 'BaseLayout', tryItOutEnabled: true, docExpansion: 'list' },
    // The page needs its own scripts and inline styles, and calls this server alone; over http as well as https.
    staticCSP:
      "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'",
  });
}

function describeAccess(description: string | undefined, access: { rule: string; scopes: readonly string[] }): string {
  const who = { self: 'whoever is signed in', owner: 'the owner or an admin', admin: 'admins' }[access.rule];
  const rule = `For ${who}; an API key needs the scope \`${access.scopes.join('` or `')}\`.`;
  return description ? `${description}\n\n${rule}` : rule;
}

/** The name of a call in clients: its method and path, as in getTasksById; the same path always has the same. */
function operationId(method: string, url: string): string {
  const words = url
    .replace(/^\/api\/v1/, '')
    .split('/')
    .flatMap((part) => (part.startsWith(':') ? ['by', part.slice(1)] : part.split(/[^a-zA-Z0-9]/)))
    .filter(Boolean);
  // Health is also served below /api/v1.
  const prefix = url.startsWith('/api/v1') && words[0] === 'health' ? ['api'] : [];
  return [
    method.toLowerCase(),
    ...[...prefix, ...words].map((word) => word.charAt(0).toUpperCase() + word.slice(1)),
  ].join('');
}

interface Content {
  schema?: Schema;
  example?: unknown;
  examples?: unknown;
}

/** Gives every body that is sent and every one that is answered an example, unless it has one. */
function withExamples<T extends object>(document: T): T {
  const { paths, components } = document as unknown as {
    paths?: Record<string, Record<string, Record<'requestBody' | 'responses', unknown>>>;
    components?: { schemas?: Record<string, Schema> };
  };
  const resolve = (ref: string) => components?.schemas?.[ref.split('/').at(-1) ?? ''] ?? {};
  const complete = (body: unknown, whole: boolean) => {
    const content = (body as { content?: Record<string, Content> } | undefined)?.content?.['application/json'];
    if (!content?.schema || content.example !== undefined || content.examples !== undefined) return;
    content.example = exampleOf(content.schema, resolve, whole);
  };
  for (const operation of Object.values(paths ?? {}).flatMap((methods) => Object.values(methods))) {
    complete(operation.requestBody, false);
    for (const [status, answer] of Object.entries((operation.responses ?? {}) as object)) {
      if (status.startsWith('2')) complete(answer, true);
    }
  }
  return document;
}

/** Drops schemas that nothing refers to: every one comes in a variant for input and one for output. */
function withoutUnused<T extends object>(document: T): T {
  const { components } = document as { components?: { schemas?: Record<string, unknown> } };
  const schemas = components?.schemas ?? {};
  for (let dropped = true; dropped; ) {
    const text = JSON.stringify(document);
    const unused = Object.keys(schemas).filter((name) => !text.includes(`"#/components/schemas/${name}"`));
    for (const name of unused) delete schemas[name];
    dropped = unused.length > 0;
  }
  return document;
}
