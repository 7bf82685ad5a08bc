import { once } from 'node:events';
import http from 'node:http';
import { afterAll, beforeAll, beforeEach, expect, test, vi } from 'vitest';
import { type AuditRow, exportAudit } from '../../src/audit/queries.ts';
import { auditView } from '../../src/audit/schemas.ts';
import { verifyExport } from '../../src/audit/verify.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());
beforeEach(async () => {
  user = await server.newUser();
});

/** Writes an entry of the user for each of `ages` (in seconds) in one transaction, with `length` letters in it. */
const write = (ages: number[], length = 1) =>
  server.db.query({
    text: `with l as (
        insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields, created_at)
        select $1, $1, 'UPDATE', 'task', 1, jsonb_build_object('a', jsonb_build_object('old', null, 'new', repeat('a', $3))),
          now() - age * interval '1 second'
        from unnest($2::int[]) age returning id)
      insert into audit_pending select id from l`,
    values: [user.id, ages, length],
  });
/** Everything that is written has its place. */
const sealed = () =>
  until(
    async () => (await server.db.query<{ n: number }>({ text: 'select count(*)::int as n from audit_pending' })).rows,
    ([row]) => row?.n === 0,
  );
async function* each(lines: string[]) {
  yield* lines;
}

test('is the log as it stood when it began: what commits late leaves no hole in it', async () => {
  await write(Array.from({ length: 700 }, (_, i) => 700 - i));
  await sealed();
  const actor = { userId: user.id, role: 'user', scopes: ['read'], ip: '', userAgent: null, requestId: '' } as const;
  const batches = exportAudit(server.db, actor, {});
  const rows: AuditRow[] = (await batches.next()).value ?? [];
  // One behind what was read already, then one before it; their places are in this order.
  await write([650]);
  await write([50]);
  await sealed();
  for await (const batch of batches) rows.push(...batch);
  const lines = rows.map((row) => JSON.stringify(auditView(row)));
  expect(rows.filter(({ seq }) => seq === null)).toHaveLength(1);
  expect(await verifyExport(each(lines), {}, { partial: false })).toMatchObject({ faults: [], waiting: 1 });
});

test('has every chain for an admin, that of nobody’s too', async () => {
  await server.as(undefined)('POST', '/auth/login', { email: 'nobody@example.com', password: 'wrong password' });
  await sealed();
  const { body } = await server.admin('GET', '/audit?format=ndjson');
  const report = await verifyExport(each(body.trim().split('\n')), {}, { partial: false });
  expect(report).toMatchObject({ faults: [], waiting: 0 });
  const { rows } = await server.db.query<{ owner_id: number }>({ text: 'select distinct owner_id from audit_chain' });
  expect(Object.keys(report.heads).toSorted()).toEqual(rows.map(({ owner_id }) => String(owner_id)).toSorted());
  expect(report.heads).toHaveProperty('0');
});

test('waits for whom it is sent to, and ends with them', async () => {
  const batches = 30;
  await write(Array(batches * 500).fill(1), 2_000);
  const all = batches + 1; // With the entries of the user's registration and login.
  const query = vi.spyOn(server.db.pool, 'query');
  const asked = () => query.mock.calls.filter((call) => /audit_chain.* asc/s.test(JSON.stringify(call))).length;
  try {
    const answering = new Promise<http.ServerResponse>((resolve) => {
      server.app.server.once('request', (_: unknown, response: http.ServerResponse) => resolve(response));
    });
    const request = http.get(`${server.url}/api/v1/audit?format=ndjson`, {
      headers: { authorization: `Bearer ${user.token}` },
    });
    request.on('error', () => {});
    // Nobody reads what comes.
    const [[response]] = (await Promise.all([once(request, 'response'), answering])) as [
      [http.IncomingMessage],
      unknown,
    ];
    expect(response.statusCode).toBe(200);

    // In the time that all is sent to somebody else, twice, the first gets no further than the connection's buffers.
    for (let i = 0; i < 2; i++) expect((await user.call('GET', '/audit?format=ndjson')).status).toBe(200);
    expect(asked()).toBeGreaterThan(2 * all);
    expect(asked()).toBeLessThan(3 * all);

    const closed = once(await answering, 'close');
    request.destroy();
    await closed;
    const before = asked();
    expect((await user.call('GET', '/audit?format=ndjson')).status).toBe(200);
    expect(asked()).toBeLessThanOrEqual(before + all + 1);
  } finally {
    query.mockRestore();
  }
});
