import fc from 'fast-check';
import { expect, test } from 'vitest';
import { createSample } from '../../src/memory/sample.ts';

const batches = fc.array(fc.array(fc.integer(), { maxLength: 10 }), { maxLength: 20 });
const size = fc.integer({ min: 1, max: 12 });
const random = fc.infiniteStream(fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }));
const sorted = (numbers: readonly number[]) => [...numbers].sort((a, b) => a - b);

test('a sample holds as many as it may, of what came, and everything while that is not more', () => {
  fc.assert(
    fc.property(batches, size, random, (all, max, numbers) => {
      const sample = createSample<number>(max, () => numbers.next().value);
      for (const batch of all) sample.add(batch);
      const { things } = sample.take();
      const came = all.flat();
      expect(things).toHaveLength(Math.min(max, came.length));
      if (came.length <= max) expect(things).toEqual(came);
      else for (const thing of things) expect(came).toContain(thing);
      expect(sample.take().things).toEqual([]);
    }),
  );
});

test('what is put back is there again, beside what came meanwhile', () => {
  fc.assert(
    fc.property(batches, batches, random, (before, meanwhile, numbers) => {
      const came = [...before.flat(), ...meanwhile.flat()];
      const sample = createSample<number>(Math.max(1, came.length), () => numbers.next().value);
      for (const batch of before) sample.add(batch);
      const { undo } = sample.take();
      for (const batch of meanwhile) sample.add(batch);
      undo();
      expect(sorted(sample.take().things)).toEqual(sorted(came));
    }),
  );
});

test('of much, the first are in it as often as the last', () => {
  const counts = new Map<number, number>();
  for (let round = 0; round < 4_000; round++) {
    const sample = createSample<number>(5);
    for (let i = 0; i < 20; i++) sample.add([i]);
    for (const thing of sample.take().things) counts.set(thing, (counts.get(thing) ?? 0) + 1);
  }
  // 1,000 of each are expected; ten standard deviations are 274.
  for (let i = 0; i < 20; i++) expect(Math.abs((counts.get(i) ?? 0) - 1_000)).toBeLessThan(274);
});
