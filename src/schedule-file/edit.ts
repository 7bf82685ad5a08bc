import { isDeepStrictEqual } from 'node:util';
import { isMap, isScalar, type YAMLMap } from 'yaml';
import { StartupError } from '../platform/startup-error.ts';
import { DEFAULTS, FIELDS } from './fields.ts';
import { keyOf, parseFile, type ScheduleFile, schedulesOf } from './file.ts';
import type { Edit } from './plan.ts';

/**
 * The text of a file after `edits`: comments, the order of entries and what is not edited stay. Throws StartupError when it
 * would not say what it is to say, as where an edited value is shared by an anchor.
 */
export function editFile(file: ScheduleFile, edits: readonly Edit[], defaultOwner?: string): string {
  const { document } = file;
  let schedules = schedulesOf(document);
  if (!schedules) {
    document.set('schedules', document.createNode({}));
    schedules = schedulesOf(document);
  }
  if (!schedules) throw new StartupError('The file has no map `schedules` to write into.');
  // `{}`, as an empty map must be written, is no way to write a full one.
  if (schedules.items.length === 0) schedules.flow = false;
  const expected = new Map(file.entries.map((entry) => [entry.key, entry.fields]));
  for (const edit of edits) {
    if (edit.kind === 'remove') {
      schedules.delete(edit.key);
      expected.delete(edit.key);
    } else if (edit.kind === 'add') {
      schedules.set(edit.key, document.createNode(written(edit)));
      expected.set(edit.key, edit.fields);
    } else {
      const entry = schedules.get(edit.key, true);
      if (isMap(entry)) setField(file, entry, edit);
      expected.set(edit.key, { ...expected.get(edit.key), [edit.field]: edit.to });
    }
  }
  const text = textOf(file);
  const after = parseFile(text, defaultOwner);
  for (const [key, fields] of expected) {
    const entry = after.entries.find((found) => found.key === key);
    if (entry && isDeepStrictEqual(entry.fields, fields)) continue;
    throw new StartupError(
      `The entry ${key} cannot be written by itself, since it uses an anchor: write it out first.`,
    );
  }
  if (after.faults[0]) throw new StartupError(`The file would not be valid: ${after.faults[0].message}.`);
  return text;
}

// An anchor that was edited away makes it throw.
function textOf({ document, text }: ScheduleFile): string {
  // {as: here} or { as: here }, whichever the file does, so that nothing changes but what is edited.
  const flowCollectionPadding = !/[{[][^\s{}[\]]/.test(text);
  try {
    return document.toString({ lineWidth: 0, flowCollectionPadding });
  } catch (error) {
    throw new StartupError(`The file cannot be written, since it uses anchors: ${(error as Error).message}`);
  }
}

function setField({ document }: ScheduleFile, entry: YAMLMap, { field, to }: Edit & { kind: 'set' }): void {
  const pair = entry.items.find((item) => keyOf(item) === field);
  if (!pair) {
    entry.set(field, document.createNode(to));
    return;
  }
  const old = pair.value;
  const node = document.createNode(to) as NonNullable<unknown> & {
    comment?: string | null;
    commentBefore?: string | null;
  };
  // A value keeps the remark behind it.
  if (isScalar(old)) node.comment = old.comment ?? null;
  pair.value = node;
}

/** A new entry as it is written: without what has its default. */
function written({ owner, adopt, fields }: Edit & { kind: 'add' }): Record<string, unknown> {
  const said = FIELDS.filter((field) => !isDeepStrictEqual(fields[field], DEFAULTS[field]));
  return {
    owner,
    ...(adopt === null ? {} : { adopt }),
    ...Object.fromEntries(said.map((field) => [field, fields[field]])),
  };
}
