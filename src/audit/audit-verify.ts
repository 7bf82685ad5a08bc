import { createReadStream } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { z } from 'zod';
import { readConfig } from '../config.ts';
import { createDatabase, sqlState } from '../db/database.ts';
import { silentBus } from '../platform/bus.ts';
import { withConfiguredDatabase } from '../platform/configured-database.ts';
import { createLogger } from '../platform/logger.ts';
import { createPool } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';
import { type Heads, type Report, verifyDatabase, verifyExport } from './verify.ts';

// npm run audit:verify -- [--file export.ndjson [--partial]] [--heads heads.json] [--save-heads heads.json]
// Looks at the database of DATABASE_URL, or at the embedded one in DATA_DIR, whether a server runs on it or not.
// Exit code 0: the log is whole. 1: it is not, and the first bad place of each chain is named. 2: it could not be looked at.

const USAGE =
  'Usage: npm run audit:verify -- [--file export.ndjson [--partial]] [--heads heads.json] [--save-heads heads.json]';

const headsFile = z.record(z.string().regex(/^\d+$/), z.object({ seq: z.int().min(1), hash: z.string().length(64) }));

async function main(): Promise<number> {
  const options = readArguments();
  const known = options.heads === undefined ? {} : await readHeads(options.heads);
  const report =
    options.file === undefined
      ? await verifyConfigured(known)
      : await verifyExport(
          createInterface({ input: createReadStream(options.file), crlfDelay: Number.POSITIVE_INFINITY }),
          known,
          { partial: options.partial ?? false },
        );
  for (const { ownerId, seq, entryId, what } of report.faults) {
    const place = seq === null ? '' : ` at place ${seq} of the chain of owner ${ownerId}`;
    console.log(`BAD${entryId === null ? '' : ` entry ${entryId}`}${place}: ${what}.`);
  }
  const chains = Object.keys(report.heads).length;
  console.log(`Entries: ${report.entries}, in chains: ${chains}, waiting for their place: ${report.waiting}.`);
  if (options['save-heads'] !== undefined && report.faults.length === 0) {
    await writeFile(options['save-heads'], `${JSON.stringify(report.heads, null, 2)}\n`);
  }
  console.log(report.faults.length === 0 ? 'The audit log is whole.' : 'The audit log was tampered with.');
  return report.faults.length === 0 ? 0 : 1;
}

const verifyConfigured = (known: Heads): Promise<Report> =>
  withConfiguredDatabase(readConfig(), USAGE, (url) => verifyAt(url, known));

async function verifyAt(url: string, known: Heads): Promise<Report> {
  const logger = createLogger('warn', false);
  const pool = createPool({ url, size: 2, name: 'muster-audit', logger });
  try {
    return await verifyDatabase(createDatabase(pool, silentBus), known);
  } finally {
    await pool.end();
  }
}

async function readHeads(file: string): Promise<Heads> {
  const parsed = headsFile.safeParse(JSON.parse(await readFile(file, 'utf8')));
  if (!parsed.success) throw new StartupError(`${file} holds no heads that --save-heads wrote.`);
  return parsed.data;
}

function readArguments() {
  try {
    const { values } = parseArgs({
      options: {
        file: { type: 'string' },
        partial: { type: 'boolean' },
        heads: { type: 'string' },
        'save-heads': { type: 'string' },
      },
    });
    if (values.partial && values.file === undefined) throw new Error('--partial goes with --file');
    return values;
  } catch (error) {
    throw new StartupError(`${(error as Error).message}. ${USAGE}`);
  }
}

/** Why it failed. Never an error of the database driver as it is: with the statement go its parameters. */
function sentence(error: unknown): string {
  if (error instanceof StartupError) return error.message;
  const state = sqlState(error);
  if (state !== undefined) return `Postgres refuses (SQLSTATE ${state}): see its log.`;
  return `The audit log could not be read: ${error instanceof Error ? error.message : String(error)}`;
}

main().then(
  (code) => process.exit(code),
  (error: unknown) => {
    process.stderr.write(`${sentence(error)}\n`);
    process.exit(2);
  },
);
