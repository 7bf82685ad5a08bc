import { Redis } from 'ioredis';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { createApiKey } from '../../src/auth/api-keys.ts';
import { haveRedis, redisOnPort } from '../support/redis.ts';
import { type Answer, type Caller, startServer, type TestServer } from '../support/server.ts';
import { until } from '../support/work.ts';

const MAX = 20;
const env = { RATE_LIMIT_PER_MINUTE: String(MAX), RATE_LIMIT_ACTIVITY_PER_MINUTE: String(2 * MAX) };
const me = (call: Caller) => call('GET', '/auth/me');
const remaining = ({ headers }: Answer) => Number(headers.get('ratelimit-remaining'));

/** Calls until it is refused, `most` times at the most; answers how often it was let pass. */
async function passed(call: Caller, most: number): Promise<number> {
  for (let i = 0; i < most; i++) {
    const { status } = await me(call);
    if (status === 429) return i;
    expect(status).toBe(200);
  }
  return most;
}

/** API keys of as many new users: each has counts of its own. Made by the database, since addresses are limited too. */
async function newCallers(server: TestServer, count: number): Promise<string[]> {
  const { rows: users } = await server.db.query<{ id: number }>({
    text: `insert into users (email, password_hash, role)
      select gen_random_uuid() || '@example.com', 'none', 'user' from generate_series(1, $1) returning id::int`,
    values: [count],
  });
  return Promise.all(
    users.map(({ id }) => {
      const actor = {
        userId: id,
        role: 'user',
        scopes: ['read'],
        ip: '::1',
        userAgent: null,
        requestId: 'test',
      } as const;
      const wanted = { name: 'test', scopes: ['read'] as const, expiresAt: null };
      return server.db.transaction(async (tx) => (await createApiKey(tx, actor, wanted)).key);
    }),
  );
}

describe('a limited answer', () => {
  let server: TestServer;
  beforeAll(async () => {
    server = await startServer({ env });
  });
  afterAll(() => server?.stop());

  const tells = (answer: Answer, max: number) => {
    for (const prefix of ['ratelimit', 'x-ratelimit']) {
      expect(answer.headers.get(`${prefix}-limit`)).toBe(String(max));
      const left = Number(answer.headers.get(`${prefix}-remaining`));
      expect(left).toBeGreaterThanOrEqual(0);
      expect(left).toBeLessThan(max);
      const reset = Number(answer.headers.get(`${prefix}-reset`));
      expect(reset).toBeGreaterThan(0);
      expect(reset).toBeLessThanOrEqual(60);
    }
  };

  test('tells the limit, what is left and when it starts anew, whatever it answers; the refused one when to come back', async () => {
    const [key = ''] = await newCallers(server, 1);
    const call = server.as(key);
    for (const [answer, status] of [
      [await me(call), 200],
      [await call('GET', '/tasks?nonsense=1'), 400],
      [await call('POST', '/tasks', {}), 403],
      [await call('GET', '/tasks/999999'), 404],
      [await server.as('garbage')('GET', '/tasks'), 401],
      [await server.as(undefined)('GET', '//no/such/path'), 404],
      [await call('POST', '/no/such/path', {}), 404],
    ] as const) {
      expect(answer.status).toBe(status);
      tells(answer, MAX);
    }
    tells(await call('GET', '/executions'), 2 * MAX);
    await passed(call, MAX);
    const refused = await me(call);
    expect(refused).toMatchObject({ status: 429, body: { type: 'urn:muster:problem:rate-limited' } });
    tells(refused, MAX);
    expect(remaining(refused)).toBe(0);
    expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
  });

  test('counts what is left down by one', async () => {
    const [key = ''] = await newCallers(server, 1);
    const left: number[] = [];
    for (let i = 0; i < 4; i++) left.push(remaining(await me(server.as(key))));
    expect(left).toEqual([MAX - 1, MAX - 2, MAX - 3, MAX - 4]);
  });
});

test('guesses of credentials, paths that lead nowhere and compressed bodies are limited by address', async () => {
  for (const guess of [
    (strict: TestServer, i: number) => strict.as(`guess-${i}`)('GET', '/auth/me'),
    (strict: TestServer, i: number) => strict.as(undefined)('GET', `//path/${i}`),
    (strict: TestServer) => strict.as('guess')('POST', '/tasks', {}, { 'content-encoding': 'gzip' }),
  ]) {
    const strict = await startServer({ env });
    try {
      const statuses: number[] = [];
      for (let i = 0; i < MAX + 5; i++) statuses.push((await guess(strict, i)).status);
      expect(statuses.slice(0, MAX)).not.toContain(429);
      expect(new Set(statuses.slice(MAX))).toEqual(new Set([429]));
    } finally {
      await strict.stop();
    }
  }
});

describe.runIf(haveRedis())('with Redis', () => {
  let redis: Awaited<ReturnType<typeof redisOnPort>>;
  let one: TestServer;
  let other: TestServer;
  beforeAll(async () => {
    redis = await redisOnPort();
    redis.start();
    one = await startServer({ env: { ...env, TRUST_PROXY: '127.0.0.1', REDIS_URL: redis.url } });
    other = await startServer({
      env: { ...env, TRUST_PROXY: '127.0.0.1', REDIS_URL: redis.url },
      databaseUrl: one.databaseUrl,
    });
    await shared();
  });
  afterAll(async () => {
    redis?.signal('SIGCONT');
    await other?.stop();
    await one?.stop();
    await redis?.stop();
  });

  /** Waits until both servers count together: what one counted, the other has heard of. */
  async function shared() {
    const probe = async () => {
      const [key = ''] = await newCallers(one, 1);
      return [remaining(await me(one.as(key))), remaining(await me(other.as(key)))];
    };
    await until(probe, ([first, second]) => first === MAX - 1 && second === MAX - 2);
  }

  test('two servers share one count', async () => {
    const [key = ''] = await newCallers(one, 1);
    const statuses: number[] = [];
    for (let i = 0; i < MAX + 6; i++) statuses.push((await me((i % 2 ? one : other).as(key))).status);
    expect(statuses).toEqual([...Array(MAX).fill(200), ...Array(6).fill(429)]);
  });

  test('calls at once on two servers are counted exactly', async () => {
    const [key = ''] = await newCallers(one, 1);
    const answers = await Promise.all(Array.from({ length: 2 * MAX }, (_, i) => me((i % 2 ? one : other).as(key))));
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(MAX);
    expect(answers.filter(({ status }) => status === 429)).toHaveLength(MAX);
  });

  test('guesses of credentials are shared too', async () => {
    const statuses: number[] = [];
    for (let i = 0; i < MAX + 6; i++) {
      const guesser = (i % 2 ? one : other).as(`guess-${i}`);
      statuses.push((await guesser('GET', '/auth/me', undefined, { 'x-forwarded-for': '203.0.113.7' })).status);
    }
    expect(statuses).toEqual([...Array(MAX).fill(401), ...Array(6).fill(429)]);
  });

  test.each([
    ['killed', () => redis.stop(), () => redis.start()],
    ['hung', () => redis.signal('SIGSTOP'), () => redis.signal('SIGCONT')],
  ] as const)(
    'that is %s, each server limits by itself, from what it knew; then they share again',
    async (_name, lose, restore) => {
      const [known = '', fresh = '', crowd = ''] = await newCallers(one, 3);
      const before = 5;
      expect(await passed(one.as(known), before)).toBe(before);
      await lose();
      try {
        // Nothing fails, nothing is unlimited, and what was used up before stays so.
        expect(await passed(one.as(known), 2 * MAX)).toBe(MAX - before);
        expect(await passed(one.as(fresh), 2 * MAX)).toBe(MAX);
        expect(await passed(other.as(fresh), 2 * MAX)).toBe(MAX);
        const answers = await Promise.all(Array.from({ length: 3 * MAX }, () => me(one.as(crowd))));
        expect(answers.filter(({ status }) => status === 200)).toHaveLength(MAX);
        expect(answers.filter(({ status }) => status === 429)).toHaveLength(2 * MAX);
        for (const answer of answers) expect(answer.headers.get('ratelimit-limit')).toBe(String(MAX));
      } finally {
        await restore();
      }
      await shared();
      const [later = ''] = await newCallers(one, 1);
      expect((await passed(one.as(later), MAX / 2)) + (await passed(other.as(later), MAX))).toBe(MAX);
    },
  );

  test('that hangs is asked once a second, however many call', async () => {
    const admin = new Redis(redis.url);
    const asked = async () => Number(/cmdstat_eval:calls=(\d+)/.exec(await admin.info('commandstats'))?.[1] ?? 0);
    const [key = ''] = await newCallers(one, 1);
    try {
      await me(one.as(key));
      const before = await asked();
      redis.signal('SIGSTOP');
      const start = performance.now();
      for (let i = 0; i < 2 * MAX; i++) await me(one.as(key));
      const seconds = Math.ceil((performance.now() - start) / 1_000);
      redis.signal('SIGCONT');
      // What it was asked while it hung it does now.
      const count = await until(asked, (now) => now > before);
      expect(count - before).toBeLessThanOrEqual(1 + seconds);
    } finally {
      redis.signal('SIGCONT');
      admin.disconnect();
    }
    await shared();
  });

  test('that answers with errors counts as away', async () => {
    const admin = new Redis(redis.url);
    const [key = ''] = await newCallers(one, 1);
    try {
      // Every write is refused, as by a replica after a failover.
      await admin.call('CONFIG', 'SET', 'min-replicas-to-write', '1');
      expect(await passed(one.as(key), 2 * MAX)).toBe(MAX);
    } finally {
      await admin.call('CONFIG', 'SET', 'min-replicas-to-write', '0');
      admin.disconnect();
    }
    await shared();
  });
});

test.runIf(haveRedis())('a Redis that was never there is no reason not to start, or not to limit', async () => {
  const redis = await redisOnPort();
  const server = await startServer({ env: { ...env, REDIS_URL: redis.url } });
  try {
    expect(await passed(server.admin, 2 * MAX)).toBe(MAX);
  } finally {
    await server.stop();
  }
});
