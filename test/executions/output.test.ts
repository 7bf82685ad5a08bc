import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { type ClaimedRun, complete, makeAgent, makeTask, until } from '../support/work.ts';

// Output that is sent while a run goes on, and read by range while it does and after.

const MIB = 1_048_576;
let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let agent: Awaited<ReturnType<typeof makeAgent>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
  agent = await makeAgent(user.call);
});
afterAll(() => server?.stop());

const execution = async (id: number) => (await user.call('GET', `/executions/${id}`)).body;
async function claimRun(fields: Record<string, unknown> = {}): Promise<ClaimedRun> {
  const task = await makeTask(user.call, { max_attempts: 1, ...fields });
  await user.call('POST', `/tasks/${task.id}/run`);
  return agent.claimOne([task.skill_name]);
}
const send = (run: ClaimedRun, text: string, offset?: number) =>
  user.call('POST', `/executions/${run.execution_id}/output`, {
    lease_token: run.lease_token,
    text,
    ...(offset === undefined ? {} : { offset }),
  });
const read = async (run: ClaimedRun, query = '') => {
  const { status, body } = await user.call('GET', `/executions/${run.execution_id}/output${query}`);
  expect(status).toBe(200);
  return body;
};

describe('a piece', () => {
  test('is put behind what came before, told with its end, and extends no lease', async () => {
    const run = await claimRun();
    const before = await execution(run.execution_id);
    expect(await send(run, 'one ')).toMatchObject({ status: 200, body: { next_offset: 4, truncated: false } });
    expect(await send(run, '€😀 two', 4)).toMatchObject({ status: 200, body: { next_offset: 10, truncated: false } });
    expect(await read(run)).toEqual({
      execution_id: run.execution_id,
      offset: 0,
      text: 'one €😀 two',
      next_offset: 10,
      length: 10,
      complete: false,
    });
    expect(await execution(run.execution_id)).toEqual(before);
    const events = await until(
      async () =>
        (
          await server.db.query<{ data: string }>({
            text: `select data from events where task_id = $1 and type = 'task_status_update' order by event_id`,
            values: [run.task_id],
          })
        ).rows.map(({ data }) => JSON.parse(data)),
      (rows) => rows.length >= 5,
    );
    expect(events.slice(-2)).toMatchObject([
      { execution_id: run.execution_id, execution_status: 'running', output: 'one ', agent_id: agent.id },
      { execution_id: run.execution_id, execution_status: 'running', output: '€😀 two' },
    ]);
  });

  test('that came already changes nothing, one that came in part adds the rest, and a gap is refused', async () => {
    const run = await claimRun();
    await send(run, 'a😀b', 0);
    expect(await send(run, 'a😀b', 0)).toMatchObject({ status: 200, body: { next_offset: 3, truncated: false } });
    expect((await send(run, '😀bcd', 1)).body).toEqual({ next_offset: 5, truncated: false });
    const gap = await send(run, 'x', 6);
    expect(gap.status).toBe(409);
    expect(gap.body.detail).toMatch(/offset 5/);
    expect((await read(run)).text).toBe('a😀bcd');
  });

  test('is refused without the lease, and from strangers, and changes nothing', async () => {
    const run = await claimRun();
    await send(run, 'mine');
    const path = `/executions/${run.execution_id}/output`;
    const wrong = { lease_token: '00000000-0000-4000-8000-000000000000', text: 'x' };
    expect((await user.call('POST', path, wrong)).status).toBe(409);
    const stranger = await server.newUser();
    expect((await stranger.call('POST', path, { ...wrong, lease_token: run.lease_token })).status).toBe(403);
    expect((await stranger.call('GET', path)).status).toBe(403);
    for (const [body, field] of [
      [{ text: '' }, 'text'],
      [{ text: 'x', offset: -1 }, 'offset'],
      [{ text: 'x', offset: 2 ** 31 }, 'offset'],
    ] as const) {
      const answer = await user.call('POST', path, { lease_token: run.lease_token, ...body });
      expect(answer).toMatchObject({ status: 400, body: { errors: [{ path: `body.${field}` }] } });
    }
    await complete(user.call, run);
    expect((await send(run, 'late', 4)).status).toBe(409);
    expect((await read(run)).text).toBe('mine');
  });

  test('and another one that are sent at the same time both arrive, in some order', async () => {
    const run = await claimRun();
    await Promise.all(Array.from({ length: 8 }, (_, i) => send(run, String(i).repeat(3_000))));
    const { text, length } = await read(run);
    expect(length).toBe(24_000);
    expect(text.match(/(.)\1{2999}/g)).toHaveLength(8);
  });

  test('however the output is cut and sent again, every range of it reads as it was', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.string({ unit: 'grapheme', minLength: 1, maxLength: 9_000, size: 'max' }), {
          minLength: 1,
          maxLength: 5,
        }),
        fc.nat(),
        fc.integer({ min: 1, max: 20_000 }),
        async (parts, from, limit) => {
          const run = await claimRun();
          const pieces = parts.map((part) => part.toWellFormed().replaceAll('\0', '0'));
          const all = [...pieces.join('')];
          let offset = 0;
          for (const piece of pieces) {
            for (const _ of [1, 2]) expect((await send(run, piece, offset)).status).toBe(200);
            offset += [...piece].length;
          }
          const at = from % (all.length + 2);
          const range = all.slice(at, at + limit).join('');
          const query = `?offset=${at}&limit=${limit}`;
          expect(await read(run, query)).toMatchObject({ text: range, length: all.length, complete: false });
          const done = await complete(user.call, run);
          expect(done.body).toMatchObject({ output_text: all.join(''), output_truncated: false });
          expect(await read(run, query)).toMatchObject({ text: range, length: all.length, complete: true });
        },
      ),
      { numRuns: 8 },
    );
  });
});

describe('the output of a run', () => {
  test('is kept up to a bound; beyond, pieces are taken and left out, and the run goes on', async () => {
    const run = await claimRun();
    const piece = '€'.repeat(100_000);
    let offset = 0;
    for (const truncated of [false, false, false, true, true]) {
      const answer = await send(run, piece, offset);
      offset += 100_000;
      expect(answer).toMatchObject({ status: 200, body: { next_offset: offset, truncated } });
    }
    // What would fit no longer has a place.
    expect((await send(run, 'x', offset)).body).toEqual({ next_offset: offset + 1, truncated: true });
    const { length } = await read(run);
    expect(length).toBe(Math.floor(MIB / 3));
    const done = await complete(user.call, run);
    expect(done.body).toMatchObject({ status: 'success', output_truncated: true });
    expect(Buffer.byteLength(done.body.output_text)).toBeLessThanOrEqual(MIB);
    expect(done.body.output_text).toHaveLength(length);
  });

  test('is what the report gives, when it gives one', async () => {
    const run = await claimRun();
    await send(run, 'streamed');
    expect((await complete(user.call, run, { status: 'success', output: '' })).body.output_text).toBe('');
    expect(await read(run)).toMatchObject({ text: '', length: 0, complete: true });
    const other = await claimRun();
    await send(other, 'streamed');
    await complete(user.call, other, { status: 'failed', output: 'whole' });
    expect(await read(other, '?offset=2&limit=2')).toMatchObject({
      text: 'ol',
      next_offset: 4,
      length: 5,
      complete: true,
    });
    const { rows } = await server.db.query({
      text: 'select from execution_output where execution_id = any($1)',
      values: [[run.execution_id, other.execution_id]],
    });
    expect(rows).toEqual([]);
  });

  test('is what was streamed when its agent is lost, and the retry begins anew', async () => {
    const run = await claimRun({ max_attempts: 2 });
    await send(run, 'so far');
    await server.db.query({
      text: `update executions set lease_expires_at = now() - interval '1 second' where id = $1`,
      values: [run.execution_id],
    });
    const again = await agent.claimOne([run.skill_name]);
    expect(await execution(run.execution_id)).toMatchObject({ cause: 'lease_lost', output_text: 'so far' });
    expect((await send(run, ' and more', 6)).status).toBe(409);
    expect(await read(again)).toMatchObject({ text: '', length: 0, complete: false });
    await send(again, 'anew', 0);
    expect((await complete(user.call, again)).body.output_text).toBe('anew');
  });

  test('is empty before anything was sent, and a range is refused by its name', async () => {
    const task = await makeTask(user.call);
    const { body } = await user.call('POST', `/tasks/${task.id}/run`);
    const path = `/executions/${body.id}/output`;
    const empty = { text: '', offset: 7, next_offset: 7, length: 0, complete: false };
    expect((await user.call('GET', `${path}?offset=7`)).body).toEqual({ execution_id: body.id, ...empty });
    expect((await user.call('GET', `${path}?offset=2147483646&limit=1048576`)).status).toBe(200);
    for (const query of ['offset=-1', 'offset=2147483647', 'limit=0', 'limit=1048577']) {
      const answer = await user.call('GET', `${path}?${query}`);
      expect(answer).toMatchObject({ status: 400, body: { errors: [{ path: `query.${query.split('=')[0]}` }] } });
    }
  });

  test('that comes in many small pieces takes few rows', async () => {
    const run = await claimRun();
    for (let i = 0; i < 60; i++) await send(run, 'x'.repeat(300));
    const { rows } = await server.db.query({
      text: 'select from execution_output where execution_id = $1',
      values: [run.execution_id],
    });
    expect(rows.length).toBeLessThanOrEqual(3);
    expect((await complete(user.call, run)).body.output_text).toBe('x'.repeat(18_000));
  });
});
