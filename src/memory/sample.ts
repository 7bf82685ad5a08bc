/** Some of what came, at most `size`. */
export interface Sample<T> {
  add(things: readonly T[]): void;
  /** Takes everything out, to be looked at; `undo` puts it back beside what came meanwhile. */
  take(): { things: T[]; undo(): void };
}

/**
 * An even sample: of things that came since it was last taken, each has the same chance to be in it (reservoir sampling), so
 * that it shows what happened at any time in between; as long as they are not more than `size`, it has them all.
 */
export function createSample<T>(size: number, random: () => number = Math.random): Sample<T> {
  let kept: T[] = [];
  let seen = 0;
  const add = (things: readonly T[]) => {
    for (const thing of things) {
      seen++;
      if (kept.length < size) kept.push(thing);
      else {
        const place = Math.floor(random() * seen);
        if (place < size) kept[place] = thing;
      }
    }
  };
  return {
    add,
    take() {
      const taken = { kept, seen };
      kept = [];
      seen = 0;
      return {
        things: taken.kept,
        undo() {
          const meanwhile = kept;
          ({ kept, seen } = taken);
          add(meanwhile);
        },
      };
    },
  };
}
