import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseEnv } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { CONFIG_NAMES, readConfig } from '../src/config.ts';

let empty: string;
beforeAll(async () => {
  empty = await mkdtemp(join(tmpdir(), 'muster-config-'));
});
afterAll(() => rm(empty, { recursive: true }));

describe('configuration', () => {
  test('.env.example lists every variable with its default', async () => {
    const example = parseEnv(await readFile(new URL('../.env.example', import.meta.url), 'utf8'));
    expect(Object.keys(example).toSorted()).toEqual([...CONFIG_NAMES].toSorted());
    expect(readConfig(example, empty)).toEqual(readConfig({}, empty));
  });

  test('the environment wins over .env, and empty values count as not set', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'muster-config-'));
    try {
      await writeFile(join(folder, '.env'), 'PORT=9001\nHOST=0.0.0.0\nLOG_LEVEL=debug\n');
      expect(readConfig({ PORT: '9002', HOST: '' }, folder)).toMatchObject({
        PORT: 9002,
        HOST: '0.0.0.0',
        LOG_LEVEL: 'debug',
      });
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  test.each([
    ['PORT', '65536', 'PORT must be a whole number from 0 to 65535.'],
    ['PORT', '8080x', 'PORT must be a whole number from 0 to 65535.'],
    ['PORT', '0x50', 'PORT must be a whole number from 0 to 65535.'],
    ['NODE_ENV', 'prod', 'NODE_ENV must be development, production or test.'],
    ['LOG_LEVEL', 'loud', 'LOG_LEVEL must be fatal, error, warn, info, debug, trace or silent.'],
    ['DATABASE_URL', 'mysql://x', 'DATABASE_URL must be a URL such as postgres://user:password@host:5432/muster.'],
    ['TRUST_PROXY', 'true', /^TRUST_PROXY must be addresses or blocks/],
    ['TRUST_PROXY', '1', /^TRUST_PROXY must be addresses or blocks/],
    ['TRUST_PROXY', '10.0.0.0/33', /^TRUST_PROXY must be addresses or blocks/],
    ['CORS_ORIGINS', 'example.com', /^CORS_ORIGINS must be origins/],
    ['CORS_ORIGINS', 'https://a.example/path', /^CORS_ORIGINS must be origins/],
    ['JWT_SECRET', 'short', /^JWT_SECRET must be a random text of at least 32 bytes/],
    ['JWT_SECRET', 'a'.repeat(64), /^JWT_SECRET must be a random text/],
    ['LEASE_SECONDS', '1', 'LEASE_SECONDS must be a whole number from 2 to 3600 seconds.'],
    ['AUTH_REGISTRATION', 'yes', 'AUTH_REGISTRATION must be open or closed.'],
  ])('%s=%s is refused with the variable and what is allowed', (name, value, sentence) => {
    expect(() => readConfig({ [name]: value }, empty)).toThrow(sentence);
    try {
      readConfig({ [name]: value }, empty);
    } catch (error) {
      if (name === 'JWT_SECRET') expect((error as Error).message).not.toContain(value);
    }
  });

  test('production needs a key to verify tokens with, and closes registration', () => {
    expect(() => readConfig({ NODE_ENV: 'production' }, empty)).toThrow(/needs JWT_SECRET, JWT_JWKS_URL or/);
    const secret = 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa';
    const config = readConfig({ NODE_ENV: 'production', JWT_SECRET: secret }, empty);
    expect(config.registrationOpen).toBe(false);
    expect(readConfig({}, empty).registrationOpen).toBe(true);
    expect(() => readConfig({ JWT_SECRET: secret, JWT_JWKS_URL: 'https://id.example.com' }, empty)).toThrow(
      /only one of/,
    );
  });
});
