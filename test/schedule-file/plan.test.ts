import fc from 'fast-check';
import { expect, test } from 'vitest';
import { DEFAULTS, type Entry, type Fields } from '../../src/schedule-file/fields.ts';
import {
  hasConflicts,
  hasDifferences,
  isSettled,
  type Known,
  makePlan,
  type Options,
  planExport,
  type Step,
} from '../../src/schedule-file/plan.ts';

const OWNER = 'ada@example.com';

/** Few fields of few values, so that any two sides often agree. */
const fields: fc.Arbitrary<Fields> = fc
  .record({
    cron: fc.constantFrom('0 8 * * *', '0 9 * * *', null),
    priority: fc.constantFrom('low', 'medium', 'high'),
    params: fc.constantFrom({}, { a: 1 }, { a: [1, 2] }),
    status: fc.constantFrom('active', 'paused'),
  })
  .map((some) => ({ ...DEFAULTS, skill: 'report', ...some }));

/** One schedule: the entry, the task and the base, of which each may be missing. */
const schedule = fc.record({
  file: fc.option(fields),
  database: fc.option(fields),
  base: fc.option(fields),
  /** The task is tied to the key; else the entry adopts it. */
  tied: fc.boolean(),
  deleted: fc.boolean(),
});
const world = fc.array(schedule, { maxLength: 4 }).map((schedules) => {
  const entries: Entry[] = [];
  const known: Known[] = [];
  for (const [i, { file, database, base, tied, deleted }] of schedules.entries()) {
    const key = `s${i}`;
    if (file) entries.push({ key, owner: OWNER, adopt: database && !tied ? i + 1 : null, fields: file });
    if (!database || (!file && !tied)) continue;
    const tie = tied ? { key, base: base ?? database, deleted } : { key: null, base: null, deleted: false };
    known.push({ id: i + 1, version: 1, owner: OWNER, fields: database, ...tie });
  }
  return { entries, known };
});
const options: fc.Arbitrary<Options> = fc.record({
  prefer: fc.constantFrom(undefined, 'file' as const, 'database' as const),
  prune: fc.boolean(),
});

/** What the database has once the steps were done. */
function applied(known: readonly Known[], steps: readonly Step[]): Known[] {
  const after = new Map(known.map((task) => [task.id, task]));
  let id = 1_000;
  for (const step of steps) {
    if (step.kind === 'create') {
      for (const task of step.forget) after.delete(task.id);
      const { key, owner, fields } = step.entry;
      after.set(++id, { id, version: 1, key, owner, base: fields, fields, deleted: false });
    } else if (step.kind === 'pair') {
      const changed = Object.fromEntries(step.changes.map(({ field, file }) => [field, file]));
      const { task, entry, base } = step;
      after.set(task.id, { ...task, key: entry.key, base, fields: { ...task.fields, ...changed } });
    } else if (step.kind === 'delete' || step.kind === 'forget') after.delete(step.task.id);
  }
  return [...after.values()];
}

const changing = (steps: readonly Step[]) =>
  steps.filter((step) =>
    step.kind === 'pair' ? !isSettled(step) : ['create', 'delete', 'forget'].includes(step.kind),
  );

test('a plan that was applied leaves the next one nothing to do', () => {
  fc.assert(
    fc.property(world, options, ({ entries, known }, options) => {
      const steps = makePlan(entries, known, options);
      fc.pre(!hasConflicts(steps));
      const next = makePlan(entries, applied(known, steps), options);
      expect(hasConflicts(next)).toBe(false);
      expect(changing(next)).toEqual([]);
      // What is compared with from now on is what the file said.
      for (const step of next) if (step.kind === 'pair') expect(step.task.base).toEqual(step.entry.fields);
    }),
    { numRuns: 1_000 },
  );
});

test('without a word of prefer no change of either side is lost', () => {
  fc.assert(
    fc.property(world, ({ entries, known }) => {
      const steps = makePlan(entries, known, {});
      for (const step of steps) {
        if (step.kind !== 'pair') continue;
        const before = step.task.base ?? step.task.fields;
        const [after] = applied([step.task], [step]);
        for (const field of Object.keys(before)) {
          const was = JSON.stringify(before[field]);
          const file = JSON.stringify(step.entry.fields[field]);
          const database = JSON.stringify(step.task.fields[field]);
          const conflict = step.conflicts.some((difference) => difference.field === field);
          expect(conflict).toBe(file !== was && database !== was && file !== database);
          if (!conflict) expect(JSON.stringify(after?.fields[field])).toBe(file !== was ? file : database);
        }
      }
      // Nothing is deleted that is not asked for, and nothing made again that somebody deleted.
      expect(steps.some(({ kind }) => kind === 'delete')).toBe(false);
      const deleted = known.filter((task) => task.deleted).map(({ key }) => key);
      for (const step of steps) if (step.kind === 'create') expect(deleted).not.toContain(step.entry.key);
    }),
    { numRuns: 1_000 },
  );
});

test('the side that is preferred is what both have in the end', () => {
  fc.assert(
    fc.property(world, ({ entries, known }) => {
      const byFile = makePlan(entries, known, { prefer: 'file', prune: true });
      expect(hasConflicts(byFile)).toBe(false);
      expect(hasDifferences(makePlan(entries, applied(known, byFile), {}))).toBe(false);

      const byDatabase = makePlan(entries, known, { prefer: 'database' });
      expect(hasConflicts(byDatabase)).toBe(false);
      for (const step of byDatabase) {
        if (step.kind !== 'pair') continue;
        const before = step.task.base ?? step.task.fields;
        for (const { field, database } of step.changes) expect(before[field]).toEqual(database);
      }
    }),
    { numRuns: 1_000 },
  );
});

test('an exported file has every change of the database, and keeps its own that wait', () => {
  fc.assert(
    fc.property(world, fc.constantFrom(undefined, 'database' as const), ({ entries, known }, prefer) => {
      const { edits, conflicts } = planExport(entries, known, prefer);
      fc.pre(conflicts.length === 0);
      const after = new Map(entries.map((entry) => [entry.key, entry]));
      for (const edit of edits) {
        const entry = after.get(edit.key);
        if (edit.kind === 'remove') after.delete(edit.key);
        else if (edit.kind === 'add') after.set(edit.key, { ...edit });
        else if (entry) after.set(edit.key, { ...entry, fields: { ...entry.fields, [edit.field]: edit.to } });
      }
      const next = makePlan([...after.values()], known, {});
      expect(hasConflicts(next)).toBe(false);
      for (const step of next) {
        expect(step.kind).toMatch(/^(pair|create|forget)$/);
        if (step.kind !== 'pair') continue;
        expect(step.drift).toEqual([]);
        const said = entries.find(({ key }) => key === step.entry.key);
        for (const { field, file } of step.changes) expect(file).toEqual(said?.fields[field]);
      }
    }),
    { numRuns: 1_000 },
  );
});

test('an orphan that somebody has changed is deleted only by a word', () => {
  const task = { id: 1, version: 1, key: 'old', owner: OWNER, deleted: false };
  const base = { ...DEFAULTS, skill: 'report' };
  const known = [{ ...task, base, fields: { ...base, priority: 'high' } }];
  const kind = (options: Options) => makePlan([], known, options).map((step) => step.kind);
  expect(kind({})).toEqual(['orphan']);
  expect(kind({ prune: true })).toEqual(['edited']);
  expect(hasConflicts(makePlan([], known, { prune: true }))).toBe(true);
  expect(kind({ prune: true, prefer: 'file' })).toEqual(['delete']);
  expect(kind({ prune: true, prefer: 'database' })).toEqual(['orphan']);
  // That it was paused is no reason to keep it.
  const paused = [{ ...task, base, fields: { ...base, status: 'paused' } }];
  expect(makePlan([], paused, { prune: true })).toMatchObject([{ kind: 'delete' }]);
});

test('a field that a base does not know yet had its default', () => {
  const { timezone, ...older } = { ...DEFAULTS, skill: 'report' } as Record<string, unknown>;
  expect(timezone).toBe('UTC');
  const entry = { key: 's', owner: OWNER, adopt: null, fields: { ...older, timezone: 'Europe/Rome' } };
  const known = {
    id: 1,
    version: 1,
    key: 's',
    owner: OWNER,
    deleted: false,
    base: older,
    fields: { ...older, timezone },
  };
  expect(makePlan([entry], [known], {})).toMatchObject([
    { kind: 'pair', conflicts: [], drift: [], changes: [{ field: 'timezone', database: 'UTC', file: 'Europe/Rome' }] },
  ]);
});
