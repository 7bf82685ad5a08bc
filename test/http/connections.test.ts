import { afterAll, beforeAll, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask } from '../support/work.ts';

let server: TestServer;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server?.stop());

test('a long poll outlives the time in which a request must arrive', { timeout: 60_000 }, async () => {
  const user = await server.newUser();
  const agent = await makeAgent(user.call);
  expect(server.app.server.requestTimeout).toBe(15_000);
  // Past that time and past the next look at the connections (5 s later).
  expect(await agent.claim({ wait_ms: 22_000 })).toEqual([]);
});

test.each([
  ['', '127.0.0.1'],
  ['127.0.0.1', '203.0.113.7'],
])('with TRUST_PROXY=%s the audit log names %s', async (proxies, address) => {
  const other = await startServer({ env: { TRUST_PROXY: proxies } });
  try {
    const spoof = { 'x-forwarded-for': '198.51.100.1, 203.0.113.7', 'x-real-ip': '198.51.100.1' };
    const task = await makeTask((method, path, body) => other.admin(method, path, body, spoof));
    const { rows } = await other.db.query({
      text: `select ip_address from audit_log where entity_type = 'task' and entity_id = $1`,
      values: [task.id],
    });
    expect(rows).toEqual([{ ip_address: address }]);
  } finally {
    await other.stop();
  }
});
