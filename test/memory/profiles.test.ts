import { describe, expect, test } from 'vitest';
import { fill, PROFILES, type Profile } from '../../src/memory/profiles.ts';
import { hitsOf, requireYes } from '../../src/memory/remote.ts';

// What each kind of server is sent and how it answers, as its pages and its source say: a profile is right when what goes out
// has the arguments of its tools, and what comes back is led to the memories that it means.

const A = 'muster-0b0e6a1c-1111-4aaa-8bbb-000000000001';
const B = 'muster-0b0e6a1c-2222-4aaa-8bbb-000000000002';
const VALUES = {
  content: 'The breaker opens.',
  key: A,
  keys: [A],
  query: 'when does it open',
  limit: 7,
  tags: { memory_id: A, why: 'analysis' },
  topics: ['muster', 'intent:analysis'],
  facts: `memory_id: ${A}; why: analysis`,
};

interface Sample {
  /** The arguments of a store and of a search. */
  store: unknown;
  search: unknown;
  /** An answer to a search that found B before A, as the link reads it; and its scores, where the server tells them. */
  found?: unknown;
  scores?: [b: number, a: number];
  none?: unknown;
  /** What it says when it has stored, when it has not, and when it had it already. */
  yes?: unknown[];
  no?: unknown[];
  duplicate?: unknown[];
}

const triple: Pick<Sample, 'found' | 'scores' | 'none' | 'no'> = {
  // Not in the order of their likeness: it puts the best at both ends.
  found: {
    results: [
      { id: 'c1', text: 'x', metadata: { memory_id: A, project: 'none' }, score: 0.3, vector_score: 0.41 },
      { id: 'c2', text: 'part 1', metadata: { memory_id: B }, score: 0.2, vector_score: 0.5 },
      { id: 'c3', text: 'part 2', metadata: { memory_id: B }, score: 0.2, vector_score: 0.83 },
      { id: 'c4', text: 'of somebody else', metadata: { file_path: '/x.md' }, vector_score: 0.9 },
    ],
    mode: 'planning',
  },
  scores: [0.83, 0.41],
  none: { results: [], mode: 'planning' },
  no: [{ success: false, error: 'Empty text provided' }, 'Error: Empty text provided'],
};

const SAMPLES: Record<string, Sample> = {
  'server-memory': {
    store: { entities: [{ name: A, entityType: 'memory', observations: [VALUES.content, VALUES.facts] }] },
    search: { query: VALUES.query },
    found: {
      entities: [
        { name: B, entityType: 'memory', observations: ['b'] },
        { name: A, entityType: 'memory', observations: ['a'] },
      ],
      relations: [],
    },
    none: { entities: [], relations: [] },
    yes: [{ entities: [] }],
    no: ['MCP error -32602: Invalid arguments for tool create_entities'],
  },
  'memory-mcp-triple-system': {
    ...triple,
    store: { text: VALUES.content, metadata: VALUES.tags },
    search: { query: VALUES.query, limit: 7, mode: 'planning', detail: 'full' },
    yes: [`Stored memory: The breaker opens....\nTagged: WHO=x, PROJECT=y\nLifecycle: hot\nChunks: 0a1b`],
  },
  'memory-mcp-triple-system-rest': {
    ...triple,
    store: { text: VALUES.content, metadata: VALUES.tags },
    search: { query: VALUES.query, limit: 7, mode: 'planning' },
    yes: [{ success: true, chunk_id: '0a1b', chunks_stored: 1 }],
  },
  'mcp-memory-service': {
    store: { content: VALUES.content, tags: VALUES.topics, memory_type: 'note', metadata: VALUES.tags },
    search: { query: VALUES.query, n_results: 7 },
    found: {
      memories: [
        { content: 'b', content_hash: '1', tags: ['muster'], metadata: { memory_id: B }, similarity_score: 0.9 },
        { content: 'a', content_hash: '2', tags: ['muster'], metadata: { memory_id: A }, similarity_score: 0.25 },
      ],
      query: 'x',
      count: 2,
    },
    scores: [0.9, 0.25],
    none: { memories: [], query: 'x', count: 0 },
    yes: [{ success: true, message: 'Memory stored successfully', content_hash: '1' }],
    no: [{ success: false, message: 'The storage is full' }],
    duplicate: [{ success: false, message: 'Duplicate content detected (exact match)', content_hash: '1' }],
  },
  'mcp-memory-service-stdio': {
    store: { content: VALUES.content, conversation_id: A, metadata: VALUES.tags },
    search: { query: VALUES.query, limit: 7 },
    found: `Found 2 memories:\n1. b\n   metadata: {'memory_id': '${B}'}\n2. a\n   metadata: {'memory_id': '${A}'}`,
    none: 'No memories found',
    yes: ['Memory stored successfully (hash: 1)'],
    no: ['Error storing memory: disk full'],
    duplicate: ['Error: Duplicate content detected (exact match)'],
  },
  'agent-memory-server': {
    store: {
      memories: [{ id: A, text: VALUES.content, user_id: 'muster', namespace: 'muster', topics: VALUES.topics }],
    },
    search: { text: VALUES.query, namespace: { eq: 'muster' }, limit: 7 },
    found: {
      memories: [
        { id: B, text: 'b', dist: 0.125, score: 0.875 },
        { id: A, text: 'a', dist: 0.5, score: 0.5 },
      ],
      total: 2,
      next_offset: null,
    },
    scores: [0.875, 0.5],
    none: { memories: [], total: 0, next_offset: null },
    yes: [{ status: 'ok' }],
  },
  mem0: {
    store: { text: VALUES.content, user_id: 'muster', app_id: 'muster', metadata: VALUES.tags },
    search: { query: VALUES.query, filters: { AND: [{ app_id: 'muster' }] }, limit: 7 },
    found: {
      results: [
        { id: '1', memory: 'b', metadata: { memory_id: B }, score: 0.7 },
        { id: '2', memory: 'a', metadata: { memory_id: A }, score: 0.6 },
      ],
    },
    scores: [0.7, 0.6],
    none: { results: [] },
    yes: [{ event_id: 'e1', status: 'PENDING' }],
    no: [{ error: 'rate_limited', message: 'slow down' }],
  },
  graphiti: {
    store: {
      name: A,
      episode_body: VALUES.content,
      group_id: 'muster',
      source: 'text',
      source_description: VALUES.facts,
    },
    search: { query: VALUES.query, max_facts: 7 },
    yes: [{ message: 'Episode queued for processing' }],
    no: [{ error: 'Graphiti service not initialized' }],
  },
  'basic-memory': {
    store: {
      title: A,
      content: VALUES.content,
      directory: 'muster',
      tags: VALUES.topics,
      metadata: VALUES.tags,
      overwrite: true,
      output_format: 'json',
    },
    search: { query: VALUES.query, page: 1, page_size: 7, output_format: 'json' },
    found: {
      results: [
        { title: B, score: 0.9, permalink: `muster/${B}`, content: 'b', file_path: `muster/${B}.md`, metadata: {} },
        { title: A, score: 0.8, permalink: `muster/${A}`, content: 'a', file_path: `muster/${A}.md`, metadata: {} },
      ],
    },
    scores: [0.9, 0.8],
    none: { results: [] },
    yes: [{ title: A, permalink: `muster/${A}`, action: 'created' }],
  },
  chroma: {
    store: {
      collection_name: 'muster',
      documents: [VALUES.content],
      ids: [A],
      metadatas: [VALUES.tags],
    },
    search: { collection_name: 'muster', query_texts: [VALUES.query], n_results: 7 },
    found: { ids: [[B, A]], documents: [['b', 'a']], metadatas: [[{}, {}]], distances: [[0.2, 1.4]] },
    none: { ids: [[]], documents: [[]], metadatas: [[]], distances: [[]] },
    yes: ['Successfully added 1 documents to collection muster'],
    duplicate: [`Error: The following IDs already exist in collection 'muster': ['${A}']`],
  },
  qdrant: {
    store: { information: VALUES.content, metadata: VALUES.tags },
    search: { query: VALUES.query },
    found: [
      "Results for the query 'x'",
      `<entry><content>b</content><metadata>{"memory_id": "${B}"}</metadata></entry>`,
      `<entry><content>a</content><metadata>{"memory_id": "${A}"}</metadata></entry>`,
    ],
    none: null,
    yes: ['Remembered: The breaker opens.'],
  },
};

test('there is a sample of every profile', () => {
  expect(Object.keys(SAMPLES)).toEqual(Object.keys(PROFILES));
});

describe.each(Object.entries(SAMPLES))('%s', (name, sample) => {
  const profile = PROFILES[name] as Profile;

  test('is sent what its tools take', () => {
    expect(fill(profile.store.args, VALUES)).toEqual(sample.store);
    expect(fill(profile.search.args, VALUES)).toEqual(sample.search);
    if (profile.find) expect(JSON.stringify(fill(profile.find.args, VALUES))).toContain(A);
  });

  test.runIf(sample.found !== undefined)('is understood when it found something, best first, and nothing', () => {
    expect(() => requireYes(sample.found, profile)).not.toThrow();
    const hits = hitsOf(sample.found, profile.search);
    expect(hits.map(({ key }) => key)).toEqual([B, A]);
    if (sample.scores) expect(hits.map(({ score }) => score)).toEqual(sample.scores);
    for (const { score } of hits) expect(score).toBeGreaterThan(0);
    expect(() => requireYes(sample.none, profile)).not.toThrow();
    expect(hitsOf(sample.none, profile.search)).toEqual([]);
  });

  test('is believed when it says yes, and when it has it already; and not when it says no in a good answer', () => {
    for (const yes of [...(sample.yes ?? []), ...(sample.duplicate ?? [])]) {
      expect(() => requireYes(yes, profile), JSON.stringify(yes)).not.toThrow();
    }
    const noes = [...(sample.no ?? []), { error: 'broken' }, 'Error: broken'];
    for (const no of noes) expect(() => requireYes(no, profile), JSON.stringify(no)).toThrow();
    expect(sample.duplicate !== undefined).toBe(profile.duplicate !== undefined);
  });
});

test('a triple system without its processor answers prose, which names none of ours and is no failure', () => {
  const { search } = PROFILES['memory-mcp-triple-system'] as Profile;
  expect(hitsOf('Result 1:\nSomething.\n\nTier: hybrid\nScore: 0.2619\nFile: /memory/stored.md\n', search)).toEqual([]);
  const { search: strict } = PROFILES['mem0'] as Profile;
  expect(() => hitsOf('<html>', strict)).toThrow(/no list of results/);
});
