import type { tasks } from '../db/schema.ts';
import { toTime } from '../http/validation.ts';
import type { NewEvent } from '../realtime/events.ts';
import type { TaskStatus } from './task-state.ts';

export type Task = typeof tasks.$inferSelect;

/** What every event of a task tells of it. */
export type TaskFacts = Pick<Task, 'id' | 'userId' | 'projectId' | 'skillName' | 'status' | 'nextRunAt'>;

/**
 * How much of a run's output and error an event carries: their ends, in bytes of JSON, since a control character takes six,
 * so that the envelope stays within 16 KiB whatever a command prints.
 */
const OUTPUT_BYTES = 6_144;
const ERROR_BYTES = 3_072;

/** The event that tells of a change of a task or of one of its runs; `task` is the state after it. */
export function taskStatusUpdate(
  task: TaskFacts,
  change: {
    previousStatus: TaskStatus | null;
    executionId?: number;
    executionStatus?: string;
    /** The tick that the run is for. */
    scheduledFor?: Date;
    agentId?: number | null;
    progress?: { percent?: number | undefined; message?: string | undefined };
    output?: string | null;
    outputTruncated?: boolean;
    error?: string | null;
    durationMs?: number | null;
  },
): NewEvent {
  const output = change.output ?? undefined;
  const tail = output === undefined ? undefined : tailOf(output, OUTPUT_BYTES);
  return {
    type: 'task_status_update',
    userId: task.userId,
    taskId: task.id,
    projectId: task.projectId,
    agentId: change.agentId ?? null,
    data: {
      task_id: task.id,
      project_id: task.projectId,
      skill_name: task.skillName,
      status: task.status,
      previous_status: change.previousStatus,
      execution_id: change.executionId,
      execution_status: change.executionStatus,
      scheduled_for: change.scheduledFor?.toISOString(),
      agent_id: change.agentId ?? undefined,
      progress: change.progress,
      output: tail,
      output_truncated: output === undefined ? undefined : change.outputTruncated || tail !== output,
      error: change.error == null ? undefined : tailOf(change.error, ERROR_BYTES),
      duration_ms: change.durationMs ?? undefined,
      next_run_at: toTime(task.nextRunAt),
    },
  };
}

/** The event that tells that a task did not succeed in time; `task` is the state after it was marked. */
export function taskOverdue(task: Task): NewEvent {
  return {
    type: 'task_overdue',
    userId: task.userId,
    taskId: task.id,
    projectId: task.projectId,
    data: {
      task_id: task.id,
      project_id: task.projectId,
      title: task.name ?? task.skillName,
      skill_name: task.skillName,
      expect_success_within_seconds: task.expectSuccessWithinSeconds,
      last_success_at: toTime(task.lastSuccessAt),
      overdue_since: toTime(task.overdueSince),
    },
  };
}

/** The event that tells calendars of a task's next time. */
export function calendarEvent(
  change: 'created' | 'updated' | 'deleted',
  task: Pick<Task, 'id' | 'userId' | 'projectId' | 'name' | 'skillName' | 'timezone' | 'scheduleCron' | 'nextRunAt'>,
): NewEvent {
  return {
    type: `calendar_event_${change}`,
    userId: task.userId,
    taskId: task.id,
    projectId: task.projectId,
    data: {
      task_id: task.id,
      title: task.name ?? task.skillName,
      start_time: toTime(task.nextRunAt),
      timezone: task.timezone,
      schedule_cron: task.scheduleCron,
      project_id: task.projectId,
    },
  };
}

/** The end of a text that takes at most so many bytes as JSON, cut between characters. */
function tailOf(text: string, maxBytes: number): string {
  let tail = text.length <= maxBytes ? text : text.slice(-maxBytes).replace(/^[\udc00-\udfff]/, '');
  for (let bytes = jsonBytes(tail); bytes > maxBytes; bytes = jsonBytes(tail)) {
    // By the share that is too much, and a little more, so that few rounds are needed.
    tail = tail.slice(Math.ceil(tail.length * (1 - maxBytes / bytes)) + 1).replace(/^[\udc00-\udfff]/, '');
  }
  return tail;
}

const jsonBytes = (text: string) => Buffer.byteLength(JSON.stringify(text));
