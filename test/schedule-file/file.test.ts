import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, readdir, readFile, readlink, stat, symlink, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { editFile } from '../../src/schedule-file/edit.ts';
import { DEFAULTS } from '../../src/schedule-file/fields.ts';
import { emptyFile, loadFile, parseFile, writeFileWhole } from '../../src/schedule-file/file.ts';
import { faultLines } from '../../src/schedule-file/report.ts';
import { newFolder, removeFolder } from '../support/processes.ts';

let folder: string;
beforeEach(async () => {
  folder = await newFolder();
});
afterEach(() => removeFolder(folder));

const faults = (text: string, owner?: string) => faultLines('f', parseFile(text, owner).faults);
const OWNER = 'ada@example.com';

test('an entry says what a body of POST /tasks says, under shorter names; what it leaves out has its default', () => {
  const { entries, faults } = parseFile(
    `
version: 1
schedules:
  morning-report:
    owner: Ada@Example.com
    project: Reports
    skill: report
    cron: '0 9 * * mon-fri'
    timezone: Europe/Rome
    params: {audience: team}
    status: paused
    agent: 7
    starts_at: 2027-01-01T01:00:00+01:00
  __proto__: {skill: deploy, run_at: '2099-01-01T03:00:00Z', adopt: 12}
`,
    'admin@localhost',
  );
  expect(faults).toEqual([]);
  expect(entries).toEqual([
    {
      key: 'morning-report',
      owner: OWNER,
      adopt: null,
      fields: {
        ...DEFAULTS,
        project: 'Reports',
        skill: 'report',
        cron: '0 9 * * mon-fri',
        timezone: 'Europe/Rome',
        params: { audience: 'team' },
        status: 'paused',
        agent: 7,
        starts_at: '2027-01-01T00:00:00.000Z',
      },
    },
    {
      key: '__proto__',
      owner: 'admin@localhost',
      adopt: 12,
      fields: { ...DEFAULTS, skill: 'deploy', run_at: '2099-01-01T03:00:00.000Z' },
    },
  ]);
});

test('every fault is named, with its line', () => {
  const text = `version: 2
colour: red
schedules:
  good: {owner: ada@example.com, skill: report}
  bad one:
    owner: ada@example.com
    skill: report
  many:
    owner: nobody
    skill: a b
    cron: 61 * * * *
    timezone: Europe/Atlantis
    status: asleep
    project_id: 3
    max_attempts: 0
    speed: 9
    params:
      text: "a\\0b"
  guarded:
    skill: report
    params: {n: .inf}
  twice:
    owner: ada@example.com
    skill: report
    skill: deploy
  both:
    owner: ada@example.com
    skill: report
    cron: '@daily'
    run_at: 2099-01-01T00:00:00Z
  merged:
    <<: {skill: report}
    owner: ada@example.com
  list: [1]
`;
  const clean = text.replace(/ {4}params:\n {6}text.*\n/, '');
  const found = faults(clean);
  expect(found).toEqual([
    'f:1: version: must be 1.',
    'f:2: colour: is not known here: entries stand below `schedules:`.',
    'f:5: bad one: must be 1 to 128 letters, digits, _, . or -, as a key.',
    'f:9: many.owner: must be an email address.',
    'f:10: many.skill: must be 1 to 255 letters, digits, _ or -.',
    expect.stringMatching(/^f:11: many\.cron: The minute field "61" is not valid: allowed are 0-59,/i),
    'f:12: many.timezone: must be a time zone of the IANA database, such as Europe/Rome or UTC.',
    'f:13: many.status: must be active or paused.',
    'f:14: many.project_id: is written `project` in a schedule file.',
    expect.stringMatching(/^f:15: many\.max_attempts: too small/),
    'f:16: many.speed: is not a known field: remove it.',
    'f:19: guarded.params.n: is a number out of range.',
    'f:23: this key stands twice in its map: remove one of them.',
    'f:28: both.run_at: cannot stand beside cron: leave one of them out.',
    'f:29: merged.skill: is required.',
    'f:30: merged.<<: is not read: write the fields out.',
    'f:32: list: must have fields below it, of which `skill` is required.',
  ]);
  expect(faults(text)).toContain('f:18: many.params.text: must not contain U+0000.');
  expect(faults('version: 1\nschedules:\n  a:\n    skill: report\n')).toEqual([
    'f:3: a.owner: is required: the e-mail address of its owner; or give --owner for all.',
  ]);
});

test('what is no schedule file at all is a fault and not a crash', () => {
  const bomb = Array.from({ length: 9 }, (_, i) => `x${i}: &x${i} [${i === 0 ? '1' : `*x${i - 1}, `.repeat(9)}]`);
  for (const [text, message] of [
    ['', /must begin with/],
    ['- a', /must begin with/],
    ['version: 1\nschedules: [a]', /f:2: schedules: must have entries/],
    ['version: 1\nschedules:\n  a: {b', /^f:\d+: \S/],
    ['version: 1\n---\nversion: 1', /multiple documents/],
    ['version: 1\nschedules:\n  a: !!set {b}', /f:3: .*tag/],
    [`version: 1\n${bomb.join('\n')}`, /referred to more than 256 times/],
    ['version: 1\nschedules:\n  a: *none', /alias/i],
    ['%YAML 1.1\n---\nversion: 1\nschedules:\n  a:\n    owner: a@b.it\n    <<: {skill: x}', /f:7: a\.<<: is not read/],
  ] as const) {
    expect(faults(text), text).toContainEqual(expect.stringMatching(message));
  }
});

const COMMENTED = `# Our schedules.
version: 1
schedules:
  # The one that the board reads.
  weekly:
    owner: ada@example.com # she knows
    skill: report
    cron: '0 9 * * mon' # after the weekend

  nightly:
    owner: ada@example.com
    skill: backup
    params:
      # Where it goes.
      to: s3
`;

test('an edit keeps comments, the order, and what it does not touch', () => {
  const text = editFile(parseFile(COMMENTED), [
    { kind: 'set', key: 'weekly', field: 'cron', from: '0 9 * * mon', to: '@weekly' },
    { kind: 'set', key: 'nightly', field: 'priority', from: 'medium', to: 'high' },
    {
      kind: 'add',
      key: 'deploy',
      owner: OWNER,
      adopt: 4,
      fields: { ...DEFAULTS, skill: 'deploy', name: 'yes', params: { long: 'word '.repeat(60).trim() } },
    },
  ]);
  expect(text).toBe(
    `${COMMENTED.replace("'0 9 * * mon' #", '"@weekly" #')}    priority: high\n  deploy:\n    owner: ada@example.com\n    adopt: 4\n    name: yes\n    skill: deploy\n    params:\n      long: ${'word '.repeat(60).trim()}\n`,
  );
  for (const flow of ['{to: [a, b]}', '{ to: [ a, b ] }']) {
    const narrow = `version: 1\nschedules:\n  b:\n    owner: ada@example.com\n    skill: x\n    params: ${flow}\n`;
    expect(editFile(parseFile(narrow), [{ kind: 'set', key: 'b', field: 'skill', from: 'x', to: 'y' }])).toBe(
      narrow.replace('skill: x', 'skill: y'),
    );
  }
  expect(editFile(parseFile(COMMENTED), [{ kind: 'remove', key: 'nightly' }])).toBe(
    COMMENTED.slice(0, COMMENTED.indexOf('\n  nightly')),
  );
  expect(
    editFile(emptyFile(), [{ kind: 'add', key: 'a', owner: OWNER, adopt: null, fields: { ...DEFAULTS, skill: 'x' } }]),
  ).toBe('version: 1\nschedules:\n  a:\n    owner: ada@example.com\n    skill: x\n');
});

test('an edit that an anchor would carry elsewhere is refused', () => {
  const text = `version: 1
schedules:
  a: &a {owner: ada@example.com, skill: report, params: &p {n: 1}}
  b: *a
  c: {owner: ada@example.com, skill: report, params: *p}
`;
  const set = (key: string, field: string, to: unknown) => () =>
    editFile(parseFile(text), [{ kind: 'set', key, field, from: null, to }]);
  expect(set('a', 'priority', 'high')).toThrow(/The entry b cannot be written by itself, since it uses an anchor/);
  expect(set('b', 'priority', 'high')).toThrow(/The entry b cannot be written/);
  expect(set('a', 'params', { n: 2 })).toThrow(/anchor/i);
  expect(set('c', 'params', { n: 2 })()).toContain('params: {n: 2}');
});

test('writing keeps the mode and a link, and leaves nothing else behind', async () => {
  const file = join(folder, 'real.yml');
  await writeFile(file, 'old');
  await chmod(file, 0o664);
  await symlink('real.yml', join(folder, 'link.yml'));
  await writeFileWhole(join(folder, 'link.yml'), 'new');
  expect(await loadFile(file)).toBe('new');
  expect((await stat(file)).mode & 0o777).toBe(0o664);
  expect(await readlink(join(folder, 'link.yml'))).toBe('real.yml');
  expect((await readdir(folder)).sort()).toEqual(['link.yml', 'real.yml']);
  await expect(writeFileWhole(join(folder, 'none/file.yml'), 'new')).rejects.toThrow(/cannot be written \(ENOENT\)/);
  await expect(writeFileWhole(file, 'x'.repeat(5_000_000))).rejects.toThrow(/larger than/);
  expect(await loadFile(file)).toBe('new');
});

test('a write that fails in its midst leaves the old file and nothing else', async () => {
  const file = join(folder, 'schedule_config.yml');
  await writeFile(file, 'old');
  const tsx = pathToFileURL(createRequire(import.meta.url).resolve('tsx')).href;
  const module = pathToFileURL(resolve(import.meta.dirname, '../../src/schedule-file/file.ts')).href;
  // A limit of the file size, in KiB, stands for a disk that is full.
  const program = `import { writeFileWhole } from ${JSON.stringify(module)};
    await writeFileWhole(${JSON.stringify(file)}, 'x'.repeat(1_000_000)).catch((error) => console.log(error.message));`;
  const child = spawn(
    'bash',
    ['-c', 'ulimit -f 256; exec "$0" "$@"', process.execPath, '--import', tsx, '--input-type=module', '-e', program],
    { env: { PATH: process.env['PATH'], TSX_DISABLE_CACHE: '1' }, stdio: ['ignore', 'pipe', 'inherit'] },
  );
  let out = '';
  child.stdout.on('data', (chunk) => {
    out += chunk;
  });
  await once(child, 'close');
  expect(out).toMatch(/cannot be written \(EFBIG\): it is as it was/);
  expect(await readdir(folder)).toEqual(['schedule_config.yml']);
  expect(await readFile(file, 'utf8')).toBe('old');
});

test('a file that cannot be read is one sentence', async () => {
  expect(await loadFile(join(folder, 'none.yml'))).toBeUndefined();
  await expect(loadFile(folder)).rejects.toThrow(/cannot be read \(EISDIR\)/);
  await writeFile(join(folder, 'latin'), Buffer.from([0xe9]));
  await expect(loadFile(join(folder, 'latin'))).rejects.toThrow(/not UTF-8/);
  await writeFile(join(folder, 'large'), Buffer.alloc(4 * 1024 * 1024 + 1, 0x20));
  await expect(loadFile(join(folder, 'large'))).rejects.toThrow(/larger than/);
});
