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

/** A socket, and the connection below it, as a wire. */
function wireOf(socket: WebSocket, connection: Duplex): Wire {
  return {
    answers: true,
    send: (text) => socket.send(text, AS_TEXT),
    together(work) {
      connection.cork();
      work();
      connection.uncork();
    },
    waiting: () => socket.bufferedAmount,
    flushed: () => new Promise<void>((resolve) => socket.ping(undefined, undefined, () => resolve())),
    beat: () => socket.ping(),
    close(code, reason) {
      // A paused socket would not see the answer to its close.
      socket.resume();
      socket.close(code, reason);
    },
  };
}

/** Takes over a socket that was just opened. Attaches its handlers before it returns, so that no message is missed. */
export function openSocket(
  { deliveries, verify }: { deliveries: Deliveries; verify: VerifyCredential },
  { socket, connection }: { socket: WebSocket; connection: Duplex },
  address: string,
  hello: Hello,
): void {
  const delivery = deliveries.open(wireOf(socket, connection), address, hello);
  let faults = 0;
  let allowance = MESSAGES_AT_ONCE;
  let countedAt = performance.now();

  const complain = ({ code, detail }: Fault) => {
    delivery.tell('error', { code, detail });
    if (++faults >= MAX_FAULTS) delivery.shut(CLOSE.policy, 'too many messages that cannot be understood');
  };
  const onMessage = (data: Buffer, binary: boolean) => {
    if (delivery.isOver()) return;
    delivery.heard();
    const now = performance.now();
    allowance = Math.min(MESSAGES_AT_ONCE, allowance + ((now - countedAt) / 1_000) * MESSAGES_PER_SECOND) - 1;
    countedAt = now;
    if (allowance < 0) return delivery.shut(CLOSE.policy, 'too many messages');
    const read = readMessage(binary ? '' : data.toString('utf8'));
    if ('fault' in read) return complain(read.fault);
    const { message } = read;
    if (message.type === 'ping') return delivery.tell('pong', {});
    if (message.type === 'auth') {
      return void renew(delivery, verify, message.token).then(
        (fault) => fault && complain(fault),
        (error: unknown) => delivery.fail(error),
      );
    }
    if (message.type !== 'subscribe' && message.type !== 'unsubscribe') return;
    if (delivery.subscription.change(message)) delivery.acknowledge(false);
    else complain({ code: 'too_many_ids', detail: 'That is too many ids of a kind: leave them out to get all.' });
  };

  socket.on('message', (data: Buffer, binary: boolean) => {
    // What a handler throws would end the process: no fault in one socket reaches another.
    try {
      onMessage(data, binary);
    } catch (error) {
      delivery.fail(error);
    }
  });
  socket.on('pong', () => delivery.heard());
  // Who breaks the protocol (frames too large, not UTF-8, …) is closed by the library with the right code.
  // The plugin's own listener holds on to the request, kilobytes for each socket, and has nothing more to do.
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
