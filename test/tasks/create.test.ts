import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Caller, startServer, type TestServer } from '../support/server.ts';
import { makeAgent, makeTask, unique } from '../support/work.ts';
import { auditOf, eventsOf, expectProblem, makeProject, tasksCount } from './traces.ts';

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
});
afterAll(() => server?.stop());

const inAnHour = () => new Date(Date.now() + 3_600_000).toISOString();
const create = (body: unknown, call: Caller = user.call) => call('POST', '/tasks', body);
const tasksInAll = async () => (await server.admin('GET', '/tasks?limit=1')).body.total as number;

describe('POST /tasks', () => {
  test('creates a task that runs on demand, with every default', async () => {
    const answer = await create({ skill_name: 'report' });
    expect(answer.status).toBe(201);
    const { id } = answer.body;
    expect(answer.headers.get('location')).toBe(`/api/v1/tasks/${id}`);
    expect(answer.headers.get('etag')).toBe('"1"');
    expect(answer.body).toEqual({
      id: expect.any(Number),
      user_id: user.id,
      project_id: null,
      name: null,
      skill_name: 'report',
      params: {},
      priority: 'medium',
      schedule_cron: null,
      timezone: 'UTC',
      run_at: null,
      next_run_at: null,
      last_run_at: null,
      status: 'pending',
      pause_reason: null,
      pause_until: null,
      dst_gap: null,
      dst_fold: null,
      starts_at: null,
      ends_at: null,
      spread_seconds: 0,
      max_runs: null,
      fired_count: 0,
      max_lateness_seconds: null,
      max_lost_leases: null,
      queue_ttl_seconds: null,
      heartbeat_timeout_seconds: null,
      pause_after_failures: null,
      consecutive_failures: 0,
      expect_success_within_seconds: null,
      last_success_at: null,
      overdue_since: null,
      overlap_policy: 'skip',
      misfire_policy: 'fire_last',
      max_attempts: 3,
      retry_backoff_seconds: 10,
      timeout_seconds: 3600,
      agent_id: null,
      required_capabilities: [],
      version: 1,
      created_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
      updated_at: answer.body.created_at,
    });
    expect((await user.call('GET', `/tasks/${id}`)).body).toEqual({ ...answer.body, executions: [] });
  });

  test('keeps every field that is given', async () => {
    const project = await makeProject(server, user.id);
    const agent = await makeAgent(user.call);
    const given = {
      name: 'Rapport du matin 🌅',
      skill_name: 'a-Z_9',
      project_id: project,
      params: { audience: 'team', deep: { list: [1, 'two', null, { three: 3.5 }] } },
      priority: 'critical',
      schedule_cron: '0 0 12 1 1 *',
      timezone: 'Asia/Kolkata',
      overlap_policy: 'queue_one',
      misfire_policy: 'fire_all',
      max_attempts: 20,
      retry_backoff_seconds: 0,
      timeout_seconds: 604_800,
      agent_id: agent.id,
      required_capabilities: ['gpu', 'docker'],
    };
    const task = await makeTask(user.call, given);
    expect(task).toMatchObject(given);
    expect(task.next_run_at).toMatch(/-01-01T06:30:00\.000Z$/);
    expect((await user.call('GET', `/tasks/${task.id}`)).body).toMatchObject(given);
    expect(await tasksCount(server, project)).toBe(1);
  });

  test('trims the name', async () => {
    expect((await makeTask(user.call, { name: '  Morning  ' })).name).toBe('Morning');
  });

  test('takes a one-off at its time', async () => {
    const run_at = inAnHour();
    expect(await makeTask(user.call, { run_at })).toMatchObject({ run_at, next_run_at: run_at, schedule_cron: null });
    expect(await makeTask(user.call, { run_at: '2999-01-01T01:00:00+05:30' })).toMatchObject({
      run_at: '2998-12-31T19:30:00.000Z',
    });
  });

  test('takes a one-off that passed a moment ago, since clocks differ', async () => {
    const run_at = new Date(Date.now() - 30_000).toISOString();
    expect(await makeTask(user.call, { run_at })).toMatchObject({ run_at, next_run_at: run_at });
  });

  // The same wall time, on dates on either side of the clock changes.
  test.each([
    ['0 12 15 1 *', 'Europe/Rome', '-01-15T11:00:00.000Z'],
    ['0 12 15 7 *', 'Europe/Rome', '-07-15T10:00:00.000Z'],
    ['0 12 15 1 *', 'America/New_York', '-01-15T17:00:00.000Z'],
    ['0 12 15 7 *', 'America/New_York', '-07-15T16:00:00.000Z'],
    ['0 12 15 1 *', 'Australia/Lord_Howe', '-01-15T01:00:00.000Z'],
    ['0 12 15 7 *', 'Australia/Lord_Howe', '-07-15T01:30:00.000Z'],
    ['0 12 15 7 *', 'UTC', '-07-15T12:00:00.000Z'],
    ['@yearly', 'Pacific/Auckland', '-12-31T11:00:00.000Z'],
    ['45 30 6 L feb *', 'UTC', /-02-2[89]T06:30:45\.000Z$/],
  ])('sets the next time of %s in %s', async (schedule_cron, timezone, expected) => {
    const task = await makeTask(user.call, { schedule_cron, timezone });
    expect(task.next_run_at).toMatch(typeof expected === 'string' ? new RegExp(`${expected}$`) : expected);
    expect(Date.parse(task.next_run_at)).toBeGreaterThan(Date.parse(task.created_at));
  });

  test('sets the next time of a daily schedule to what the preview says, whatever the clocks do', async () => {
    for (const timezone of ['Europe/Rome', 'America/New_York', 'Australia/Lord_Howe', 'Africa/Cairo']) {
      const schedule_cron = '30 2 * * *';
      const task = await makeTask(user.call, { schedule_cron, timezone });
      const preview = await user.call('POST', '/tasks/preview', { schedule_cron, timezone, from: task.created_at });
      expect(task.next_run_at).toBe(preview.body.runs[0].scheduled_for);
    }
  });

  test('goes by the clock of the database', async () => {
    // Every second: the next time is the start of the second after the row's own creation.
    const task = await makeTask(user.call, { schedule_cron: '* * * * * *' });
    const created = Date.parse(task.created_at);
    expect(Date.parse(task.next_run_at)).toBe(Math.floor(created / 1000) * 1000 + 1000);
    await user.call('DELETE', `/tasks/${task.id}`);
  });

  test('writes one audit entry and the events of it', async () => {
    const answer = await user.call(
      'POST',
      '/tasks',
      { skill_name: 'report', name: 'N', priority: 'low', schedule_cron: '@yearly' },
      { 'x-request-id': 'the-request' },
    );
    const task = answer.body;
    expect(await auditOf(server, task.id)).toEqual([
      {
        operation: 'CREATE',
        user_id: user.id,
        owner_id: user.id,
        request_id: 'the-request',
        changed_fields: expect.objectContaining({
          name: { old: null, new: 'N' },
          skill_name: { old: null, new: 'report' },
          priority: { old: null, new: 'low' },
          schedule_cron: { old: null, new: '@yearly' },
          next_run_at: { old: null, new: task.next_run_at },
          status: { old: null, new: 'pending' },
        }),
      },
    ]);
    expect(await eventsOf(server, task.id)).toEqual([
      {
        type: 'task_status_update',
        user_id: user.id,
        data: expect.objectContaining({
          task_id: task.id,
          skill_name: 'report',
          status: 'pending',
          previous_status: null,
          next_run_at: task.next_run_at,
        }),
      },
      {
        type: 'calendar_event_created',
        user_id: user.id,
        data: {
          task_id: task.id,
          title: 'N',
          start_time: task.next_run_at,
          timezone: 'UTC',
          schedule_cron: '@yearly',
          project_id: null,
        },
      },
    ]);
  });

  test('tells calendars nothing of a task without a next time', async () => {
    const task = await makeTask(user.call);
    expect((await eventsOf(server, task.id)).map(({ type }) => type)).toEqual(['task_status_update']);
  });

  test('fires what it creates, at its time', async () => {
    const skill = unique('skill');
    const agent = await makeAgent(user.call);
    const waiting = agent.claimOne([skill]);
    const run_at = new Date(Date.now() + 500).toISOString();
    const task = await makeTask(user.call, { skill_name: skill, run_at });
    expect(await waiting).toMatchObject({ task_id: task.id, scheduled_for: run_at });
  });

  test('and its siblings take the examples that the API document gives', async () => {
    const task = await makeTask(user.call);
    const { paths } = (await server.admin('GET', '//openapi.json')).body;
    for (const [method, path, success] of [
      ['POST', '/tasks', 201],
      ['POST', '/tasks/preview', 200],
      ['PUT', '/tasks/{id}', 200],
      ['POST', '/tasks/{id}/run', 202],
    ] as const) {
      const { example, examples } =
        paths[`/api/v1${path}`][method.toLowerCase()].requestBody.content['application/json'];
      const bodies = example
        ? [example]
        : Object.values(examples as Record<string, { value: unknown }>).map((e) => e.value);
      expect(bodies.length).toBeGreaterThan(0);
      for (const body of bodies) {
        expect((await user.call(method, path.replace('{id}', String(task.id)), body)).status).toBe(success);
      }
    }
  });

  test('counts a project right when many create at once', async () => {
    const project = await makeProject(server, user.id);
    await Promise.all(Array.from({ length: 20 }, () => makeTask(user.call, { project_id: project })));
    expect(await tasksCount(server, project)).toBe(20);
  });
});

const long = (length: number) => 'x'.repeat(length);

/** What is refused, and the field that the answer names. */
const REFUSED: [what: string, fields: Record<string, unknown>, path: string, message?: RegExp][] = [
  ['no skill', { skill_name: undefined }, 'body.skill_name', /required/],
  ['an empty skill', { skill_name: '' }, 'body.skill_name'],
  ['a skill with a space', { skill_name: 'a b' }, 'body.skill_name', /letters, digits/],
  ['a skill with a line end', { skill_name: 'a\n' }, 'body.skill_name'],
  ['a skill of other letters', { skill_name: 'bücher' }, 'body.skill_name'],
  ['a skill too long', { skill_name: long(256) }, 'body.skill_name'],
  ['an empty name', { name: '' }, 'body.name'],
  ['a blank name', { name: ' \t ' }, 'body.name'],
  ['a name too long', { name: long(256) }, 'body.name'],
  ['a name that is no text', { name: 5 }, 'body.name'],
  ['params that are a list', { params: [] }, 'body.params', /JSON object/],
  ['params that are a text', { params: '{}' }, 'body.params', /JSON object/],
  ['params that are null', { params: null }, 'body.params', /JSON object/],
  ['params too large', { params: { a: long(65_536) } }, 'body.params', /65536 bytes/],
  ['params too large in UTF-8', { params: { a: 'é'.repeat(32_768) } }, 'body.params', /65536 bytes/],
  ['another priority', { priority: 'urgent' }, 'body.priority'],
  ['a priority as a number', { priority: 1 }, 'body.priority'],
  ['an unknown overlap policy', { overlap_policy: 'never' }, 'body.overlap_policy'],
  ['an unknown misfire policy', { misfire_policy: 'never' }, 'body.misfire_policy'],
  ['no attempts', { max_attempts: 0 }, 'body.max_attempts'],
  ['too many attempts', { max_attempts: 21 }, 'body.max_attempts'],
  ['half an attempt', { max_attempts: 1.5 }, 'body.max_attempts'],
  ['a negative backoff', { retry_backoff_seconds: -1 }, 'body.retry_backoff_seconds'],
  ['a backoff over an hour', { retry_backoff_seconds: 3601 }, 'body.retry_backoff_seconds'],
  ['no timeout', { timeout_seconds: 0 }, 'body.timeout_seconds'],
  ['a timeout over a week', { timeout_seconds: 604_801 }, 'body.timeout_seconds'],
  ['a timeout as text', { timeout_seconds: '60' }, 'body.timeout_seconds'],
  [
    'too many capabilities',
    { required_capabilities: Array.from({ length: 33 }, (_, i) => `c${i}`) },
    'body.required_capabilities',
  ],
  ['a capability twice', { required_capabilities: ['a', ' a'] }, 'body.required_capabilities', /twice/],
  ['an empty capability', { required_capabilities: [''] }, 'body.required_capabilities.0'],
  ['a capability too long', { required_capabilities: [long(65)] }, 'body.required_capabilities.0'],
  ['an unknown zone', { timezone: 'Mars/Olympus' }, 'body.timezone', /IANA/],
  ['an offset as a zone', { timezone: '+02:00' }, 'body.timezone', /IANA/],
  ['an empty zone', { timezone: '' }, 'body.timezone'],
  ['a zone with more to say', { timezone: "UTC'; drop table tasks" }, 'body.timezone'],
  ['a zone of 10 kB', { timezone: long(10_000) }, 'body.timezone'],
  ['no zone', { timezone: null }, 'body.timezone'],
  ['an empty schedule', { schedule_cron: '' }, 'body.schedule_cron', /empty/],
  ['four fields', { schedule_cron: '* * * *' }, 'body.schedule_cron', /4 fields/],
  ['seven fields', { schedule_cron: '* * * * * * *' }, 'body.schedule_cron', /7 fields/],
  ['minute 60', { schedule_cron: '60 * * * *' }, 'body.schedule_cron', /minute field "60"/],
  ['hour 24', { schedule_cron: '0 24 * * *' }, 'body.schedule_cron', /hour field "24"/],
  ['day 32', { schedule_cron: '0 0 32 * *' }, 'body.schedule_cron', /day of month field/],
  ['month 13', { schedule_cron: '0 0 1 13 *' }, 'body.schedule_cron', /month field/],
  ['weekday 8', { schedule_cron: '0 0 * * 8' }, 'body.schedule_cron', /day of week field/],
  ['second 60', { schedule_cron: '60 0 0 * * *' }, 'body.schedule_cron', /second field/],
  ['a step of nothing', { schedule_cron: '*/0 * * * *' }, 'body.schedule_cron', /minute field/],
  ['a question mark', { schedule_cron: '? * * * *' }, 'body.schedule_cron', /minute field/],
  ['a hash', { schedule_cron: 'H * * * *' }, 'body.schedule_cron', /minute field/],
  ['Arabic digits', { schedule_cron: '٣ * * * *' }, 'body.schedule_cron'],
  ['an unknown name', { schedule_cron: '@often' }, 'body.schedule_cron', /@often/],
  ['a day that never comes', { schedule_cron: '0 0 30 2 *' }, 'body.schedule_cron', /never fires/],
  ['1,025 characters', { schedule_cron: `${'0,'.repeat(508)}0 * * * *` }, 'body.schedule_cron', /longer than/],
  ['a schedule as a number', { schedule_cron: 5 }, 'body.schedule_cron'],
  [
    'both a schedule and a time',
    { schedule_cron: '@daily', run_at: '2999-01-01T00:00:00Z' },
    'body.run_at',
    /schedule_cron/,
  ],
  ['a time long past', { run_at: '2020-01-01T00:00:00Z' }, 'body.run_at', /POST \/tasks\/\{id\}\/run/],
  ['a time without a zone', { run_at: '2999-01-01T00:00:00' }, 'body.run_at', /RFC 3339/],
  ['a day', { run_at: '2999-01-01' }, 'body.run_at'],
  ['hour 24 of a day', { run_at: '2999-01-01T24:00:00Z' }, 'body.run_at'],
  ['an impossible offset', { run_at: '2999-01-01T00:00:00+99:99' }, 'body.run_at'],
  ['30 February', { run_at: '2999-02-30T00:00:00Z' }, 'body.run_at'],
  ['a leap second', { run_at: '2999-12-31T23:59:60Z' }, 'body.run_at'],
  ['year 0', { run_at: '0000-01-01T00:00:00Z' }, 'body.run_at'],
  ['year 10000', { run_at: '+010000-01-01T00:00:00Z' }, 'body.run_at'],
  ['infinity', { run_at: 'infinity' }, 'body.run_at'],
  ['a time as a number', { run_at: 4_000_000_000 }, 'body.run_at'],
  ['a project that is not there', { project_id: 9_007_199_254_740_991 }, 'body.project_id', /no project/],
  ['a project beyond integers', { project_id: 9_007_199_254_740_992 }, 'body.project_id'],
  ['a project as text', { project_id: '1' }, 'body.project_id'],
  ['project 0', { project_id: 0 }, 'body.project_id'],
  ['an agent that is not there', { agent_id: 9_007_199_254_740_991 }, 'body.agent_id', /no agent/],
  ['agent -1', { agent_id: -1 }, 'body.agent_id'],
  ['agent 1.5', { agent_id: 1.5 }, 'body.agent_id'],
  // Nothing that the server decides can be said.
  ...['id', 'user_id', 'status', 'next_run_at', 'last_run_at', 'version', 'created_at', 'updated_at', 'unknown'].map(
    (field): [string, Record<string, unknown>, string, RegExp] => [
      `the field ${field}`,
      { [field]: 1 },
      `body.${field}`,
      /not a known field/,
    ],
  ),
];

describe('POST /tasks refuses', () => {
  test.each(REFUSED)('%s', async (_what, fields, path, message = /./) => {
    expect(expectProblem(await create({ skill_name: 'report', ...fields }), 400, path)).toMatch(message);
  });

  test('and writes nothing then', async () => {
    const quiet = await startServer();
    try {
      for (const [, fields] of REFUSED) await create({ skill_name: 'report', ...fields }, quiet.admin);
      const { rows } = await quiet.db.query({
        text: `select id from tasks union all select id from audit_log where entity_type = 'task'
          union all select id from event_outbox union all select event_id from events`,
      });
      expect(rows).toEqual([]);
    } finally {
      await quiet.stop();
    }
  });

  test('a project or agent of somebody else just as one that is not there', async () => {
    const stranger = await server.newUser();
    const project = await makeProject(server, stranger.id);
    const deleted = await makeProject(server, user.id, 'deleted');
    const agent = await makeAgent(stranger.call);
    for (const [field, theirs, none] of [
      ['project_id', project, 987_654_321],
      ['project_id', deleted, 987_654_321],
      ['agent_id', agent.id, 987_654_321],
    ] as const) {
      const path = `body.${field}`;
      const refused = expectProblem(await create({ skill_name: 'report', [field]: theirs }), 400, path);
      const absent = expectProblem(await create({ skill_name: 'report', [field]: none }), 400, path);
      expect(refused.replace(String(theirs), '#')).toBe(absent.replace(String(none), '#'));
    }
    expect(await tasksCount(server, project)).toBe(0);
  });

  test('a deleted agent, but takes a shared one of somebody else', async () => {
    const shared = await makeAgent(server.admin, { shared: true });
    expect(await makeTask(user.call, { agent_id: shared.id })).toMatchObject({ agent_id: shared.id });
    const gone = await makeAgent(user.call);
    await server.db.query({ text: 'update agents set deleted_at = now() where id = $1', values: [gone.id] });
    expectProblem(await create({ skill_name: 'report', agent_id: gone.id }), 400, 'body.agent_id');
  });

  test('bodies that are no object', async () => {
    for (const body of ['[]', '"task"', 'null', '5', 'true', '[{"skill_name":"report"}]', '']) {
      expectProblem(await create(body), 400);
    }
    expectProblem(await create('{"skill_name":"report",}'), 400);
    expectProblem(await create('{"skill_name":"report","params":{"__proto__":{}}}'), 400);
    expectProblem(await create('{"skill_name":"report","params":{"n":1e400}}'), 400, 'body.params.n');
    expectProblem(await user.call('POST', '/tasks'), 400);
    expectProblem(await user.call('POST', '/tasks', '{"skill_name":"report"}', { 'content-type': 'text/plain' }), 415);
    expectProblem(await user.call('POST', '/tasks?dry=true', { skill_name: 'report' }), 400, 'query.dry');
  });

  test('names every field that is wrong at once', async () => {
    const answer = await create({ skill_name: '?', schedule_cron: '61 * * * *', timezone: 'Nowhere' });
    for (const path of ['body.skill_name', 'body.schedule_cron', 'body.timezone']) expectProblem(answer, 400, path);
  });
});

const POISON = [
  '\0',
  'a\0b',
  '\ud800',
  '\udc00\ud800',
  '\u202e',
  '\ufeff',
  '\u2028',
  '\u{10ffff}',
  'İßK',
  `a${'\u0301'.repeat(200)}`,
  '%00',
  '%2e%2e/',
  '\r\n',
  '\u001b[31m',
  "'; --",
  '$1',
  '%',
  '_',
  '\\',
  '{{7*7}}',
  '__proto__',
  'constructor',
  'toString',
  'NaN',
  '-0',
  '1e309',
  '9'.repeat(400),
  '',
  long(256),
];

describe('whatever is sent', () => {
  test.each(['name', 'skill_name', 'schedule_cron', 'timezone', 'run_at', 'priority', 'required_capabilities'])(
    'in %s is either kept as it is or a 400',
    async (field) => {
      for (const text of POISON) {
        const value = field === 'required_capabilities' ? [text] : text;
        const answer = await create({ skill_name: 'report', [field]: value });
        if (answer.status === 201) expect(answer.body[field]).toEqual(field === 'name' ? text.trim() : value);
        else expectProblem(answer, 400);
      }
    },
  );

  test('in params, as key or value, is either kept as it is or a 400', async () => {
    for (const text of POISON.filter((key) => key !== '__proto__')) {
      const params = { [text]: { text, list: [text] } };
      const answer = await create({ skill_name: 'report', params });
      if (answer.status === 201) expect(answer.body.params).toEqual(params);
      else expectProblem(answer, 400);
    }
  });

  test('the server stands: random values in random fields are a 201 or a 400', async () => {
    const before = await tasksInAll();
    let created = 0;
    const value = fc.oneof(fc.constantFrom(...POISON), fc.jsonValue({ maxDepth: 3 }), fc.integer(), fc.double());
    const fields = ['name', 'params', 'priority', 'schedule_cron', 'timezone', 'run_at', 'max_attempts', 'agent_id'];
    await fc.assert(
      fc.asyncProperty(fc.dictionary(fc.constantFrom(...fields, 'project_id', 'status'), value), async (given) => {
        const answer = await create({ skill_name: 'report', ...given });
        expect([201, 400], JSON.stringify(given)).toContain(answer.status);
        if (answer.status === 201) created += 1;
      }),
      { numRuns: 300 },
    );
    expect(await tasksInAll()).toBe(before + created);
  });
});

describe('one transaction', () => {
  test.each(['audit_log', 'event_outbox'])('nothing is written when %s cannot be', async (table) => {
    const project = await makeProject(server, user.id);
    const name = unique(`refused-by-${table}`);
    const column = table === 'audit_log' ? 'changed_fields::text' : 'data';
    await server.db.query({
      text: `create function refuse_${table}() returns trigger language plpgsql as $$ begin
        if new.${column} like '%${name}%' then raise exception 'refused'; end if; return new; end $$;
        create trigger refuse before insert on ${table} for each row execute function refuse_${table}()`,
    });
    const answer = await create({ skill_name: 'report', name, project_id: project, schedule_cron: '@yearly' });
    expectProblem(answer, 500);
    expect(JSON.stringify(answer.body)).not.toMatch(/refused/);
    const { rows } = await server.db.query({
      text: `select 1 from tasks where name = $1
        union all select 1 from audit_log where changed_fields::text like $2
        union all select 1 from event_outbox where data like $2 union all select 1 from events where data like $2`,
      values: [name, `%${name}%`],
    });
    expect(rows).toEqual([]);
    expect(await tasksCount(server, project)).toBe(0);
  });
});
