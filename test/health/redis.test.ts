import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { haveRedis, redisOnPort } from '../support/redis.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeTask, until } from '../support/work.ts';

describe.runIf(haveRedis())('Redis', () => {
  let redis: Awaited<ReturnType<typeof redisOnPort>>;
  let server: TestServer;
  beforeAll(async () => {
    redis = await redisOnPort();
    redis.start();
    server = await startServer({ env: { REDIS_URL: redis.url } });
  });
  afterAll(async () => {
    await server?.stop();
    await redis?.stop();
  });

  const health = async () => (await server.as(undefined)('GET', '//health')).body;
  const healthSays = (state: string) => until(health, (body) => body.redis === state);

  test('that is away, hangs, or comes back is told in /health, and everything is served meanwhile', async () => {
    expect(await healthSays('ok')).toMatchObject({ status: 'healthy' });
    await redis.stop();
    expect(await healthSays('away')).toMatchObject({ status: 'degraded', database: 'ok' });
    expect((await makeTask(server.admin)).id).toBeGreaterThan(0);
    expect((await server.as(undefined)('GET', '//health/ready')).status).toBe(200);
    redis.start();
    await healthSays('ok');
    redis.signal('SIGSTOP');
    await healthSays('away');
    expect((await makeTask(server.admin)).id).toBeGreaterThan(0);
    redis.signal('SIGCONT');
    expect(await healthSays('ok')).toMatchObject({ status: 'healthy' });
  });
});
