import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { canonicalJson } from '../../src/audit/chain.ts';
import { verifyDatabase, verifyExport } from '../../src/audit/verify.ts';
import { endPrograms, newFolder, processesIn, removeFolder, startServerProcess } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
});

const get = async (query = '') => (await user.call('GET', `/audit${query}`)).body;
/** Everything that is written has its place. */
const sealed = () =>
  until(
    async () => (await server.db.query<{ n: number }>({ text: 'select count(*)::int as n from audit_pending' })).rows,
    ([row]) => row?.n === 0,
  );
async function exported(call = user.call, query = ''): Promise<string[]> {
  const { status, headers, body } = await call('GET', `/audit?format=ndjson${query}`);
  expect(status).toBe(200);
  expect(headers.get('content-type')).toMatch(/ndjson/);
  return body.split('\n').filter((line: string) => line !== '');
}
async function* each(lines: string[]) {
  yield* lines;
}

describe('GET /audit', () => {
  test('tells who changed what, from where and in which request, newest first', async () => {
    const task = await makeTask(user.call, { name: 'before' });
    await user.call(
      'PUT',
      `/tasks/${task.id}`,
      { name: 'after' },
      { 'x-request-id': 'change-1', 'user-agent': 'tests' },
    );
    await user.call('DELETE', `/tasks/${task.id}`);
    const { entries, total } = await get(`?entity_type=task&entity_id=${task.id}`);
    expect(total).toBe(3);
    expect(entries.map(({ operation }: { operation: string }) => operation)).toEqual(['DELETE', 'UPDATE', 'CREATE']);
    expect(entries[1]).toMatchObject({
      user_id: user.id,
      owner_id: user.id,
      changed_fields: { name: { old: 'before', new: 'after' } },
      ip_address: '127.0.0.1',
      user_agent: 'tests',
      request_id: 'change-1',
    });
  });

  test('tells what Muster does to runs by itself: fires, hands out, takes back and retries', async () => {
    const agent = await makeAgent(user.call);
    const task = await makeTask(user.call, { run_at: new Date(Date.now() + 300).toISOString(), max_attempts: 2 });
    const run = await agent.claimOne();
    await server.db.query({
      text: `update executions set lease_expires_at = now() - interval '1 second' where id = $1`,
      values: [run.execution_id],
    });
    const again = await agent.claimOne();
    expect(again.attempt).toBe(2);
    const told = async (id: number) =>
      (await get(`?entity_type=execution&entity_id=${id}&sort_order=asc`)).entries.map(
        ({ operation, user_id, changed_fields: fields }: Record<string, unknown>) => ({ operation, user_id, fields }),
      );
    const taken = {
      operation: 'UPDATE',
      user_id: user.id,
      fields: { status: { old: 'queued', new: 'running' }, agent_id: { old: null, new: agent.id } },
    };
    expect(await told(run.execution_id)).toEqual([
      {
        operation: 'CREATE',
        user_id: null,
        fields: expect.objectContaining({
          task_id: { old: null, new: task.id },
          trigger: { old: null, new: 'schedule' },
          status: { old: null, new: 'queued' },
        }),
      },
      taken,
      {
        operation: 'UPDATE',
        user_id: null,
        fields: { status: { old: 'running', new: 'failed' }, cause: { old: null, new: 'lease_lost' } },
      },
    ]);
    expect(await told(again.execution_id)).toEqual([
      {
        operation: 'CREATE',
        user_id: null,
        fields: expect.objectContaining({ retry_of: { old: null, new: run.execution_id } }),
      },
      taken,
    ]);
  });

  test('filters and pages without holes', async () => {
    const agent = await makeAgent(user.call);
    for (let i = 0; i < 4; i++) await makeTask(user.call);
    await user.call('PUT', `/agents/${agent.id}`, { type: 'tester' });
    const types = async (query: string) =>
      (await get(query)).entries.map((entry: { entity_type: string }) => entry.entity_type);
    expect(await types('?entity_type=agent&operation=UPDATE')).toEqual(['agent']);
    expect(await types(`?entity_id=${agent.id}&operation=UPDATE`)).toEqual(['agent']);
    expect(await types(`?entity_type=task&user_id=${user.id}`)).toHaveLength(4);
    expect(await types(`?to=2020-01-01T00:00:00Z`)).toEqual([]);
    expect(await types(`?entity_type=task&from=2020-01-01T00:00:00Z`)).toHaveLength(4);
    const seen: number[] = [];
    let cursor = '';
    do {
      const page = await get(`?limit=2${cursor && `&cursor=${cursor}`}`);
      seen.push(...page.entries.map(({ id }: { id: number }) => id));
      cursor = page.next_cursor ?? '';
    } while (cursor);
    expect(seen).toEqual((await get('?limit=100')).entries.map(({ id }: { id: number }) => id));
    for (const query of ['?operation=READ', '?entity_type=x;y', '?entity_id=0', '?format=csv', '?from=now', '?x=1']) {
      expect((await user.call('GET', `/audit${query}`)).status, query).toBe(400);
    }
  });

  test('shows nobody what is not theirs', async () => {
    const other = await server.newUser();
    const task = await makeTask(user.call);
    expect((await other.call('GET', `/audit?entity_type=task&entity_id=${task.id}`)).body.entries).toEqual([]);
    expect((await other.call('GET', `/audit?user_id=${user.id}`)).status).toBe(403);
    expect(await exported(other.call)).not.toContainEqual(expect.stringContaining(`"owner_id":${user.id},`));
    expect((await server.admin('GET', `/audit?user_id=${user.id}&entity_type=task`)).body.total).toBe(1);
    await server.admin('PUT', `/tasks/${task.id}`, { name: 'by an admin' });
    expect((await get('?entity_type=task&operation=UPDATE')).entries[0].user_id).not.toBe(user.id);
  });

  test('has logins, refused ones and logouts, and no secret', async () => {
    const call = server.as(undefined);
    const { email, password } = user;
    const login = await call('POST', '/auth/login', { email, password });
    await call('POST', '/auth/login', { email, password: 'wrong password' });
    await call('POST', '/auth/login', { email: 'nobody@example.com', password: 'wrong password' });
    const next = await call('POST', '/auth/refresh', { refresh_token: login.body.refresh_token });
    await call('POST', '/auth/logout', { refresh_token: next.body.refresh_token });
    const { entries } = await get('?limit=4');
    expect(entries[0].entity_id).toBe(entries[2].entity_id);
    expect(entries.slice(0, 3)).toMatchObject([
      { entity_type: 'session', operation: 'DELETE', user_id: user.id },
      { entity_type: 'login', user_id: null, changed_fields: { email: { new: email }, outcome: { new: 'refused' } } },
      { entity_type: 'session', operation: 'CREATE', user_id: user.id },
    ]);
    const nobody = (await server.admin('GET', '/audit?entity_type=login&limit=100')).body.entries;
    expect(nobody).toContainEqual(
      expect.objectContaining({
        owner_id: null,
        changed_fields: expect.objectContaining({ email: { old: null, new: 'nobody@example.com' } }),
      }),
    );
    for (const secret of [password, 'wrong password', login.body.refresh_token, next.body.refresh_token]) {
      expect(JSON.stringify([entries, nobody])).not.toContain(secret);
    }
  });

  test('exports everything, oldest first, in more than one batch', async () => {
    await server.db.query({
      text: `with l as (insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields)
        select $1, $1, 'UPDATE', 'task', i, '{"a":{"old":1,"new":2}}' from generate_series(1, 1200) i returning id)
        insert into audit_pending select id from l`,
      values: [user.id],
    });
    await sealed();
    const lines = await exported();
    expect(lines.length).toBeGreaterThanOrEqual(1_200);
    expect(await verifyExport(each(lines), {}, { partial: false })).toMatchObject({ faults: [], waiting: 0 });
    expect(await exported(user.call, '&entity_id=7&entity_type=task')).toHaveLength(1);
    for (const query of ['&limit=5', '&offset=1', '&cursor=x', '&sort_order=asc', '&entity_id=x']) {
      expect((await user.call('GET', `/audit?format=ndjson${query}`)).status).toBe(400);
    }
  });
});

test('canonical JSON has its keys in order, whatever the order they were written in', () => {
  expect(canonicalJson({ b: [1, { z: null, a: 'é"' }], a: -0 })).toBe('{"a":0,"b":[1,{"a":"é\\"","z":null}]}');
});

describe('the chain', () => {
  test('the server’s own role is refused to change it', async () => {
    for (const statement of [
      `update audit_log set entity_id = 1`,
      'delete from audit_log',
      'truncate audit_log',
      `update audit_chain set hash = ''`,
      'delete from audit_chain',
      'truncate audit_chain',
    ]) {
      await expect(server.db.query({ text: statement })).rejects.toMatchObject({ code: '42501' });
    }
  });

  test('is whole and without holes when two servers write to it at once', async () => {
    const second = await startServer({ databaseUrl: server.databaseUrl });
    try {
      await Promise.all(
        Array.from({ length: 30 }, (_, i) =>
          makeTask(i % 2 ? user.call : second.as(user.token), { name: `task ${i}` }),
        ),
      );
      await sealed();
      expect((await verifyDatabase(server.db, {})).faults).toEqual([]);
      const { entries } = await get('?limit=100');
      const places = entries.map(({ seq }: { seq: number }) => seq).toSorted((a: number, b: number) => a - b);
      expect(places).toEqual(Array.from({ length: entries.length }, (_, i) => i + 1));
    } finally {
      await second.stop();
    }
  });

  test('whatever is tampered with is found, and the first bad entry named', { timeout: 240_000 }, async () => {
    await server.db.query({
      text: `with l as (insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields, ip_address)
        select $1, $1, 'UPDATE', 'task', i, '{"a":{"old":1,"new":2}}', '10.0.0.1' from generate_series(1, 60) i returning id)
        insert into audit_pending select id from l`,
      values: [user.id],
    });
    await sealed();
    const { rows } = await server.db.query<{ seq: number; audit_id: number; hash: string }>({
      text: 'select seq, audit_id, hash from audit_chain where owner_id = $1 order by seq',
      values: [user.id],
    });
    const written: Record<string, unknown>[] = (await exported()).map((line) => JSON.parse(line));
    const forgedHash = (i: number) => {
      const { seq: _, hash: __, prev_hash: prevHash, ...entry } = written.find((entry) => entry['id'] === id(i)) ?? {};
      return createHash('sha256')
        .update(`${prevHash}${canonicalJson({ ...entry, entity_id: 7_000_000 })}`)
        .digest('hex');
    };
    const heads = (await verifyDatabase(server.db, {})).heads;
    const client = await server.db.pool.connect();
    const q = {
      orm: server.db.orm,
      // biome-ignore lint/suspicious/noExplicitAny: the same function as the database's, on one connection.
      query: (statement: any) => client.query(statement) as any,
    };
    // Thirteen kinds, and more than two hundred attacks in all.
    const ROUNDS = 77;
    const attacks: [string, (i: number) => [sql: string, values: unknown[], first: number | undefined]][] = [
      [
        'change',
        (i) => [`update audit_log set changed_fields = '{"a":{"old":1,"new":3}}' where id = $1`, [id(i)], id(i)],
      ],
      ['change of the address', (i) => [`update audit_log set ip_address = '10.0.0.2' where id = $1`, [id(i)], id(i)]],
      [
        'change of the time',
        (i) => [`update audit_log set created_at = created_at + interval '1 ms' where id = $1`, [id(i)], id(i)],
      ],
      [
        'change of the time to one that no calendar has',
        (i) => [`update audit_log set created_at = 'infinity' where id = $1`, [id(i)], id(i)],
      ],
      ['change of the owner', (i) => [`update audit_log set owner_id = 1 where id = $1`, [id(i)], id(i)]],
      ['removal of the entry', (i) => ['delete from audit_log where id = $1', [id(i)], id(i)]],
      [
        'removal with its place',
        (i) => [
          'with l as (delete from audit_log where id = $1) delete from audit_chain where audit_id = $1',
          [id(i)],
          id(i + 1),
        ],
      ],
      [
        'swap',
        (i) => [
          `update audit_chain set audit_id = case when seq = $2::bigint then $4::bigint else $3::bigint end
           where owner_id = $1 and seq in ($2::bigint, $2::bigint + 1)`,
          [user.id, rows[i]?.seq, id(i), id(i + 1)],
          id(i + 1),
        ],
      ],
      [
        'swap of what two entries say',
        (i) => [
          `update audit_log l set entity_id = o.entity_id from audit_log o
           where l.id in ($1::bigint, $2::bigint) and o.id in ($1::bigint, $2::bigint) and l.id <> o.id`,
          [id(i), id(i + 1)],
          id(i),
        ],
      ],
      [
        'insertion',
        () => [
          `insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields)
           values ($1, $1, 'DELETE', 'task', 1, '{}') returning id`,
          [user.id],
          undefined,
        ],
      ],
      ['hash made anew', (i) => [`update audit_chain set hash = repeat('a', 64) where audit_id = $1`, [id(i)], id(i)]],
      [
        'change with its hash made anew, as the sealer would',
        (i) => [
          `with l as (update audit_log set entity_id = 7000000 where id = $1)
           update audit_chain set hash = $2 where audit_id = $1`,
          [id(i), forgedHash(i)],
          id(i + 1),
        ],
      ],
      [
        'insertion of a place',
        (i) => [
          `with moved as (update audit_chain set seq = seq + 1000 where owner_id = $1 and seq > $2::bigint returning seq)
           insert into audit_chain (owner_id, seq, audit_id, hash, prev_hash)
           select $1, $2::bigint + 1, 9000000, repeat('b', 64), $3 from (select count(*) from moved) n`,
          [user.id, rows[i]?.seq, rows[i]?.hash],
          9_000_000,
        ],
      ],
    ];
    const id = (i: number) => rows[i]?.audit_id ?? 0;
    try {
      for (const [name, attack] of attacks) {
        for (let round = 0; round < ROUNDS; round++) {
          const [statement, values, first] = attack(Math.floor(Math.random() * (rows.length - 2)));
          await client.query('begin');
          await client.query('set local session_replication_role = replica');
          // Two places may not hold one entry, not even between two rows of one statement.
          if (name === 'swap') await client.query('drop index audit_chain_entry_key');
          const done = await client.query<{ id: number }>(statement, values);
          expect(done.rowCount, name).toBeGreaterThan(0);
          const { faults } = await verifyDatabase(q, heads);
          await client.query('rollback');
          expect(faults.length, name).toBeGreaterThan(0);
          const ours = faults.find(({ ownerId }) => ownerId === user.id);
          expect(ours, name).toBeDefined();
          expect(ours?.entryId, name).toBe(first ?? done.rows[0]?.id);
        }
      }
      await client.query('begin');
      await client.query('set local session_replication_role = replica');
      await client.query(
        `with c as (delete from audit_chain where owner_id = $1 and seq > 30 returning audit_id)
         delete from audit_log where id in (select audit_id from c)`,
        [user.id],
      );
      expect((await verifyDatabase(q, {})).faults).toEqual([]);
      expect((await verifyDatabase(q, heads)).faults).toMatchObject([
        { ownerId: user.id, what: expect.stringMatching(/cut off/) },
      ]);
      await client.query('rollback');
    } finally {
      await client.query('rollback');
      client.release();
    }
  });

  test('an export is verified without the database, and a filtered one as far as it goes', async () => {
    for (let i = 0; i < 6; i++) await makeTask(user.call);
    await sealed();
    const lines = await exported();
    const verify = async (changed: string[], partial = false) =>
      (await verifyExport(each(changed), {}, { partial })).faults;
    expect(await verify(lines)).toEqual([]);
    expect(await verify(lines.filter((_, i) => i !== 3))).toMatchObject([
      { seq: 5, what: expect.stringMatching(/removed/) },
    ]);
    expect(
      await verify(
        lines.filter((_, i) => i !== 3),
        true,
      ),
    ).toEqual([]);
    const forged = lines.map((line, i) => (i === 3 ? line.replace('CREATE', 'DELETE') : line));
    expect(await verify(forged, true)).toMatchObject([{ seq: 4, what: expect.stringMatching(/changed/) }]);
    await expect(verify(['not json'])).rejects.toThrow(/line 1/);
    expect(await verify([...lines, lines[3] ?? ''], true)).toMatchObject([
      { seq: 4, what: expect.stringMatching(/twice/) },
    ]);
    const { heads } = await verifyExport(each(lines), {}, { partial: false });
    const short = (partial: boolean) => verifyExport(each(lines.slice(0, -1)), heads, { partial });
    expect((await short(false)).faults).toMatchObject([{ ownerId: user.id, what: expect.stringMatching(/cut off/) }]);
    expect((await short(true)).faults).toEqual([]);
    const put = JSON.stringify({
      ...JSON.parse(lines[3] ?? ''),
      id: 1,
      seq: null,
      created_at: '2020-01-01T00:00:00.000Z',
    });
    expect(await verify([...lines, put])).toMatchObject([
      { entryId: 1, what: expect.stringMatching(/put in by hand/) },
    ]);
  });
});

describe('npm run audit:verify', () => {
  const run = promisify(execFile);
  const verify = async (args: string[], env: Record<string, string>) =>
    run(process.execPath, ['--import', 'tsx', 'src/audit/audit-verify.ts', ...args], {
      env: { PATH: process.env['PATH'] ?? '', ...env },
    }).then(
      ({ stdout, stderr }) => ({ code: 0, stdout, stderr }),
      ({ code, stdout, stderr }: { code: number; stdout: string; stderr: string }) => ({ code, stdout, stderr }),
    );

  test('says whether the log is whole, saves its heads, and says what to do about a wrong argument', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'muster-audit-'));
    try {
      await makeTask(user.call);
      await sealed();
      const env = { DATABASE_URL: server.databaseUrl };
      const heads = join(folder, 'heads.json');
      expect(await verify(['--save-heads', heads], env)).toMatchObject({
        code: 0,
        stdout: expect.stringMatching(/whole/),
      });
      expect(await verify(['--heads', heads], env)).toMatchObject({ code: 0 });
      const file = join(folder, 'export.ndjson');
      const lines = await exported();
      await writeFile(
        file,
        `${lines.map((line) => line.replace('"entity_type":"task"', '"entity_type":"user"')).join('\n')}\n`,
      );
      expect(await verify(['--file', file], {})).toMatchObject({
        code: 1,
        stdout: expect.stringMatching(/BAD entry \d+/),
      });
      expect(await verify(['--nonsense'], env)).toMatchObject({ code: 2, stderr: expect.stringMatching(/Usage/) });
      expect(await verify([], {})).toMatchObject({ code: 2, stderr: expect.stringMatching(/DATABASE_URL is not set/) });
      expect(await verify(['--file', join(folder, 'none')], {})).toMatchObject({
        code: 2,
        stderr: expect.stringMatching(/^The audit log could not be read: ENOENT.*\n$/),
      });
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  test('looks at the embedded database, beside its server and without it', async () => {
    const folder = await newFolder();
    try {
      const server = await startServerProcess({ folder });
      const env = { DATA_DIR: join(folder, '.muster') };
      const whole = { code: 0, stdout: expect.stringMatching(/^Entries: [1-9].*\nThe audit log is whole\.\n$/) };
      expect(await verify([], env)).toMatchObject(whole);
      server.child.kill('SIGTERM');
      expect(await server.exited).toBe(0);
      expect(await verify([], env)).toMatchObject(whole);
      expect(await processesIn(folder)).toEqual([]);
    } finally {
      await endPrograms();
      await removeFolder(folder);
    }
  });
});
