import { setTimeout as sleep } from 'node:timers/promises';
import type { Database, Tx } from '../db/database.ts';
import { LOCKS } from '../platform/locks.ts';
import { StartupError } from '../platform/startup-error.ts';
import { findTasksOf } from '../tasks/schedule-key.ts';
import { applySteps } from './apply.ts';
import { editFile } from './edit.ts';
import { emptyFile, type Fault, loadFile, parseFile, type ScheduleFile, writeFileWhole } from './file.ts';
import { type Edit, hasConflicts, hasDifferences, makePlan, type Options, planExport } from './plan.ts';
import { editLines, faultLines, planLines } from './report.ts';
import { readState, type State } from './state.ts';

// A schedule file and the tasks of its owners, kept in step: planned, applied, exported.

/** How the program ends. */
export const EXIT = {
  done: 0,
  /** The file cannot be, and nothing was written; or the work could not be done at all. */
  fault: 2,
  /** A plan found something to do. */
  differences: 3,
  /** Both sides have changed the same thing, and nothing was written. */
  conflicts: 4,
} as const;

export interface SyncOptions extends Options {
  file: string;
  /** Who has the entries that name no owner; also, whose tasks count though no entry names that owner. */
  owner?: string | undefined;
  /** For an export: tasks without a key, too. */
  all?: boolean | undefined;
}

type Print = (line: string) => void;

const LOCK_RETRY_MS = 200;
const MAX_TRIES = 5;
const PREFER = 'Say which side counts by --prefer file or --prefer database.';

/** Says what an apply would do. Answers the exit code. */
export async function planFile(db: Database, options: SyncOptions, print: Print): Promise<number> {
  const file = await readFile(options);
  const state = await readState(db, file, options);
  const faults = faultsOf(file, state);
  if (faults.length > 0) return refuse(options, faults, print);
  const steps = makePlan(state.entries, state.known, options);
  for (const line of planLines(steps, state)) print(line);
  if (hasConflicts(steps)) {
    print(`Nothing can be applied while there are conflicts. ${PREFER}`);
    return EXIT.conflicts;
  }
  return hasDifferences(steps) ? EXIT.differences : EXIT.done;
}

/**
 * Does it, in one transaction: all of it or nothing. One apply at a time: another waits for its end. Answers the exit code.
 */
export async function applyFile(db: Database, options: SyncOptions, print: Print): Promise<number> {
  const file = await readFile(options);
  let waits = false;
  for (let attempt = 1; ; ) {
    const outcome = await tryApply(db, file, options);
    if (outcome.kind === 'busy') {
      if (!waits) print('Another apply is under way: waiting for its end.');
      waits = true;
      await sleep(LOCK_RETRY_MS);
    } else if (outcome.kind === 'stale') {
      // Somebody changed one of the tasks meanwhile: what is to be done must be decided anew.
      if (++attempt > MAX_TRIES)
        throw new StartupError('The tasks change all the time: nothing was written. Try again.');
    } else if (outcome.kind === 'faults') {
      return refuse(options, outcome.faults, print);
    } else {
      for (const line of outcome.lines) print(line);
      print(outcome.kind === 'applied' ? 'Applied.' : `Nothing was written: there are conflicts. ${PREFER}`);
      return outcome.kind === 'applied' ? EXIT.done : EXIT.conflicts;
    }
  }
}

type Outcome =
  | { kind: 'busy' }
  | { kind: 'stale' }
  | { kind: 'faults'; faults: Fault[] }
  | { kind: 'conflicts' | 'applied'; lines: string[] };

/** Thrown within a transaction to undo it; what came of it is its outcome. */
class Undone extends Error {
  readonly outcome: Outcome;
  constructor(outcome: Outcome) {
    super('undone');
    this.outcome = outcome;
  }
}

async function tryApply(db: Database, file: ScheduleFile, options: SyncOptions): Promise<Outcome> {
  try {
    return await db.transaction(async (tx) => {
      if (!(await takeLock(tx))) return { kind: 'busy' };
      const state = await readState(tx, file, options);
      const faults = faultsOf(file, state);
      if (faults.length > 0) return { kind: 'faults', faults };
      const steps = makePlan(state.entries, state.known, options);
      if (hasConflicts(steps)) return { kind: 'conflicts', lines: planLines(steps, state) };
      const refused = await applySteps(tx, file, state, steps);
      if (refused === 'stale') throw new Undone({ kind: 'stale' });
      if (refused.length > 0) throw new Undone({ kind: 'faults', faults: refused });
      return { kind: 'applied', lines: planLines(steps, state) };
    });
  } catch (error) {
    if (error instanceof Undone) return error.outcome;
    throw error;
  }
}

/** Tries, instead of waiting in the database, where a statement may take five seconds only. */
async function takeLock(tx: Tx): Promise<boolean> {
  const { rows } = await tx.query<{ taken: boolean }>({
    name: 'schedule-file-lock',
    text: 'select pg_try_advisory_xact_lock($1, $2) as taken',
    values: [...LOCKS.scheduleFile],
  });
  return rows[0]?.taken === true;
}

/** Writes what the database has into the file, which need not be there yet. Answers the exit code. */
export async function exportFile(db: Database, options: SyncOptions, print: Print): Promise<number> {
  const text = await loadFile(options.file);
  const file = text === undefined ? emptyFile() : parseFile(text, options.owner);
  const state = await readState(db, file, { ...options, everybody: true });
  const { edits, conflicts } = planExport(state.entries, state.known, options.prefer);
  if (options.all) edits.push(...(await keyless(db, state, edits, options.owner)));
  const faults = [...file.faults, ...state.faults, ...sharedKeys(file, edits)];
  if (faults.length > 0) return refuse(options, faults, print);
  if (conflicts.length > 0) {
    for (const line of planLines(conflicts, state)) print(line);
    print(`Nothing was written: there are conflicts. ${PREFER}`);
    return EXIT.conflicts;
  }
  if (edits.length === 0) {
    print(`There is nothing to write into ${options.file}.`);
    return EXIT.done;
  }
  await writeFileWhole(options.file, editFile(file, edits, options.owner));
  for (const line of editLines(edits)) print(line);
  print(`Wrote ${options.file}.`);
  return EXIT.done;
}

async function readFile({ file, owner }: SyncOptions): Promise<ScheduleFile> {
  const text = await loadFile(file);
  if (text === undefined) throw new StartupError(`There is no file ${file}: name it by --file, or make it by export.`);
  return parseFile(text, owner);
}

const faultsOf = (file: ScheduleFile, state: State): Fault[] =>
  [...file.faults, ...state.faults, ...state.unresolved].sort((a, b) => (a.line ?? 0) - (b.line ?? 0));

function refuse({ file }: SyncOptions, faults: readonly Fault[], print: Print): number {
  for (const line of faultLines(file, faults)) print(line);
  print(`Nothing was written: ${faults.length} ${faults.length === 1 ? 'fault' : 'faults'}.`);
  return EXIT.fault;
}

/** The owner's tasks without a key, as entries that adopt them: the tie is made when the file is applied. */
async function keyless(
  db: Database,
  { owners, entries, knownOf }: State,
  edits: readonly Edit[],
  email: string | undefined,
): Promise<Edit[]> {
  const owner = owners.get(email ?? '');
  if (!owner) return [];
  const adopted = new Set(entries.map(({ adopt }) => adopt));
  const taken = new Set([...entries, ...edits].map(({ key }) => key));
  return (await findTasksOf(db, owner.id))
    .filter(({ id, scheduleKey }) => scheduleKey === null && !adopted.has(id))
    .map((task) => {
      const key = keyFrom(task.name ?? task.skillName, taken);
      taken.add(key);
      return { kind: 'add', key, owner: owner.email, adopt: task.id, fields: knownOf(owner, task).fields };
    });
}

/** A key made from a name, which no other has. */
function keyFrom(name: string, taken: ReadonlySet<string>): string {
  const plain = name
    .normalize('NFKD')
    .toLowerCase()
    .replace(/[^a-z0-9_.-]+/g, '-')
    .replace(/^-+/, '');
  const base = plain.slice(0, 100).replace(/-+$/, '') || 'task';
  for (let n = 1; ; n++) {
    const key = n === 1 ? base : `${base}-${n}`;
    if (!taken.has(key)) return key;
  }
}

/** A file has an entry once, so it cannot hold tasks of two owners that have one key. */
function sharedKeys(file: ScheduleFile, edits: readonly Edit[]): Fault[] {
  const seen = new Set(file.entries.map(({ key }) => key));
  return edits.flatMap((edit): Fault[] => {
    if (edit.kind !== 'add') return [];
    const shared = seen.has(edit.key);
    seen.add(edit.key);
    const message = `is the key of tasks of several owners: export each into a file of its own, by --owner and --file`;
    return shared ? [{ line: null, where: edit.key, message }] : [];
  });
}
