import { expect } from 'vitest';
import type { Fleet } from './fleet.ts';
import { type History, newHistory, type Rows } from './history.ts';
import { unique, until } from './work.ts';

/** Tasks that tick every second, their runs side by side, and what is expected of them. */
export interface Ticking {
  history: History;
  /** Waits until the database's clock has moved on by `seconds`, as it goes by itself. */
  pass(seconds: number): Promise<void>;
  /**
   * Waits until every task has answered for every tick up to now, pauses them, and checks that each has every tick since
   * its first one exactly once, on time, with its run. Deletes the tasks, whose runs then end. Answers how many ticks.
   */
  finish(): Promise<number>;
}

/** Makes `count` of them, over all servers of the fleet. */
export async function startTicking(fleet: Fleet, rows: Rows, count: number): Promise<Ticking> {
  const history = newHistory();
  const firsts = new Map<number, number>();
  const skill = unique('ticking');
  const ask = async (place: number) => {
    for (let n = place; n < count; n += fleet.urls.length) {
      const name = `${skill}-${n}`;
      history.attempted.add(name);
      const made = await fleet.call(place)('POST', '/tasks', {
        name,
        skill_name: skill,
        schedule_cron: '* * * * * *',
        overlap_policy: 'allow',
        // A stall of the machine makes a tick late, and no misfire.
        max_lateness_seconds: 300,
      });
      expect(made.status).toBe(201);
      history.tasks.set(name, made.body.id);
      firsts.set(made.body.id, Date.parse(made.body.next_run_at));
    }
  };
  await Promise.all(fleet.urls.map((_, place) => ask(place)));
  const now = async () => ((await rows('select now() as now'))[0].now as Date).getTime();
  const ids = [...firsts.keys()];
  const each = async (method: string, path: string) => {
    for (let i = 0; i < ids.length; i += 20) {
      const answers = await Promise.all(ids.slice(i, i + 20).map((id) => fleet.call()(method, `/tasks/${id}${path}`)));
      for (const { status } of answers) expect(status).toBeLessThan(300);
    }
  };
  return {
    history,
    async pass(seconds) {
      const start = await now();
      await until(now, (at) => at >= start + seconds * 1_000, seconds + 20);
    },
    async finish() {
      const end = await now();
      await until(
        async () =>
          (
            await rows('select count(*)::int as n from tasks where next_run_at <= $1 and id = any($2::bigint[])', [
              new Date(end),
              ids,
            ])
          )[0].n as number,
        (behind) => behind === 0,
        40,
      );
      await each('POST', '/pause');
      const ticks = await rows<{ task: number; times: Date[]; verdicts: string[]; runs: number }>(
        `select o.task_id as task, array_agg(o.scheduled_for order by o.scheduled_for) as times,
          array_agg(distinct o.verdict) as verdicts,
          (select count(*)::int from executions e where e.task_id = o.task_id) as runs
        from occurrences o where o.task_id = any($1::bigint[]) and o.verdict <> 'paused' group by o.task_id`,
        [ids],
      );
      expect(ticks).toHaveLength(ids.length);
      for (const { task, times, verdicts, runs } of ticks) {
        const first = firsts.get(task) ?? 0;
        // Each of them ran.
        expect([task, runs]).toEqual([task, times.length]);
        expect(verdicts.filter((verdict) => verdict !== 'fired' && verdict !== 'late')).toEqual([]);
        expect(times.map((time, i) => time.getTime() - first - i * 1_000)).toEqual(times.map(() => 0));
        expect(times.at(-1)?.getTime()).toBeGreaterThan(end - 1_000);
      }
      await each('DELETE', '');
      return ticks.reduce((sum, { times }) => sum + times.length, 0);
    },
  };
}
