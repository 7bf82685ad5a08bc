import { afterEach, beforeEach, expect, test } from 'vitest';
import { type Crew, startCrew } from '../support/crew.ts';
import { type Fleet, startFleet } from '../support/fleet.ts';
import { checkHistory, newHistory, openDatabase } from '../support/history.ts';
import { type OwnPostgres, ownPostgres } from '../support/own-postgres.ts';
import { endPrograms, newFolder, removeFolder } from '../support/processes.ts';
import { askForRuns, expectDoneOnce, rage, stormSeconds } from '../support/storm.ts';
import { unique, until } from '../support/work.ts';

const LARGE = process.env['FAULTS'] === 'all';
const RUNS = Number(process.env['FAULTS_RUNS'] ?? 300);

let folder: string;
let postgres: OwnPostgres;
let look: ReturnType<typeof openDatabase>;
let crew: Crew | undefined;
beforeEach(async () => {
  folder = await newFolder();
  postgres = await ownPostgres(folder);
  look = openDatabase(postgres.url);
});
afterEach(async () => {
  await crew?.stop();
  await endPrograms();
  await look.close();
  await postgres.close();
  await removeFolder(folder);
});

/** Sends tasks, each with a key of its own and again until it is taken; writes down every answer. */
function write(fleet: Fleet, writers: number) {
  const history = newHistory();
  const skill = unique('written');
  const answers = new Set<string>();
  let refused = 0;
  let over = false;
  const writing = Array.from({ length: writers }, async (_, writer) => {
    for (let n = 0; !over; n++) {
      const name = `${skill}-${writer}-${n}`;
      history.attempted.add(name);
      while (!history.tasks.has(name)) {
        const answer = await fleet.call()('POST', '/tasks', { name, skill_name: skill }, { 'idempotency-key': name });
        if (answer.status === 201) history.tasks.set(name, answer.body.id);
        else {
          refused += 1;
          answers.add(`${answer.status}, Retry-After: ${/^[1-5]$/.test(answer.headers.get('retry-after') ?? '')}`);
        }
      }
    }
  });
  return {
    history,
    answers,
    refused: () => refused,
    async stop() {
      over = true;
      await Promise.all(writing);
    },
  };
}

test('Postgres is stopped, broken off and killed under ten writers: nothing that was acknowledged is lost', {
  timeout: 240_000,
}, async () => {
  const fleet = await startFleet({ databaseUrl: postgres.url, folder, size: 1 });
  const writers = write(fleet, 10);
  for (const signal of ['SIGINT', 'SIGQUIT', 'SIGKILL'] as const) {
    const before = writers.history.tasks.size;
    await until(
      async () => writers.history.tasks.size,
      (size) => size >= before + 60,
      60,
    );
    const refused = writers.refused();
    await postgres.end(signal);
    // While it is away every call is answered, with what there is to say.
    await until(
      async () => writers.refused(),
      (now) => now >= refused + 10,
      60,
    );
    expect((await fetch(`${fleet.urls[0]}/health/live`)).status).toBe(200);
    await postgres.start();
  }
  const before = writers.history.tasks.size;
  await until(
    async () => writers.history.tasks.size,
    (size) => size >= before + 60,
    60,
  );
  await writers.stop();
  expect(writers.answers).toEqual(new Set(['503, Retry-After: true']));
  // The same process all the time.
  expect(fleet.all).toHaveLength(1);
  const told = await look.rows(`
    select t.id, (select count(*)::int from audit_log a where a.entity_type = 'task' and a.entity_id = t.id) as audited,
      (select count(*)::int from events e where e.task_id = t.id) +
        (select count(*)::int from event_outbox e where e.task_id = t.id) as told from tasks t`);
  expect(told.filter(({ audited, told: n }) => audited !== 1 || n !== 1)).toEqual([]);
  expect(told).toHaveLength(writers.history.tasks.size);
  await checkHistory({ database: look, history: writers.history, servers: fleet.all, folder: `${folder}/server` });
});

test.runIf(LARGE)(
  'agents, servers and Postgres are killed all the time: every run is done once',
  {
    timeout: (60 + stormSeconds(RUNS)) * 1_000,
  },
  async () => {
    const fleet = await startFleet({ databaseUrl: postgres.url, folder, size: 2 });
    const skill = unique('storm');
    const history = await askForRuns(fleet, { count: RUNS, skill, stallEvery: Math.ceil(RUNS / 20) });
    crew = startCrew({ size: 6, urls: fleet.urls, key: fleet.user.key, skill, name: skill, folder });
    const raging = rage(crew, look.rows, history);
    for (const share of [0.2, 0.5, 0.8]) {
      await until(
        async () => crew?.taken ?? 0,
        (taken) => taken >= RUNS * share,
        stormSeconds(RUNS),
      );
      await postgres.end('SIGKILL');
      await new Promise((done) => setTimeout(done, 300));
      await postgres.start();
      if (share < 0.8) await fleet.replace(share < 0.5 ? 0 : 1);
    }
    await raging;
    await expectDoneOnce(look.rows, history);
    await checkHistory({
      database: look,
      history,
      reports: crew.reports.values(),
      servers: fleet.all,
      folder: `${folder}/server`,
    });
  },
);
