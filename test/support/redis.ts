import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { freePort } from './processes.ts';

/**
 * Whether there is a redis-server on the PATH to start. Without one the tests that need it are skipped, with a loud line;
 * with REQUIRE_REDIS=1, as in CI, that is a failure.
 */
export function haveRedis(): boolean {
  if (spawnSync('redis-server', ['--version']).status === 0) return true;
  if (process.env['REQUIRE_REDIS'] === '1')
    throw new Error('REQUIRE_REDIS=1, and there is no redis-server on the PATH.');
  console.warn('SKIPPED: the tests that need Redis, since there is no redis-server on the PATH.');
  return false;
}

/** A Redis of a test's own, which it may stop and start. */
export async function redisOnPort() {
  const port = await freePort();
  let server: ChildProcess | undefined;
  return {
    url: `redis://127.0.0.1:${port}`,
    start() {
      server = spawn(
        'redis-server',
        ['--port', String(port), '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no'],
        {
          stdio: 'ignore',
        },
      );
    },
    signal: (signal: NodeJS.Signals) => server?.kill(signal),
    async stop() {
      const ending = server;
      server = undefined;
      if (!ending || ending.exitCode !== null || ending.signalCode !== null) return;
      const ended = new Promise((done) => ending.once('exit', done));
      ending.kill('SIGKILL');
      await ended;
    },
  };
}
