import type { Fault } from './file.ts';
import type { Difference, Edit, Step } from './plan.ts';
import type { State } from './state.ts';

// What is printed, for people and for logs of builds: one line a schedule, and the fields below it.

const MAX_SHOWN = 120;

/** A value as it is shown. */
function shown(value: unknown): string {
  const text = typeof value === 'string' && /^[\w.@:+/-]+$/.test(value) ? value : JSON.stringify(value);
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text;
}

/** What is wrong, one line each. */
export const faultLines = (file: string, faults: readonly Fault[]): string[] =>
  faults.map(({ line, where, message }) => {
    const place = line === null ? file : `${file}:${line}`;
    return `${place}: ${where === '' ? '' : `${where}: `}${message}.`;
  });

const change = ({ field, database, file }: Difference) => `    ${field}: ${shown(database)} → ${shown(file)}`;
const both = (word: string, { field, database, file }: Difference) =>
  `    ${word} ${field}: file ${shown(file)}, database ${shown(database)}`;

/** The words for what is done to a schedule; empty when it is unchanged. */
function wordsOf(step: Step): string[] {
  switch (step.kind) {
    case 'create':
      return ['create'];
    case 'gone':
      return [step.conflict ? 'CONFLICT (deleted in the database)' : 'deleted in the database'];
    case 'delete':
      return ['delete'];
    case 'edited':
      return ['CONFLICT (not in the file, changed in the database)'];
    case 'orphan':
      return ['orphan (not in the file)'];
    case 'forget':
      return [];
    case 'pair': {
      const status = step.changes.find(({ field }) => field === 'status');
      return [
        ...(step.conflicts.length > 0 ? ['CONFLICT'] : []),
        ...(step.adopts ? [`adopt task ${step.task.id}`] : []),
        ...(step.changes.some(({ field }) => field !== 'status') ? ['change'] : []),
        ...(status ? [status.file === 'paused' ? 'pause' : 'resume'] : []),
        ...(step.drift.length > 0 ? ['drift'] : []),
      ];
    }
  }
}

/** A plan, and at its end how many schedules there are of each kind. */
export function planLines(steps: readonly Step[], { twinsOf }: Pick<State, 'twinsOf'>): string[] {
  const lines: string[] = [];
  const counts = new Map<string, number>();
  const count = (word: string) => counts.set(word, (counts.get(word) ?? 0) + 1);
  for (const step of steps) {
    if (step.kind === 'forget') continue;
    const words = wordsOf(step);
    if (words.length === 0) {
      count('unchanged');
      continue;
    }
    // The first word of each, for the sum.
    for (const word of words) count(word.split(' ')[0] ?? word);
    const { key, owner } = 'entry' in step ? step.entry : step.task;
    lines.push(`${key} (${owner}): ${words.join(', ')}`);
    if (step.kind === 'create') {
      for (const id of twinsOf(step.entry))
        lines.push(`    (the task ${id} of another owner has this key, too, and stays)`);
    }
    if (step.kind === 'pair') {
      lines.push(...step.conflicts.map((difference) => both('CONFLICT', difference)));
      lines.push(...step.changes.map(change), ...step.drift.map((difference) => both('drift', difference)));
    }
  }
  const sum = [...counts].map(([word, n]) => `${word} ${n}`).join(', ');
  lines.push(sum === '' ? 'No schedules.' : `Schedules: ${sum}.`);
  return lines;
}

/** What an export writes. */
export const editLines = (edits: readonly Edit[]): string[] =>
  edits.map((edit) => {
    if (edit.kind === 'add') return `${edit.key} (${edit.owner}): added`;
    if (edit.kind === 'remove') return `${edit.key}: removed`;
    return `${edit.key}: ${edit.field}: ${shown(edit.from)} → ${shown(edit.to)}`;
  });
