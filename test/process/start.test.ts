import { chown, readFile, stat } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import pg from 'pg';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createEmptyDatabase, createTestDatabase } from '../support/postgres.ts';
import {
  endPrograms,
  freePort,
  newFolder,
  processesIn,
  removeFolder,
  startProgram,
  startServerProcess,
} from '../support/processes.ts';
import { caller } from '../support/server.ts';
import { until } from '../support/work.ts';

let folder: string;
beforeEach(async () => {
  folder = await newFolder();
});
afterEach(async () => {
  await endPrograms();
  await until(
    () => processesIn(folder),
    (left) => left.length === 0,
  );
  await removeFolder(folder);
});

/** Starts with `env`, expects it to end, and answers the one sentence it said. */
async function refusal(env: Record<string, string>): Promise<string> {
  const started = startProgram('src/main.ts', { folder, env });
  expect(await started.exited).toBe(1);
  expect(started.out()).toBe('');
  const lines = started.err().trim().split('\n');
  expect(lines).toHaveLength(1);
  expect(lines[0]).not.toMatch(/\bat .*:\d+:\d+|Error:/);
  return lines[0] ?? '';
}

describe('a start that cannot succeed says why in one sentence and exits with 1', () => {
  test.each([
    [{ PORT: '80a' }, 'PORT must be a whole number from 0 to 65535.'],
    [
      { TRUST_PROXY: '1' },
      'TRUST_PROXY must be addresses or blocks of proxies you run, such as 10.0.0.5 or 10.0.0.0/8, separated by commas.',
    ],
    [{ NODE_ENV: 'prod' }, 'NODE_ENV must be development, production or test.'],
    [{ NODE_ENV: 'production' }, 'NODE_ENV=production needs JWT_SECRET, JWT_JWKS_URL or JWT_PUBLIC_KEY_FILE.'],
    [{ HOST: '203.0.113.7' }, /^HOST=203\.0\.113\.7 is no address of this machine/],
    [
      { DATABASE_URL: 'postgres://u:hidden@127.0.0.1:1/x' },
      /^Postgres at DATABASE_URL cannot be reached \(ECONNREFUSED\)/,
    ],
    [{ DATA_DIR: '/proc/nothing' }, /DATA_DIR must be a folder that this user may read and write/],
    [
      { JWT_PUBLIC_KEY_FILE: '/nothing.pem', DATABASE_URL: 'postgres://u@127.0.0.1:1/x' },
      /DATABASE_URL cannot be reached|JWT_PUBLIC_KEY_FILE/,
    ],
  ])('%j', async (env, sentence) => {
    const said = await refusal({ PORT: '0', ...(env as Record<string, string>) });
    if (typeof sentence === 'string') expect(said).toBe(sentence);
    else expect(said).toMatch(sentence);
    expect(said).not.toContain('hidden');
  });

  test('a port that is taken', async () => {
    const port = await freePort();
    const holder = createServer().listen(port, '127.0.0.1');
    expect(await refusal({ PORT: String(port) })).toBe(
      `Port ${port} on 127.0.0.1 is taken: stop what listens there, or set PORT to another.`,
    );
    await new Promise((done) => holder.close(done));
  });

  test('a second server on the same data folder', async () => {
    const first = await startServerProcess({ folder });
    expect(await refusal({ PORT: '0' })).toMatch(/another|already|in use|running/i);
    expect((await caller(first.url, first.key)('GET', '/auth/me')).status).toBe(200);
  });

  test('a user whom Postgres refuses, a database that does not exist, and one of a newer schema', async () => {
    const database = await createTestDatabase();
    try {
      const stranger = new URL(database.url);
      stranger.username = 'muster_stranger';
      stranger.password = 'hidden';
      expect(await refusal({ PORT: '0', DATABASE_URL: stranger.href })).toBe(
        'Postgres refuses the user or password of DATABASE_URL.',
      );
      const missing = new URL(database.url);
      missing.pathname = '/muster_not_there';
      expect(await refusal({ PORT: '0', DATABASE_URL: missing.href })).toMatch(/does not exist: create it first\.$/);
      const client = new pg.Client({ connectionString: database.url });
      await client.connect();
      await client.query(
        `insert into drizzle.__drizzle_migrations (hash, created_at) values ('future', 9999999999999)`,
      );
      await client.end();
      expect(await refusal({ PORT: '0', DATABASE_URL: database.url })).toMatch(
        /^The database was migrated by a newer version/,
      );
    } finally {
      await database.drop();
    }
  });
});

describe('the embedded mode', () => {
  test('prints what a newcomer needs, once; stops at SIGTERM and SIGINT without a trace', async () => {
    const first = await startServerProcess({ folder });
    expect(first.out()).toContain(`docs     ${first.url}/docs`);
    expect(first.out()).toContain(first.key);
    for (const command of ['npm run watch', 'npm run agent --', `curl -s ${first.url}/api/v1/tasks`]) {
      expect(first.out()).toContain(command);
    }
    expect((await stat(join(folder, '.muster/admin-key'))).mode & 0o777).toBe(0o600);
    const created = await caller(first.url, first.key)('POST', '/tasks', { skill_name: 'kept' });
    expect(created.status).toBe(201);
    first.child.kill('SIGTERM');
    expect(await first.exited).toBe(0);
    expect(await processesIn(folder)).toEqual([]);

    const second = await startServerProcess({ folder });
    expect(second.out()).not.toContain(first.key);
    expect((await caller(second.url, first.key)('GET', `/tasks/${created.body.id}`)).status).toBe(200);
    // npm passes a Ctrl-C on that the terminal sends as well.
    second.child.kill('SIGINT');
    second.child.kill('SIGINT');
    expect(await second.exited).toBe(0);
    expect(await processesIn(folder)).toEqual([]);
  });

  test.each([
    ['while its database is made', async () => (await processesIn(join(folder, '.muster'))).length > 0],
    ['while its database is migrated', async () => (await postmaster()).includes('ready')],
  ])('a signal in the middle of the first start, %s, ends it in order; the next one serves', async (_when, reached) => {
    const started = startProgram('src/main.ts', { folder, env: { PORT: '0' } });
    await until(reached, (there) => there);
    started.child.kill('SIGTERM');
    expect(await started.exited).toBe(0);
    expect(started.err()).toBe('');
    expect(await processesIn(folder)).toEqual([]);
    const next = await startServerProcess({ folder });
    expect((await caller(next.url, next.key)('GET', '/auth/me')).status).toBe(200);
  });
  const postmaster = () => readFile(join(folder, '.muster/postgres/postmaster.pid'), 'utf8').catch(() => '');

  test('kill -9, again and again: what was acknowledged is there, and no Postgres is left', {
    timeout: 180_000,
  }, async () => {
    const acknowledged: number[] = [];
    for (let round = 0; round < 5; round++) {
      const server = await startServerProcess({ folder });
      const call = caller(server.url, server.key);
      let on = true;
      const writers = Array.from({ length: 4 }, async () => {
        while (on) {
          const answer = await call('POST', '/tasks', { skill_name: 'kept' }).catch(() => undefined);
          if (answer?.status === 201) acknowledged.push(answer.body.id);
        }
      });
      const enough = acknowledged.length + 20;
      await until(
        async () => acknowledged.length,
        (count) => count >= enough,
      );
      server.child.kill('SIGKILL');
      await server.exited;
      on = false;
      await Promise.all(writers);
      await until(
        () => processesIn(folder),
        (left) => left.length === 0,
        5,
      );
    }
    const server = await startServerProcess({ folder });
    const { body } = await caller(server.url, server.key)('GET', '/tasks?limit=1');
    expect(body.total).toBeGreaterThanOrEqual(acknowledged.length);
    const lost: number[] = [];
    for (const id of acknowledged) {
      if ((await caller(server.url, server.key)('GET', `/tasks/${id}?history_limit=0`)).status !== 200) lost.push(id);
    }
    expect(lost).toEqual([]);
  });

  test.runIf(process.getuid?.() === 0)('works as an ordinary user', async () => {
    await chown(folder, 65_534, 65_534);
    const server = await startServerProcess({ folder, uid: 65_534 });
    expect((await stat(join(folder, '.muster/admin-key'))).uid).toBe(65_534);
    expect((await caller(server.url, await readKey())('GET', '/auth/me')).status).toBe(200);
  });
  const readKey = async () => (await readFile(join(folder, '.muster/admin-key'), 'utf8')).trim();
});

describe('many starts at once', () => {
  test('on an empty database: all serve, and it was migrated once', async () => {
    const database = await createEmptyDatabase();
    try {
      const env = {
        DATABASE_URL: database.url,
        DATABASE_POOL_SIZE: '2',
        JWT_SECRET: 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa',
      };
      const servers = await Promise.all(Array.from({ length: 8 }, () => startServerProcess({ folder, env })));
      for (const server of servers) expect((await caller(server.url, undefined)('GET', '//health')).status).toBe(200);
      const client = new pg.Client({ connectionString: database.url });
      await client.connect();
      const { rows } = await client.query(
        'select hash, count(*)::int as times from drizzle.__drizzle_migrations group by hash',
      );
      await client.end();
      expect(rows.every(({ times }) => times === 1)).toBe(true);
      for (const server of servers) server.child.kill('SIGTERM');
      expect(await Promise.all(servers.map(({ exited }) => exited))).toEqual(servers.map(() => 0));
    } finally {
      await endPrograms();
      await database.drop();
    }
  });
});

describe('npm run admin:create', () => {
  const create = async (args: string[], env: Record<string, string>) => {
    const started = startProgram('src/auth/create-admin.ts', { folder, env, args });
    return { code: await started.exited, out: started.out(), err: started.err().trim() };
  };

  test('makes an admin whose password is printed once, and says why when it cannot', async () => {
    const database = await createTestDatabase();
    const env = { DATABASE_URL: database.url, JWT_SECRET: 'k7Jx2mQ9vT4wZ8bN5cR1yH6uP3sD0fGa' };
    try {
      const made = await create(['--email', 'Ada@example.com', '--name', 'Ada'], env);
      expect(made).toMatchObject({ code: 0, err: '' });
      const password = made.out.trim().split('\n').at(-1) ?? '';
      const server = await startServerProcess({ folder, env });
      const anybody = caller(server.url, undefined);
      const login = await anybody('POST', '/auth/login', { email: 'ada@example.com', password });
      expect((await caller(server.url, login.body.access_token)('GET', '/auth/me')).body.role).toBe('admin');
      const again = await create(['--email', 'ada@example.com'], env);
      expect(again).toMatchObject({
        code: 1,
        err: expect.stringMatching(/^There is a user with this email address already/),
      });
      expect((await create(['--email', 'ada'], env)).err).toMatch(/^--email must be an email address\. Usage: /);
      expect((await create(['--mail', 'x'], env)).err).toMatch(/Usage: /);
      expect((await create(['--email', 'a@example.com'], {})).err).toMatch(
        /^DATABASE_URL is not set: the embedded mode has/,
      );
    } finally {
      await endPrograms();
      await database.drop();
    }
  });
});
