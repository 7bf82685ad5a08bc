// Follows the events of a Muster server from Node (22 and later, or any with a WebSocket given) and from browsers. It stands
// on nothing and imports nothing: the built file can be copied beside a page as it is.
//
// What it keeps is one number, the largest event_id that it has seen, by which the server gives it after every loss of the
// connection what it missed, once and in order.

/** A frame of the server; only events and bookmarks have an event_id. */
export interface Envelope {
  type: string;
  event_id?: number;
  timestamp: string;
  data: Record<string, unknown>;
}

/** Topics and ids to add to, or take from, what is followed; see the README. */
export interface Wish {
  topics?: string[];
  task_ids?: number[];
  project_ids?: number[];
  agent_ids?: number[];
}

/** `waiting`: it has lost the connection and tries again after a pause. `closed`: it does not try again. */
export type ClientState = 'connecting' | 'live' | 'waiting' | 'closed';

/** What is used of a WebSocket: that of browsers, of Node 22, and of the package ws have it. */
export interface SocketLike {
  readonly readyState: number;
  send(text: string): void;
  close(code?: number, reason?: string): void;
  onopen: ((event: never) => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  onclose: ((event: { code: number; reason: string }) => void) | null;
  onerror: ((event: never) => void) | null;
}

export interface ClientOptions {
  /** The server: http(s):// or ws(s):// and its host. */
  url: string;
  /** An access token or API key with the scope read; a function is asked before each connection. */
  token: string | (() => string | Promise<string>);
  /** Some of tasks, agents and calendar; all unless given. */
  topics?: readonly string[];
  /** Where to go on from: an event_id, or the header X-Event-Cursor of a read. Without it, from now. */
  lastEventId?: number;
  /** Gets each event once, in order. */
  onEvent: (event: Envelope) => void;
  /** Events were missed that the server does not keep any more: read over REST what is now. It goes on from here. */
  onResync?: (lastEventId: number) => void;
  onState?: (state: ClientState, detail: string) => void;
  /** Gets every other frame: ack, bookmark, error. */
  onFrame?: (frame: Envelope) => void;
  /** Where the platform has none: `import WebSocket from 'ws'`. */
  WebSocket?: new (
    url: string,
    protocols: string[],
  ) => unknown;
}

export interface Client {
  /** Adds to what is followed; from the first id on only what is named. Holds over reconnects. */
  subscribe(wish: Wish): void;
  /** Takes away from what is followed. */
  unsubscribe(wish: Wish): void;
  /** The largest event_id that was seen; undefined before the first connection. */
  lastEventId(): number | undefined;
  /** Goes on with another credential of the same user, without a new connection. */
  refresh(token: string): void;
  /** Ends it for good. */
  close(): void;
}

const FIRST_PAUSE_MS = 250;
const MAX_PAUSE_MS = 15_000;
/** After an orderly end the server, or another one, is there in a moment; all of its clients come at once, so not at once. */
const MOVED_PAUSE_MS = 1_000;
/** What shows that a connection lives that says nothing: a ping of ours, and the server's answer to it. */
const PING_EVERY_MS = 30_000;
const SILENT_MS = 60_000;

const OPEN = 1;
const KINDS = ['topics', 'task_ids', 'project_ids', 'agent_ids'] as const;

/** Connects, and again after every loss, until it is closed. Throws only for options that can never do. */
export function connectMuster(options: ClientOptions): Client {
  const { url, token, onEvent } = options;
  const given = options.WebSocket ?? (globalThis as { WebSocket?: unknown }).WebSocket;
  if (typeof given !== 'function') throw new Error('This platform has no WebSocket: give one, such as that of ws.');
  const Socket = given as new (url: string, protocols: string[]) => SocketLike;
  const base = url.replace(/^http/, 'ws').replace(/\/+$/, '');
  if (!/^wss?:\/\/./.test(base)) throw new Error('url must begin with http://, https://, ws:// or wss://.');

  let last = options.lastEventId;
  let current: SocketLike | undefined;
  let timer: ReturnType<typeof setTimeout> | undefined;
  let closed = false;
  let tries = 0;
  let topics = new Set(options.topics ?? ['tasks', 'agents', 'calendar']);
  let ids: { [K in 'task_ids' | 'project_ids' | 'agent_ids']: Set<number> } | undefined;

  /** A callback that throws is a fault of the page, to be seen there; it must not end this. */
  const call = <T extends unknown[]>(callback: ((...args: T) => void) | undefined, ...args: T) => {
    try {
      callback?.(...args);
    } catch (error) {
      setTimeout(() => {
        throw error;
      });
    }
  };
  const state = (now: ClientState, detail: string) => call(options.onState, now, detail);

  const again = (pauseMs: number, detail: string) => {
    if (closed) return;
    state('waiting', detail);
    timer = setTimeout(connect, pauseMs);
  };
  /** Exponential, with full jitter: clients that were lost together do not come back together. */
  const backoff = () => Math.random() * Math.min(MAX_PAUSE_MS, FIRST_PAUSE_MS * 2 ** Math.min(tries++, 10));

  const connect = async () => {
    state('connecting', base);
    let credential: string;
    try {
      credential = typeof token === 'string' ? token : await token();
    } catch (error) {
      return again(backoff(), `there is no token: ${String(error)}`);
    }
    if (closed) return;
    const query = [`topics=${[...topics].join(',')}`];
    if (topics.size === 0) query.pop();
    if (last !== undefined) query.push(`last_event_id=${last}`);
    let socket: SocketLike;
    try {
      socket = new Socket(`${base}/ws${query.length > 0 ? `?${query.join('&')}` : ''}`, ['bearer', credential]);
    } catch (error) {
      return again(backoff(), String(error));
    }
    current = socket;
    let heardAt = Date.now();
    const pinging = setInterval(() => {
      if (Date.now() - heardAt > SILENT_MS) {
        // A close would wait for an answer that does not come.
        ended(4408, 'nothing was heard');
        socket.close();
      } else if (socket.readyState === OPEN) socket.send('{"type":"ping"}');
    }, PING_EVERY_MS);

    const ended = (code: number, reason: string) => {
      if (current !== socket) return;
      current = undefined;
      clearInterval(pinging);
      const detail = `the connection ended (${code}${reason && ` ${reason}`})`;
      if (closed) return;
      if (code === 1008 && typeof token === 'string') {
        closed = true;
        return state('closed', detail);
      }
      again(code === 1001 ? Math.random() * MOVED_PAUSE_MS : backoff(), detail);
    };
    socket.onopen = () => {};
    socket.onerror = () => {};
    socket.onclose = ({ code, reason }) => ended(code, String(reason));
    socket.onmessage = ({ data }) => {
      if (current !== socket) return;
      heardAt = Date.now();
      const frame = read(data);
      if (frame) take(frame, socket);
    };
  };

  let greeted: SocketLike | undefined;
  const take = (frame: Envelope, socket: SocketLike) => {
    const place = frame.data['last_event_id'];
    if (frame.type === 'ack') {
      if (greeted !== socket) {
        greeted = socket;
        tries = 0;
        if (!frame.data['resumed'] && typeof place === 'number' && last === undefined) last = place;
        if (ids) say(wishes('subscribe'));
        state('live', frame.data['resumed'] ? 'resumed' : 'from now');
      }
      return call(options.onFrame, frame);
    }
    if (frame.type === 'resync_required') {
      if (typeof place === 'number') last = place;
      call(options.onFrame, frame);
      return call(options.onResync, last ?? 0);
    }
    const { event_id: id } = frame;
    if (id === undefined) return call(options.onFrame, frame);
    // At least once is what the server promises; once is what this gives.
    if (last !== undefined && id <= last) return;
    last = id;
    call(frame.type === 'bookmark' ? options.onFrame : onEvent, frame);
  };

  const say = (message: object) => {
    if (current?.readyState === OPEN && greeted === current) current.send(JSON.stringify(message));
  };
  const wishes = (type: 'subscribe' | 'unsubscribe') => ({
    type,
    topics: [...topics],
    ...(ids && { task_ids: [...ids.task_ids], project_ids: [...ids.project_ids], agent_ids: [...ids.agent_ids] }),
  });

  // Not before the caller has what this answers.
  timer = setTimeout(connect, 0);
  return {
    subscribe(wish) {
      for (const topic of wish.topics ?? []) topics.add(topic);
      const named = KINDS.some((kind) => kind !== 'topics' && wish[kind] !== undefined);
      if (named) {
        ids ??= { task_ids: new Set(), project_ids: new Set(), agent_ids: new Set() };
        for (const id of wish.task_ids ?? []) ids.task_ids.add(id);
        for (const id of wish.project_ids ?? []) ids.project_ids.add(id);
        for (const id of wish.agent_ids ?? []) ids.agent_ids.add(id);
      } else if (wish.topics) ids = undefined;
      say({ type: 'subscribe', ...wish });
    },
    unsubscribe(wish) {
      topics = new Set([...topics].filter((topic) => !wish.topics?.includes(topic)));
      for (const id of wish.task_ids ?? []) ids?.task_ids.delete(id);
      for (const id of wish.project_ids ?? []) ids?.project_ids.delete(id);
      for (const id of wish.agent_ids ?? []) ids?.agent_ids.delete(id);
      say({ type: 'unsubscribe', ...wish });
    },
    lastEventId: () => last,
    refresh: (next) => say({ type: 'auth', token: next }),
    close() {
      if (closed) return;
      closed = true;
      clearTimeout(timer);
      current?.close(1000);
      current = undefined;
      state('closed', 'closed by the caller');
    },
  };
}

/** A frame, or undefined for what is none of ours. */
function read(data: unknown): Envelope | undefined {
  try {
    const frame = JSON.parse(String(data)) as Envelope;
    return typeof frame?.type === 'string' && typeof frame.data === 'object' && frame.data !== null ? frame : undefined;
  } catch {
    return undefined;
  }
}
