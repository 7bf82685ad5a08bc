import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startServer, type TestServer } from '../support/server.ts';
import { type Client, emit, numbered, openSocket, rawConnection } from './support.ts';

// What a client can do to a WebSocket server below the level of messages.

let server: TestServer;
let user: Awaited<ReturnType<TestServer['newUser']>>;
/** Somebody else, whom none of this may concern. */
let bystander: Client;
beforeAll(async () => {
  server = await startServer();
  user = await server.newUser();
  bystander = openSocket(`${server.url}/ws?token=${user.token}`);
  await bystander.ack;
});
afterAll(async () => {
  bystander?.socket.close();
  await server?.stop();
});

let n = 0;
async function expectBystanderUnaffected() {
  await emit(server.db, numbered(++n, { userId: user.id }));
  await bystander.frame(({ data }) => data['n'] === n);
}

const handshake = (path: string, extra = '') =>
  `GET ${path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n` +
  `Sec-WebSocket-Key: ${randomBytes(16).toString('base64')}\r\n${extra}\r\n`;

/** A frame of a client: masked, unless said otherwise. `length` lies about the payload's length. */
function frame(first: number, payload: Buffer | string, options: { mask?: boolean; length?: bigint } = {}): Buffer {
  const data = Buffer.from(payload as string);
  const { mask = true, length = BigInt(data.length) } = options;
  const flag = mask ? 0x80 : 0;
  let head: Buffer;
  if (length < 126n) head = Buffer.from([first, flag | Number(length)]);
  else if (length < 65_536n) {
    head = Buffer.from([first, flag | 126, 0, 0]);
    head.writeUInt16BE(Number(length), 2);
  } else {
    head = Buffer.alloc(10);
    head.set([first, flag | 127]);
    head.writeBigUInt64BE(length, 2);
  }
  if (!mask) return Buffer.concat([head, data]);
  const key = randomBytes(4);
  return Buffer.concat([head, key, data.map((byte, i) => byte ^ (key[i % 4] ?? 0))]);
}

/** The frames of a server, which are not masked. */
function framesOf(bytes: Buffer): { opcode: number; payload: Buffer }[] {
  const frames: { opcode: number; payload: Buffer }[] = [];
  for (let at = bytes.indexOf('\r\n\r\n') + 4; at + 2 <= bytes.length; ) {
    const opcode = (bytes[at] ?? 0) & 15;
    const short = (bytes[at + 1] ?? 0) & 127;
    const [length, start] = short === 126 ? [bytes.readUInt16BE(at + 2), at + 4] : [short, at + 2];
    frames.push({ opcode, payload: bytes.subarray(start, start + length) });
    at = start + length;
  }
  return frames;
}

const FIN = 0x80;
const TEXT = 1;
const BINARY = 2;
const CLOSE = 8;
const PING = 9;
const closeCode = (code: number) => Buffer.from([code >> 8, code & 255]);

describe('a frame', () => {
  test.each<[string, number, Buffer[]]>([
    ['without a mask', 1002, [frame(FIN | TEXT, '{"type":"ping"}', { mask: false })]],
    ['that claims to be compressed', 1002, [frame(FIN | 0x40 | TEXT, '{}')]],
    ['with an unknown opcode', 1002, [frame(FIN | 3, '{}')]],
    ['of text that is not UTF-8', 1007, [frame(FIN | TEXT, Buffer.from([0xc3, 0x28]))]],
    ['of text that ends in the middle of a character', 1007, [frame(FIN | TEXT, Buffer.from([0xf0, 0x9f]))]],
    ['of control with 126 bytes', 1002, [frame(FIN | PING, Buffer.alloc(126))]],
    ['of control in fragments', 1002, [frame(PING, 'x')]],
    ['that continues nothing', 1002, [frame(FIN, 'x')]],
    ['that begins anew before the message has ended', 1002, [frame(TEXT, 'x'), frame(FIN | TEXT, 'x')]],
    ['that says 2^63 bytes', 1009, [frame(FIN | BINARY, '', { length: 1n << 63n })]],
    ['that says 2^53 − 1 bytes', 1009, [frame(FIN | BINARY, '', { length: (1n << 53n) - 1n })]],
    ['of 64 KiB and a byte', 1009, [frame(FIN | TEXT, ' '.repeat(65_537))]],
    ['of 64 KiB and a byte in fragments', 1009, [frame(TEXT, ' '.repeat(65_536)), frame(FIN, ' ')]],
    ['in 200 fragments', 1008, [frame(TEXT, ' '), ...Array.from({ length: 199 }, () => frame(0, ' '))]],
    ['of close with a code that must not be sent', 1002, [frame(FIN | CLOSE, closeCode(1005))]],
    ['of close with one byte', 1002, [frame(FIN | CLOSE, Buffer.from([3]))]],
  ])('%s ends its socket with %i, and concerns nobody else', async (_what, expected, frames) => {
    const { socket, received, ended } = await rawConnection(server.url);
    socket.write(handshake(`/ws?token=${user.token}`));
    for (const bytes of frames) socket.write(bytes);
    // It never answers the close; the server does not wait for that for long.
    await ended;
    const last = framesOf(received()).at(-1);
    expect([last?.opcode, last?.payload.readUInt16BE(0)]).toEqual([CLOSE, expected]);
    await expectBystanderUnaffected();
  });

  test('of 64 KiB is taken', async () => {
    const client = openSocket(`${server.url}/ws?token=${user.token}`);
    await client.ack;
    client.say(JSON.stringify({ type: 'ping' }).padEnd(65_536));
    await client.frame(({ type }) => type === 'pong');
    client.socket.close();
  });

  test('of ping is answered with its own bytes', async () => {
    const client = openSocket(`${server.url}/ws?token=${user.token}`);
    await client.ack;
    const pong = new Promise<Buffer>((resolve) => client.socket.once('pong', resolve));
    client.socket.ping('grüezi');
    expect(String(await pong)).toBe('grüezi');
    client.socket.close();
  });
});

describe('a connection', () => {
  test('that is reset in any phase of its life harms nothing', async () => {
    await Promise.all(
      Array.from({ length: 60 }, async (_, i) => {
        const { socket, received, ended } = await rawConnection(server.url);
        const good = i % 2 === 0;
        socket.write(handshake(`/ws?token=${good ? user.token : 'x'}`));
        if (i % 3 === 1) await new Promise<void>((resolve) => setImmediate(resolve));
        if (i % 3 === 2) {
          await new Promise<void>((resolve) => {
            socket.on('data', () => resolve());
          });
          expect(String(received())).toMatch(good ? /^HTTP\/1\.1 101 / : /^HTTP\/1\.1 401 /);
        }
        socket.resetAndDestroy();
        await ended;
      }),
    );
    await expectBystanderUnaffected();
  });

  test.each([
    ['without a credential', '/ws', 401],
    ['with an unknown parameter', '/ws?x=1', 401],
    ['to another path', '/health', 400],
    ['to no path', '/nowhere', 400],
  ])('whose upgrade is refused is ended by the server: %s', async (_what, path, status) => {
    const { socket, received, ended } = await rawConnection(server.url);
    socket.write(handshake(path));
    await ended;
    expect(String(received())).toMatch(new RegExp(`^HTTP/1\\.1 ${status} [^]*\r\nconnection: close\r\n`, 'i'));
  });

  test('with 20 KiB of headers is refused', async () => {
    const { socket, received, ended } = await rawConnection(server.url);
    socket.write(handshake(`/ws?token=${user.token}`, `X-Long: ${'x'.repeat(20_000)}\r\n`));
    await ended;
    expect(String(received())).toMatch(/^HTTP\/1\.1 431 /);
  });

  test('that says everything at once, before it was answered, is understood', async () => {
    const { socket, received } = await rawConnection(server.url);
    socket.write(
      Buffer.concat([
        Buffer.from(handshake(`/ws?token=${user.token}&last_event_id=0`)),
        frame(FIN | TEXT, '{"type":"ping"}'),
        frame(FIN | CLOSE, closeCode(1000)),
      ]),
    );
    await new Promise<void>((resolve) => {
      socket.on('data', () => {
        if (framesOf(received()).at(-1)?.opcode === CLOSE) resolve();
      });
    });
    const types = framesOf(received())
      .filter(({ opcode }) => opcode === TEXT)
      .map(({ payload }) => (JSON.parse(String(payload)) as { type: string }).type);
    expect(types.filter((type) => !type.startsWith('task_'))).toEqual(['ack', 'pong']);
    socket.destroy();
  });
});
