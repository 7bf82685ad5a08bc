import { createRequire } from 'node:module';
import type { ValidateFunction } from 'ajv';
import type { TestServer } from './server.ts';

// Both come as CommonJS whose default export types and modules disagree about.
const load = createRequire(import.meta.url);
const { Ajv2020 } = load('ajv/dist/2020.js') as typeof import('ajv/dist/2020.js');
const addFormats = load('ajv-formats') as typeof import('ajv-formats').default;

export interface JsonSchema {
  $ref?: string;
  type?: string | string[];
  enum?: unknown[];
  format?: string;
  pattern?: string;
  minimum?: number;
  maximum?: number;
  minLength?: number;
  maxLength?: number;
  minItems?: number;
  items?: JsonSchema;
  anyOf?: JsonSchema[];
  properties?: Record<string, JsonSchema>;
  required?: string[];
}
interface Content {
  schema: JsonSchema;
  example?: unknown;
  examples?: Record<string, { value: unknown }>;
}
export interface Operation {
  /** As the document has it, with `{id}`. */
  path: string;
  method: string;
  operationId: string;
  parameters: { name: string; in: 'query' | 'path' | 'header'; schema: JsonSchema; required?: boolean }[];
  body: Content | undefined;
  answers: Record<string, Content | undefined>;
}

export interface ApiDocument {
  operations: Operation[];
  /** Checks values against a schema of the document. */
  validator(schema: JsonSchema): ValidateFunction;
}

/** The API document of a server, as tests go through it. */
export async function readApiDocument(server: TestServer): Promise<ApiDocument> {
  const { body: document } = await server.as(undefined)('GET', '//openapi.json');
  const ajv = new Ajv2020({ strict: false, allErrors: false, validateFormats: true });
  addFormats(ajv);
  ajv.addSchema(document, 'api');
  const compiled = new Map<string, ValidateFunction>();
  const absolute = (text: string) => text.replaceAll('"#/components/', '"api#/components/');
  return {
    operations: Object.entries(document.paths as Record<string, Record<string, Record<string, never>>>).flatMap(
      ([path, methods]) =>
        Object.entries(methods).map(([method, operation]) => ({
          path,
          method: method.toUpperCase(),
          operationId: operation['operationId'] as unknown as string,
          parameters: (operation['parameters'] ?? []) as Operation['parameters'],
          body: jsonOf(operation['requestBody']),
          answers: Object.fromEntries(
            Object.entries((operation['responses'] ?? {}) as Record<string, unknown>).map(([status, answer]) => [
              status,
              jsonOf(answer),
            ]),
          ),
        })),
    ),
    validator(schema) {
      const text = absolute(JSON.stringify(schema));
      let validate = compiled.get(text);
      if (!validate) {
        validate = ajv.compile(JSON.parse(text));
        compiled.set(text, validate);
      }
      return validate;
    },
  };
}

function jsonOf(part: unknown): Content | undefined {
  const { content } = (part ?? {}) as { content?: Record<string, Content> };
  return content?.['application/json'] ?? content?.['application/problem+json'];
}
