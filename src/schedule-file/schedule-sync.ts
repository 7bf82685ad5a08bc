import { parseArgs } from 'node:util';
import { readConfig } from '../config.ts';
import { CommitUnknownError, createDatabase, sqlState } from '../db/database.ts';
import { silentBus } from '../platform/bus.ts';
import { withConfiguredDatabase } from '../platform/configured-database.ts';
import { createLogger } from '../platform/logger.ts';
import { createPool } from '../platform/postgres.ts';
import { StartupError } from '../platform/startup-error.ts';
import { ownerEmail } from './fields.ts';
import { applyFile, EXIT, exportFile, planFile, type SyncOptions } from './sync.ts';

// npm run schedule:sync -- [plan | apply | export] [--file schedule_config.yml] [--owner ada@example.com]
//   [--prefer file|database] [--prune] [--all]
// Keeps a schedule file and the tasks of the configured database in step (sync.ts), whether a server runs on it or not.
// Exit code 0: done, or in step. 2: the file is at fault, or it could not be done. 3: the plan has something to do.
// 4: conflicts. With any but 0, nothing was written.

const USAGE =
  'Usage: npm run schedule:sync -- [plan|apply|export] [--file schedule_config.yml] [--owner ada@example.com] [--prefer file|database] [--prune] [--all]';

const VERBS = { plan: planFile, apply: applyFile, export: exportFile };

async function main(): Promise<number> {
  const { verb, options } = readArguments();
  return withConfiguredDatabase(readConfig(), USAGE, async (url) => {
    const pool = createPool({ url, size: 2, name: 'muster-schedule-sync', logger: createLogger('warn', false) });
    try {
      return await VERBS[verb](createDatabase(pool, silentBus), options, console.log);
    } finally {
      await pool.end();
    }
  });
}

function readArguments(): { verb: keyof typeof VERBS; options: SyncOptions } {
  const refuse = (why: string) => new StartupError(`${why}. ${USAGE}`);
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse();
  } catch (error) {
    throw refuse((error as Error).message.replace(/\.$/, ''));
  }
  const { positionals, values } = parsed;
  const [verb = 'plan', ...more] = positionals;
  if (!isVerb(verb) || more.length > 0) throw refuse(`${positionals.join(' ')} is not a verb`);
  const { file = 'schedule_config.yml', prefer, prune, all } = values;
  if (prefer !== undefined && prefer !== 'file' && prefer !== 'database') throw refuse('--prefer is file or database');
  if (prune && verb === 'export') throw refuse('--prune goes with plan and apply');
  if (all && (verb !== 'export' || values.owner === undefined)) throw refuse('--all goes with export and --owner');
  const owner = ownerEmail.optional().safeParse(values.owner);
  if (!owner.success) throw refuse('--owner must be an email address');
  return { verb, options: { file, owner: owner.data, prefer, prune, all } };
}

function parse() {
  return parseArgs({
    allowPositionals: true,
    options: {
      file: { type: 'string' },
      owner: { type: 'string' },
      prefer: { type: 'string' },
      prune: { type: 'boolean' },
      all: { type: 'boolean' },
    },
  });
}

const isVerb = (word: string): word is keyof typeof VERBS => Object.hasOwn(VERBS, word);

/** Why it failed. Never an error of the database driver as it is: with the statement go its parameters. */
function sentence(error: unknown): string {
  if (error instanceof StartupError) return error.message;
  if (error instanceof CommitUnknownError) {
    return 'The database was lost at the very end: whether it was applied, a plan tells.';
  }
  const state = sqlState(error);
  if (state !== undefined) return `Postgres refuses (SQLSTATE ${state}): start the server once, and see its log.`;
  let cause = error;
  while (cause instanceof Error && cause.cause !== undefined) cause = cause.cause;
  return `The schedules could not be synchronised: ${cause instanceof Error ? cause.message : String(cause)}`;
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    process.stderr.write(`${sentence(error)}\n`);
    process.exitCode = EXIT.fault;
  },
);
