import type { TASK_STATUSES } from '../db/schema.ts';

export type TaskStatus = (typeof TASK_STATUSES)[number];

/**
 * What happens to a task. `run_ended_*` is told once no other run of it is under way or waiting: `…_more` when it has a
 * further time to run at (or a retry waiting), `…_last` when it has none.
 */
export type TaskEvent =
  | 'run_started'
  | 'run_ended_more'
  | 'run_succeeded_last'
  | 'run_failed_last'
  | 'scheduled'
  | 'paused'
  | 'failed_too_often'
  | 'resumed'
  | 'resumed_running'
  | 'deleted';

/**
 * The states of a task. What is not in the table cannot happen: a paused task stays paused whatever its last run does,
 * and a deleted one stays deleted.
 */
export const TASK_TRANSITIONS: readonly (readonly [from: TaskStatus, event: TaskEvent, to: TaskStatus])[] = [
  ['pending', 'run_started', 'running'],
  ['completed', 'run_started', 'running'],
  ['failed', 'run_started', 'running'],
  ['running', 'run_ended_more', 'pending'],
  ['running', 'run_succeeded_last', 'completed'],
  ['running', 'run_failed_last', 'failed'],
  // A run can end without having started: cancelled while it was queued.
  ['pending', 'run_succeeded_last', 'completed'],
  ['pending', 'run_failed_last', 'failed'],
  // A result that came late and was adopted, or a success that an agent reports of its own accord.
  ['failed', 'run_succeeded_last', 'completed'],
  ['completed', 'scheduled', 'pending'],
  ['failed', 'scheduled', 'pending'],
  ['pending', 'paused', 'disabled'],
  ['running', 'paused', 'disabled'],
  // Whatever its last run left it as: it must not be started before somebody has looked.
  ['pending', 'failed_too_often', 'disabled'],
  ['running', 'failed_too_often', 'disabled'],
  ['completed', 'failed_too_often', 'disabled'],
  ['failed', 'failed_too_often', 'disabled'],
  ['disabled', 'resumed', 'pending'],
  ['disabled', 'resumed_running', 'running'],
  ['pending', 'deleted', 'deleted'],
  ['running', 'deleted', 'deleted'],
  ['completed', 'deleted', 'deleted'],
  ['failed', 'deleted', 'deleted'],
  ['disabled', 'deleted', 'deleted'],
];

/** The status after `event`, or undefined when the event changes nothing in that state. */
export function taskTransition(from: TaskStatus, event: TaskEvent): TaskStatus | undefined {
  return TASK_TRANSITIONS.find(([state, happened]) => state === from && happened === event)?.[2];
}
