import type { Tx } from '../db/database.ts';
import { type EVENT_TOPICS, eventOutbox } from '../db/schema.ts';

/** Every type of event there is, and the topic that a subscriber names to get it. */
export const EVENT_TYPES = {
  task_status_update: 'tasks',
  agent_activity_update: 'agents',
  calendar_event_created: 'calendar',
  calendar_event_updated: 'calendar',
  calendar_event_deleted: 'calendar',
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

/** The row of the outbox for an event. */
export function outboxRow(event: NewEvent): typeof eventOutbox.$inferInsert {
  return {
    type: event.type,
    topic: EVENT_TYPES[event.type],
    userId: event.userId,
    shared: event.shared ?? false,
    taskId: event.taskId ?? null,
    projectId: event.projectId ?? null,
    agentId: event.agentId ?? null,
    data: JSON.stringify(event.data),
  };
}

/** Writes events in the transaction that caused them, in their order, and wakes the relay when it has committed. */
export async function emitEvents(tx: Tx, events: readonly NewEvent[]): Promise<void> {
  if (events.length === 0) return;
  await tx.orm.insert(eventOutbox).values(events.map(outboxRow));
  tx.ring(OUTBOX_TOPIC);
}
