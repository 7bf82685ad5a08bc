import type { Tx } from '../db/database.ts';
import type { EVENT_TOPICS } from '../db/schema.ts';

/** Every type of event there is, and the topic that a subscriber names to get it. */
export const EVENT_TYPES = {
  task_status_update: 'tasks',
  task_overdue: 'tasks',
  agent_activity_update: 'agents',
  calendar_event_created: 'calendar',
  calendar_event_updated: 'calendar',
  calendar_event_deleted: 'calendar',
  memory_status_update: 'memory',
  task_occurrences: 'tasks',
} as const satisfies Record<string, (typeof EVENT_TOPICS)[number]>;

export type EventType = keyof typeof EVENT_TYPES;

/** An event as its noun tells it; the relay gives it its id and place. */
export interface NewEvent {
  type: EventType;
  /** The owner: who, besides admins, may see it. */
  userId: number;
  /** True for the doings of shared agents, which everybody may see. */
  shared?: boolean;
  taskId?: number | null;
  projectId?: number | null;
  agentId?: number | null;
  data: Record<string, unknown>;
}

/** The bus topic that is rung when events were written. */
export const OUTBOX_TOPIC = 'outbox';

/** One parameter for any number of events: a list of values would be planned anew for every length. */
const WRITE = {
  name: 'events-write',
  text: `
    insert into event_outbox (user_id, shared, topic, type, task_id, project_id, agent_id, data)
    select * from jsonb_to_recordset($1) as e(
      user_id bigint, shared boolean, topic text, type text, task_id bigint, project_id bigint, agent_id bigint, data text)`,
};

/** Writes events in the transaction that caused them, in their order, and wakes the relay when it has committed. */
export function emitEvents(tx: Tx, events: readonly NewEvent[]): void {
  if (events.length === 0) return;
  const rows = events.map((event) => ({
    user_id: event.userId,
    shared: event.shared ?? false,
    topic: EVENT_TYPES[event.type],
    type: event.type,
    task_id: event.taskId,
    project_id: event.projectId,
    agent_id: event.agentId,
    data: JSON.stringify(event.data),
  }));
  tx.write({ ...WRITE, values: [JSON.stringify(rows)] });
  tx.ring(OUTBOX_TOPIC);
}
