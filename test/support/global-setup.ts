import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { TestProject } from 'vitest/node';
import { startEmbeddedPostgres } from '../../src/platform/embedded-postgres.ts';
import { prepareTemplate } from './postgres.ts';

declare module 'vitest' {
  interface ProvidedContext {
    /** A Postgres that tests make their databases in. */
    postgresUrl: string;
  }
}

/** Provides a real Postgres: TEST_DATABASE_URL, else one in Docker, else the embedded one. */
export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const { url, stop } = await providePostgres();
  try {
    await prepareTemplate(url);
  } catch (error) {
    await stop();
    throw error;
  }
  project.provide('postgresUrl', url);
  return stop;
}

async function providePostgres(): Promise<{ url: string; stop: () => Promise<void> }> {
  const given = process.env['TEST_DATABASE_URL'];
  if (given) return { url: given, stop: async () => {} };
  if (await dockerAnswers()) {
    const { PostgreSqlContainer } = await import('@testcontainers/postgresql');
    const container = await new PostgreSqlContainer('postgres:18')
      .withCommand(['postgres', '-c', 'fsync=off', '-c', 'max_connections=300'])
      .start();
    return { url: container.getConnectionUri(), stop: async () => void (await container.stop()) };
  }
  const folder = await mkdtemp(join(tmpdir(), 'muster-tests-'));
  const postgres = await startEmbeddedPostgres({ dataDir: folder, fsync: false, maxConnections: 300 });
  return {
    url: postgres.url,
    async stop() {
      await postgres.stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}

/** Whether there is an engine behind the client: a client alone answers `docker --version`, but not this. */
async function dockerAnswers(): Promise<boolean> {
  try {
    await promisify(execFile)('docker', ['info'], { timeout: 5_000 });
    return true;
  } catch {
    return false;
  }
}
