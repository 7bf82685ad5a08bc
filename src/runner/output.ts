/** The end of what a command prints. */
export interface Tail {
  add(chunk: Buffer): void;
  /** What is kept, as text that the server takes: well-formed, without U+0000. */
  text(): string;
}

/** Keeps the last `maxBytes` bytes. */
export function createTail(maxBytes: number): Tail {
  let chunks: Buffer[] = [];
  let size = 0;
  const cut = () => {
    const all = Buffer.concat(chunks, size);
    let start = Math.max(0, size - maxBytes);
    // Not in the middle of a character: behind the bytes that continue one.
    if (start > 0) while (start < size && ((all[start] ?? 0) & 0b1100_0000) === 0b1000_0000) start++;
    const kept = all.subarray(start);
    chunks = [kept];
    size = kept.length;
    return kept;
  };
  return {
    add(chunk) {
      chunks.push(chunk);
      size += chunk.length;
      if (size > maxBytes * 2) cut();
    },
    text: () => cut().toString('utf8').replaceAll('\0', '\u{fffd}'),
  };
}

export interface Progress {
  percent?: number;
  message?: string;
}

const MARK = /^::progress +(\d{1,3}(?:\.\d+)?)%?(?: +(.*))?$/;
const MESSAGE_CHARACTERS = 1_024;
const MAX_LINE = 8_192;

/** Reads progress off a command's output: its last line that is not empty, and the percentage of its last `::progress`. */
export function createProgressReader(): { add(chunk: Buffer): void; current(): Progress } {
  const decoder = new TextDecoder();
  let line = '';
  let percent: number | undefined;
  let message: string | undefined;
  const end = (text: string) => {
    const mark = MARK.exec(text);
    if (mark && Number(mark[1]) <= 100) {
      percent = Number(mark[1]);
      if (mark[2]) message = mark[2];
    } else if (text.trim() !== '') {
      message = text.trim();
    }
  };
  return {
    add(chunk) {
      const parts = (line + decoder.decode(chunk, { stream: true })).split(/\r?\n|\r/);
      line = (parts.pop() ?? '').slice(-MAX_LINE);
      for (const part of parts) end(part);
    },
    current: () => {
      const shown = message?.replaceAll('\0', '\u{fffd}').slice(0, MESSAGE_CHARACTERS).toWellFormed();
      return { ...(percent === undefined ? {} : { percent }), ...(shown === undefined ? {} : { message: shown }) };
    },
  };
}
