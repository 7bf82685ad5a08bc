import WebSocket from 'ws';
import { onStopSignals } from '../platform/stop-signals.ts';
import { pause, pauseAfter } from './api.ts';
import { describeEvent, type Envelope } from './describe-event.ts';
import { readWatchOptions, UsageError, WATCH_HELP, type WatchOptions } from './options.ts';

// npm run watch: see WATCH_HELP. Comes back after every loss of the connection with the last event it saw, so that none is
// missed.

async function main(): Promise<void> {
  const options = readOptions();
  const ended = new AbortController();
  onStopSignals(
    () => ended.abort(),
    () => process.exit(1),
  );
  let lastEventId: number | undefined;
  for (let tries = 0; !ended.signal.aborted; ) {
    const lost = await follow(options, lastEventId, ended.signal, (envelope) => {
      tries = 0;
      const place = envelope.event_id ?? (envelope.type === 'ack' ? Number(envelope.data['last_event_id']) : undefined);
      if (place !== undefined) lastEventId = Math.max(place, lastEventId ?? 0);
      print(options, envelope);
    });
    if (ended.signal.aborted) return;
    if (lost.final) {
      process.stderr.write(`${lost.why}\n`);
      process.exit(1);
    }
    if (tries === 0) process.stderr.write(`${lost.why}; trying on\n`);
    await pause(pauseAfter(undefined, Math.min(tries++, 5)), ended.signal);
  }
}

function readOptions(): WatchOptions {
  try {
    const options = readWatchOptions(process.argv.slice(2));
    if (options !== 'help') return options;
    process.stdout.write(`${WATCH_HELP}\n`);
    process.exit(0);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    process.stderr.write(`${error.message}\n`);
    process.exit(2);
  }
}

/** Follows one connection to its end; says why it ended, and whether another try is of use. */
function follow(
  { server, key, topics }: WatchOptions,
  lastEventId: number | undefined,
  ended: AbortSignal,
  onEnvelope: (envelope: Envelope) => void,
): Promise<{ why: string; final: boolean }> {
  return new Promise((resolve) => {
    const url = new URL(`${server.replace(/^http/, 'ws')}/ws`);
    if (topics) url.searchParams.set('topics', topics);
    if (lastEventId !== undefined) url.searchParams.set('last_event_id', String(lastEventId));
    const socket = new WebSocket(url, ['bearer', key], { handshakeTimeout: 10_000 });
    const onEnd = () => socket.close(1000);
    ended.addEventListener('abort', onEnd);
    const over = (why: string, final: boolean) => {
      ended.removeEventListener('abort', onEnd);
      resolve({ why, final });
    };
    socket.on('message', (data) => onEnvelope(JSON.parse(String(data)) as Envelope));
    socket.on('unexpected-response', (_request, response) => {
      const { statusCode = 0 } = response;
      response.resume();
      socket.terminate();
      if (statusCode === 401) over('The server does not take this key.', true);
      else if (statusCode === 403) over('This key may not watch: it needs the scope read.', true);
      else over(`The server answered ${statusCode}`, false);
    });
    socket.on('error', (error: NodeJS.ErrnoException) =>
      over(`The server cannot be reached (${error.code ?? error.message})`, false),
    );
    socket.on('close', (code, reason) =>
      over(`The connection ended (${code} ${String(reason)})`.replace(' )', ')'), false),
    );
  });
}

function print({ json }: WatchOptions, envelope: Envelope): void {
  if (json) return void process.stdout.write(`${JSON.stringify(envelope)}\n`);
  const line = describeEvent(envelope);
  if (line === undefined) return;
  const time = new Date(envelope.timestamp).toTimeString().slice(0, 8);
  const colour = process.stdout.isTTY && !process.env['NO_COLOR'];
  process.stdout.write(colour ? `\x1b[2m${time}\x1b[0m ${line}\n` : `${time} ${line}\n`);
}

await main();
process.exit(0);
