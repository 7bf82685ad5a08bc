import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { ApiError, createApi, pauseAfter } from '../../src/runner/api.ts';
import { describeEvent } from '../../src/runner/describe-event.ts';
import type { AgentOptions } from '../../src/runner/options.ts';
import { type Agent, startAgent } from '../../src/runner/work.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask, unique, until } from '../support/work.ts';

// The agent's work inside this process; as people start it, it is tested in agent.test.ts.

let server: TestServer;
const agents: Agent[] = [];
let folder: string;
beforeAll(async () => {
  server = await startServer({ env: { LEASE_SECONDS: '3' } });
  folder = await mkdtemp(join(tmpdir(), 'muster-work-'));
});
afterEach(async () => {
  for (const agent of agents.splice(0)) {
    agent.drain();
    agent.drain();
    await agent.done.catch(() => {});
  }
});
afterAll(async () => {
  await server?.stop();
  await rm(folder, { recursive: true, force: true });
});

function start(commands: Record<string, string>, options: Partial<AgentOptions> = {}) {
  const said: string[] = [];
  const agent = startAgent(
    {
      server: server.url,
      key: server.adminKey,
      name: unique('agent'),
      type: 'custom',
      capabilities: ['shell'],
      concurrency: 2,
      commands: new Map(Object.entries(commands)),
      graceMs: 200,
      drainMs: 20_000,
      json: false,
      ...options,
    },
    (what) => void said.push(what),
  );
  agents.push(agent);
  return {
    agent,
    said,
    saying: (text: string) =>
      until(
        async () => said.join('\n'),
        (all) => all.includes(text),
      ),
  };
}

const runNow = async (skill: string, fields: Record<string, unknown> = {}) => {
  const task = await makeTask(server.admin, { skill_name: skill, max_attempts: 1, ...fields });
  return (await server.admin('POST', `/tasks/${task.id}/run`)).body.id as number;
};
const execution = async (id: number) => (await server.admin('GET', `/executions/${id}`)).body;
const ended = (id: number) =>
  until(
    () => execution(id),
    (run) => !['queued', 'running'].includes(run.status),
  );

describe('an agent at work', () => {
  test('runs what it is told to on its own command line, and reports success, failure and progress', async () => {
    const [good, bad] = [unique('good'), unique('bad')];
    const { said } = start({
      [good]: 'echo "::progress 30 third"; cat; sleep 1.2; echo',
      [bad]: 'echo broken >&2; exit 7',
    });
    const [first, second] = [
      await runNow(good, { params: { a: 1 } }),
      await runNow(bad, { required_capabilities: ['shell'] }),
    ];
    await until(
      () => execution(first),
      (run) => run.progress?.percent === 30,
    );
    expect(await ended(first)).toMatchObject({
      status: 'success',
      output_text: '::progress 30 third\n{"a":1}\n',
    });
    expect(await ended(second)).toMatchObject({ status: 'failed', error_text: 'exit code 7\nbroken' });
    await until(
      async () => said.filter((line) => /^(finished|failed)/.test(line)).length,
      (count) => count === 2,
    );
  });

  test('stops a run that is cancelled, one that takes too long, and one that it has lost', async () => {
    const skill = unique('long');
    const { saying } = start({ [skill]: 'sleep 60' }, { concurrency: 3 });
    const [cancelled, late, lost] = [
      await runNow(skill),
      await runNow(skill, { timeout_seconds: 1 }),
      await runNow(skill),
    ];
    await until(
      async () => [await execution(cancelled), await execution(lost)],
      (runs) => runs.every((run) => run.status === 'running'),
    );
    await server.admin('POST', `/executions/${cancelled}/cancel`);
    await server.db.query({
      text: 'update executions set lease_token = gen_random_uuid() where id = $1',
      values: [lost],
    });
    expect((await ended(cancelled)).status).toBe('cancelled');
    expect((await ended(late)).status).toBe('timeout');
    await saying(`lost run ${lost}`);
  });

  test('sends what a command prints while it runs, and all of it has arrived when it has ended', async () => {
    const skill = unique('stream');
    const gate = join(folder, unique('gate'));
    start({ [skill]: `printf 'first €'; until [ -e ${gate} ]; do sleep 0.1; done; printf ' last'` });
    const id = await runNow(skill);
    const output = async () => (await server.admin('GET', `/executions/${id}/output`)).body;
    expect(await until(output, ({ text }) => text !== '')).toMatchObject({ text: 'first €', complete: false });
    await writeFile(gate, '');
    expect(await ended(id)).toMatchObject({ status: 'success', output_text: 'first € last', output_truncated: false });
    expect(await output()).toMatchObject({ text: 'first € last', complete: true });
  });

  test('says by the exit codes for bad input and bad configuration that there is no use in another try', async () => {
    const [data, config, later] = [unique('data'), unique('config'), unique('later')];
    start({ [data]: 'exit 65', [config]: 'exit 78', [later]: 'exit 75' }, { concurrency: 3 });
    const retry = { max_attempts: 2, retry_backoff_seconds: 3_600 };
    const ids = [await runNow(data, retry), await runNow(config, retry), await runNow(later, retry)];
    const runs = await Promise.all(ids.map(ended));
    expect(runs.map((run) => run.error_text)).toEqual(['exit code 65', 'exit code 78', 'exit code 75']);
    const counts = runs.map(
      async ({ task_id }) => (await server.admin('GET', `/executions?task_id=${task_id}`)).body.executions.length,
    );
    expect(await Promise.all(counts)).toEqual([1, 1, 2]);
  });

  test('drains: finishes what runs, then stops; told again, stops that too', async () => {
    const skill = unique('drain');
    const { agent, said } = start({ [skill]: 'sleep 1; echo whole' });
    const id = await runNow(skill);
    await until(
      () => execution(id),
      (run) => run.status === 'running',
    );
    agent.drain();
    await agent.done;
    expect(await execution(id)).toMatchObject({ status: 'success', output_text: 'whole\n' });
    expect(said.at(-1)).toBe('stopped');

    const other = start({ [skill]: 'sleep 60' });
    const stopped = await runNow(skill);
    await until(
      () => execution(stopped),
      (run) => run.status === 'running',
    );
    other.agent.drain();
    other.agent.drain();
    await other.agent.done;
    expect(await execution(stopped)).toMatchObject({ status: 'failed', error_text: 'the agent was stopped' });
  });

  test('is refused for good with a bad key, and waits for a server that is not there', async () => {
    const refused = start({ x: 'true' }, { key: 'muster_wrong' });
    await expect(refused.agent.done).rejects.toThrow(/API key is not valid/);
    const waiting = start({ x: 'true' }, { server: 'http://127.0.0.1:1' });
    await waiting.saying('waiting for the server');
    waiting.agent.drain();
    await waiting.agent.done;
  });
});

describe('calls of the agent', () => {
  test('say what the server said, and how long to wait', async () => {
    const api = createApi(server.url, server.adminKey);
    const error = await api.post('/agents/999999/claim', {}).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(ApiError);
    expect(error).toMatchObject({ status: 404, passing: false, message: 'There is no agent 999999.' });
    expect(new ApiError(503, '', 2_000).passing).toBe(true);
    expect(pauseAfter(new ApiError(429, '', 2_000), 0)).toBe(2_000);
    for (const tries of [0, 1, 5, 50]) {
      const wait = pauseAfter(new Error('x'), tries);
      expect(wait).toBeGreaterThanOrEqual(Math.min(10_000, 250 * 2 ** tries) / 2);
      expect(wait).toBeLessThanOrEqual(10_000);
    }
  });
});

test('every frame of the server in words', () => {
  const say = (type: string, data: Record<string, unknown>) =>
    describeEvent({ type, timestamp: '2026-01-01T00:00:00.000Z', data });
  expect(say('ack', { resumed: false })).toBe('connected; waiting for events');
  expect(say('ack', { resumed: true })).toMatch(/what was missed follows/);
  expect(
    say('agent_activity_update', { agent_id: 1, agent_name: 'a', action: 'claimed', status: 'busy', execution_id: 2 }),
  ).toBe('agent 1 a: claimed, now busy run 2');
  expect(say('calendar_event_created', { title: 't', task_id: 1, start_time: 'x' })).toBe('calendar: t (task 1) at x');
  expect(say('calendar_event_deleted', { title: 't', task_id: 1, start_time: null })).toBe(
    'calendar: t (task 1) has no further time',
  );
  expect(say('error', { detail: 'no' })).toBe('error: no');
  expect(say('resync_required', {})).toMatch(/look at the REST API/);
  expect(say('bookmark', {})).toBeUndefined();
});
