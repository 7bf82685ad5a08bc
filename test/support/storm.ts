import { expect } from 'vitest';
import type { Crew } from './crew.ts';
import type { Fleet } from './fleet.ts';
import { type History, newHistory, type Rows } from './history.ts';
import { until } from './work.ts';

/**
 * Makes `count` tasks that run once, soon, through all servers of the fleet, again with the same key where no answer comes;
 * every `stallEvery`-th stops the first agent that takes it.
 */
export async function askForRuns(
  fleet: Fleet,
  options: { count: number; skill: string; stallEvery: number },
): Promise<History> {
  const history = newHistory();
  const insist = async (place: number, path: string, key: string, body: object) => {
    for (let turn = place; ; turn++) {
      const call = fleet.call(turn % fleet.urls.length);
      const answer = await call('POST', path, body, { 'idempotency-key': key }).catch(() => undefined);
      if (answer && answer.status < 300) return answer.body;
      if (answer && answer.status < 500) throw new Error(`${path}: ${answer.status} ${JSON.stringify(answer.body)}`);
      await new Promise((done) => setTimeout(done, 50));
    }
  };
  const soon = new Date(Date.now() + 1_000).toISOString();
  let next = 0;
  const ask = async (place: number) => {
    for (let n = next++; n < options.count; n = next++) {
      const name = `${options.skill}-${n}`;
      history.attempted.add(name);
      const stall = n % options.stallEvery === 0;
      const task = await insist(place, '/tasks', name, {
        name,
        skill_name: options.skill,
        run_at: soon,
        max_attempts: 20,
        params: { stall },
      });
      history.tasks.set(name, task.id);
    }
  };
  await Promise.all(Array.from({ length: 10 }, (_, place) => ask(place)));
  return history;
}

/** How long a storm over so many runs may take on a slow machine that has other things to do. */
export const stormSeconds = (runs: number) => 240 + runs;

/**
 * Kills an agent for every three runs that are done, and wakes those that stopped themselves once their lease is lost, until
 * every run that was asked for has been done. Answers how many were woken, and how many reports came too late and were refused.
 */
export async function rage(crew: Crew, rows: Rows, history: History): Promise<{ late: number; woken: number }> {
  let woken = 0;
  // By what is done and not by the clock, so that a slow machine gets as far as a fast one.
  let killedAt = 0;
  const killing = setInterval(() => {
    if (crew.taken < killedAt + 3) return;
    killedAt = crew.taken;
    crew.killOne();
  }, 20);
  const waking = setInterval(async () => {
    for (const { execution, resume } of crew.stalled()) {
      const [run] = await rows('select status from executions where id = $1', [execution]).catch(() => []);
      if (run === undefined || run.status === 'running') continue;
      woken += 1;
      resume();
    }
  }, 100);
  try {
    await until(
      () =>
        rows(`select count(distinct task_id)::int as done from executions where status = 'success'`).catch(() => [
          { done: 0 },
        ]),
      ([row]) => row?.done === history.tasks.size,
      stormSeconds(history.tasks.size),
    );
    // The last ones to wake have something to say yet.
    await until(
      async () => crew.stalled(),
      (stalled) => stalled.length === 0,
      30,
    );
  } finally {
    clearInterval(killing);
    clearInterval(waking);
  }
  await crew.stop();
  const late = [...crew.reports.values()].filter(({ answers }) => answers[0] === 409).length;
  return { late, woken };
}

/** Each run that was asked for was done once, by one agent, and told of once. */
export async function expectDoneOnce(rows: Rows, history: History): Promise<void> {
  const done = await rows(`
    select t.name, count(e.id) filter (where e.status = 'success')::int as done,
      (select count(*)::int from events v where v.task_id = t.id and v.data::jsonb->>'execution_status' = 'success') as told
    from tasks t join executions e on e.task_id = t.id group by t.id`);
  expect(done.filter((task) => task.done !== 1 || task.told !== 1)).toEqual([]);
  expect(done).toHaveLength(history.tasks.size);
}
