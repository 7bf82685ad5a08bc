import type { agents } from '../db/schema.ts';
import type { NewEvent } from '../realtime/events.ts';

/**
 * The event that tells what an agent does; `agent` is its state after it. Everybody sees a shared agent, so its events do
 * not say whose run it is at.
 */
export function agentActivity(
  agent: Pick<typeof agents.$inferSelect, 'id' | 'userId' | 'name' | 'status' | 'shared'>,
  action: string,
  run: { taskId?: number; executionId?: number; durationMs?: number | null } = {},
): NewEvent {
  return {
    type: 'agent_activity_update',
    userId: agent.userId,
    shared: agent.shared,
    agentId: agent.id,
    taskId: agent.shared ? null : (run.taskId ?? null),
    data: {
      agent_id: agent.id,
      agent_name: agent.name,
      status: agent.status,
      ...(agent.shared ? {} : { task_id: run.taskId, execution_id: run.executionId }),
      action,
      duration_ms: run.durationMs ?? undefined,
    },
  };
}
