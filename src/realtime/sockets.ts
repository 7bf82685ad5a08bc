import type { Duplex } from 'node:stream';
import type { WebSocket } from '@fastify/websocket';
import { requireScope } from '../http/access.ts';
import type { VerifyCredential } from '../http/authenticate.ts';
import { Problem } from '../http/problem.ts';
import { CLOSE } from './close-codes.ts';
import type { Deliveries } from './deliveries.ts';
import type { Delivery, Hello, Wire } from './delivery.ts';
import { type Fault, readMessage } from './subscription.ts';

/** What the WebSocket server must be set to. */
export const SOCKET_OPTIONS = {
  maxPayload: 65_536,
  // A message in a thousand crumbs costs far more memory than its bytes (ws SECURITY.md).
  maxFragments: 128,
  maxBufferedChunks: 1_024,
  // Compression keeps a window of memory for each socket: one event to 10,000 of them took a gigabyte.
  perMessageDeflate: false,
  /** How long a closing handshake may take before the connection is cut. */
  closeTimeout: 1_000,
  // The other sub-protocols offered are a browser's way to hand over the credential.
  handleProtocols: (protocols: Set<string>) => (protocols.has('bearer') ? 'bearer' : false),
} as const;

const MAX_FAULTS = 10;
/** How many messages a client may send at once, and then a second. */
const MESSAGES_AT_ONCE = 200;
const MESSAGES_PER_SECOND = 50;

const AS_TEXT = { binary: false } as const;

const letLeave = (conversation: Conversation) => conversation.letLeave();

/**
 * A socket, the connection below it as a wire, and what its client says. A class for its size, as Delivery is: closures
 * were a fifth of what an idle socket cost.
 */
class Conversation implements Wire {
  readonly answers = true;
  readonly #socket: WebSocket;
  readonly #connection: Duplex;
  readonly #verify: VerifyCredential;
  #delivery: Delivery | undefined;
  #holding = false;
  #faults = 0;
  #allowance = MESSAGES_AT_ONCE;
  #countedAt = performance.now();

  constructor(socket: WebSocket, connection: Duplex, verify: VerifyCredential) {
    this.#socket = socket;
    this.#connection = connection;
    this.#verify = verify;
  }

  send(text: string | Buffer): void {
    // What is sent in one go, such as the events that came together, leaves in one packet.
    if (!this.#holding) {
      this.#holding = true;
      this.#connection.cork();
      process.nextTick(letLeave, this);
    }
    this.#socket.send(text, AS_TEXT);
  }
  letLeave(): void {
    this.#holding = false;
    this.#connection.uncork();
  }
  waiting(): number {
    return this.#socket.bufferedAmount;
  }
  flushed(): Promise<void> {
    return new Promise((resolve) => this.#socket.ping(undefined, undefined, () => resolve()));
  }
  beat(): void {
    this.#socket.ping();
  }
  close(code: number, reason: string): void {
    // A paused socket would not see the answer to its close.
    this.#socket.resume();
    this.#socket.close(code, reason);
  }

  /** Hears the client from now on, on behalf of `delivery`. */
  hear(delivery: Delivery): void {
    this.#delivery = delivery;
    this.#socket.on('message', (data: Buffer, binary: boolean) => {
      // What a handler throws would end the process: no fault in one socket reaches another.
      try {
        this.#take(delivery, binary ? '' : data.toString('utf8'));
      } catch (error) {
        delivery.fail(error);
      }
    });
    this.#socket.on('pong', () => delivery.heard());
  }

  #take(delivery: Delivery, text: string): void {
    if (delivery.isOver()) return;
    delivery.heard();
    const now = performance.now();
    const earned = ((now - this.#countedAt) / 1_000) * MESSAGES_PER_SECOND;
    this.#allowance = Math.min(MESSAGES_AT_ONCE, this.#allowance + earned) - 1;
    this.#countedAt = now;
    if (this.#allowance < 0) return void delivery.shut(CLOSE.policy, 'too many messages');
    const read = readMessage(text);
    if ('fault' in read) return void this.#complain(read.fault);
    const { message } = read;
    if (message.type === 'ping') delivery.tell('pong', {});
    else if (message.type === 'auth') {
      renew(delivery, this.#verify, message.token).then(
        (fault) => fault && this.#complain(fault),
        (error: unknown) => delivery.fail(error),
      );
    } else if (message.type === 'subscribe' || message.type === 'unsubscribe') {
      if (delivery.subscription.change(message)) delivery.acknowledge(false);
      else
        this.#complain({ code: 'too_many_ids', detail: 'That is too many ids of a kind: leave them out to get all.' });
    }
  }

  #complain({ code, detail }: Fault): void {
    this.#delivery?.tell('error', { code, detail });
    if (++this.#faults >= MAX_FAULTS) {
      this.#delivery?.shut(CLOSE.policy, 'too many messages that cannot be understood');
    }
  }
}

/** Takes over a socket that was just opened. Attaches its handlers before it returns, so that no message is missed. */
export function openSocket(
  { deliveries, verify }: { deliveries: Deliveries; verify: VerifyCredential },
  { socket, connection }: { socket: WebSocket; connection: Duplex },
  address: string,
  hello: Hello,
): void {
  const conversation = new Conversation(socket, connection, verify);
  const delivery = deliveries.open(conversation, address, hello);
  conversation.hear(delivery);
  // Who breaks the protocol (frames too large, not UTF-8, …) is closed by the library with the right code. The plugin's own
  // listener holds on to the request, kilobytes for each socket, and has nothing more to do.
  socket.removeAllListeners('error');
  socket.on('error', () => delivery.gone());
  socket.once('close', () => deliveries.ended(delivery));
  // What the client sends already waits until it was greeted.
  socket.pause();
  void delivery.begin(hello.lastEventId);
  void delivery.greeted.then(() => socket.resume());
}

/** Lets a socket go on with another credential of the same user; answers what is wrong with it, and then nothing changes. */
async function renew(delivery: Delivery, verify: VerifyCredential, token: string): Promise<Fault | undefined> {
  try {
    const identity = await verify(token);
    if (identity.userId !== delivery.identity.userId) {
      return { code: 'unauthorized', detail: 'This credential is of another user: open another socket for it.' };
    }
    requireScope(identity.scopes, ['read']);
    delivery.identity = identity;
    delivery.acknowledge(false);
    return undefined;
  } catch (error) {
    if (error instanceof Problem && error.status < 500) return { code: 'unauthorized', detail: error.message };
    if (error instanceof Problem) return { code: 'unavailable', detail: error.message };
    throw error;
  }
}
