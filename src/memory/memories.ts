import { createHash } from 'node:crypto';
import { getVisibleAgent } from '../agents/queries.ts';
import type { Queryable, Tx } from '../db/database.ts';
import type { MEMORY_INTENTS, MEMORY_KINDS, MemoryTags } from '../db/schema.ts';
import type { Actor } from '../http/access.ts';
import { getProject } from '../projects/queries.ts';
import { getTask } from '../tasks/queries.ts';
import type { Outgoing } from './remote.ts';
import { describe, type MEMORY_SOURCES, readable, type StoreMemory } from './schemas.ts';

// Memories as rows. Every one is a row first; a Memory MCP server gets it from the outbox.

export interface Memory {
  id: number;
  key: string;
  userId: number;
  agentId: number | null;
  projectId: number | null;
  taskId: number | null;
  executionId: number | null;
  kind: (typeof MEMORY_KINDS)[number];
  intent: (typeof MEMORY_INTENTS)[number];
  content: string;
  metadata: Record<string, unknown>;
  tags: MemoryTags;
  deliveredAt: Date | null;
  createdAt: Date;
}

export interface FoundMemory {
  memory: Memory;
  /** From 0 to 1. */
  score: number;
  source: (typeof MEMORY_SOURCES)[number];
}

/** A memory before it is written. */
export interface NewMemory {
  userId: number;
  agentId: number | null;
  projectId: number | null;
  taskId: number | null;
  executionId?: number | null;
  kind: Memory['kind'];
  intent: Memory['intent'];
  content: string;
  metadata?: Record<string, unknown>;
}

/** The columns of a memory, but for the words it is found by. */
export const COLUMNS =
  'm.id, m.key, m.user_id, m.agent_id, m.project_id, m.task_id, m.execution_id, m.kind, m.intent, m.content, m.metadata, m.tags, m.delivered_at, m.created_at';

const WRITE = {
  name: 'memories-write',
  text: `
    with written as (
      insert into memories (user_id, agent_id, project_id, task_id, execution_id, kind, intent, content, metadata, tags)
      select g.user_id, a.id, p.id, t.id, g.execution_id, g.kind, g.intent, g.content, g.metadata, jsonb_build_object(
        'who', jsonb_build_object('user_id', g.user_id, 'agent_id', a.id, 'agent_name', a.name, 'agent_category', a.type,
          'capabilities', coalesce(to_jsonb(a.capabilities), '[]')),
        'project', jsonb_build_object('project_id', p.id, 'project_name', p.name, 'task_id', t.id,
          'task_name', coalesce(t.name, t.skill_name)))
      from jsonb_to_recordset($1) as g(n int, user_id bigint, agent_id bigint, project_id bigint, task_id bigint,
        execution_id bigint, kind text, intent text, content text, metadata jsonb)
      left join agents a on a.id = g.agent_id
      left join tasks t on t.id = g.task_id
      left join projects p on p.id = coalesce(g.project_id, t.project_id)
      order by g.n
      on conflict (execution_id) where execution_id is not null do nothing
      returning *
    ), queued as (
      insert into memory_outbox (memory_id, available_at, ambiguous)
      select id, now() + $3::int * interval '1 millisecond', $3::int > 0 from written where $2
    )
    select ${COLUMNS} from written m`,
};

/** How new memories get to a server: not at all where there is none, at once by the writer itself, or by the outbox. */
export interface Queueing {
  queued: boolean;
  /** For so long nobody else sends them: the writer does, right after the commit. 0 leaves them to the outbox. */
  mineForMs: number;
}

/** Writes memories; answers those that are new (a run is remembered once). */
export async function writeMemories(
  tx: Tx,
  all: readonly NewMemory[],
  { queued, mineForMs }: Queueing,
): Promise<Memory[]> {
  if (all.length === 0) return [];
  const rows = all.map((memory, n) => ({
    n,
    user_id: memory.userId,
    agent_id: memory.agentId,
    project_id: memory.projectId,
    task_id: memory.taskId,
    execution_id: memory.executionId ?? null,
    kind: memory.kind,
    intent: memory.intent,
    content: memory.content,
    metadata: memory.metadata ?? {},
  }));
  const { rows: written } = await tx.query({ ...WRITE, values: [JSON.stringify(rows), queued, mineForMs] });
  return written.map(memoryOf);
}

/** What a caller wants remembered, as its own: throws for an agent, project or task that is not the caller's. */
export async function noteOf(tx: Tx, actor: Actor, input: StoreMemory): Promise<NewMemory> {
  const task = input.task_id === undefined ? undefined : await getTask(tx, actor, input.task_id);
  const project = input.project_id === undefined ? undefined : await getProject(tx, actor, input.project_id);
  if (input.agent_id !== undefined) await getVisibleAgent(tx, actor, input.agent_id);
  return {
    // An admin who remembers something about somebody's task does it in that one's memory.
    userId: task?.userId ?? project?.userId ?? actor.userId,
    agentId: input.agent_id ?? null,
    projectId: project?.id ?? task?.projectId ?? null,
    taskId: task?.id ?? null,
    kind: 'note',
    intent: input.intent,
    content: input.content,
    metadata: input.metadata,
  };
}

/** A row of a statement that selects COLUMNS. */
export function memoryOf(row: Record<string, unknown>): Memory {
  return {
    id: Number(row['id']),
    key: row['key'] as string,
    userId: Number(row['user_id']),
    agentId: nullable(row['agent_id']),
    projectId: nullable(row['project_id']),
    taskId: nullable(row['task_id']),
    executionId: nullable(row['execution_id']),
    kind: row['kind'] as Memory['kind'],
    intent: row['intent'] as Memory['intent'],
    content: row['content'] as string,
    metadata: row['metadata'] as Record<string, unknown>,
    tags: row['tags'] as MemoryTags,
    deliveredAt: row['delivered_at'] as Date | null,
    createdAt: row['created_at'] as Date,
  };
}

const nullable = (value: unknown) => (value === null ? null : Number(value));

/** The name of a memory on servers. */
export const remoteKey = (key: string) => `muster-${key}`;

/** A memory as servers get it: flat scalars, since most of them store nothing else. */
export function outgoing(memory: Memory): Outgoing {
  const { who, project } = memory.tags;
  const all: Record<string, unknown> = {
    memory_id: remoteKey(memory.key),
    who: who.agent_name ?? `user-${who.user_id}`,
    when: memory.createdAt.toISOString(),
    project: project.project_name ?? 'none',
    why: memory.intent,
    agent: who.agent_name,
    agent_id: who.agent_id,
    agent_category: who.agent_category,
    capabilities: who.capabilities.join(','),
    user_id: who.user_id,
    when_unix: Math.floor(memory.createdAt.getTime() / 1000),
    when_readable: readable(memory.createdAt),
    project_id: project.project_id,
    project_name: project.project_name,
    task_id: project.task_id,
    task_name: project.task_name,
    execution_id: memory.executionId,
    intent: memory.intent,
    description: describe(memory),
    kind: memory.kind,
    content_sha256: createHash('sha256').update(memory.content).digest('hex'),
    schema: 1,
  };
  const tags = Object.fromEntries(
    Object.entries(all).filter(([, value]) => value !== null && value !== ''),
  ) as Outgoing['tags'];
  return { key: remoteKey(memory.key), content: memory.content, tags };
}

/** What of memories a reader may see: everything of one owner, or of all (null, for admins). */
export type Scope = number | null;

/** The rule of ownership for memories. */
export const scopeOf = (actor: Pick<Actor, 'userId' | 'role'>): Scope => (actor.role === 'admin' ? null : actor.userId);

export interface MemoryFilter {
  projectId?: number | undefined;
  taskId?: number | undefined;
  intent?: string | undefined;
}

const FILTER = `($2::bigint is null or m.user_id = $2) and ($3::bigint is null or m.project_id = $3)
  and ($4::bigint is null or m.task_id = $4) and ($5::text is null or m.intent = $5)`;
const filterValues = (scope: Scope, { projectId, taskId, intent }: MemoryFilter) => [
  scope,
  projectId ?? null,
  taskId ?? null,
  intent ?? null,
];

/** Those of our memories that these keys of a server name and that may be seen, by their key. */
export async function memoriesByKey(
  q: Queryable,
  keys: readonly string[],
  scope: Scope,
  filter: MemoryFilter = {},
): Promise<Map<string, Memory>> {
  const { rows } = await q.query({
    name: 'memories-by-key',
    text: `select ${COLUMNS} from memories m where m.key = any($1::uuid[]) and ${FILTER}`,
    values: [keys.map((key) => key.slice('muster-'.length)), ...filterValues(scope, filter)],
  });
  return new Map(rows.map(memoryOf).map((memory) => [remoteKey(memory.key), memory]));
}

/** How many matches are ranked, the newest; and how many of the best are looked at letter by letter. */
const RANKED = 2_000;
const COMPARED = 200;

const matching = (words: string) => `
  with asked as (select plainto_tsquery('english', $1) as all_of),
  wanted as (
    select ${words} as query, tsvector_to_array(to_tsvector('english', $1)) as words from asked
    where numnode(all_of) > 0
  ), matched as (
    select m.id, m.search from memories m, wanted w
    where m.search @@ (case when $2::bigint is null then w.query else ('''owner:' || $2 || '''')::tsquery && w.query end)
      and ${FILTER}
    order by m.id desc limit ${RANKED}
  ), ranked as (
    select x.id, ts_rank(x.search, w.query) as rank,
      (select count(*) from unnest(w.words) word where x.search @@ quote_literal(word)::tsquery)::real
        / cardinality(w.words) as coverage
    from matched x, wanted w order by coverage desc, rank desc, x.id desc limit ${COMPARED}
  )
  select ${COLUMNS}, 0.6 * r.coverage + 0.3 * word_similarity($1, left(m.content, 1000)) + 0.1 * (r.rank / (r.rank + 0.1)) as score
  from ranked r join memories m on m.id = r.id
  order by score desc, m.id desc limit $6`;

const ALL_WORDS = { name: 'memories-all-words', text: matching('all_of') };
const ANY_WORD = { name: 'memories-any-word', text: matching(`replace(all_of::text, '&', '|')::tsquery`) };
const SIMILAR = {
  name: 'memories-similar',
  text: `
    with alike as (
      select x.id, sum(x.likeness) / cardinality($1::text[]) as likeness
      from unnest($1::text[]) word, lateral (
        select m.id, word_similarity(word, left(m.content, 1000)) as likeness from memories m
        where word <% left(m.content, 1000) and ${FILTER} limit ${COMPARED}
      ) x group by x.id
    )
    select ${COLUMNS}, 0.5 * a.likeness as score from alike a join memories m on m.id = a.id
    order by score desc, m.id desc limit $6`,
};
/** Words of the query that are long enough to be mistyped, so many at the most. */
const wordsOf = (query: string) => (query.match(/[\p{L}\p{N}]{4,}/gu) ?? []).slice(0, 8);

/**
 * Searches in Postgres, best first, with scores from 0 to 1. Memories with all the words come first; when they are too few,
 * those with any of them; and when there are none, those with similar letters, for what was mistyped.
 */
export async function searchPostgres(
  q: Queryable,
  { query, scope, filter, limit }: { query: string; scope: Scope; filter: MemoryFilter; limit: number },
): Promise<FoundMemory[]> {
  const rest = [...filterValues(scope, filter), limit];
  let found: FoundMemory[] = [];
  for (const statement of [ALL_WORDS, ANY_WORD, SIMILAR]) {
    if (statement === SIMILAR && found.length > 0) break;
    const { rows } = await q.query({ ...statement, values: [statement === SIMILAR ? wordsOf(query) : query, ...rest] });
    if (rows.length > 0) {
      found = rows.map((row) => ({
        memory: memoryOf(row),
        score: Math.min(1, Math.max(0, Number(row['score']))),
        source: 'postgresql',
      }));
    }
    if (found.length >= limit) break;
  }
  return found;
}

/** What is remembered of one task, newest first. Served by memories_task_idx. */
export async function taskMemories(q: Queryable, taskId: number, limit: number): Promise<Memory[]> {
  const { rows } = await q.query({
    name: 'memories-of-task',
    text: `select ${COLUMNS} from memories m where m.task_id = $1 order by m.created_at desc, m.id desc limit $2`,
    values: [taskId, limit],
  });
  return rows.map(memoryOf);
}

/** What is remembered of a project: how much, of what kind, by whom, when, and the latest. Served by memories_project_idx. */
export async function projectMemory(q: Queryable, projectId: number) {
  const { rows } = await q.query<{ intents: unknown; agents: unknown; weeks: unknown; total: number }>({
    name: 'memories-of-project',
    text: `
      with all_of as (select intent, agent_id, tags, created_at from memories where project_id = $1)
      select
        (select count(*)::int from all_of) as total,
        (select coalesce(jsonb_agg(x order by x.count desc, x.intent), '[]') from
          (select intent, count(*)::int from all_of group by intent) x) as intents,
        (select coalesce(jsonb_agg(x order by x.count desc, x.agent_id), '[]') from
          (select agent_id, max(tags->'who'->>'agent_name') as agent_name, count(*)::int from all_of
           group by agent_id order by count(*) desc limit 50) x) as agents,
        (select coalesce(jsonb_agg(x order by x.week desc), '[]') from
          (select to_char(date_trunc('week', created_at, 'UTC') at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') as week,
             count(*)::int from all_of group by 1 order by 1 desc limit 12) x) as weeks`,
    values: [projectId],
  });
  const latest = await q.query({
    name: 'memories-latest',
    text: `select ${COLUMNS} from memories m where m.project_id = $1 order by m.created_at desc, m.id desc limit 10`,
    values: [projectId],
  });
  const [counts] = rows;
  if (!counts) throw new Error('The counts answered no row.');
  return { ...counts, latest: latest.rows.map(memoryOf) };
}
