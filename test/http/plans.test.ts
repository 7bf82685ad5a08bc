import pg from 'pg';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';

// Each list, filter and search at a size at which reading the whole table is dearer than an index, by the plan that Postgres
// makes for the very statements that the call sends.

const ROWS = 30_000;
let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
let agentId: number;
let projectId: number;
let taskId: number;
let runId: number;

beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
  const other = await server.newUser();
  // Not by the server's pool, whose statements must be quick.
  const filler = new pg.Client({ connectionString: server.databaseUrl });
  await filler.connect();
  const run = (text: string, values: unknown[] = []) => filler.query(text, values);
  for (const owner of [user.id, other.id]) {
    await run(
      `insert into projects (user_id, name) select $1, 'project ' || md5(i::text) from generate_series(1, 12000) i`,
      [owner],
    );
    await run(
      `insert into agents (user_id, name, type, capabilities, status, shared)
       select $1, 'agent ' || i, 'custom', array['c' || i % 500], 'offline', i % 1000 = 0 from generate_series(1, 5000) i`,
      [owner],
    );
    await run(
      `insert into tasks (user_id, project_id, agent_id, name, skill_name, priority, schedule_cron, status, next_run_at, overdue_since, created_at)
       select $1, (select min(id) from projects where user_id = $1) + i % 1000,
         case when i % 100 = 0 then (select min(id) from agents where user_id = $1) + i % 1000 end,
         'task ' || md5(i::text), 'skill-' || i % 300, i % 4, (i % 60) || ' 3 * * *',
         case when i % 500 = 0 then 'failed' else 'pending' end,
         now() + interval '1 day' + i * interval '1 second', case when i % 700 = 0 then now() end,
         now() - i * interval '1 second'
       from generate_series(1, ${ROWS}) i`,
      [owner],
    );
    await run(
      `insert into executions (task_id, user_id, agent_id, trigger, scheduled_for, skill_name, params, priority,
         timeout_seconds, status, ended_at, created_at)
       select (select min(id) from tasks where user_id = $1) + i % 1000, $1,
         (select min(id) from agents where user_id = $1) + i % 1000, 'schedule', now(), 's', '{}', 1, 60,
         case when i % 500 = 0 then 'failed' else 'success' end, now(), now() - i * interval '1 second'
       from generate_series(1, ${ROWS}) i`,
      [owner],
    );
    await run(
      `insert into execution_output (execution_id, starts_at, length, text)
       select (select min(id) from executions where user_id = $1) + i / 3, i % 3 * 4, 4, 'text'
       from generate_series(0, ${ROWS} - 1) i`,
      [owner],
    );
    await run(
      `insert into orphan_results (execution_id, user_id, lease_token, status, created_at)
       select (select min(id) from executions where user_id = $1) + i, $1, gen_random_uuid(), 'success',
         now() - i * interval '1 second'
       from generate_series(0, ${ROWS} - 1) i`,
      [owner],
    );
    await run(
      `insert into occurrences (task_id, user_id, scheduled_for, verdict)
       select (select min(id) from tasks where user_id = $1) + i % 1000, $1, now() - i * interval '1 minute', 'fired'
       from generate_series(1, ${ROWS}) i`,
      [owner],
    );
    await run(
      `insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields, created_at)
       select $1, $1, 'UPDATE', 'task', i % 1000, '{}', now() - i * interval '1 second'
       from generate_series(1, ${ROWS}) i`,
      [owner],
    );
    await run(
      `insert into agent_stats_hourly (agent_id, hour, outcome, duration_bucket, runs, duration_ms_sum)
       select (select min(id) from agents where user_id = $1) + i % 100, date_trunc('hour', now()) - i / 100 * interval '1 hour',
         'success', 40, 1, 1 from generate_series(0, ${ROWS}) i`,
      [owner],
    );
  }
  await run(`insert into users (email) select 'owner-' || i || '@example.com' from generate_series(1, 200) i`);
  await run(
    `insert into concurrency_limits (user_id, skill_name, max_running)
     select u.id, 's' || i, 1 from users u, generate_series(1, 100) i`,
  );
  await run(
    `insert into memories (user_id, project_id, task_id, intent, content, tags, delivered_at)
     select $1, (select min(id) from projects where user_id = $1) + i % 1000,
       (select min(id) from tasks where user_id = $1) + i % 1000, 'analysis',
       'memory ' || md5(i::text) || ' of word' || i % 700, '{"who":{"user_id":1,"agent_id":null,"agent_name":null,"agent_category":null,"capabilities":[]},"project":{"project_id":null,"project_name":null,"task_id":null,"task_name":null}}',
       now() from generate_series(1, ${ROWS}) i`,
    [user.id],
  );
  await run(
    `insert into audit_chain (owner_id, seq, audit_id, hash, prev_hash)
     select owner_id, 1000 + row_number() over (partition by owner_id order by id), id, repeat('a', 64), repeat('b', 64)
     from audit_log where changed_fields = '{}' and not exists (select from audit_chain c where c.audit_id = audit_log.id)
       and not exists (select from audit_pending p where p.audit_id = audit_log.id)`,
  );
  // The vacuum, too: what a GIN index has not sorted in yet makes it look dear.
  await run('vacuum analyze tasks, projects, agents, memories');
  await run('analyze');
  await filler.end();
  const { rows } = await server.db.pool.query<{ project: number; agent: number; task: number; run: number }>(
    `select (select min(id) from projects where user_id = $1) as project, (select min(id) from agents where user_id = $1) as agent,
       (select min(id) from tasks where user_id = $1) as task, (select min(id) from executions where user_id = $1) as run`,
    [user.id],
  );
  ({
    project: projectId,
    agent: agentId,
    task: taskId,
    run: runId,
  } = rows[0] ?? { project: 0, agent: 0, task: 0, run: 0 });
});
afterAll(() => server?.stop());

/** The statements that `act` sends to the tables of the domain. */
async function statementsOf(act: () => Promise<{ status: number }>): Promise<{ text: string; values: unknown[] }[]> {
  const query = vi.spyOn(server.db.pool, 'query');
  try {
    expect((await act()).status).toBe(200);
    return query.mock.calls.flatMap(([first, second]) => {
      const { text, values } = first as unknown as pg.QueryConfig;
      const sent = { text, values: (values ?? (second as unknown as unknown[] | undefined) ?? []) as unknown[] };
      return /\b(tasks|projects|agents|executions|occurrences|audit_log|agent_stats_hourly|memories|orphan_results|execution_output|concurrency_limits)\b/.test(
        text,
      ) && /^\s*(select|with)/i.test(text)
        ? [sent]
        : [];
    });
  } finally {
    query.mockRestore();
  }
}

interface Plan {
  'Node Type': string;
  'Relation Name'?: string;
  Plans?: Plan[];
}

/** The tables that a plan reads from one end to the other. */
function readWhole(plan: Plan): string[] {
  const own = plan['Node Type'] === 'Seq Scan' ? [plan['Relation Name'] ?? '?'] : [];
  return [...own, ...(plan.Plans ?? []).flatMap(readWhole)];
}

async function expectIndexes(act: () => Promise<{ status: number }>): Promise<void> {
  const statements = await statementsOf(act);
  expect(statements.length).toBeGreaterThan(0);
  for (const { text, values } of statements) {
    const { rows } = await server.db.pool.query<{ 'QUERY PLAN': [{ Plan: Plan }] }>(
      `explain (format json) ${text}`,
      values,
    );
    const plan = rows[0]?.['QUERY PLAN'][0].Plan;
    expect(plan).toBeDefined();
    if (plan) expect(readWhole(plan), text).toEqual([]);
  }
}

const inDays = (days: number) => new Date(Date.now() + days * 86_400_000).toISOString();

describe('an index serves', () => {
  const calls: [string, () => string][] = [
    ['tasks', () => '/tasks?total=false'],
    ['tasks by updated_at', () => '/tasks?total=false&sort_by=updated_at'],
    ['tasks by next_run_at', () => '/tasks?total=false&sort_by=next_run_at&sort_order=asc'],
    ['tasks by status', () => '/tasks?total=false&sort_by=status'],
    ['tasks by priority', () => '/tasks?total=false&sort_by=priority'],
    ['tasks of a status', () => '/tasks?total=false&status=failed'],
    ['tasks of a skill', () => '/tasks?total=false&skill_name=skill-7'],
    ['tasks of a project', () => `/tasks?project_id=${projectId}`],
    ['tasks of an agent', () => `/tasks?agent_id=${agentId}`],
    ['tasks of a window', () => `/tasks?next_run_from=${inDays(1)}&next_run_to=${inDays(1.01)}`],
    ['tasks that are overdue', () => '/tasks?overdue=true'],
    ['tasks by a part of the name', () => '/tasks?search=c4ca4238a0b9'],
    ['tasks by two letters', () => '/tasks?search=zz&total=false'],
    ['one task with its runs', () => `/tasks/${taskId}`],
    ['ticks of a task', () => `/tasks/${taskId}/occurrences?total=false`],
    ['projects', () => '/projects?total=false'],
    ['projects by name', () => '/projects?total=false&sort_by=name'],
    ['projects by size', () => '/projects?total=false&sort_by=tasks_count'],
    ['projects by updated_at', () => '/projects?total=false&sort_by=updated_at'],
    ['projects by a part of the name', () => '/projects?search=c4ca4238a0b9'],
    ['one project with its tasks', () => `/projects/${projectId}`],
    ['runs', () => '/executions?total=false'],
    ['runs of a task', () => `/executions?task_id=${taskId}`],
    ['runs of an agent', () => `/executions?agent_id=${agentId}`],
    ['runs that failed', () => '/executions?total=false&status=failed'],
    ['late results', () => '/orphan-results?total=false'],
    ['late results that wait', () => '/orphan-results?total=false&adopted=false'],
    ['late results of a run', () => `/executions/${runId}/orphan-results`],
    ['the output of a run', () => `/executions/${runId}/output`],
    ['agents', () => '/agents?total=false'],
    ['agents by capability', () => '/agents?capabilities=c7,c8'],
    ['agents by all capabilities', () => '/agents?capabilities=c7,c8&match=all'],
    ['one agent with its metrics', () => `/agents/${agentId}`],
    ['concurrency limits', () => '/concurrency-limits?total=false'],
    ['the calendar', () => `/calendar?from=${inDays(-1)}&to=${inDays(3)}`],
    ['the forecast', () => `/forecast?to=${inDays(3)}`],
    ['the history of a task', () => `/tasks/${taskId}/history?related=true`],
    ['the memory of a project', () => `/projects/${projectId}/memory`],
    ['the audit log', () => '/audit?total=false'],
    ['the audit log of a thing', () => '/audit?entity_type=task&entity_id=7'],
  ];
  test.each(calls)('%s', async (_name, path) => {
    await expectIndexes(() => user.call('GET', path()));
  });

  test.each(['word7', 'word7 word8', 'memory word7', 'mistipedd'])('memories with %s', async (query) => {
    await expectIndexes(() => user.call('POST', '/memory/search', { query }));
  });

  test.each([
    '/tasks?total=false',
    '/projects?total=false',
    '/executions?total=false',
    '/agents?total=false',
    '/concurrency-limits?total=false',
    '/audit?total=false',
  ])('an admin who lists everything: %s', async (path) => {
    await expectIndexes(() => server.admin('GET', path));
  });

  test('what lies behind a cursor as what lies before it', async () => {
    const { body } = await user.call('GET', '/tasks?limit=100&total=false');
    await expectIndexes(() => user.call('GET', `/tasks?limit=100&total=false&cursor=${body.next_cursor}`));
  });
});

test('a table without an index is found out', async () => {
  await expect(
    expectIndexes(async () => {
      await server.db.query({ text: 'select * from tasks where timeout_seconds = 7', values: [] });
      return { status: 200 };
    }),
  ).rejects.toThrow(/timeout_seconds/);
});
