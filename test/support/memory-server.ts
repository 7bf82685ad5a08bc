import { randomUUID } from 'node:crypto';
import {
  createServer,
  type IncomingHttpHeaders,
  type IncomingMessage,
  type Server,
  type ServerResponse,
} from 'node:http';
import type { AddressInfo } from 'node:net';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import { z } from 'zod';

/** What is wrong with the server from now on. */
export type Fault =
  | 'none'
  | 'hang' // takes the call and never answers
  | 'slow' // stores, and answers after the caller has given up
  | 'status-500'
  | 'garbage' // 200 and no JSON
  | 'half' // the beginning of an answer, then the end of the connection
  | 'unauthorized'
  | 'error-text' // says in a successful answer that it failed
  | 'lie' // says that it stored, and does not
  | 'huge'; // answers ten megabytes

export interface MemoryServer {
  url: string;
  /** What it keeps, in the order in which it came: the key of a memory and its text. */
  kept: { key: string; text: string; metadata: Record<string, unknown> }[];
  calls: { store: number; search: number };
  /** The headers of the latest call. */
  headers: IncomingHttpHeaders;
  fault: Fault;
  /** Ends every connection and every session; it keeps what it has. */
  kill(): Promise<void>;
  /** Listens again on the same port. */
  restart(): Promise<void>;
  connections(): Promise<number>;
}

const SLOW_MS = 4_000;

/**
 * A small memory server over Streamable HTTP with the tools of server-memory (finds by key, one of a name) and
 * memory-mcp-triple-system (searches words, stores everything again that it gets again), the latter also over plain REST; and
 * the store of mcp-memory-service, which says as an error that it has something already.
 */
export async function startMemoryServer(): Promise<MemoryServer> {
  let sessions = new Map<string, StreamableHTTPServerTransport>();
  const waiting = new Set<ServerResponse>();
  let http: Server | undefined;

  const wordsIn = (query: string, limit: number) => {
    const words = query.toLowerCase().match(/\w+/g) ?? [];
    return server.kept
      .map(({ text, metadata }) => {
        const has = words.filter((word) => text.toLowerCase().includes(word)).length;
        return { text, metadata, vector_score: has / Math.max(1, words.length) };
      })
      .filter(({ vector_score }) => vector_score > 0)
      .sort((a, b) => b.vector_score - a.vector_score)
      .slice(0, limit);
  };

  const tools = () => {
    const mcp = new McpServer({ name: 'test-memory', version: '1' });
    const say = (value: unknown) => {
      if (server.fault === 'error-text')
        return { content: [{ type: 'text' as const, text: 'Error: the index is broken' }] };
      const padding = server.fault === 'huge' ? 'x'.repeat(10 * 1024 * 1024) : undefined;
      return { content: [{ type: 'text' as const, text: JSON.stringify({ ...(value as object), padding }) }] };
    };
    const store = async (key: string, text: string, metadata: Record<string, unknown>) => {
      server.calls.store++;
      if (server.fault !== 'lie' && server.fault !== 'error-text') server.kept.push({ key, text, metadata });
      if (server.fault === 'slow') await new Promise((resolve) => setTimeout(resolve, SLOW_MS));
    };
    mcp.registerTool(
      'memory_store',
      { inputSchema: { text: z.string(), metadata: z.record(z.string(), z.unknown()) } },
      async ({ text, metadata }) => {
        await store(String(metadata['memory_id']), text, metadata);
        return say({ success: true });
      },
    );
    mcp.registerTool(
      'unified_search',
      { inputSchema: { query: z.string(), limit: z.number(), mode: z.string(), detail: z.string() } },
      async ({ query, limit }) => {
        server.calls.search++;
        const results = wordsIn(query, limit);
        return say({ results });
      },
    );
    mcp.registerTool(
      'store_memory',
      { inputSchema: { content: z.string(), metadata: z.record(z.string(), z.unknown()) } },
      async ({ content, metadata }) => {
        if (server.kept.some(({ text }) => text === content)) {
          const text = 'Duplicate content detected (exact match)';
          return { isError: true, content: [{ type: 'text' as const, text }] };
        }
        await store(String(metadata['memory_id']), content, metadata);
        return say({ success: true });
      },
    );
    mcp.registerTool('lifecycle_status', {}, async () => say({ ok: true }));
    const entity = z.object({ name: z.string(), entityType: z.string(), observations: z.array(z.string()) });
    mcp.registerTool('create_entities', { inputSchema: { entities: z.array(entity) } }, async ({ entities }) => {
      for (const { name, observations } of entities) {
        if (!server.kept.some(({ key }) => key === name)) await store(name, observations[0] ?? '', {});
      }
      return say({ entities });
    });
    const listed = (keep: (entry: MemoryServer['kept'][number]) => boolean) =>
      say({ entities: server.kept.filter(keep).map(({ key, text }) => ({ name: key, observations: [text] })) });
    mcp.registerTool('open_nodes', { inputSchema: { names: z.array(z.string()) } }, async ({ names }) =>
      listed(({ key }) => names.includes(key)),
    );
    mcp.registerTool('search_nodes', { inputSchema: { query: z.string() } }, async ({ query }) => {
      server.calls.search++;
      return listed(({ text }) => text.toLowerCase().includes(query.toLowerCase()));
    });
    return mcp;
  };

  const handle = async (request: IncomingMessage, response: ServerResponse) => {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const { fault } = server;
    server.headers = request.headers;
    if (fault === 'hang') return void waiting.add(response);
    if (fault === 'status-500') return void response.writeHead(500).end('broken');
    if (fault === 'unauthorized') return void response.writeHead(401).end('who are you?');
    if (fault === 'garbage') {
      return void response
        .writeHead(200, { 'content-type': 'application/json' })
        .end('<html>not what you think</html>');
    }
    if (fault === 'half') {
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': '1000' });
      response.write('{"jsonrpc":"2.0","id":1,"resu');
      return void setImmediate(() => response.destroy());
    }
    const body: unknown = chunks.length === 0 ? undefined : JSON.parse(Buffer.concat(chunks).toString());
    if (request.url?.startsWith('/tools/')) {
      const { text, metadata, query, limit } = (body ?? {}) as {
        text: string;
        metadata: Record<string, string>;
        query: string;
        limit: number;
      };
      const answers: Record<string, () => object> = {
        '/tools/stats': () => ({ vectors: { count: server.kept.length } }),
        '/tools/search': () => ({ results: wordsIn(query, limit) }),
        '/tools/memory_store': () => {
          server.kept.push({ key: String(metadata['memory_id']), text, metadata });
          return { success: true };
        },
      };
      const answer = answers[request.url];
      response.writeHead(answer ? 200 : 404, { 'content-type': 'application/json' });
      return void response.end(JSON.stringify(answer?.() ?? { detail: 'Not Found' }));
    }
    const id = request.headers['mcp-session-id'];
    let transport = typeof id === 'string' ? sessions.get(id) : undefined;
    if (!transport) {
      if (id !== undefined) return void response.writeHead(404).end();
      const mine = sessions;
      const made = new StreamableHTTPServerTransport({
        sessionIdGenerator: () => randomUUID(),
        enableJsonResponse: true,
        onsessioninitialized: (session) => void mine.set(session, made),
      });
      transport = made;
      await tools().connect(made as Parameters<McpServer['connect']>[0]);
    }
    await transport.handleRequest(request, response, body);
  };

  const listen = (port: number) =>
    new Promise<void>((resolve, reject) => {
      const made = createServer((request, response) => void handle(request, response).catch(() => response.destroy()));
      made.once('error', reject);
      made.listen(port, '127.0.0.1', resolve);
      http = made;
    });
  await listen(0);
  const { port } = (http as unknown as Server).address() as AddressInfo;
  const server: MemoryServer = {
    url: `http://127.0.0.1:${port}/mcp`,
    kept: [],
    calls: { store: 0, search: 0 },
    headers: {},
    fault: 'none',
    async kill() {
      sessions = new Map();
      for (const response of waiting) response.destroy();
      waiting.clear();
      const closed = new Promise((resolve) => http?.close(resolve));
      http?.closeAllConnections();
      await closed;
    },
    restart: () => listen(port),
    connections: () =>
      new Promise((resolve, reject) =>
        http?.getConnections((error, count) => (error ? reject(error) : resolve(count))),
      ),
  };
  return server;
}
