// Examples for the API document, made from the schemas, so that they never go stale: an example of its own that a schema
// carries wins, then the examples below for fields by their name, then what the type allows.

export interface Schema {
  $ref?: string;
  type?: string | string[];
  enum?: unknown[];
  const?: unknown;
  format?: string;
  example?: unknown;
  examples?: unknown[];
  default?: unknown;
  minimum?: number;
  minItems?: number;
  items?: Schema;
  anyOf?: Schema[];
  oneOf?: Schema[];
  properties?: Record<string, Schema>;
  required?: string[];
  additionalProperties?: Schema | boolean;
}

const BY_NAME: Record<string, unknown> = {
  action: 'pause',
  capabilities: ['typescript'],
  cause: null,
  changed_fields: { name: { old: 'Report', new: 'Morning report' } },
  description: 'Everything that the website needs.',
  detail: 'The task 1 is completed and has no further run to pause: give it a new time instead.',
  email: 'ada@example.com',
  error: 'The report had no data.',
  error_text: null,
  ip_address: '203.0.113.7',
  lease_token: '3f6c0a52-6d0f-4a86-9a3e-2f0d1b0c5f11',
  message: 'Halfway through.',
  name: 'Morning report',
  next_cursor: null,
  output: 'The report is out.',
  output_preview: 'The report is out.',
  output_text: 'The report is out.',
  params: { audience: 'team' },
  percent: 50,
  refresh_token: 'mrt_0000000000000000000000000000000000000000000',
  required_capabilities: [],
  request_id: 'b2f6a5c8-5a5f-4b2e-9c2e-0b7d1d8d2f10',
  schedule_cron: '0 9 * * mon-fri',
  scopes: ['read'],
  skill_name: 'report',
  skills: ['report'],
  tasks_next_cursor: null,
  timezone: 'Europe/Rome',
  user_agent: 'curl/8.5',
  version: 1,
  wait_ms: 20_000,
};

/**
 * An example of a schema; `resolve` finds what a reference leads to. Of a body that is sent it has what is required and what
 * has an example, of one that is answered (`whole`) everything.
 */
export function exampleOf(schema: Schema, resolve: (ref: string) => Schema, whole: boolean, field = ''): unknown {
  if (schema.$ref !== undefined) {
    // Free JSON refers to itself.
    if (schema.$ref.endsWith('/JsonValue')) return 'value';
    return exampleOf(resolve(schema.$ref), resolve, whole, field);
  }
  if (schema.example !== undefined) return schema.example;
  if (schema.examples?.[0] !== undefined) return schema.examples[0];
  const [type] = [schema.type].flat();
  const nullable = [schema.type].flat().includes('null') || schema.anyOf?.some((one) => one.type === 'null');
  const byName = BY_NAME[field];
  if (byName !== undefined && (byName !== null || nullable) && fits(byName, type, schema)) return byName;
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (schema.default !== undefined) return schema.default;
  const choice = schema.anyOf?.[0] ?? schema.oneOf?.[0];
  if (choice) return exampleOf(choice, resolve, whole, field);
  switch (type) {
    case 'integer':
    case 'number':
      return Math.max(1, schema.minimum ?? 1);
    case 'boolean':
      return false;
    case 'string':
      return schema.format === 'date-time' ? '2026-11-23T09:00:00.000Z' : 'text';
    case 'array':
      return schema.items && (whole || (schema.minItems ?? 0) > 0) ? [exampleOf(schema.items, resolve, whole)] : [];
    case 'null':
      return null;
    default:
      return Object.fromEntries(
        Object.entries(schema.properties ?? {})
          .filter(([name, value]) => whole || schema.required?.includes(name) || value.example !== undefined)
          .map(([name, value]) => [name, exampleOf(value, resolve, whole, name)]),
      );
  }
}

function fits(value: unknown, type: string | undefined, schema: Schema): boolean {
  if (schema.enum) return schema.enum.includes(value);
  if (value === null) return true;
  if (Array.isArray(value)) return type === 'array';
  if (typeof value === 'number') return type === 'integer' || type === 'number';
  if (typeof value === 'object') return type === 'object';
  return typeof value === type;
}
