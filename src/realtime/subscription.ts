import { z } from 'zod';
import { EVENT_TOPICS } from '../db/schema.ts';
import type { PlacedEvent } from './feed.ts';

// What a client may send, and which events it wants.

export type Topic = (typeof EVENT_TOPICS)[number];

/** How many ids of a kind a socket may name. */
export const MAX_IDS = 1_000;
/** An error tells the client of its own words; that need not be long. */
const MAX_DETAIL = 300;

const ids = z.array(z.int().min(1)).max(MAX_IDS).optional();
const wish = {
  topics: z.array(z.enum(EVENT_TOPICS)).max(100).optional(),
  task_ids: ids,
  project_ids: ids,
  agent_ids: ids,
};
const clientMessage = z.discriminatedUnion(
  'type',
  [
    z.strictObject({ type: z.literal('subscribe'), ...wish }),
    z.strictObject({ type: z.literal('unsubscribe'), ...wish }),
    z.strictObject({ type: z.literal('auth'), token: z.string().max(8_192) }),
    z.object({ type: z.literal('ping') }),
    z.object({ type: z.literal('pong') }),
    z.object({ type: z.literal('ack') }),
  ],
  { error: 'is not known: send ping, pong, ack, auth, subscribe or unsubscribe' },
);

export type ClientMessage = z.output<typeof clientMessage>;

/** Why a message was not taken, as the `data` of an `error`. */
export interface Fault {
  code: 'invalid_json' | 'invalid_message' | 'too_many_ids' | 'unauthorized' | 'unavailable';
  detail: string;
}

/** Reads a text frame; answers what is wrong with it when it is no message. */
export function readMessage(text: string): { message: ClientMessage } | { fault: Fault } {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    return { fault: { code: 'invalid_json', detail: 'Send text frames that hold a JSON object each.' } };
  }
  const parsed = clientMessage.safeParse(json);
  if (parsed.success) return { message: parsed.data };
  const [issue] = parsed.error.issues;
  const detail = `${issue?.path.join('.') || 'message'}: ${issue?.message}.`.slice(0, MAX_DETAIL);
  return { fault: { code: 'invalid_message', detail } };
}

/** Which events a socket wants, of those it may see. */
export interface Subscription {
  covers(event: PlacedEvent): boolean;
  /**
   * `subscribe` adds topics and ids, `unsubscribe` takes them away. From the first id on, only events about one of the
   * named things come, or none when all names are taken away again; a `subscribe` that names topics and no ids ends that.
   * Answers false, and changes nothing, when that would be too many ids.
   */
  change(message: Extract<ClientMessage, { type: 'subscribe' | 'unsubscribe' }>): boolean;
  topics(): Topic[];
}

const KINDS = ['task_ids', 'project_ids', 'agent_ids'] as const;

/** A subscription to whole topics. */
export function createSubscription(initial: readonly Topic[]): Subscription {
  return new TopicSubscription(initial);
}

/** A class for its size: every client has one. */
class TopicSubscription implements Subscription {
  readonly #topics: Set<Topic>;
  #only: Record<(typeof KINDS)[number], Set<number>> | undefined;

  constructor(initial: readonly Topic[]) {
    this.#topics = new Set(initial);
  }

  covers(event: PlacedEvent): boolean {
    if (!this.#topics.has(event.topic)) return false;
    const only = this.#only;
    if (only === undefined) return true;
    return (
      (event.taskId !== null && only.task_ids.has(event.taskId)) ||
      (event.projectId !== null && only.project_ids.has(event.projectId)) ||
      (event.agentId !== null && only.agent_ids.has(event.agentId))
    );
  }

  change(message: Extract<ClientMessage, { type: 'subscribe' | 'unsubscribe' }>): boolean {
    const only = this.#only;
    const namesIds = KINDS.some((kind) => message[kind] !== undefined);
    if (message.type === 'unsubscribe') {
      for (const topic of message.topics ?? []) this.#topics.delete(topic);
      for (const kind of KINDS) for (const id of message[kind] ?? []) only?.[kind].delete(id);
      return true;
    }
    const wanted = {
      task_ids: new Set([...(only?.task_ids ?? []), ...(message.task_ids ?? [])]),
      project_ids: new Set([...(only?.project_ids ?? []), ...(message.project_ids ?? [])]),
      agent_ids: new Set([...(only?.agent_ids ?? []), ...(message.agent_ids ?? [])]),
    };
    if (KINDS.some((kind) => wanted[kind].size > MAX_IDS)) return false;
    if (namesIds) this.#only = wanted;
    else if (message.topics !== undefined) this.#only = undefined;
    for (const topic of message.topics ?? []) this.#topics.add(topic);
    return true;
  }

  topics(): Topic[] {
    return [...this.#topics];
  }
}
