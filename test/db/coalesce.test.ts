import { expect, test } from 'vitest';
import { coalesced } from '../../src/db/coalesce.ts';

/** A look-up whose loads end when they are told to. */
function held() {
  const loads: { keys: number[]; answer: () => void; fail: (error: Error) => void }[] = [];
  const find = coalesced(
    (keys: number[]) =>
      new Promise<string[]>((resolve, reject) => {
        loads.push({ keys, answer: () => resolve(keys.map((key) => `value ${key}`)), fail: reject });
      }),
  );
  return { loads, find };
}

test('the first look-up goes at once, and those that come meanwhile go together', async () => {
  const { loads, find } = held();
  const found = [1, 2, 3, 4, 5].map(find);
  expect(loads.map(({ keys }) => keys)).toEqual([[1], [2]]);
  loads[0]?.answer();
  expect(await found[0]).toBe('value 1');
  await expect.poll(() => loads.length).toBe(3);
  expect(loads[2]?.keys).toEqual([3, 4, 5]);
  loads[1]?.answer();
  loads[2]?.answer();
  expect(await Promise.all(found)).toEqual([1, 2, 3, 4, 5].map((key) => `value ${key}`));
});

test('a look-up never gets what was asked for before it came, not even for the same key', async () => {
  let value = 'old';
  const find = coalesced(async (keys: number[]) => {
    const read = value;
    await new Promise((done) => setImmediate(done));
    return keys.map(() => read);
  });
  const before = find(1);
  value = 'new';
  expect(await Promise.all([before, find(1), find(1)])).toEqual(['old', 'new', 'new']);
});

test('one load that hangs does not hold up the others; one that fails fails its callers alone', async () => {
  const { loads, find } = held();
  const hung = find(1);
  const failing = find(2);
  const after = find(3);
  loads[1]?.fail(new Error('gone'));
  await expect(failing).rejects.toThrow('gone');
  await expect.poll(() => loads.length).toBe(3);
  loads[2]?.answer();
  expect(await after).toBe('value 3');
  loads[0]?.answer();
  expect(await hung).toBe('value 1');
});

test('a load takes a hundred keys at the most', async () => {
  const sizes: number[] = [];
  const find = coalesced(async (keys: number[]) => {
    sizes.push(keys.length);
    return keys;
  });
  const keys = Array.from({ length: 350 }, (_, i) => i);
  expect(await Promise.all(keys.map(find))).toEqual(keys);
  expect(Math.max(...sizes)).toBe(100);
});
