import cluster from 'node:cluster';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import closeWithGrace from 'close-with-grace';
import { ensureFirstAdmin, type FirstAdmin } from './auth/first-admin.ts';
import { loadJwtSecret } from './auth/jwt-secret.ts';
import { type Config, readConfig } from './config.ts';
import type { Database } from './db/database.ts';
import { startEmbeddedPostgres } from './platform/embedded-postgres.ts';
import { createLogger } from './platform/logger.ts';
import { StartupError } from './platform/startup-error.ts';
import { onStopSignals } from './platform/stop-signals.ts';
import { listenError, prepareDatabase, startMuster } from './start.ts';
import { superviseWorkers, takeLeave, type WorkerMessage } from './supervisor.ts';

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

/** Signals of a fault in the process itself. Who listens to them returns to the fault, for ever: they must end it. */
const CRASHES = ['SIGSEGV', 'SIGBUS', 'SIGFPE', 'SIGILL', 'SIGTRAP', 'SIGABRT'] as const;

/** How much longer than its workers the primary gets to stop. */
const WORKERS_GRACE_MS = 5_000;

async function main(): Promise<void> {
  const config = readConfig();
  const logger = createLogger(config.LOG_LEVEL, process.stdout.isTTY && config.NODE_ENV !== 'production');
  const supervises = cluster.isPrimary && config.workers > 1;
  // Before anything is made or started: a taken port is what most often stops a start.
  if (cluster.isPrimary) await requireFreePort(config);
  const jwtSecret = await loadJwtSecret(config);

  // What is started comes off in the opposite order, also when the signal arrives in the middle of the start, which then
  // fails for want of what was closed under it: whoever stops is the one who ends the process.
  const closers: (() => Promise<void>)[] = [];
  let stopping = false;
  const grace = closeWithGrace(
    {
      delay: config.SHUTDOWN_TIMEOUT_SECONDS * 1000 + (supervises ? WORKERS_GRACE_MS : 0),
      logger,
      skip: ['SIGINT', 'SIGTERM', 'SIGHUP', ...CRASHES],
    },
    async ({ err }) => {
      stopping = true;
      if (err) logger.fatal({ err }, 'stopping after an error that nobody handled');
      for (let close = closers.pop(); close; close = closers.pop()) await close();
      if (cluster.isWorker) await takeLeave();
      logger.info('stopped');
    },
  );
  onStopSignals(
    (signal) => {
      logger.info({ signal }, 'stopping');
      grace.close();
    },
    (signal) => {
      logger.warn({ signal }, 'ending without waiting');
      process.exit(1);
    },
  );

  // Without the primary nobody hands out connections, nor starts this one anew.
  if (cluster.isWorker) {
    process.once('disconnect', () => {
      if (stopping) return;
      logger.warn('the primary is gone: stopping');
      grace.close();
    });
  }
  let reload: (() => void) | undefined;
  process.on('SIGHUP', () => {
    // A terminal that closes says the same to what runs in it.
    if (process.stdout.isTTY) grace.close();
    else reload?.();
  });

  let { DATABASE_URL: databaseUrl, DATABASE_DIRECT_URL: directUrl = databaseUrl } = config;
  if (databaseUrl === undefined) {
    const starting = startEmbeddedPostgres({ dataDir: config.DATA_DIR });
    let closing = false;
    closers.push(async () => {
      closing = true;
      const started = await starting.catch(() => undefined);
      await started?.stop();
    });
    const postgres = await starting;
    if (stopping) return;
    void postgres.exited.then((how) => {
      if (closing) return;
      logger.fatal(how, 'Postgres ended; start Muster again, it recovers by itself');
      process.exit(1);
    });
    databaseUrl = directUrl = postgres.url;
  }

  let admin: FirstAdmin | undefined;
  try {
    const prepare = async (db: Database) => {
      if (config.embedded) admin = await ensureFirstAdmin(db, config.DATA_DIR);
    };
    if (supervises) {
      const urls = { databaseUrl, directUrl: directUrl ?? databaseUrl };
      await prepareDatabase({ ...urls, logger, prepare });
      if (stopping) return;
      const supervisor = superviseWorkers({
        count: config.workers,
        env: { DATABASE_URL: urls.databaseUrl, DATABASE_DIRECT_URL: urls.directUrl },
        stopTimeoutMs: config.SHUTDOWN_TIMEOUT_SECONDS * 1000,
        logger,
      });
      closers.push(supervisor.stop);
      const url = await supervisor.started.catch(() => {
        throw new StartupError('The workers could not start: see above.');
      });
      reload = () => {
        logger.info('replacing the workers');
        void supervisor.restart();
      };
      if (!stopping) print(greeting(url, admin));
      return;
    }
    const running = await startMuster({
      config,
      logger,
      databaseUrl,
      directUrl: directUrl ?? databaseUrl,
      jwtSecret,
      version,
      prepare,
    });
    closers.push(running.stop);
    if (stopping) return;
    if (cluster.isWorker) {
      process.send?.({ ready: running.url } satisfies WorkerMessage);
      return;
    }
    reload = running.reload;
    print(greeting(running.url, admin));
  } catch (error) {
    if (stopping) return;
    for (let close = closers.pop(); close; close = closers.pop()) await close();
    throw error;
  }
}

async function requireFreePort({ HOST: host, PORT: port }: Config): Promise<void> {
  if (port === 0) return;
  const probe = createServer();
  try {
    await new Promise<void>((resolve, reject) => {
      probe.once('error', reject).listen({ host, port }, resolve);
    });
  } catch (error) {
    throw listenError(error, host, port);
  } finally {
    await new Promise((resolve) => probe.close(resolve));
  }
}

function greeting(url: string, admin: FirstAdmin | undefined): string {
  const lines = [`Muster ${version}`, `  server   ${url}`, `  docs     ${url}/docs`];
  if (admin?.made) lines.push(`  admin    ${admin.key}`, `           (shown this once; kept in ${admin.file})`);
  if (admin) {
    const create = `curl -s ${url}/api/v1/tasks -H "Authorization: Bearer $(cat ${admin.file})" -H 'Content-Type: application/json' -d '{"skill_name":"hello","schedule_cron":"*/10 * * * * *"}'`;
    lines.push(
      '',
      'Try next, each in a terminal of its own:',
      '  npm run watch',
      `  npm run agent -- --skill hello --exec 'echo "Hello from $MUSTER_SKILL"'`,
      `  ${create}`,
    );
  }
  return lines.join('\n');
}

function print(text: string): void {
  process.stdout.write(`\n${text}\n\n`);
}

main().catch((error: unknown) => {
  if (error instanceof StartupError) process.stderr.write(`${error.message}\n`);
  else process.stderr.write(`Muster could not start: ${error instanceof Error ? error.stack : String(error)}\n`);
  process.exit(1);
});
