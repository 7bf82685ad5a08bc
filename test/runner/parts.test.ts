import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { type Api, ApiError } from '../../src/runner/api.ts';
import { commandEnvironment } from '../../src/runner/command.ts';
import { describeEvent } from '../../src/runner/describe-event.ts';
import { readAgentOptions, readWatchOptions } from '../../src/runner/options.ts';
import { createProgressReader, createTail } from '../../src/runner/output.ts';
import { streamOutput } from '../../src/runner/stream.ts';
import { until } from '../support/work.ts';

describe('the tail of an output', () => {
  test('is the end of what was added, at most so many bytes, and never begins inside a character', () => {
    fc.assert(
      fc.property(
        fc.array(fc.string({ unit: 'binary', maxLength: 50 })),
        fc.integer({ min: 4, max: 60 }),
        (texts, max) => {
          const tail = createTail(max);
          for (const text of texts) tail.add(Buffer.from(text.toWellFormed()));
          const all = texts.join('').toWellFormed().replaceAll('\0', '\u{fffd}');
          const kept = tail.text();
          const whole = texts.map((text) => text.toWellFormed()).join('');
          if (Buffer.byteLength(whole) <= max) expect(kept).toBe(whole.replaceAll('\0', '\u{fffd}'));
          expect(kept.isWellFormed()).toBe(true);
          expect(all.length === 0 || kept.length <= all.length).toBe(true);
          expect(whole.replaceAll('\0', '\u{fffd}').endsWith(kept)).toBe(true);
        },
      ),
    );
  });
});

describe('progress', () => {
  test('is the last line that says something and the last percentage, however the output is cut into pieces', () => {
    const output = 'start\n::progress 10\nworking €\r\n::progress 55.5% nearly\n\n';
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: Buffer.byteLength(output) }), { maxLength: 6 }), (cuts) => {
        const bytes = Buffer.from(output);
        const reader = createProgressReader();
        const at = [0, ...cuts.toSorted((a, b) => a - b), bytes.length];
        for (let i = 1; i < at.length; i++) reader.add(bytes.subarray(at[i - 1], at[i]));
        expect(reader.current()).toEqual({ percent: 55.5, message: 'nearly' });
      }),
    );
  });

  test('a line that only looks like a mark is a line', () => {
    const reader = createProgressReader();
    reader.add(Buffer.from('::progress 400 x\n'));
    expect(reader.current()).toEqual({ message: '::progress 400 x' });
  });
});

describe('the stream of an output', () => {
  const run = {
    execution_id: 1,
    task_id: 2,
    skill_name: 's',
    params: {},
    attempt: 1,
    scheduled_for: 't',
    lease_token: 'l',
    lease_expires_at: 't',
    timeout_seconds: 1,
  };
  /** A server that keeps pieces as ours does; `answer` says what becomes of the answer to the n-th. */
  function fakeServer(answer: (n: number) => Error | undefined = () => undefined, most = Number.POSITIVE_INFINITY) {
    let kept: string[] = [];
    let calls = 0;
    const api: Api = {
      async post<T>(path: string, body: unknown) {
        const { text, offset } = body as { text: string; offset: number };
        expect(path).toBe('/executions/1/output');
        expect(text.isWellFormed()).toBe(true);
        if (offset > kept.length) throw new ApiError(409, 'a gap', undefined);
        if (offset === kept.length) kept = [...kept, ...text];
        const failure = answer(calls++);
        if (failure) throw failure;
        return { body: { next_offset: kept.length, truncated: kept.length > most } as T, date: new Date() };
      },
      insist: () => Promise.reject(new Error('Pieces are not insisted on.')),
    };
    return { api, text: () => kept.join(''), calls: () => calls };
  }
  const large = '€😀'.repeat(8_000);

  test('a short one is left to the report', async () => {
    const server = fakeServer();
    const stream = streamOutput(server.api, run, 1_000);
    stream.add(Buffer.from('short'), 'stdout');
    expect(await stream.finish()).toBe(false);
    expect(server.calls()).toBe(0);
  });

  test('a long one arrives whole, whatever its pieces cut, and so does its rest', async () => {
    const server = fakeServer();
    const stream = streamOutput(server.api, run, 1_000);
    const bytes = Buffer.from(large);
    for (let at = 0; at < bytes.length; at += 997) stream.add(bytes.subarray(at, at + 997), 'stdout');
    await until(
      async () => server.text(),
      (text) => text !== '',
    );
    stream.add(Buffer.from('a\0b'), 'stderr');
    expect(await stream.finish()).toBe(true);
    expect(server.text()).toBe(`${large}a\u{fffd}b`);
  });

  test('a piece whose answer was lost is sent again from where it began', async () => {
    const server = fakeServer((n) => (n === 0 ? new Error('ECONNRESET') : undefined));
    const stream = streamOutput(server.api, run, 1_000);
    stream.add(Buffer.from(large), 'stdout');
    await until(
      async () => server.calls(),
      (calls) => calls > 1,
    );
    stream.add(Buffer.from('end'), 'stdout');
    expect(await stream.finish()).toBe(true);
    expect(server.text()).toBe(`${large}end`);
  });

  test.each([
    ['the server is away at the end', fakeServer(() => new ApiError(503, 'away', undefined))],
    ['the server refuses it', fakeServer(() => new ApiError(404, 'no such call', undefined))],
    ['it is more than the server keeps', fakeServer(undefined, 10)],
  ])('the report carries it when %s', async (_what, server) => {
    const stream = streamOutput(server.api, run, 1_000);
    stream.add(Buffer.from(large), 'stdout');
    await until(
      async () => server.calls(),
      (calls) => calls > 0,
    );
    stream.add(Buffer.from('end'), 'stdout');
    expect(await stream.finish()).toBe(false);
  });
});

test('the environment of a command names plain params and hides the key', () => {
  const run = {
    execution_id: 1,
    task_id: 2,
    skill_name: 's',
    params: { 'a-b': 'x\0y', n: 0, on: false, deep: {} },
    attempt: 1,
    scheduled_for: 't',
    lease_token: 'l',
    lease_expires_at: 't',
    timeout_seconds: 1,
  };
  const env = commandEnvironment(run, { PATH: '/bin', MUSTER_KEY: 'secret' });
  expect(env).toMatchObject({ PATH: '/bin', MUSTER_PARAM_A_B: 'xy', MUSTER_PARAM_N: '0', MUSTER_PARAM_ON: 'false' });
  expect(env).not.toHaveProperty('MUSTER_KEY');
  expect(env).not.toHaveProperty('MUSTER_PARAM_DEEP');
  expect(Object.values(env).join()).not.toContain('l,');
});

test('options: pairs in their order, defaults, the same name for the same folder', () => {
  const env = { MUSTER_KEY: 'muster_x' };
  const read = () => readAgentOptions(['--skill', 'a', '--exec', 'x', '--skill=b', '--exec=y'], env, '/somewhere');
  const options = read();
  if (options === 'help') throw new Error('no help was asked for');
  expect([...options.commands]).toEqual([
    ['a', 'x'],
    ['b', 'y'],
  ]);
  expect(options).toMatchObject({
    concurrency: 1,
    server: 'http://127.0.0.1:8080',
    graceMs: 5_000,
    drainMs: 60_000,
    type: 'custom',
  });
  expect(read()).toEqual(options);
  expect(readAgentOptions(['--help'], {})).toBe('help');
  expect(readWatchOptions(['--topics', 'tasks'], env)).toMatchObject({ topics: 'tasks', json: false });
  expect(() => readWatchOptions(['--topics', 'x'], env)).toThrow('--topics must be some of tasks,agents,calendar.');
});

test('an event on one line, without what would move the cursor', () => {
  const line = describeEvent({
    type: 'task_status_update',
    timestamp: '2026-01-01T00:00:00.000Z',
    data: {
      task_id: 1,
      skill_name: 'x\u001b[2J',
      previous_status: 'pending',
      status: 'running',
      execution_id: 3,
      execution_status: 'running',
      output: 'a\nb',
    },
  });
  expect(line).toBe('task 1 x [2J: pending → running (run 3 running) · a b');
});
