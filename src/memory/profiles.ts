// Memory servers as data: what their tools are called, what they are given and where their answers lie. A new server is a
// new row. Facts about each: the pages of the servers themselves.
//
// Arguments are templates: a text `{name}` becomes the value as it is. Values: content, key (the memory's own name), query,
// limit, tags (flat scalars), topics (a list of texts), facts (the tags in one text), keys (the names that are looked for).
// For `rest`, a tool is a method and a path, such as `POST /tools/search`.

type Template = { readonly [name: string]: unknown };

interface Call {
  tool: string;
  args: Template;
}

export interface Profile {
  transports: readonly ('streamable-http' | 'stdio' | 'rest')[];
  store: Call;
  /** `hits` is the path to the list of hits, empty for the answer itself, undefined for answers that are prose. */
  search: Call & {
    hits?: string;
    /** The path to a hit's score, and whether a low one is good. Without one, the order counts. */
    score?: string;
    distance?: boolean;
    /** It answers prose instead when a part of it is out of order. */
    orProse?: boolean;
    /** Hits that cannot be led back to what was stored: Muster then searches in Postgres. */
    unjoinable?: boolean;
  };
  /** Looks memories up by their keys; where there is none, a search for their text has to do. */
  find?: Call;
  /** Storing one key twice leaves one. */
  idempotent: boolean;
  /** It says yes before it has stored: what was stored just now need not be found yet. */
  async?: boolean;
  /** What it says of a memory that it has already. */
  duplicate?: RegExp;
  /** A call that costs little and touches the store, for looking at it. */
  health?: Call;
  /** The header that takes the API key; else Authorization: Bearer. */
  keyHeader?: string;
}

const tripleSystem = {
  idempotent: false,
  keyHeader: 'x-mcp-api-key',
} as const;

/** Every kind of memory server that Muster knows, by the name that MEMORY_MCP_PROFILE takes. */
export const PROFILES: Readonly<Record<string, Profile>> = {
  'server-memory': {
    transports: ['stdio', 'streamable-http'],
    store: {
      tool: 'create_entities',
      args: { entities: [{ name: '{key}', entityType: 'memory', observations: ['{content}', '{facts}'] }] },
    },
    search: { tool: 'search_nodes', args: { query: '{query}' }, hits: 'entities' },
    find: { tool: 'open_nodes', args: { names: '{keys}' } },
    idempotent: true,
  },
  'memory-mcp-triple-system': {
    ...tripleSystem,
    transports: ['stdio', 'streamable-http'],
    store: { tool: 'memory_store', args: { text: '{content}', metadata: '{tags}' } },
    // Any other mode answers five hits, or prose.
    search: {
      tool: 'unified_search',
      args: { query: '{query}', limit: '{limit}', mode: 'planning', detail: 'full' },
      hits: 'results',
      score: 'vector_score',
      orProse: true,
    },
    health: { tool: 'lifecycle_status', args: {} },
  },
  'memory-mcp-triple-system-rest': {
    ...tripleSystem,
    transports: ['rest'],
    store: { tool: 'POST /tools/memory_store', args: { text: '{content}', metadata: '{tags}' } },
    search: {
      tool: 'POST /tools/search',
      args: { query: '{query}', limit: '{limit}', mode: 'planning' },
      hits: 'results',
      score: 'vector_score',
    },
    health: { tool: 'GET /tools/stats', args: {} },
  },
  'mcp-memory-service': {
    transports: ['streamable-http'],
    store: {
      tool: 'store_memory',
      args: { content: '{content}', tags: '{topics}', memory_type: 'note', metadata: '{tags}' },
    },
    search: {
      tool: 'retrieve_memory',
      args: { query: '{query}', n_results: '{limit}' },
      hits: 'memories',
      score: 'similarity_score',
    },
    idempotent: true,
    duplicate: /duplicate content/i,
  },
  'mcp-memory-service-stdio': {
    transports: ['stdio'],
    store: {
      tool: 'memory_store',
      args: { content: '{content}', conversation_id: '{key}', metadata: '{tags}' },
    },
    search: { tool: 'memory_search', args: { query: '{query}', limit: '{limit}' } },
    idempotent: true,
    duplicate: /duplicate content/i,
  },
  'agent-memory-server': {
    transports: ['streamable-http', 'stdio'],
    store: {
      tool: 'create_long_term_memories',
      args: {
        memories: [{ id: '{key}', text: '{content}', user_id: 'muster', namespace: 'muster', topics: '{topics}' }],
      },
    },
    search: {
      tool: 'search_long_term_memory',
      args: { text: '{query}', namespace: { eq: 'muster' }, limit: '{limit}' },
      hits: 'memories',
      score: 'dist',
      distance: true,
    },
    idempotent: true,
    async: true,
  },
  mem0: {
    transports: ['streamable-http', 'stdio'],
    store: {
      tool: 'add_memory',
      args: { text: '{content}', user_id: 'muster', app_id: 'muster', metadata: '{tags}' },
    },
    search: {
      tool: 'search_memories',
      args: { query: '{query}', filters: { AND: [{ app_id: 'muster' }] }, limit: '{limit}' },
      hits: 'results',
      score: 'score',
    },
    idempotent: false,
    async: true,
  },
  graphiti: {
    transports: ['streamable-http', 'stdio'],
    store: {
      tool: 'add_memory',
      args: {
        name: '{key}',
        episode_body: '{content}',
        group_id: 'muster',
        source: 'text',
        source_description: '{facts}',
      },
    },
    // Its facts name no episode that we could know.
    search: {
      tool: 'search_memory_facts',
      args: { query: '{query}', max_facts: '{limit}' },
      hits: 'facts',
      unjoinable: true,
    },
    idempotent: false,
    async: true,
  },
  'basic-memory': {
    transports: ['streamable-http', 'stdio'],
    store: {
      tool: 'write_note',
      args: {
        title: '{key}',
        content: '{content}',
        directory: 'muster',
        tags: '{topics}',
        metadata: '{tags}',
        overwrite: true,
        output_format: 'json',
      },
    },
    search: {
      tool: 'search_notes',
      args: { query: '{query}', page: 1, page_size: '{limit}', output_format: 'json' },
      hits: 'results',
      score: 'score',
    },
    idempotent: true,
  },
  chroma: {
    transports: ['stdio'],
    store: {
      tool: 'chroma_add_documents',
      args: { collection_name: 'muster', documents: ['{content}'], ids: ['{key}'], metadatas: ['{tags}'] },
    },
    search: {
      tool: 'chroma_query_documents',
      args: { collection_name: 'muster', query_texts: ['{query}'], n_results: '{limit}' },
      hits: 'ids.0',
    },
    idempotent: true,
    duplicate: /already exist/i,
  },
  qdrant: {
    transports: ['streamable-http', 'stdio'],
    store: { tool: 'qdrant-store', args: { information: '{content}', metadata: '{tags}' } },
    search: { tool: 'qdrant-find', args: { query: '{query}' } },
    idempotent: false,
  },
};

/** Fills the templates of a call's arguments in. */
export function fill(template: unknown, values: Record<string, unknown>): unknown {
  if (typeof template === 'string') {
    const name = /^\{(\w+)\}$/.exec(template)?.[1];
    return name === undefined ? template : values[name];
  }
  if (Array.isArray(template)) return template.map((entry) => fill(entry, values));
  if (typeof template === 'object' && template !== null) {
    return Object.fromEntries(Object.entries(template).map(([name, value]) => [name, fill(value, values)]));
  }
  return template;
}
