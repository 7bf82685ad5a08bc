import { type Api, ApiError, pauseAfter } from './api.ts';
import type { Run } from './command.ts';

/** What a command prints, sent while it runs. */
export interface OutputStream {
  add(chunk: Buffer, source: 'stdout' | 'stderr'): void;
  /**
   * Ends it, sending what is left; true when the server has all of the output, piece by piece. False when the report should
   * carry it: nothing was sent yet, it was too much to be kept whole, or the server was away. Never rejects.
   */
  finish(): Promise<boolean>;
}

/** So much that waits is sent before its time, and so much is sent at once at the most. */
const SOON = 16_384;
const MOST = 65_536;
/** Of more than the server keeps, the report carries the end. */
const MAX_WAITING = 1_048_576;
const TIMEOUT_MS = 5_000;

/**
 * Sends the output of a run in pieces, every `everyMs`, that say where they begin: one whose answer was lost is sent again, and the server
 * knows it by that. A server that is away changes nothing for the command; what it prints waits.
 */
export function streamOutput(api: Api, run: Run, everyMs: number): OutputStream {
  // One each, since a character of one may be cut by what the other prints.
  const decoders = { stdout: newDecoder(), stderr: newDecoder() };
  let waiting = '';
  /** How many characters the server has. */
  let offset = 0;
  let hopeless = false;
  let troubles = 0;
  let ending = false;
  let wake: () => void = () => {};

  const take = (text: string) => {
    if (hopeless) return;
    waiting += text.replaceAll('\0', '\u{fffd}');
    if (waiting.length > MAX_WAITING) giveUp();
    else if (waiting.length >= SOON && troubles === 0) wake();
  };
  const giveUp = () => {
    hopeless = true;
    waiting = '';
    wake();
  };
  const send = async () => {
    const text = waiting.slice(0, MOST).replace(/[\ud800-\udbff]$/, '');
    const path = `/executions/${run.execution_id}/output`;
    const piece = { lease_token: run.lease_token, text, offset };
    try {
      const { body } = await api.post<{ truncated: boolean }>(path, piece, { timeoutMs: TIMEOUT_MS });
      waiting = waiting.slice(text.length);
      for (const _ of text) offset += 1;
      troubles = 0;
      if (body.truncated) giveUp();
    } catch (error) {
      if (error instanceof ApiError && !error.passing) giveUp();
      troubles += 1;
      return error;
    }
    return undefined;
  };
  const sleep = (ms: number) =>
    new Promise<void>((resolve) => {
      if (ending || hopeless) return resolve();
      const timer = setTimeout(resolve, ms);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  const sending = (async () => {
    for (let pauseMs = everyMs; ; ) {
      await sleep(waiting.length >= SOON && troubles === 0 ? 0 : pauseMs);
      if (ending || hopeless) return;
      const error = waiting === '' ? undefined : await send();
      pauseMs = error === undefined ? everyMs : Math.max(everyMs, pauseAfter(error, troubles));
    }
  })();

  return {
    add: (chunk, source) => take(decoders[source].decode(chunk, { stream: true })),
    async finish() {
      for (const decoder of Object.values(decoders)) take(decoder.decode());
      ending = true;
      wake();
      await sending;
      if (offset === 0) return false;
      while (waiting !== '' && troubles === 0) await send();
      return !hopeless && troubles === 0;
    },
  };
}

const newDecoder = () => new TextDecoder('utf-8', { ignoreBOM: true });
