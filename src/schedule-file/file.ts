import { isUtf8 } from 'node:buffer';
import { randomBytes } from 'node:crypto';
import { open, realpath, rename, rm, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { type Document, isMap, isScalar, LineCounter, type Pair, parseDocument, type YAMLMap } from 'yaml';
import { StartupError } from '../platform/startup-error.ts';
import { type Entry, readEntry } from './fields.ts';

// A schedule file: what it says, where it says it, and how it is written so that a crash leaves the old one or the new one.

const MAX_BYTES = 4 * 1024 * 1024;
/** How often an anchor may be referred to, those within it counted: a small file can stand for any amount of memory. */
const MAX_ALIASES = 256;
const KEY = /^[a-zA-Z0-9_.-]{1,128}$/;

/** What is wrong with a file. */
export interface Fault {
  line: number | null;
  /** The key of the entry, and the field. */
  where: string;
  message: string;
}

/** A file that was read. */
export interface ScheduleFile {
  text: string;
  document: Document;
  entries: Entry[];
  faults: Fault[];
  /** Where an entry, or a field of it (`cron`, `params.x`), stands; null when it does not. */
  lineOf(key: string, field?: string): number | null;
}

/** The text of the file; undefined when there is none. Throws StartupError when it cannot be a schedule file. */
export async function loadFile(file: string): Promise<string | undefined> {
  try {
    const handle = await open(file, 'r');
    try {
      if ((await handle.stat()).size > MAX_BYTES) throw new StartupError(`${file} is larger than ${MAX_BYTES} bytes.`);
      const bytes = await handle.readFile();
      if (!isUtf8(bytes)) throw new StartupError(`${file} is not UTF-8: save it as that.`);
      return bytes.toString('utf8');
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (error instanceof StartupError) throw error;
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return undefined;
    throw new StartupError(`${file} cannot be read (${code}).`);
  }
}

/** Reads a file; `defaultOwner` has the entries that name none. What is wrong with it is in `faults`, all of it. */
export function parseFile(text: string, defaultOwner?: string): ScheduleFile {
  const lines = new LineCounter();
  // Whatever version a %YAML directive asks for: merge keys and the types of YAML 1.1 are not read.
  const document = parseDocument(text, {
    lineCounter: lines,
    prettyErrors: false,
    schema: 'core',
    merge: false,
    stringKeys: true,
    resolveKnownTags: false,
    logLevel: 'error',
  });
  const lineAt = (offset: number | undefined) => (offset === undefined ? null : lines.linePos(offset).line);
  const lineOf = (key: string, field?: string): number | null => {
    let node: unknown = schedulesOf(document);
    let line: number | null = null;
    for (const step of [key, ...(field ? field.split('.') : [])]) {
      const pair = isMap(node) ? node.items.find((item) => keyOf(item) === step) : undefined;
      if (!pair) break;
      line = lineAt((pair.key as { range?: [number] } | null)?.range?.[0]) ?? line;
      node = pair.value;
    }
    return line;
  };
  const faults: Fault[] = [...document.errors, ...document.warnings].map(({ code, message, pos: [start] }) => ({
    line: lineAt(start),
    where: '',
    message: code === 'DUPLICATE_KEY' ? 'this key stands twice in its map: remove one of them' : message,
  }));
  const file: ScheduleFile = { text, document, entries: [], faults, lineOf };
  if (document.errors.every(({ code }) => code === 'DUPLICATE_KEY')) readEntries(file, lineAt, defaultOwner);
  faults.sort((a, b) => (a.line ?? 0) - (b.line ?? 0));
  return file;
}

/** A file without entries. */
export const emptyFile = (): ScheduleFile => parseFile('version: 1\nschedules: {}\n');

/** The map of the entries, when there is one. */
export function schedulesOf(document: Document): YAMLMap | undefined {
  const found = isMap(document.contents) ? document.contents.get('schedules', true) : undefined;
  return isMap(found) ? found : undefined;
}

/** The text of a pair's key. */
export const keyOf = ({ key }: Pair): string => String(isScalar(key) ? key.value : key);

function readEntries(
  { document, entries, faults, lineOf }: ScheduleFile,
  lineAt: (offset: number | undefined) => number | null,
  defaultOwner: string | undefined,
): void {
  let root: unknown;
  try {
    root = document.toJS({ maxAliasCount: MAX_ALIASES });
  } catch (error) {
    const message = /Excessive alias count/.test((error as Error).message)
      ? `an anchor is referred to more than ${MAX_ALIASES} times: write it out`
      : (error as Error).message;
    faults.push({ line: null, where: '', message });
    return;
  }
  if (!isMap(document.contents) || typeof root !== 'object' || root === null) {
    faults.push({
      line: 1,
      where: '',
      message: 'it must begin with `version: 1` and have its entries below `schedules:`',
    });
    return;
  }
  const { version, schedules, ...others } = root as Record<string, unknown>;
  const lineOfTop = (name: string) => {
    const pair = isMap(document.contents) ? document.contents.items.find((item) => keyOf(item) === name) : undefined;
    return lineAt((pair?.key as { range?: [number] } | undefined)?.range?.[0]) ?? 1;
  };
  if (version !== 1) faults.push({ line: lineOfTop('version'), where: 'version', message: 'must be 1' });
  for (const name of Object.keys(others)) {
    faults.push({ line: lineOfTop(name), where: name, message: 'is not known here: entries stand below `schedules:`' });
  }
  if (schedules === undefined || schedules === null) return;
  if (typeof schedules !== 'object' || Array.isArray(schedules)) {
    faults.push({
      line: lineOfTop('schedules'),
      where: 'schedules',
      message: 'must have entries below it, by their keys',
    });
    return;
  }
  for (const [key, raw] of Object.entries(schedules)) {
    const shown = key.length > 128 ? `${key.slice(0, 128)}…` : key;
    if (!KEY.test(key)) {
      faults.push({
        line: lineOf(key),
        where: shown,
        message: 'must be 1 to 128 letters, digits, _, . or -, as a key',
      });
    }
    const entry = readEntry(key, raw, defaultOwner);
    if (!Array.isArray(entry)) entries.push(entry);
    else {
      for (const { path, message } of entry) {
        faults.push({ line: lineOf(key, path), where: path === '' ? shown : `${shown}.${path}`, message });
      }
    }
  }
}

/**
 * Writes the file so that a crash or a full disk leaves the old content or the new, never half of it; its mode stays, and a
 * link goes on leading to it. Throws StartupError when it cannot.
 */
export async function writeFileWhole(file: string, text: string): Promise<void> {
  if (Buffer.byteLength(text) > MAX_BYTES) {
    throw new StartupError(`${file} would be larger than ${MAX_BYTES} bytes: export one owner with --owner.`);
  }
  let temporary: string | undefined;
  try {
    const target = await realpath(file).catch(() => file);
    const before = await stat(target).catch(() => undefined);
    temporary = join(dirname(target), `.${randomBytes(6).toString('hex')}.tmp`);
    const handle = await open(temporary, 'wx', 0o644);
    try {
      if (before) await handle.chmod(before.mode & 0o777);
      await handle.writeFile(text);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, target);
    await syncFolder(dirname(target));
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new StartupError(`${file} cannot be written (${code}): it is as it was.`);
  } finally {
    if (temporary !== undefined) await rm(temporary, { force: true });
  }
}

/** Makes the new name last; systems that cannot do that to a folder do it by themselves. */
async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r').catch(() => undefined);
  await handle?.sync().catch(() => {});
  await handle?.close();
}
