import { readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { availableParallelism } from 'node:os';
import { resolve } from 'node:path';
import { parseEnv } from 'node:util';
import { z } from 'zod';
import { readRedisUrl } from './platform/redis.ts';
import { StartupError } from './platform/startup-error.ts';

// The only reader of process.env. Every variable is in .env.example with its default; test/config.test.ts keeps the two in step.

const integer = (min: number, max: number, unit = '') => {
  const allowed = `a whole number from ${min} to ${max}${unit}`;
  return z
    .string()
    .regex(/^(0|[1-9]\d{0,15})$/, { error: allowed })
    .transform(Number)
    .refine((n) => n >= min && n <= max, { error: allowed });
};

const url = (protocols: string[], example: string) => {
  const allowed = `a URL such as ${example}`;
  return z.string().refine((text) => URL.canParse(text) && protocols.includes(new URL(text).protocol), {
    error: allowed,
  });
};

const list = z.string().transform((text) =>
  text
    .split(',')
    .map((part) => part.trim())
    .filter(Boolean),
);

const origins = list.refine(
  (all) => all.every((o) => o === '*' || (URL.canParse(o) && new URL(o).origin === o.toLowerCase())),
  { error: 'origins such as https://app.example.com, separated by commas, or * for any' },
);

/** An address or a CIDR block: what @fastify/proxy-addr takes. Hop counts and `true` are refused, since both let a caller choose its own address. */
const proxies = list.refine(
  (all) =>
    all.every((entry) => {
      const [address = '', bits] = entry.split('/');
      const family = isIP(address);
      if (family === 0) return false;
      return bits === undefined || (/^\d{1,3}$/.test(bits) && Number(bits) <= (family === 4 ? 32 : 128));
    }),
  { error: 'addresses or blocks of proxies you run, such as 10.0.0.5 or 10.0.0.0/8, separated by commas' },
);

const captured = list.refine((all) => all.every((what) => ['executions', 'activity', 'tasks', 'none'].includes(what)), {
  error: 'some of executions, activity and tasks, separated by commas, or none',
});

const json = <T>(schema: z.ZodType<T>, error: string) =>
  z.string().transform((text, context): T => {
    try {
      const parsed = schema.safeParse(JSON.parse(text));
      if (parsed.success) return parsed.data;
    } catch {
      // The same sentence as for JSON of another shape.
    }
    context.addIssue({ code: 'custom', message: error });
    return z.NEVER;
  });
const textList = json(z.array(z.string()), 'a JSON list of texts, such as ["-m","memory_server"]');
const textMap = json(
  z.record(z.string(), z.string()),
  'a JSON object of texts, such as {"MEMORY_FILE_PATH":"/data/m.json"}',
);

const variables = z.object({
  NODE_ENV: z
    .enum(['development', 'production', 'test'], { error: 'development, production or test' })
    .default('development'),
  HOST: z
    .string()
    .min(1, { error: 'an address or host name to listen on' })
    .regex(/^[\w.:-]+$/, { error: 'an address or host name to listen on' })
    .default('127.0.0.1'),
  PORT: integer(0, 65535).prefault('8080'),
  DATA_DIR: z.string().min(1, { error: 'a folder' }).default('.muster'),
  DATABASE_URL: url(['postgres:', 'postgresql:'], 'postgres://user:password@host:5432/muster').optional(),
  DATABASE_DIRECT_URL: url(['postgres:', 'postgresql:'], 'postgres://user:password@host:5432/muster').optional(),
  DATABASE_POOL_SIZE: integer(2, 200, ' connections').prefault('10'),
  REDIS_URL: z
    .string()
    .refine((text) => readRedisUrl(text) !== undefined, {
      error: 'a URL such as redis://host:6379, redis+sentinel://host1,host2/master or redis+cluster://host1,host2',
    })
    .optional(),
  WORKERS: z
    .string()
    .regex(/^(auto|[1-9]\d{0,2})$/, { error: 'a number of processes from 1 to 999, or auto for one per core' })
    .default('1'),
  TLS_CERT_FILE: z.string().min(1, { error: 'a PEM file' }).optional(),
  TLS_KEY_FILE: z.string().min(1, { error: 'a PEM file' }).optional(),
  LOG_LEVEL: z
    .enum(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'], {
      error: 'fatal, error, warn, info, debug, trace or silent',
    })
    .default('info'),
  JWT_SECRET: z
    .string()
    .refine((s) => Buffer.byteLength(s) >= 32 && new Set(s).size >= 10, {
      error: 'a random text of at least 32 bytes, for example from: openssl rand -base64 48',
    })
    .optional(),
  JWT_JWKS_URL: url(['https:', 'http:'], 'https://id.example.com').optional(),
  JWT_PUBLIC_KEY_FILE: z.string().min(1, { error: 'a PEM file' }).optional(),
  JWT_ISSUER: z.string().min(1, { error: 'the issuer (iss) that tokens carry' }).default('muster'),
  JWT_AUDIENCE: z.string().min(1, { error: 'the audience (aud) that tokens carry' }).default('muster'),
  ACCESS_TOKEN_TTL_SECONDS: integer(60, 3600, ' seconds').prefault('3600'),
  REFRESH_TOKEN_TTL_SECONDS: integer(3600, 7776000, ' seconds').prefault('604800'),
  AUTH_REGISTRATION: z.enum(['open', 'closed'], { error: 'open or closed' }).optional(),
  CORS_ORIGINS: origins.prefault(''),
  TRUST_PROXY: proxies.prefault(''),
  RATE_LIMIT_PER_MINUTE: integer(1, 1000000, ' requests').prefault('100'),
  RATE_LIMIT_ACTIVITY_PER_MINUTE: integer(1, 1000000, ' requests').prefault('1000'),
  BODY_LIMIT_BYTES: integer(1024, 16777216, ' bytes').prefault('1048576'),
  SHUTDOWN_TIMEOUT_SECONDS: integer(1, 600, ' seconds').prefault('20'),
  AGENT_OFFLINE_AFTER_SECONDS: integer(5, 86400, ' seconds').prefault('60'),
  LEASE_SECONDS: integer(2, 3600, ' seconds').prefault('30'),
  RETENTION_EXECUTIONS_DAYS: integer(0, 36500, ' days').prefault('90'),
  RETENTION_OCCURRENCES_DAYS: integer(0, 36500, ' days').prefault('30'),
  WS_MAX_CONNECTIONS_PER_USER: integer(1, 1000000, ' connections').prefault('200'),
  WS_MAX_CONNECTIONS_PER_ADDRESS: integer(1, 1000000, ' connections').prefault('1000'),
  METRICS: z.enum(['on', 'off', 'token'], { error: 'on, off or token' }).default('on'),
  MEMORY_CAPTURE: captured.prefault('executions,activity'),
  MEMORY_MCP_TRANSPORT: z
    .enum(['streamable-http', 'stdio', 'rest'], { error: 'streamable-http, stdio or rest' })
    .optional(),
  MEMORY_MCP_URL: url(['http:', 'https:'], 'http://127.0.0.1:8000/mcp').optional(),
  MEMORY_MCP_COMMAND: z.string().min(1, { error: 'a program to start' }).optional(),
  MEMORY_MCP_ARGS: textList.optional(),
  MEMORY_MCP_CWD: z.string().min(1, { error: 'a folder' }).optional(),
  MEMORY_MCP_ENV: textMap.optional(),
  MEMORY_MCP_API_KEY: z.string().min(1, { error: 'the key that the server wants' }).optional(),
  MEMORY_MCP_PROFILE: z
    .string()
    .regex(/^[a-z0-9-]+$/, { error: 'the name of a profile, such as server-memory' })
    .optional(),
  MEMORY_MCP_SEARCH_TIMEOUT_MS: integer(10, 60000, ' milliseconds').prefault('2000'),
  MEMORY_MCP_STORE_TIMEOUT_MS: integer(10, 60000, ' milliseconds').prefault('5000'),
  MEMORY_MCP_WARMUP_TIMEOUT_MS: integer(100, 600000, ' milliseconds').prefault('30000'),
  MEMORY_MCP_HEALTH_INTERVAL_MS: integer(50, 3600000, ' milliseconds').prefault('30000'),
  MEMORY_MCP_RESET_TIMEOUT_MS: integer(50, 3600000, ' milliseconds').prefault('60000'),
  WS_MAX_BUFFERED_BYTES: integer(65536, 67108864, ' bytes').prefault('1048576'),
});

/** The names of every environment variable that Muster reads, for the test that keeps .env.example in step. */
export const CONFIG_NAMES = Object.keys(variables.shape) as (keyof typeof variables.shape)[];

export type Config = Readonly<
  z.output<typeof variables> & {
    /** True when no DATABASE_URL is given and Muster starts its own Postgres. */
    embedded: boolean;
    /** How many processes serve. */
    workers: number;
    /** True where plain users may register themselves. */
    registrationOpen: boolean;
  }
>;

/**
 * Reads the configuration from `env` and, for names that `env` does not set, from the file `.env` in `folder`.
 * An empty value counts as not set. Throws StartupError with one sentence that names the variable and what is allowed;
 * the value itself is never repeated, since it may be a secret.
 */
export function readConfig(env: Record<string, string | undefined> = process.env, folder = process.cwd()): Config {
  const given: Record<string, string> = {};
  for (const [name, value] of [...Object.entries(readEnvFile(folder)), ...Object.entries(env)]) {
    if (value !== undefined && value !== '') given[name] = value;
  }
  const parsed = variables.safeParse(given);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new StartupError(`${String(issue?.path[0])} must be ${issue?.message}.`);
  }
  const config = parsed.data;
  const production = config.NODE_ENV === 'production';
  const sources = [config.JWT_SECRET, config.JWT_JWKS_URL, config.JWT_PUBLIC_KEY_FILE].filter(Boolean).length;
  if (sources > 1) {
    throw new StartupError('Set only one of JWT_SECRET, JWT_JWKS_URL and JWT_PUBLIC_KEY_FILE.');
  }
  if (production && sources === 0) {
    throw new StartupError('NODE_ENV=production needs JWT_SECRET, JWT_JWKS_URL or JWT_PUBLIC_KEY_FILE.');
  }
  if ((config.TLS_CERT_FILE === undefined) !== (config.TLS_KEY_FILE === undefined)) {
    throw new StartupError('TLS_CERT_FILE and TLS_KEY_FILE must be set together.');
  }
  if (production && config.JWT_JWKS_URL?.startsWith('http:')) {
    throw new StartupError('JWT_JWKS_URL must be an https URL in production.');
  }
  const { MEMORY_MCP_TRANSPORT: transport } = config;
  if (transport === 'stdio' && config.MEMORY_MCP_COMMAND === undefined) {
    throw new StartupError('MEMORY_MCP_TRANSPORT=stdio needs MEMORY_MCP_COMMAND.');
  }
  if (transport !== undefined && transport !== 'stdio' && config.MEMORY_MCP_URL === undefined) {
    throw new StartupError(`MEMORY_MCP_TRANSPORT=${transport} needs MEMORY_MCP_URL.`);
  }
  if (transport !== undefined && config.MEMORY_MCP_PROFILE === undefined) {
    throw new StartupError('MEMORY_MCP_TRANSPORT needs MEMORY_MCP_PROFILE: the kind of server it leads to.');
  }
  if (transport === undefined && (config.MEMORY_MCP_URL ?? config.MEMORY_MCP_COMMAND) !== undefined) {
    throw new StartupError('MEMORY_MCP_URL and MEMORY_MCP_COMMAND need MEMORY_MCP_TRANSPORT.');
  }
  return {
    ...config,
    DATA_DIR: resolve(folder, config.DATA_DIR),
    embedded: config.DATABASE_URL === undefined,
    workers: config.WORKERS === 'auto' ? availableParallelism() : Number(config.WORKERS),
    registrationOpen: (config.AUTH_REGISTRATION ?? (production ? 'closed' : 'open')) === 'open',
  };
}

function readEnvFile(folder: string): Record<string, string | undefined> {
  try {
    return parseEnv(readFileSync(resolve(folder, '.env'), 'utf8'));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return {};
    throw new StartupError(`The file .env cannot be read: ${(error as Error).message}.`);
  }
}
