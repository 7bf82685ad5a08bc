import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import closeWithGrace from 'close-with-grace';
import { ensureFirstAdmin } from './auth/first-admin.ts';
import { loadJwtSecret } from './auth/jwt-secret.ts';
import { type Config, readConfig } from './config.ts';
import { startEmbeddedPostgres } from './platform/embedded-postgres.ts';
import { createLogger, type Logger } from './platform/logger.ts';
import { StartupError } from './platform/startup-error.ts';
import { listenError, startMuster } from './start.ts';

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
  version: string;
};

async function main(): Promise<void> {
  const config = readConfig();
  const logger = createLogger(config.LOG_LEVEL, process.stdout.isTTY && config.NODE_ENV !== 'production');
  // Before anything is made or started: a taken port is what most often stops a start.
  await requireFreePort(config);
  const jwtSecret = await loadJwtSecret(config);

  let close = async (): Promise<void> => {};
  closeWithGrace({ delay: config.SHUTDOWN_TIMEOUT_SECONDS * 1000, logger }, async ({ signal, err }) => {
    if (err) logger.fatal({ err }, 'stopping after an error that nobody handled');
    else logger.info({ signal }, 'stopping');
    await close();
    logger.info('stopped');
  });

  if (config.DATABASE_URL === undefined) {
    close = await startEmbedded(config, logger, jwtSecret);
  } else {
    const running = await startMuster({
      config,
      logger,
      databaseUrl: config.DATABASE_URL,
      directUrl: config.DATABASE_DIRECT_URL ?? config.DATABASE_URL,
      jwtSecret,
      version,
    });
    close = running.stop;
    print(greeting(running.url));
  }
}

/** Starts our own Postgres and the server on it; answers what closes both. */
async function startEmbedded(
  config: Config,
  logger: Logger,
  jwtSecret: string | undefined,
): Promise<() => Promise<void>> {
  const postgres = await startEmbeddedPostgres({ dataDir: config.DATA_DIR });
  try {
    const running = await startMuster({
      config,
      logger,
      databaseUrl: postgres.url,
      directUrl: postgres.url,
      jwtSecret,
      version,
    });
    let closing = false;
    void postgres.exited.then((how) => {
      if (closing) return;
      logger.fatal(how, 'Postgres ended; start Muster again, it recovers by itself');
      process.exit(1);
    });
    const admin = await ensureFirstAdmin(running.db, config.DATA_DIR);
    print(greeting(running.url, admin));
    return async () => {
      closing = true;
      await running.stop();
      await postgres.stop();
    };
  } catch (error) {
    await postgres.stop();
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

function greeting(url: string, admin?: { key: string; file: string; made: boolean }): string {
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
