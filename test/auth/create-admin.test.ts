import { generateKeyPairSync } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { createTestDatabase } from '../support/postgres.ts';
import { endPrograms, freePort, newFolder, removeFolder, startProgram } from '../support/processes.ts';
import { startServer } from '../support/server.ts';

let folder: string;
beforeEach(async () => {
  folder = await newFolder();
});
afterEach(async () => {
  await endPrograms();
  await removeFolder(folder);
});

async function create(args: string[], env: Record<string, string>) {
  const started = startProgram('src/auth/create-admin.ts', { folder, env, args });
  return { code: await started.exited, out: started.out(), err: started.err().trim() };
}

test('where tokens come from another issuer, the admin gets an API key, since a password would open nothing', async () => {
  const database = await createTestDatabase();
  const file = join(folder, 'key.pem');
  const { publicKey } = generateKeyPairSync('ed25519');
  await writeFile(file, publicKey.export({ type: 'spki', format: 'pem' }));
  const env = { JWT_SECRET: '', JWT_PUBLIC_KEY_FILE: file };
  try {
    const made = await create(['--email', 'Ada@example.com', '--name', 'Ada'], { ...env, DATABASE_URL: database.url });
    expect(made).toMatchObject({ code: 0, err: '' });
    const key = made.out.trim().split('\n').at(-1);
    const server = await startServer({ databaseUrl: database.url, env });
    try {
      const me = await server.as(key)('GET', '/auth/me');
      expect(me.body).toMatchObject({ email: 'ada@example.com', name: 'Ada', role: 'admin' });
      expect(made.out).toContain(`sub "${me.body.id}"`);
      expect((await server.as(key)('GET', '/auth/api-keys')).body.api_keys).toMatchObject([
        { scopes: ['read', 'write', 'agent'], expires_at: null },
      ]);
    } finally {
      await server.stop();
    }
  } finally {
    await database.drop();
  }
});

test('a database that cannot be used is one sentence without its password', async () => {
  const database = await createTestDatabase();
  await database.drop();
  const gone = new URL(database.url);
  gone.password = 'canary-55512';
  const away = `postgres://muster:canary-55512@127.0.0.1:${await freePort()}/muster`;
  for (const [url, reason] of [
    [gone.href, /^Postgres at DATABASE_URL refuses \(SQLSTATE \w{5}\): see its log\.$/],
    [away, /^The admin could not be made: connect ECONNREFUSED [\d.:]+$/],
  ] as const) {
    const answer = await create(['--email', 'ada@example.com'], { DATABASE_URL: url });
    expect(answer).toMatchObject({ code: 1, out: '', err: expect.stringMatching(reason) });
    expect(answer.err).not.toContain('canary');
  }
});

test('a name that no user may have is refused before anything is touched', async () => {
  const answer = await create(['--email', 'ada@example.com', '--name', ' '], {
    DATABASE_URL: 'postgres://127.0.0.1/x',
  });
  expect(answer).toMatchObject({
    code: 1,
    err: expect.stringMatching(/^--name must have 1 to 255 characters\. Usage: /),
  });
});
