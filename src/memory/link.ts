import { setMaxListeners } from 'node:events';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport, StreamableHTTPError } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ErrorCode, McpError } from '@modelcontextprotocol/sdk/types.js';
import type { Config } from '../config.ts';

// The wire to a memory server: Streamable HTTP and stdio by the official SDK, and plain REST. Each call has a time limit,
// and what went wrong says whether the call may have had its effect.

/** A call that failed. `ambiguous`: it may have been done. `rejected`: the server took it for wrong, and is well. */
export class LinkError extends Error {
  override readonly name = 'LinkError';
  readonly ambiguous: boolean;
  readonly rejected: boolean;

  constructor(message: string, kind: { ambiguous?: boolean; rejected?: boolean; cause?: unknown } = {}) {
    super(message, { cause: kind.cause });
    this.ambiguous = kind.ambiguous ?? false;
    this.rejected = kind.rejected ?? false;
  }
}

export interface Link {
  /** Calls a tool; answers what it said: an object where it answers JSON, else a text. Throws LinkError. */
  call(tool: string, args: Record<string, unknown>, timeoutMs: number): Promise<unknown>;
  /** Connects, and answers the names of the tools; none for REST, which has no list. */
  tools(timeoutMs: number): Promise<string[]>;
  close(): Promise<void>;
}

/** No answer may be larger; what a server says is read into memory. */
const MAX_ANSWER_BYTES = 8 * 1024 * 1024;

/** Makes the link that the configuration describes; it connects when it is first used. */
export function createLink(config: Config, keyHeader: string | undefined, onNoise: (text: string) => void): Link {
  return config.MEMORY_MCP_TRANSPORT === 'rest' ? restLink(config, keyHeader) : mcpLink(config, keyHeader, onNoise);
}

function keyHeaders({ MEMORY_MCP_API_KEY: key }: Config, keyHeader: string | undefined): Record<string, string> {
  if (key === undefined) return {};
  return keyHeader === undefined ? { authorization: `Bearer ${key}` } : { [keyHeader]: key };
}

function mcpLink(config: Config, keyHeader: string | undefined, onNoise: (text: string) => void): Link {
  let connected: Promise<Client> | undefined;
  let closed = false;

  const connect = async (timeoutMs: number): Promise<Client> => {
    const client = new Client({ name: 'muster', version: '1' });
    const transport = config.MEMORY_MCP_TRANSPORT === 'stdio' ? stdio(config, onNoise) : http(config, keyHeader);
    client.onerror = () => {}; // The call under way rejects with the same error.
    client.onclose = () => drop(client);
    current = client;
    try {
      await client.connect(transport as Parameters<Client['connect']>[0], { timeout: timeoutMs });
      return client;
    } catch (error) {
      drop(client);
      throw error;
    }
  };
  let current: Client | undefined;
  // What failed on its way leaves things behind in a client: a new one is made, and this one is closed.
  const drop = (client: Client) => {
    if (current === client) {
      current = undefined;
      connected = undefined;
    }
    client.onclose = () => {};
    void client.close().catch(() => {});
  };
  /** Everything that a call needs, a connection and a second try among it, within one limit. */
  const withClient = async <T>(timeoutMs: number, act: (client: Client, leftMs: number) => Promise<T>): Promise<T> => {
    const deadline = performance.now() + timeoutMs;
    const leftMs = () => Math.max(1, Math.round(deadline - performance.now()));
    for (let attempt = 1; ; attempt++) {
      if (closed) throw new LinkError('The link is closed.');
      connected ??= connect(Math.max(timeoutMs, config.MEMORY_MCP_WARMUP_TIMEOUT_MS));
      let client: Client;
      try {
        client = await within(connected, leftMs());
      } catch (error) {
        throw new LinkError(`No connection: ${sentence(error)}`, { cause: error });
      }
      try {
        return await act(client, leftMs());
      } catch (error) {
        if (error instanceof LinkError) throw error;
        if (isBroken(error)) drop(client);
        // The server was started again and knows no session: it has seen no call of this one.
        if (error instanceof StreamableHTTPError && error.code === 404 && attempt === 1) continue;
        throw linkError(error);
      }
    }
  };
  /** What the server itself answered leaves a connection whole; so does a slow answer of a process, which would lose its place. */
  const isBroken = (error: unknown) => {
    if (!(error instanceof McpError) || error.code === ErrorCode.ConnectionClosed) return true;
    return error.code === ErrorCode.RequestTimeout && config.MEMORY_MCP_TRANSPORT !== 'stdio';
  };
  return {
    call: (tool, args, timeoutMs) =>
      withClient(timeoutMs, async (client, leftMs) => {
        const result = await client.callTool({ name: tool, arguments: args }, undefined, { timeout: leftMs });
        const blocks = Array.isArray(result.content) ? (result.content as { type: string; text?: string }[]) : [];
        const text = blocks.map((block) => block.text ?? '').join('\n');
        if (result.isError === true)
          throw new LinkError(short(text) || 'The tool answered an error.', { rejected: /-32602/.test(text) });
        if (result.structuredContent !== undefined) return unwrap(result.structuredContent);
        return parsed(text);
      }),
    tools: (timeoutMs) =>
      withClient(timeoutMs, async (client, leftMs) => {
        const { tools } = await client.listTools(undefined, { timeout: leftMs });
        return tools.map(({ name }) => name);
      }),
    async close() {
      closed = true;
      const client = current;
      current = undefined;
      connected = undefined;
      if (client) {
        client.onclose = () => {};
        await client.close().catch(() => {});
      }
    },
  };
}

/** FastMCP wraps answers that are no objects. */
const unwrap = (content: unknown): unknown => {
  const keys = Object.keys(content as object);
  return keys.length === 1 && keys[0] === 'result' ? (content as { result: unknown }).result : content;
};

function parsed(text: string): unknown {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && value !== null ? value : text;
  } catch {
    return text;
  }
}

function linkError(error: unknown): LinkError {
  if (error instanceof McpError) {
    const timedOut = error.code === ErrorCode.RequestTimeout;
    return new LinkError(short(error.message), {
      ambiguous: timedOut || error.code === ErrorCode.ConnectionClosed,
      rejected: error.code === ErrorCode.InvalidParams,
      cause: error,
    });
  }
  if (error instanceof StreamableHTTPError) {
    const code = error.code ?? 0;
    return new LinkError(`HTTP ${code}: ${short(error.message)}`, {
      ambiguous: code < 400 || code >= 500,
      rejected: code === 400 || code === 413 || code === 422,
      cause: error,
    });
  }
  return new LinkError(sentence(error), { ambiguous: !neverSent(error), cause: error });
}

/** Whether the connection was refused before anything was sent on it. */
function neverSent(error: unknown): boolean {
  for (let e = error; e instanceof Error; e = e.cause) {
    if (
      ['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'ENOENT', 'EHOSTUNREACH'].includes(
        (e as NodeJS.ErrnoException).code ?? '',
      )
    )
      return true;
  }
  return error instanceof Error && error.message === 'Not connected';
}

function sentence(error: unknown): string {
  let e = error;
  while (e instanceof Error && e.cause !== undefined) e = e.cause;
  if (!(e instanceof Error)) return short(String(e));
  const { code } = e as NodeJS.ErrnoException;
  return short(typeof code === 'string' ? code : e.message);
}

const short = (text: string) => text.slice(0, 300).toWellFormed().replaceAll('\0', '');

async function within<T>(promise: Promise<T>, ms: number): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${ms} ms`)), ms);
  });
  promise.catch(() => {}); // It may end after nobody waits for it.
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

function stdio(config: Config, onNoise: (text: string) => void): StdioClientTransport {
  const transport = new StdioClientTransport({
    command: config.MEMORY_MCP_COMMAND ?? '',
    args: [...(config.MEMORY_MCP_ARGS ?? [])],
    // Nothing of our own environment: it holds secrets. The SDK adds HOME, PATH and the like.
    env: { ...config.MEMORY_MCP_ENV },
    stderr: 'pipe',
    ...(config.MEMORY_MCP_CWD === undefined ? {} : { cwd: config.MEMORY_MCP_CWD }),
  });
  // Unread, a full pipe would stop the server.
  transport.stderr?.on('data', (chunk: Buffer) => onNoise(short(chunk.toString('utf8'))));
  return transport;
}

function http(config: Config, keyHeader: string | undefined): StreamableHTTPClientTransport {
  const limitMs = Math.max(config.MEMORY_MCP_STORE_TIMEOUT_MS, config.MEMORY_MCP_SEARCH_TIMEOUT_MS) + 500;
  return new StreamableHTTPClientTransport(new URL(config.MEMORY_MCP_URL ?? ''), {
    requestInit: { headers: keyHeaders(config, keyHeader) },
    fetch: async (input, init = {}) => {
      // The stream of a server's own messages: nothing that we need, and undici would cut it every five minutes.
      if (init.method === 'GET') return new Response(null, { status: 405 });
      return limitedFetch(input, init, limitMs);
    },
  });
}

/** fetch with an end, also while the answer is read, and a bound on its size. The SDK's own timeout leaves the socket open. */
async function limitedFetch(input: string | URL, init: RequestInit, limitMs: number): Promise<Response> {
  const aborter = new AbortController();
  const abort = () => aborter.abort();
  const outer = init.signal;
  // One signal of a connection for all of its calls.
  if (outer) setMaxListeners(0, outer);
  outer?.addEventListener('abort', abort);
  const release = () => {
    clearTimeout(timer);
    outer?.removeEventListener('abort', abort);
  };
  const timer = setTimeout(() => {
    abort();
    outer?.removeEventListener('abort', abort);
  }, limitMs);
  try {
    const response = await fetch(input, { ...init, signal: aborter.signal });
    if (!response.body) {
      release();
      return response;
    }
    let bytes = 0;
    const bounded = response.body.pipeThrough(
      new TransformStream<Uint8Array, Uint8Array>({
        transform(chunk, controller) {
          bytes += chunk.byteLength;
          if (bytes > MAX_ANSWER_BYTES) {
            abort();
            controller.error(new Error(`an answer of more than ${MAX_ANSWER_BYTES} bytes`));
          } else controller.enqueue(chunk);
        },
        flush: release,
      }),
    );
    return new Response(bounded, {
      status: response.status,
      statusText: response.statusText,
      headers: response.headers,
    });
  } catch (error) {
    release();
    throw error;
  }
}

function restLink(config: Config, keyHeader: string | undefined): Link {
  const base = (config.MEMORY_MCP_URL ?? '').replace(/\/$/, '');
  const call: Link['call'] = async (tool, args, timeoutMs) => {
    const [method = 'POST', path = '/'] = tool.split(' ');
    let response: Response;
    let text: string;
    try {
      response = await limitedFetch(
        `${base}${path}`,
        {
          method,
          redirect: 'error',
          headers: { ...keyHeaders(config, keyHeader), accept: 'application/json', 'content-type': 'application/json' },
          ...(method === 'GET' ? {} : { body: JSON.stringify(args) }),
        },
        timeoutMs,
      );
      text = await response.text();
    } catch (error) {
      throw new LinkError(sentence(error), { ambiguous: !neverSent(error), cause: error });
    }
    if (!response.ok) {
      throw new LinkError(`HTTP ${response.status}: ${short(text)}`, {
        ambiguous: response.status >= 500,
        rejected: [400, 413, 422].includes(response.status),
      });
    }
    return parsed(text);
  };
  return { call, tools: async () => [], close: async () => {} };
}
