import { readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { readConfig } from './config.ts';
import { createDatabase } from './db/database.ts';
import { createMemory } from './memory/memory.ts';
import { silentBus } from './platform/bus.ts';
import { createLogger } from './platform/logger.ts';
import { createPool } from './platform/postgres.ts';
import { createFeed } from './realtime/feed.ts';
import { buildServer } from './server.ts';

// npm run openapi: writes the OpenAPI document of the routes to openapi.json; with --check, fails when that file differs.

const FILE = fileURLToPath(new URL('../openapi.json', import.meta.url));

const logger = createLogger('silent', false);
// Nothing is asked of the database: the routes are only described.
const pool = createPool({ url: 'postgres://localhost/none', size: 2, name: 'muster-openapi', logger });
const db = createDatabase(pool, silentBus);
const config = readConfig({}, '/');
const { app } = await buildServer({
  config,
  db,
  bus: silentBus,
  redis: undefined,
  logger,
  feed: createFeed({ db, bus: silentBus, logger }),
  memory: createMemory({ db, bus: silentBus, redis: undefined, logger, config }),
  jwtSecret: 'only-used-to-describe-the-routes-0123456789',
  version: '1',
});
await app.ready();
const document = `${JSON.stringify(app.swagger(), null, 2)}\n`;
await app.close();
await pool.end();

if (process.argv.includes('--check')) {
  const written = await readFile(FILE, 'utf8').catch(() => '');
  if (written !== document) {
    console.error('openapi.json is not what the routes say: run npm run openapi.');
    process.exit(1);
  }
  console.log('openapi.json is in step with the routes');
} else {
  await writeFile(FILE, document);
}
