/** How many loads may be under way: more than one, so that one that hangs does not hold up all that come after it. */
const MAX_LOADS = 2;
/** How many keys one load takes, so that none becomes a long query. */
const MAX_KEYS = 100;

interface Waiting<K, V> {
  key: K;
  resolve(value: V): void;
  reject(error: unknown): void;
}

/**
 * Turns a look-up of many keys at once into one of a single key that may be called any number of times at the same time: the
 * first call goes at once, and those that come while loads are under way go together in the next. So what each costs falls
 * as the load rises, and every look-up still begins after it was asked for: nobody gets an answer from before their call.
 * `load` answers one value for each key, in their order; when it throws, all of its callers get that error.
 */
export function coalesced<K, V>(load: (keys: K[]) => Promise<V[]>): (key: K) => Promise<V> {
  let waiting: Waiting<K, V>[] = [];
  let loads = 0;
  const start = async () => {
    const batch = waiting.slice(0, MAX_KEYS);
    waiting = waiting.slice(MAX_KEYS);
    loads += 1;
    try {
      const values = await load(batch.map(({ key }) => key));
      if (values.length !== batch.length) throw new Error(`${batch.length} keys got ${values.length} values.`);
      for (const [i, { resolve }] of batch.entries()) resolve(values[i] as V);
    } catch (error) {
      for (const { reject } of batch) reject(error);
    } finally {
      loads -= 1;
      if (waiting.length > 0) start();
    }
  };
  return (key) =>
    new Promise((resolve, reject) => {
      waiting.push({ key, resolve, reject });
      if (loads < MAX_LOADS) start();
    });
}
