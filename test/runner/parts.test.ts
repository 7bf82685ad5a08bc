import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { commandEnvironment } from '../../src/runner/command.ts';
import { describeEvent } from '../../src/runner/describe-event.ts';
import { readAgentOptions, readWatchOptions } from '../../src/runner/options.ts';
import { createProgressReader, createTail } from '../../src/runner/output.ts';

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
