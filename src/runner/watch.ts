import WebSocket from 'ws';
import { connectMuster, type Envelope } from '../client/muster-client.ts';
import { onStopSignals } from '../platform/stop-signals.ts';
import { describeEvent } from './describe-event.ts';
import { readWatchOptions, UsageError, WATCH_HELP, type WatchOptions } from './options.ts';

// npm run watch: see WATCH_HELP. Comes back after every loss of the connection with the last event it saw, so that none is
// missed.

async function main(): Promise<void> {
  const options = readOptions();
  const done = await new Promise<number>((resolve) => {
    let told = false;
    let unreachable: string | undefined;
    /** Why the server does not take us, which a WebSocket alone does not tell. */
    class Watching extends WebSocket {
      constructor(url: string, protocols: string[]) {
        super(url, protocols, { handshakeTimeout: 10_000 });
        this.on('unexpected-response', (_request, response) => {
          const { statusCode = 0 } = response;
          response.resume();
          this.terminate();
          if (statusCode === 401) end('The server does not take this key.');
          if (statusCode === 403) end('This key may not watch: it needs the scope read.');
          unreachable = `The server answered ${statusCode}`;
        });
        this.on('error', (error: NodeJS.ErrnoException) => {
          unreachable ??= `The server cannot be reached (${error.code ?? error.message})`;
        });
      }
    }
    const end = (why: string) => {
      client.close();
      process.stderr.write(`${why}\n`);
      resolve(1);
    };
    const show = (envelope: Envelope) => print(options, envelope);
    const client = connectMuster({
      url: options.server,
      token: options.key,
      WebSocket: Watching,
      ...(options.topics ? { topics: options.topics.split(',') } : {}),
      onEvent: show,
      onFrame: show,
      onState(state, detail) {
        if (state === 'live') told = false;
        if (state === 'closed' && detail !== 'closed by the caller') end(`The key is not good any more: ${detail}.`);
        if (state !== 'waiting' || told) return;
        told = true;
        process.stderr.write(`${unreachable ?? detail}; trying on\n`);
        unreachable = undefined;
      },
    });
    onStopSignals(
      () => {
        client.close();
        resolve(0);
      },
      () => process.exit(1),
    );
  });
  process.exit(done);
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

function print({ json }: WatchOptions, envelope: Envelope): void {
  if (json) return void process.stdout.write(`${JSON.stringify(envelope)}\n`);
  const line = describeEvent(envelope);
  if (line === undefined) return;
  const time = new Date(envelope.timestamp).toTimeString().slice(0, 8);
  const colour = process.stdout.isTTY && !process.env['NO_COLOR'];
  process.stdout.write(colour ? `\x1b[2m${time}\x1b[0m ${line}\n` : `${time} ${line}\n`);
}

await main();
