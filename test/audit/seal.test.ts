import { expect, test } from 'vitest';
import { verifyDatabase } from '../../src/audit/verify.ts';
import { startServer } from '../support/server.ts';
import { until } from '../support/work.ts';

test('an entry that is gone before its seal is found, and a forged note of one with a place stops nothing', async () => {
  const server = await startServer();
  const sealed = () =>
    until(
      async () => (await server.db.query<{ n: number }>({ text: 'select count(*)::int as n from audit_pending' })).rows,
      ([row]) => row?.n === 0,
    );
  try {
    const user = await server.newUser();
    await sealed();
    const whole = await verifyDatabase(server.db, {});
    expect(whole).toMatchObject({ faults: [], waiting: 0 });

    await server.db.query({ text: 'insert into audit_pending select max(audit_id) from audit_chain' });
    await user.call('POST', '/tasks', { skill_name: 'after' });
    await sealed();
    expect(await verifyDatabase(server.db, whole.heads)).toMatchObject({ faults: [], entries: whole.entries + 1 });

    await server.db.query({ text: 'insert into audit_pending values (4000000)' });
    await sealed();
    await user.call('POST', '/tasks', { skill_name: 'and after that' });
    await sealed();
    expect((await verifyDatabase(server.db, whole.heads)).faults).toEqual([
      { ownerId: 0, seq: expect.any(Number), entryId: 4_000_000, what: 'its entry was removed' },
    ]);
  } finally {
    await server.stop();
  }
});
