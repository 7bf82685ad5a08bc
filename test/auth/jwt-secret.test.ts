import { mkdtemp, readFile, rm, stat, truncate } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { loadJwtSecret } from '../../src/auth/jwt-secret.ts';
import { readConfig } from '../../src/config.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'muster-secret-'));
});
afterEach(() => rm(folder, { recursive: true }));

test('a secret is made once, however many starts there are at once, and healed when its file was emptied', async () => {
  const config = readConfig({ DATA_DIR: join(folder, 'a/b') }, folder);
  const made = await Promise.all(Array.from({ length: 8 }, () => loadJwtSecret(config)));
  expect(new Set(made).size).toBe(1);
  const file = join(folder, 'a/b/jwt-secret');
  expect((await stat(file)).mode & 0o777).toBe(0o600);
  expect((await readFile(file, 'utf8')).trim()).toBe(made[0]);

  await truncate(file);
  const healed = await loadJwtSecret(config);
  expect(healed).toHaveLength(64);
  expect(await loadJwtSecret(config)).toBe(healed);
});

test('one that is given is used, and none is made where tokens come from another issuer', async () => {
  const secret = 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa';
  expect(await loadJwtSecret(readConfig({ JWT_SECRET: secret, DATA_DIR: folder }, folder))).toBe(secret);
  expect(
    await loadJwtSecret(readConfig({ JWT_JWKS_URL: 'https://id.example.com', DATA_DIR: folder }, folder)),
  ).toBeUndefined();
  await expect(stat(join(folder, 'jwt-secret'))).rejects.toThrow();
});
