import type pg from 'pg';

// What benches share that is written past the server: the work of a scheduler in bare SQL, and queued runs.

/** Fires up to 500 due tasks as one statement: tick, run, event and next time, without audit, policies or arithmetic. Answers how many. */
export async function bareBatch(pool: pg.Pool): Promise<number> {
  const { rows } = await pool.query<{ n: number }>({
    name: 'bare-batch',
    text: `
      with due as (
        select * from tasks where next_run_at <= now() order by next_run_at, id limit 500 for no key update skip locked
      ), ticks as (
        insert into occurrences (task_id, user_id, scheduled_for, verdict)
        select id, user_id, next_run_at, 'fired' from due on conflict do nothing returning id, task_id
      ), runs as (
        insert into executions (task_id, user_id, trigger, occurrence_id, scheduled_for, skill_name, params, priority,
          timeout_seconds, available_at)
        select d.id, d.user_id, 'schedule', k.id, d.next_run_at, d.skill_name, d.params, d.priority, d.timeout_seconds, now()
        from due d join ticks k on k.task_id = d.id returning id, task_id
      ), told as (
        insert into event_outbox (user_id, topic, type, task_id, data)
        select d.user_id, 'tasks', 'task_status_update', d.id, json_build_object('task_id', d.id, 'execution_id', r.id)::text
        from due d join runs r on r.task_id = d.id
      ), moved as (
        update tasks t set next_run_at = d.next_run_at + interval '1 hour' from due d where d.id = t.id
      ) select count(*)::int as n from due`,
  });
  return rows[0]?.n ?? 0;
}

/** Makes `count` tasks with a queued run each. */
export async function seedRuns(pool: pg.Pool, userId: number, count: number): Promise<void> {
  await pool.query(
    `with t as (
       insert into tasks (user_id, skill_name) select $1, 'bench' from generate_series(1, $2::int) returning *
     ) insert into executions (task_id, user_id, trigger, scheduled_for, skill_name, params, priority, timeout_seconds, available_at)
     select id, user_id, 'manual', now(), skill_name, params, priority, timeout_seconds, now() from t`,
    [userId, count],
  );
  await pool.query('analyze tasks, executions');
}
