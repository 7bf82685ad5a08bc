import type { Config } from '../config.ts';
import { StartupError } from '../platform/startup-error.ts';
import { createLink, LinkError } from './link.ts';
import { fill, PROFILES, type Profile } from './profiles.ts';

/** A memory as servers get it: its text and flat facts about it. */
export interface Outgoing {
  key: string;
  content: string;
  tags: Record<string, string | number>;
}

/** What a server found: the key of one of our memories, and how near it is, from 0 to 1. */
export interface Hit {
  key: string;
  score: number;
}

/** A memory server behind its profile. Every call throws LinkError. */
export interface Remote {
  readonly profile: Profile;
  store(memory: Outgoing): Promise<void>;
  search(query: string, limit: number): Promise<Hit[]>;
  /** Whether it has this memory, as far as it can tell. */
  has(memory: Outgoing): Promise<boolean>;
  /** Those that it does not have, as far as it can tell. */
  missing<T extends Outgoing>(memories: readonly T[]): Promise<T[]>;
  /** A round trip to the store. */
  ping(timeoutMs?: number): Promise<void>;
  tools(): Promise<string[]>;
  close(): Promise<void>;
}

const KEY = /muster-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})/g;
const PROBE_LIMIT = 20;
/** How many are asked for by name in one call: the answer holds their contents, and must stay below the bound of the link. */
const NAMES_AT_ONCE = 10;

/** The remote that the configuration names; undefined where there is none. Throws StartupError for an unknown profile. */
export function createRemote(config: Config, onNoise: (text: string) => void = () => {}): Remote | undefined {
  const { MEMORY_MCP_TRANSPORT: transport, MEMORY_MCP_PROFILE: name = '' } = config;
  if (transport === undefined) return undefined;
  const profile = Object.hasOwn(PROFILES, name) ? PROFILES[name] : undefined;
  if (!profile) throw new StartupError(`MEMORY_MCP_PROFILE must be one of ${Object.keys(PROFILES).join(', ')}.`);
  if (!profile.transports.includes(transport)) {
    throw new StartupError(`MEMORY_MCP_TRANSPORT must be ${profile.transports.join(' or ')} for the profile ${name}.`);
  }
  const { MEMORY_MCP_SEARCH_TIMEOUT_MS: searchMs, MEMORY_MCP_STORE_TIMEOUT_MS: storeMs } = config;
  const link = createLink(config, profile.keyHeader, onNoise);

  const call = async ({ tool, args }: Profile['store'], values: Record<string, unknown>, timeoutMs: number) =>
    link.call(tool, fill(args, values) as Record<string, unknown>, timeoutMs);
  const search = async (query: string, limit: number, timeoutMs = searchMs) => {
    const answer = await call(profile.search, { query, limit }, timeoutMs);
    requireYes(answer, profile);
    return hitsOf(answer, profile.search);
  };
  const missing: Remote['missing'] = async (memories) => {
    const gone: (typeof memories)[number][] = [];
    if (!profile.find) {
      for (const memory of memories) {
        const hits = await search(memory.content.slice(0, 300).toWellFormed(), PROBE_LIMIT);
        if (!hits.some(({ key }) => key === memory.key)) gone.push(memory);
      }
      return gone;
    }
    for (let i = 0; i < memories.length; i += NAMES_AT_ONCE) {
      const some = memories.slice(i, i + NAMES_AT_ONCE);
      const answer = await call(profile.find, { keys: some.map(({ key }) => key) }, searchMs);
      requireYes(answer, profile);
      const said = JSON.stringify(answer);
      gone.push(...some.filter(({ key }) => !said.includes(key)));
    }
    return gone;
  };
  return {
    profile,
    async store(memory) {
      try {
        requireYes(await call(profile.store, valuesOf(memory), storeMs), profile);
      } catch (error) {
        // Some say it as an error that they have it already.
        if (!(error instanceof LinkError && profile.duplicate?.test(error.message))) throw error;
      }
    },
    search,
    has: async (memory) => (await missing([memory])).length === 0,
    missing,
    async ping(timeoutMs = searchMs) {
      if (profile.health) requireYes(await call(profile.health, {}, timeoutMs), profile);
      else await search('muster health', 1, timeoutMs);
    },
    tools: () => link.tools(config.MEMORY_MCP_WARMUP_TIMEOUT_MS),
    close: () => link.close(),
  };
}

const valuesOf = ({ key, content, tags }: Outgoing) => ({
  key,
  content,
  tags,
  topics: ['muster', `intent:${tags['intent']}`, `project:${tags['project']}`],
  facts: Object.entries(tags)
    .map(([name, value]) => `${name}: ${value}`)
    .join('; '),
});

/** Throws when an answer that came as a success says otherwise: many servers answer errors like that. */
export function requireYes(answer: unknown, { duplicate }: Profile): void {
  const text = typeof answer === 'string' ? answer : undefined;
  const fields = typeof answer === 'object' && answer !== null ? (answer as Record<string, unknown>) : {};
  const failed =
    text === undefined
      ? fields['success'] === false || Boolean(fields['error'])
      : /^\s*(error|mcp error|traceback)\b/i.test(text);
  if (!failed) return;
  const said = text ?? JSON.stringify(fields['error'] ?? fields['message'] ?? fields);
  if (duplicate?.test(said) || duplicate?.test(JSON.stringify(answer))) return;
  throw new LinkError(said.slice(0, 300).toWellFormed());
}

/** The hits of an answer, best first. Each is known by the key that we gave it, wherever in the hit that stands. */
export function hitsOf(answer: unknown, { hits: path, score: scorePath, distance, orProse }: Profile['search']): Hit[] {
  const list = path === undefined ? undefined : path.split('.').reduce(step, answer);
  const prose = path === undefined || (orProse === true && typeof answer === 'string');
  if (!prose && !Array.isArray(list)) throw new LinkError(`The answer to a search has no list of ${path}.`);
  const said = typeof answer === 'string' ? answer : JSON.stringify(answer ?? null);
  const entries: unknown[] = Array.isArray(list) ? list : [...said.matchAll(KEY)].map(([key]) => key);
  const found = new Map<string, number>();
  entries.forEach((entry, i) => {
    const [key] = JSON.stringify(entry)?.match(KEY) ?? [];
    if (key === undefined) return;
    const raw = scorePath === undefined ? undefined : scorePath.split('.').reduce(step, entry);
    const given =
      typeof raw === 'number' && Number.isFinite(raw) ? (distance ? 1 - raw : raw) : 1 - i / (entries.length + 1);
    const score = Math.min(1, Math.max(0, given));
    found.set(key, Math.max(score, found.get(key) ?? 0));
  });
  return [...found].map(([key, score]) => ({ key, score })).sort((a, b) => b.score - a.score);
}

const step = (value: unknown, name: string): unknown =>
  typeof value === 'object' && value !== null ? (value as Record<string, unknown>)[name] : undefined;
