import { isDeepStrictEqual } from 'node:util';
import { DEFAULTS, type Entry, FIELDS, type Fields } from './fields.ts';

// What is to be done so that tasks and file say the same, decided without I/O.
//
// Each field has three values: what the file said when it was last applied (the base, kept with the task), what it says
// now, and what the database has. Who differs from the base has changed it:
//
//   file  database
//   same  same      nothing
//   new   same      change: the database gets the file's value
//   same  new       drift: somebody changed the task by other means; it stays until it is exported, or the file preferred
//   new   the same  nothing but a new base: both made one change
//   new   new       conflict: nothing at all is written until somebody says which to prefer
//
// The same goes for whole entries: one that left the file is an orphan, and a task that was deleted while its entry stayed is
// gone. The invariant: no change, on either side, is undone by a change of the other without a word of `prefer`.

export type Side = 'file' | 'database';

/** A task as the plan sees it. */
export interface Known {
  id: number;
  version: number;
  /** Its key; null for one that an entry wants to adopt. */
  key: string | null;
  owner: string;
  /** What the file said when it was last applied. */
  base: Fields | null;
  fields: Fields;
  deleted: boolean;
}

/** A field that differs. */
export interface Difference {
  field: string;
  database: unknown;
  file: unknown;
}

/** An entry and its task. */
export interface Pairing {
  kind: 'pair';
  entry: Entry;
  task: Known;
  /** The task gets this key now. */
  adopts: boolean;
  changes: Difference[];
  drift: Difference[];
  conflicts: Difference[];
  /** What is to be noted as the base. */
  base: Fields;
}

export type Step =
  | Pairing
  /** `forget` are deleted tasks that had the key. */
  | { kind: 'create'; entry: Entry; forget: Known[] }
  /** Its task was deleted in the database; `conflict` unless somebody says that it may be so. */
  | { kind: 'gone'; entry: Entry; task: Known; conflict: boolean }
  | { kind: 'delete'; task: Known }
  /** It is to be deleted, and somebody has changed it since it was last applied. */
  | { kind: 'edited'; task: Known }
  | { kind: 'orphan'; task: Known }
  /** Gone from both: its key is free again. */
  | { kind: 'forget'; task: Known };

export interface Options {
  prefer?: Side | undefined;
  prune?: boolean | undefined;
}

const same = isDeepStrictEqual;
const placeOf = (owner: string, key: string) => `${owner}\n${key}`;

/** What would bring tasks and file in step, entries first and in their order. Each entry's owner has no task of another entry. */
export function makePlan(entries: readonly Entry[], known: readonly Known[], options: Options): Step[] {
  const index = indexOf(known);
  const taken = new Set<Known>();
  const steps: Step[] = entries.map((entry) => {
    const place = placeOf(entry.owner, entry.key);
    const deleted = index.deleted.get(place) ?? [];
    for (const task of deleted) taken.add(task);
    const keyed = index.live.get(place);
    const last = deleted.at(-1);
    const task = keyed ?? (entry.adopt === null ? undefined : index.byId.get(entry.adopt));
    if (task) {
      taken.add(task);
      return pair(entry, task, options.prefer);
    }
    if (last && options.prefer !== 'file') {
      return { kind: 'gone', entry, task: last, conflict: options.prefer !== 'database' };
    }
    return { kind: 'create', entry, forget: deleted };
  });
  for (const task of known) {
    if (taken.has(task) || task.key === null) continue;
    if (task.deleted) steps.push({ kind: 'forget', task });
    else if (!options.prune) steps.push({ kind: 'orphan', task });
    else if (!edited(task) || options.prefer === 'file') steps.push({ kind: 'delete', task });
    else steps.push({ kind: options.prefer === 'database' ? 'orphan' : 'edited', task });
  }
  return steps;
}

function indexOf(known: readonly Known[]) {
  const live = new Map<string, Known>();
  const deleted = new Map<string, Known[]>();
  const byId = new Map(known.filter((task) => !task.deleted).map((task) => [task.id, task]));
  for (const task of known) {
    if (task.key === null) continue;
    const place = placeOf(task.owner, task.key);
    if (!task.deleted) live.set(place, task);
    else deleted.set(place, [...(deleted.get(place) ?? []), task]);
  }
  return { live, deleted, byId };
}

/** Compares each field of an entry with its task's and with the base. */
function pair(entry: Entry, task: Known, prefer: Side | undefined): Pairing {
  const changes: Difference[] = [];
  const drift: Difference[] = [];
  const conflicts: Difference[] = [];
  const base: Record<string, unknown> = {};
  for (const field of FIELDS) {
    const file = entry.fields[field];
    const database = task.fields[field];
    const before = baseOf(task, field);
    base[field] = file;
    if (same(file, database)) continue;
    const difference = { field, database, file };
    if (same(database, before) || prefer === 'file') changes.push(difference);
    else if (same(file, before)) drift.push(difference);
    // The database's value stays; with the file's as the base it is drift from now on, to be exported.
    else if (prefer === 'database') drift.push(difference);
    else conflicts.push(difference);
  }
  return { kind: 'pair', entry, task, adopts: task.key !== entry.key, changes, drift, conflicts, base };
}

/** What the file last said of a field: its default when it was not a field then; the database's when it never said anything. */
function baseOf({ base, fields }: Known, field: string): unknown {
  if (!base) return fields[field];
  return field in base ? base[field] : DEFAULTS[field];
}

/** Whether somebody has changed more of a task than whether it is paused. */
const edited = (task: Known) =>
  FIELDS.some((field) => field !== 'status' && !same(task.fields[field], baseOf(task, field)));

/** Whether a plan must not be applied before somebody has said which side to prefer. */
export const hasConflicts = (steps: readonly Step[]): boolean =>
  steps.some(
    (step) =>
      step.kind === 'edited' ||
      (step.kind === 'gone' && step.conflict) ||
      (step.kind === 'pair' && step.conflicts.length > 0),
  );

/** Whether tasks and file differ in anything. */
export const hasDifferences = (steps: readonly Step[]): boolean =>
  steps.some((step) =>
    step.kind === 'pair'
      ? step.adopts || step.changes.length + step.drift.length + step.conflicts.length > 0
      : step.kind !== 'forget',
  );

/** Whether nothing need be written for a pair, not even a new base. */
export const isSettled = ({ adopts, changes, task, base }: Pairing): boolean =>
  !adopts && changes.length === 0 && same(task.base, base);

/** What an export does to a file. */
export type Edit =
  | { kind: 'set'; key: string; field: string; from: unknown; to: unknown }
  | { kind: 'add'; key: string; owner: string; adopt: number | null; fields: Fields }
  | { kind: 'remove'; key: string };

/**
 * What of the database is to be written into a file, and the keys of the entries that conflict. What the file has changed and
 * the database has not stays: it waits to be applied.
 */
export function planExport(
  entries: readonly Entry[],
  known: readonly Known[],
  prefer: Side | undefined,
): { edits: Edit[]; conflicts: Step[] } {
  const edits: Edit[] = [];
  const conflicts: Step[] = [];
  for (const step of makePlan(entries, known, {})) {
    if (step.kind === 'pair') {
      const { key } = step.entry;
      if (step.conflicts.length > 0 && prefer === undefined) conflicts.push(step);
      for (const { field, file, database } of [...step.drift, ...(prefer === 'database' ? step.conflicts : [])]) {
        edits.push({ kind: 'set', key, field, from: file, to: database });
      }
    } else if (step.kind === 'gone') {
      const changed = FIELDS.some((field) => !same(step.entry.fields[field], baseOf(step.task, field)));
      if (!changed || prefer === 'database') edits.push({ kind: 'remove', key: step.entry.key });
      else if (prefer === undefined) conflicts.push(step);
    } else if (step.kind === 'orphan' && step.task.key !== null) {
      const { key, owner, fields } = step.task;
      edits.push({ kind: 'add', key, owner, adopt: null, fields });
    }
  }
  return { edits, conflicts };
}
