import { readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { LOCKS } from '../../src/platform/locks.ts';
import { applyFile, exportFile, planFile, type SyncOptions } from '../../src/schedule-file/sync.ts';
import { endPrograms, newFolder, removeFolder, startProgram } from '../support/processes.ts';
import { startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, until } from '../support/work.ts';

type User = Awaited<ReturnType<TestServer['newUser']>>;

let server: TestServer;
let user: User;
let folder: string;
let file: string;
beforeAll(async () => {
  server = await startServer();
});
afterAll(() => server.stop());
beforeEach(async () => {
  user = await server.newUser();
  folder = await newFolder();
  file = join(folder, 'schedule_config.yml');
});
afterEach(async () => {
  await endPrograms();
  await removeFolder(folder);
});

const VERBS = { plan: planFile, apply: applyFile, export: exportFile };

/** Runs a verb on the file, or on what it is to hold from now on. */
async function run(verb: keyof typeof VERBS, options: Partial<SyncOptions> = {}, text?: string) {
  if (text !== undefined) await writeFile(file, text);
  const lines: string[] = [];
  const code = await VERBS[verb](server.db, { file, owner: user.email, ...options }, (line) => void lines.push(line));
  return { code, out: lines.join('\n') };
}

const schedules = (entries: Record<string, Record<string, unknown>>) =>
  JSON.stringify({ version: 1, schedules: entries });
const tasks = async () => (await user.call('GET', '/tasks?sort_by=created_at&sort_order=asc')).body.tasks;
const onlyTask = async () => {
  const all = await tasks();
  expect(all).toHaveLength(1);
  return all[0];
};
const audits = async (id: number) =>
  (
    await server.db.query<{
      operation: string;
      user_id: number;
      request_id: string;
      user_agent: string;
      changed: object;
    }>({
      text: `select operation, user_id, request_id, user_agent, changed_fields as changed from audit_log
        where entity_type = 'task' and entity_id = $1 order by id`,
      values: [id],
    })
  ).rows;

const REPORT = { skill: 'report', cron: '0 9 * * mon-fri', timezone: 'Europe/Rome' };

test('what the file has is made, changed, paused and resumed, as its owner, with audit entries and events', async () => {
  const project = (await user.call('POST', '/projects', { name: 'Reports' })).body;
  const agent = await makeAgent(user.call, { name: 'reporter' });
  const entry = { ...REPORT, name: 'Morning', project: 'Reports', agent: 'reporter', params: { audience: 'team' } };
  const first = await run('plan', {}, schedules({ morning: entry, paused: { skill: 'x', status: 'paused' } }));
  expect(first).toEqual({
    code: 3,
    out: `morning (${user.email}): create\npaused (${user.email}): create\nSchedules: create 2.`,
  });
  expect(await tasks()).toEqual([]);
  expect(await run('apply')).toMatchObject({ code: 0, out: expect.stringMatching(/Applied\.$/) });
  const [task, paused] = await tasks();
  expect(task).toMatchObject({
    name: 'Morning',
    skill_name: 'report',
    project_id: project.id,
    agent_id: agent.id,
    schedule_cron: '0 9 * * mon-fri',
    params: { audience: 'team' },
    next_run_at: expect.any(String),
    status: 'pending',
  });
  expect(paused).toMatchObject({ status: 'disabled', pause_reason: 'manual' });
  expect((await user.call('GET', `/projects/${project.id}`)).body.tasks_count).toBe(1);
  expect(await run('plan')).toEqual({ code: 0, out: 'Schedules: unchanged 2.' });
  expect(await run('apply')).toEqual({ code: 0, out: 'Schedules: unchanged 2.\nApplied.' });

  const changed = { ...entry, project: null, priority: 'high', status: 'paused' };
  const second = await run('plan', {}, schedules({ morning: changed, paused: { skill: 'x' } }));
  expect(second.code).toBe(3);
  expect(second.out).toContain(`morning (${user.email}): change, pause\n`);
  expect(second.out).toContain('    priority: medium → high\n');
  expect(second.out).toContain('    project: Reports → null\n');
  expect(second.out).toContain(`paused (${user.email}): resume\n    status: paused → active\n`);
  expect((await run('apply')).code).toBe(0);
  expect(await tasks()).toMatchObject([
    { priority: 'high', project_id: null, status: 'disabled', next_run_at: null },
    { status: 'pending' },
  ]);
  expect((await run('plan')).code).toBe(0);

  const log = await audits(task.id);
  expect(log.map(({ operation }) => operation)).toEqual(['CREATE', 'UPDATE', 'UPDATE']);
  expect(log[1]).toMatchObject({ changed: { priority: { old: 'medium', new: 'high' } } });
  for (const { user_id, request_id, user_agent } of log) {
    expect([user_id, request_id, user_agent]).toEqual([user.id, 'schedule:sync', 'schedule:sync']);
  }
  await server.feedCaughtUp();
  const { rows } = await server.db.query<{ type: string }>({
    text: 'select type from events where user_id = $1 order by event_id',
    values: [user.id],
  });
  expect(rows.map(({ type }) => type)).toEqual(
    expect.arrayContaining(['task_status_update', 'calendar_event_created', 'calendar_event_deleted']),
  );
});

test('what somebody changed over REST is drift: shown, left alone, exported, or overruled by a word', async () => {
  await run('apply', {}, schedules({ nightly: REPORT }));
  const { id } = await onlyTask();
  await user.call('PUT', `/tasks/${id}`, { priority: 'critical' });
  await user.call('POST', `/tasks/${id}/pause`);
  const plan = await run('plan');
  expect(plan.code).toBe(3);
  expect(plan.out).toContain(`nightly (${user.email}): drift\n`);
  expect(plan.out).toContain('    drift priority: file medium, database critical\n');
  expect(plan.out).toContain('    drift status: file active, database paused');
  // Another field that the file changes does not take the drift with it.
  await run('apply', {}, schedules({ nightly: { ...REPORT, max_attempts: 5 } }));
  expect(await onlyTask()).toMatchObject({ priority: 'critical', status: 'disabled', max_attempts: 5 });

  expect(await run('export')).toMatchObject({
    code: 0,
    out: expect.stringContaining('nightly: priority: medium → critical'),
  });
  expect((await run('plan')).code).toBe(0);
  expect(await readFile(file, 'utf8')).toMatch(/priority: critical/);

  expect((await run('apply')).code).toBe(0);
  await user.call('PUT', `/tasks/${id}`, { priority: 'low' });
  expect((await run('apply')).code).toBe(0);
  expect(await onlyTask()).toMatchObject({ priority: 'low' });
  expect((await run('apply', { prefer: 'file' })).code).toBe(0);
  expect(await onlyTask()).toMatchObject({ priority: 'critical' });
  expect((await run('plan')).code).toBe(0);
});

test('what both have changed is a conflict: nothing is written until somebody says which side counts', async () => {
  await run('apply', {}, schedules({ a: REPORT, b: REPORT }));
  const [a, b] = await tasks();
  const edited = schedules({ a: { ...REPORT, priority: 'high' }, b: { ...REPORT, priority: 'high' } });
  await user.call('PUT', `/tasks/${b.id}`, { priority: 'low' });
  const refused = await run('apply', {}, edited);
  expect(refused.code).toBe(4);
  expect(refused.out).toContain('    CONFLICT priority: file high, database low\n');
  expect(refused.out).toContain('--prefer file or --prefer database');
  expect((await run('plan')).code).toBe(4);
  expect((await run('export')).code).toBe(4);
  expect(await readFile(file, 'utf8')).toBe(edited);
  expect(await tasks()).toMatchObject([
    { id: a.id, priority: 'medium', version: 1 },
    { id: b.id, priority: 'low', version: 2 },
  ]);
  // The database's value stays, and is to be exported.
  expect(await run('apply', { prefer: 'database' })).toMatchObject({ code: 0, out: expect.stringContaining('drift') });
  expect(await tasks()).toMatchObject([{ priority: 'high' }, { priority: 'low' }]);
  expect((await run('export')).out).toContain('b: priority: high → low');
  expect((await run('plan')).code).toBe(0);

  await user.call('PUT', `/tasks/${b.id}`, { priority: 'critical' });
  expect((await run('apply', { prefer: 'file' }, schedules({ a: REPORT, b: REPORT }))).code).toBe(0);
  expect(await tasks()).toMatchObject([{ priority: 'medium' }, { priority: 'medium' }]);
});

test('one change made on both sides is none', async () => {
  await run('apply', {}, schedules({ a: REPORT }));
  const { id } = await onlyTask();
  await user.call('PUT', `/tasks/${id}`, { priority: 'high' });
  const text = schedules({ a: { ...REPORT, priority: 'high' } });
  expect(await run('plan', {}, text)).toEqual({ code: 0, out: 'Schedules: unchanged 1.' });
  expect((await run('apply')).code).toBe(0);
  // It is the base from now on: taken back in the database, it is drift and not applied again.
  await user.call('PUT', `/tasks/${id}`, { priority: 'medium' });
  expect((await run('plan')).out).toContain('drift priority: file high, database medium');
});

test('what left the file is an orphan until it is pruned, and its key is free then', async () => {
  await run('apply', {}, schedules({ a: REPORT, b: REPORT }));
  const [, b] = await tasks();
  const without = schedules({ a: REPORT });
  expect(await run('plan', {}, without)).toMatchObject({
    code: 3,
    out: expect.stringContaining(`b (${user.email}): orphan (not in the file)`),
  });
  expect((await run('apply')).code).toBe(0);
  expect(await tasks()).toHaveLength(2);
  await user.call('PUT', `/tasks/${b.id}`, { priority: 'low' });
  expect((await run('apply', { prune: true })).code).toBe(4);
  await user.call('PUT', `/tasks/${b.id}`, { priority: 'medium' });
  expect(await run('apply', { prune: true })).toMatchObject({ code: 0, out: expect.stringContaining('delete') });
  expect(await tasks()).toHaveLength(1);
  expect((await audits(b.id)).at(-1)).toMatchObject({ operation: 'DELETE', request_id: 'schedule:sync' });
  expect((await run('apply', {}, schedules({ a: REPORT, b: REPORT }))).code).toBe(0);
  expect(await tasks()).toHaveLength(2);
});

test('what was deleted over REST is made again only by a word', async () => {
  const text = schedules({ a: REPORT });
  await run('apply', {}, text);
  const { id } = await onlyTask();
  await user.call('DELETE', `/tasks/${id}`);
  expect(await run('apply')).toMatchObject({
    code: 4,
    out: expect.stringContaining('CONFLICT (deleted in the database)'),
  });
  expect((await run('apply', { prefer: 'database' })).code).toBe(0);
  expect(await tasks()).toEqual([]);
  expect((await run('apply', { prefer: 'file' })).code).toBe(0);
  const again = await onlyTask();
  expect(again.id).not.toBe(id);
  expect((await run('plan')).code).toBe(0);

  // Exported, the entry goes; applied, its key is free.
  await user.call('DELETE', `/tasks/${again.id}`);
  expect(await run('export')).toMatchObject({ code: 0, out: expect.stringContaining('a: removed') });
  expect(await run('apply')).toEqual({ code: 0, out: 'No schedules.\nApplied.' });
  expect((await run('apply', {}, text)).code).toBe(0);
  expect(await tasks()).toHaveLength(1);
});

test('a task made by other means is adopted, and one is taken along under a new key', async () => {
  const made = await makeTask(user.call, { skill_name: 'report', priority: 'low' });
  const adopt = await run(
    'apply',
    {},
    schedules({ a: { skill: 'report', adopt: made.id, max_attempts: 2, priority: 'low' } }),
  );
  expect(adopt).toMatchObject({
    code: 0,
    out: expect.stringContaining(`a (${user.email}): adopt task ${made.id}, change`),
  });
  expect(await onlyTask()).toMatchObject({ id: made.id, max_attempts: 2, priority: 'low' });
  expect((await run('plan')).code).toBe(0);
  await user.call('PUT', `/tasks/${made.id}`, { priority: 'high' });
  const renamed = schedules({ b: { skill: 'report', adopt: made.id, max_attempts: 2, priority: 'low' } });
  expect((await run('apply', {}, renamed)).out).toContain('drift priority: file low, database high');
  expect(await onlyTask()).toMatchObject({ id: made.id, priority: 'high' });

  const other = await server.newUser();
  const foreign = await makeTask(other.call);
  const bad = schedules({
    b: { skill: 'report', adopt: foreign.id },
    c: { skill: 'report', adopt: made.id },
    d: { skill: 'report', adopt: made.id },
    e: { skill: 'report', adopt: foreign.id },
  });
  const refused = await run('plan', {}, bad);
  expect(refused.code).toBe(2);
  expect(refused.out).toContain(`b.adopt: the entry has the task ${made.id} already`);
  expect(refused.out).toContain(`c.adopt: another entry adopts the task ${made.id} as well`);
  expect(refused.out).toContain(`e.adopt: there is no task ${foreign.id} of ${user.email}`);
});

test('every fault is told at once with its line, and nothing is written', async () => {
  const shared = await user.call('POST', '/projects', { name: 'Twice' });
  const { body: twin } = await user.call('POST', '/projects', { name: 'Twice' });
  const text = `version: 1
schedules:
  good: {skill: report}
  nobody:
    owner: nobody@example.com
    skill: report
  places:
    skill: report
    project: Twice
    agent: None
  syntax:
    skill: report
    cron: never
`;
  for (const verb of ['plan', 'apply'] as const) {
    const { code, out } = await run(verb, {}, text);
    expect(code).toBe(2);
    expect(out.split('\n')).toEqual([
      `${file}:5: nobody.owner: there is no user nobody@example.com.`,
      `${file}:9: places.project: 2 of that name are there for ${user.email}: write the id instead, ${shared.body.id} or ${twin.id}.`,
      `${file}:10: places.agent: there is no agent "None" for ${user.email}: create it first, or correct the name.`,
      expect.stringMatching(/:13: syntax\.cron: /),
      'Nothing was written: 4 faults.',
    ]);
  }
  // What only the task itself can tell.
  const late = await run(
    'apply',
    {},
    'version: 1\nschedules:\n  good: {skill: report}\n  late:\n    skill: report\n    run_at: 2020-01-01T00:00:00Z\n  id:\n    skill: report\n    project: ' +
      `${twin.id}\n`,
  );
  expect(late).toMatchObject({
    code: 2,
    out: expect.stringMatching(/:6: late\.run_at: has passed.*\nNothing was written: 1 fault\.$/),
  });
  expect(await tasks()).toEqual([]);
  expect(await run('plan', { owner: 'nobody@example.com' }, schedules({}))).toMatchObject({
    code: 2,
    out: expect.stringContaining('--owner: there is no user nobody@example.com'),
  });
});

test('an entry cannot change its owner, and two owners may have one key', async () => {
  const key = `key-${user.id}`;
  await run('apply', {}, schedules({ [key]: REPORT, b: REPORT }));
  const [{ id }] = await tasks();
  const other = await server.newUser();
  expect(await run('plan', {}, schedules({ [key]: { ...REPORT, owner: other.email }, b: REPORT }))).toMatchObject({
    code: 2,
    out: expect.stringContaining(`.owner: the task ${id} of this key belongs to ${user.email}`),
  });
  const twin = await run('apply', { owner: other.email }, schedules({ [key]: REPORT }));
  expect(twin).toMatchObject({
    code: 0,
    out: expect.stringContaining(`(the task ${id} of another owner has this key`),
  });
  expect((await other.call('GET', '/tasks')).body.tasks).toHaveLength(1);
  expect(await tasks()).toHaveLength(2);
});

test('an export makes the file, with every task when asked, and applied it changes nothing', async () => {
  const entries = { a: { ...REPORT, params: { n: 1 } } };
  await run('apply', {}, schedules(entries));
  await makeTask(user.call, { name: 'Grüße an alle!', skill_name: 'mail', run_at: '2099-01-01T00:00:00Z' });
  await makeTask(user.call, { skill_name: 'a' });
  await rm(file);
  expect((await run('export')).code).toBe(0);
  const made = await readFile(file, 'utf8');
  expect(made).toBe(
    `version: 1\nschedules:\n  a:\n    owner: ${user.email}\n    skill: report\n    cron: 0 9 * * mon-fri\n    params:\n      n: 1\n    timezone: Europe/Rome\n`,
  );
  await writeFile(file, `# Ours.\n${made}`);
  expect((await run('export', { all: true })).code).toBe(0);
  const all = await readFile(file, 'utf8');
  expect(all.startsWith(`# Ours.\n${made}`)).toBe(true);
  expect(all).toMatch(/\n {2}gru-e-an-alle-?:\n.*\n {4}adopt: \d+\n {4}name: Grüße an alle!\n/);
  expect(all).toMatch(/\n {2}a-2:\n/);
  const before = await tasks();
  expect((await run('apply')).code).toBe(0);
  expect(await tasks()).toEqual(before);
  expect((await run('plan')).code).toBe(0);
  expect(await run('export', { all: true })).toEqual({ code: 0, out: `There is nothing to write into ${file}.` });
});

test('a task that is paused with its project is not drift', async () => {
  const { body: project } = await user.call('POST', '/projects', { name: 'P' });
  await run('apply', {}, schedules({ a: { ...REPORT, project: 'P' } }));
  await user.call('POST', `/projects/${project.id}/archive`);
  expect(await onlyTask()).toMatchObject({ status: 'disabled' });
  expect((await run('plan')).code).toBe(0);
  await user.call('PUT', `/projects/${project.id}`, { name: 'Q' });
  expect(await run('plan')).toMatchObject({ code: 2, out: expect.stringContaining('there is no project "P"') });
  expect((await run('export')).out).toContain('a: project: P → Q');
  expect((await run('plan')).code).toBe(0);
});

test('the program waits while another applies, then sees what that one did', async () => {
  await writeFile(file, schedules({ a: REPORT, b: { ...REPORT, cron: '@daily' } }));
  const start = (args: string[]) =>
    startProgram('src/schedule-file/schedule-sync.ts', {
      folder,
      env: { DATABASE_URL: server.databaseUrl },
      args: [...args, '--owner', user.email],
    });
  // Of the session, since a transaction that does nothing is ended before slow programs have started.
  const holder = await server.db.pool.connect();
  try {
    await holder.query('select pg_advisory_lock($1, $2)', [...LOCKS.scheduleFile]);
    const both = [start(['apply']), start(['apply'])];
    for (const program of both) await program.saying(/Another apply is under way/);
    await holder.query('select pg_advisory_unlock_all()');
    for (const program of both) expect(await program.exited, program.out() + program.err()).toBe(0);
    const ends = both.map((program) => program.out().match(/Schedules: .*/)?.[0]);
    expect(ends.sort()).toEqual(['Schedules: create 2.', 'Schedules: unchanged 2.']);
  } finally {
    holder.release(true);
  }
  expect(await tasks()).toHaveLength(2);
  const plan = start([]);
  expect(await plan.exited).toBe(0);
});

test('the program says in a sentence what it cannot do', async () => {
  const start = async (args: string[], env: Record<string, string> = { DATABASE_URL: server.databaseUrl }) => {
    const program = startProgram('src/schedule-file/schedule-sync.ts', { folder, env, args });
    return { code: await program.exited, out: program.out().trim(), err: program.err().trim() };
  };
  const none = start([]);
  const verb = start(['destroy']);
  const prefer = start(['apply', '--prefer', 'luck']);
  const all = start(['export', '--all']);
  const away = start(['export'], { DATA_DIR: join(folder, 'nothing') });
  expect(await none).toMatchObject({ code: 2, err: expect.stringMatching(/^There is no file schedule_config\.yml: /) });
  expect(await verb).toMatchObject({ code: 2, err: expect.stringMatching(/^destroy is not a verb\. Usage: /) });
  expect(await prefer).toMatchObject({
    code: 2,
    err: expect.stringMatching(/^--prefer is file or database\. Usage: /),
  });
  expect(await all).toMatchObject({ code: 2, err: expect.stringMatching(/^--all goes with export and --owner\. /) });
  expect(await away).toMatchObject({ code: 2, err: expect.stringMatching(/^DATABASE_URL is not set, and /) });
});

test('who edits a task just then is not overruled: the plan is made anew', async () => {
  await run('apply', {}, schedules({ a: REPORT }));
  const { id } = await onlyTask();
  await writeFile(file, schedules({ a: { ...REPORT, priority: 'high' } }));
  const holder = await server.db.pool.connect();
  try {
    await holder.query('begin');
    await holder.query(`update tasks set priority = 0, version = version + 1 where id = $1`, [id]);
    // It has read the task as it was, and waits for the row.
    const applying = run('apply');
    const waiting = async () =>
      (
        await server.db.query({
          text: `select 1 from pg_locks where not granted and locktype = 'transactionid' and pid in
            (select pid from pg_stat_activity where datname = current_database())`,
        })
      ).rowCount;
    await until(waiting, (count) => count !== 0);
    await holder.query('commit');
    expect(await applying).toMatchObject({ code: 4, out: expect.stringContaining('file high, database low') });
  } finally {
    holder.release(true);
  }
  expect(await onlyTask()).toMatchObject({ priority: 'low' });
});
