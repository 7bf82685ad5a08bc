import { describe, expect, test, vi } from 'vitest';
import { startLoop } from '../../src/platform/loop.ts';

const HOUR = 3_600_000;

/** A turn that the test ends when it likes, with what it likes. */
function heldTurns() {
  let running = 0;
  let most = 0;
  let started = 0;
  const ends: ((pause: number | Error) => void)[] = [];
  return {
    started: () => started,
    most: () => most,
    turn: () =>
      new Promise<number>((resolve, reject) => {
        started++;
        most = Math.max(most, ++running);
        ends.push((pause) => {
          running--;
          if (pause instanceof Error) reject(pause);
          else resolve(pause);
        });
      }),
    end(pause: number | Error) {
      ends.shift()?.(pause);
    },
  };
}

const noError = (error: unknown) => {
  throw error;
};

/** Lets everything run that is due at once. */
const settle = () => new Promise<void>((resolve) => setImmediate(resolve));

describe('a loop', () => {
  test('takes its first turn at once, and the next after the pause that the turn answered', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    try {
      const turns = heldTurns();
      const loop = startLoop(noError, turns.turn);
      expect(turns.started()).toBe(1);
      turns.end(500);
      await settle();
      await vi.advanceTimersByTimeAsync(499);
      expect(turns.started()).toBe(1);
      await vi.advanceTimersByTimeAsync(1);
      expect(turns.started()).toBe(2);
      turns.end(HOUR);
      await loop.stop();
      expect(vi.getTimerCount()).toBe(0);
    } finally {
      vi.useRealTimers();
    }
  });

  test('wakes from its sleep', async () => {
    const turns = heldTurns();
    const loop = startLoop(noError, turns.turn);
    turns.end(HOUR);
    await settle();
    expect(turns.started()).toBe(1);
    loop.wake();
    await settle();
    expect(turns.started()).toBe(2);
    turns.end(HOUR);
    await loop.stop();
  });

  test('that is woken in the middle of a turn, however often, takes one more after it and never two at once', async () => {
    const turns = heldTurns();
    const loop = startLoop(noError, turns.turn);
    for (let i = 0; i < 100; i++) loop.wake();
    await settle();
    expect(turns.started()).toBe(1);
    turns.end(HOUR);
    await settle();
    expect(turns.started()).toBe(2);
    turns.end(HOUR);
    await settle();
    expect(turns.started()).toBe(2);
    expect(turns.most()).toBe(1);
    await loop.stop();
  });

  test('whose turns fail reports each, pauses for longer and longer up to two seconds, and begins anew after a good one', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    try {
      const turns = heldTurns();
      const errors: unknown[] = [];
      const loop = startLoop((error) => errors.push(error), turns.turn);
      const fault = new Error('a fault');
      const pauseAfter = async (end: number | Error) => {
        const before = turns.started();
        turns.end(end);
        await settle();
        for (let ms = 0; ; ms += 100) {
          if (turns.started() > before) return ms;
          await vi.advanceTimersByTimeAsync(100);
        }
      };
      const pauses = [];
      for (let i = 0; i < 7; i++) pauses.push(await pauseAfter(fault));
      expect(pauses).toEqual([100, 200, 400, 800, 1_600, 2_000, 2_000]);
      expect(errors).toEqual(Array(7).fill(fault));
      expect(await pauseAfter(300)).toBe(300);
      expect(await pauseAfter(fault)).toBe(100);
      turns.end(0);
      await loop.stop();
    } finally {
      vi.useRealTimers();
    }
  });

  test('that is woken after a turn that failed tries again at once', async () => {
    const turns = heldTurns();
    const loop = startLoop(() => {}, turns.turn);
    turns.end(new Error('a fault'));
    await settle();
    loop.wake();
    await settle();
    expect(turns.started()).toBe(2);
    turns.end(HOUR);
    await loop.stop();
  });

  test('stops after the turn under way, whose fault then concerns nobody', async () => {
    const turns = heldTurns();
    const errors: unknown[] = [];
    const loop = startLoop((error) => errors.push(error), turns.turn);
    let stopped = false;
    const stopping = loop.stop().then(() => {
      stopped = true;
    });
    loop.wake();
    await settle();
    expect(stopped).toBe(false);
    turns.end(new Error('the database was closed'));
    await stopping;
    loop.wake();
    await settle();
    expect(turns.started()).toBe(1);
    expect(errors).toEqual([]);
  });

  test('stops at once when it sleeps, and as often as it is asked to', async () => {
    const turns = heldTurns();
    const loop = startLoop(noError, turns.turn);
    turns.end(HOUR);
    await settle();
    await Promise.all([loop.stop(), loop.stop()]);
    expect(turns.started()).toBe(1);
  });
});
