import { changedFields, recordAudits } from '../audit/record.ts';
import type { Tx } from '../db/database.ts';
import type { Actor } from '../http/access.ts';
import { emitEvents } from '../realtime/events.ts';
import { type TaskFacts, taskStatusUpdate } from '../tasks/task-events.ts';
import { QUEUE_TOPIC, queueDetail } from './queue.ts';
import type { Execution } from './schemas.ts';

/** A run that was queued because somebody asked for it, and its task. */
export interface Queued {
  task: TaskFacts;
  run: Pick<Execution, 'id' | 'userId' | 'skillName' | 'trigger' | 'scheduledFor'> & {
    available: boolean;
    /** What the log is to tell besides. */
    more?: Record<string, unknown>;
  };
}

/**
 * Writes the audit entries and the events of runs that were queued together, and wakes agents for those that need not wait
 * for another. The params of the runs stand in the runs: a thousand copies of them would be tens of MB.
 */
export function tellQueued(tx: Tx, actor: Actor, queued: readonly Queued[]): void {
  recordAudits(
    tx,
    actor,
    queued.map(({ task, run }) => ({
      operation: 'CREATE',
      entityType: 'execution',
      entityId: run.id,
      ownerId: run.userId,
      changedFields: changedFields(null, {
        taskId: task.id,
        trigger: run.trigger,
        status: 'queued',
        scheduledFor: run.scheduledFor,
        ...run.more,
      }),
    })),
  );
  emitEvents(
    tx,
    queued.map(({ task, run }) =>
      taskStatusUpdate(task, {
        previousStatus: task.status,
        executionId: run.id,
        executionStatus: 'queued',
        scheduledFor: run.scheduledFor,
      }),
    ),
  );
  for (const detail of new Set(queued.flatMap(({ run }) => (run.available ? [queueDetail(run)] : [])))) {
    tx.ring(QUEUE_TOPIC, detail);
  }
}
