import pg from 'pg';
import { startEmbeddedPostgres } from '../../src/platform/embedded-postgres.ts';

/*
 * A process that starts the embedded Postgres and tells its parent, a JSON object a line:
 *     node --import tsx postgres-child.ts DATA_DIR [write] [fast]
 * `write` inserts rising numbers one by one and tells each when it is acknowledged; `fast` turns fsync off.
 * SIGTERM stops it in order; on SIGINT it asks Postgres for a number and tells the answer.
 */

async function main(): Promise<void> {
  const [dataDir = '', ...wishes] = process.argv.slice(2);
  const postgres = await startEmbeddedPostgres({
    dataDir,
    fsync: !wishes.includes('fast'),
    log: (line) => say({ log: line }),
  });
  const pool = new pg.Pool({ connectionString: postgres.url, max: 2 });
  pool.on('error', () => {});
  process.on('SIGTERM', () => {
    void postgres.stop().then(() => process.exit(0));
  });
  process.on('SIGINT', () => {
    void pool.query('select 42 as answer').then(({ rows }) => say({ interrupted: rows[0].answer }));
  });
  say({ ready: { url: postgres.url, firstStart: postgres.firstStart } });
  if (!wishes.includes('write')) return;
  await pool.query('create table if not exists written (n int primary key)');
  const { rows } = await pool.query<{ last: number }>('select coalesce(max(n), 0) as last from written');
  for (let n = (rows[0]?.last ?? 0) + 1; ; n++) {
    await pool.query('insert into written values ($1)', [n]);
    say({ written: n });
  }
}

function say(message: Record<string, unknown>): void {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

main().catch((error: Error) => {
  say({ refused: { name: error.name, message: error.message } });
  process.exit(1);
});
