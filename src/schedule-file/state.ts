import { findAgentsFor } from '../agents/queries.ts';
import { findUsers, type User } from '../auth/users.ts';
import type { Queryable } from '../db/database.ts';
import { findProjectsOf } from '../projects/queries.ts';
import { findKeyedTasks, findKeyOwners } from '../tasks/schedule-key.ts';
import type { Task } from '../tasks/task-events.ts';
import { type Entry, fieldsOf } from './fields.ts';
import type { Fault, ScheduleFile } from './file.ts';
import type { Known } from './plan.ts';

/** What the database has of the owners that a file is about. */
export interface State {
  owners: ReadonlyMap<string, User>;
  /** Those of the file without a fault, with projects and agents called as the database calls them. */
  entries: Entry[];
  known: Known[];
  /** What of the file cannot be, as the database is. */
  faults: Fault[];
  /** Projects and agents that are not there, which an export may be about to correct. */
  unresolved: Fault[];
  /** The ids of what an entry names. */
  idsOf(entry: Entry): { project: number | null; agent: number | null };
  /** The tasks of its key that belong to owners of whom the file says nothing: a key is one owner's. */
  twinsOf(entry: Entry): number[];
  /** A task that has no key, as the plan sees it. */
  knownOf(owner: User, task: Task): Known;
}

/** Reads it. The owners are those of the entries and of `owner`; with `everybody` and neither, all that have tasks with a key. */
export async function readState(
  q: Queryable,
  file: ScheduleFile,
  { owner, everybody = false }: { owner?: string | undefined; everybody?: boolean },
): Promise<State> {
  const emails = new Set([...file.entries.map((entry) => entry.owner), ...(owner === undefined ? [] : [owner])]);
  const ids = everybody && emails.size === 0 ? await findKeyOwners(q) : [];
  const users = await findUsers(q, [...emails], ids);
  const owners = new Map(users.map((user) => [user.email, user]));
  const ownerOf = new Map(users.map((user) => [user.id, user]));
  const names = await readNames(q, users);
  const tasks = await findKeyedTasks(q, {
    ownerIds: users.map(({ id }) => id),
    keys: file.entries.map(({ key }) => key),
    ids: file.entries.flatMap(({ adopt }) => adopt ?? []),
  });
  const knownOf = (user: User, task: Task): Known => ({
    id: task.id,
    version: task.version,
    key: task.scheduleKey,
    owner: user.email,
    base: task.scheduleBase,
    fields: fieldsOf(task, names.projects(user).wordOf(task.projectId), names.agents(user).wordOf(task.agentId)),
    deleted: task.status === 'deleted',
  });
  const known = tasks.flatMap((task) => {
    const user = ownerOf.get(task.userId);
    return user ? [knownOf(user, task)] : [];
  });
  const byKey = grouped(known, ({ key }) => key);
  const elsewhere = grouped(
    tasks.filter(({ userId, status }) => !ownerOf.has(userId) && status !== 'deleted'),
    ({ scheduleKey }) => scheduleKey,
  );

  const faults: Fault[] = [];
  const unresolved: Fault[] = [];
  const entries: Entry[] = [];
  const found = new Map<Entry, { project: number | null; agent: number | null }>();
  const fault = (to: Fault[], { key }: Entry, field: string, message: string) =>
    void to.push({ line: file.lineOf(key, field), where: `${key}.${field}`, message });
  if (owner !== undefined && !owners.has(owner)) {
    faults.push({ line: null, where: '--owner', message: `there is no user ${owner}` });
  }
  for (const raw of file.entries) {
    const user = owners.get(raw.owner);
    if (!user) {
      fault(faults, raw, 'owner', `there is no user ${raw.owner}`);
      continue;
    }
    if (user.disabledAt) fault(faults, raw, 'owner', `the user ${raw.owner} is disabled`);
    const project = names.projects(user).find(raw.fields['project']);
    const agent = names.agents(user).find(raw.fields['agent']);
    if (typeof project === 'string') fault(unresolved, raw, 'project', project);
    if (typeof agent === 'string') fault(unresolved, raw, 'agent', agent);
    const entry = {
      ...raw,
      fields: {
        ...raw.fields,
        ...(typeof project === 'string' ? {} : { project: names.projects(user).wordOf(project) }),
        ...(typeof agent === 'string' ? {} : { agent: names.agents(user).wordOf(agent) }),
      },
    };
    found.set(entry, {
      project: typeof project === 'string' ? null : project,
      agent: typeof agent === 'string' ? null : agent,
    });
    const sameKey = byKey.get(entry.key) ?? [];
    const own = sameKey.filter((task) => task.owner === entry.owner);
    const before = own.length > 0 ? undefined : sameKey.find((task) => !task.deleted);
    if (before) {
      const message = `the task ${before.id} of this key belongs to ${before.owner}, and an entry cannot change its owner: remove the entry and apply with --prune, then add it again; or choose another key`;
      fault(faults, entry, 'owner', message);
    }
    const refused = entry.adopt === null ? undefined : refuseAdoption(entry, entry.adopt, file.entries, known, own);
    if (refused !== undefined) fault(faults, entry, 'adopt', refused);
    entries.push(entry);
  }
  return {
    owners,
    entries,
    known,
    faults,
    unresolved,
    idsOf: (entry) => found.get(entry) ?? { project: null, agent: null },
    twinsOf: ({ key }) => (elsewhere.get(key) ?? []).map(({ id }) => id),
    knownOf,
  };
}

/** Why an entry cannot take over a task; undefined when it can, or has. */
function refuseAdoption(
  entry: Entry,
  id: number,
  entries: readonly Entry[],
  known: readonly Known[],
  own: readonly Known[],
): string | undefined {
  if (own.some((task) => task.id === id)) return undefined;
  const mine = own.find((task) => !task.deleted);
  if (mine) return `the entry has the task ${mine.id} already: remove this line, or delete that task`;
  const task = known.find((candidate) => candidate.id === id && !candidate.deleted);
  if (task?.owner !== entry.owner) return `there is no task ${id} of ${entry.owner}`;
  if (entries.some((other) => other.key !== entry.key && other.adopt === id)) {
    return `another entry adopts the task ${id} as well: keep one of them`;
  }
  if (task.key !== null && entries.some((other) => other.key === task.key && other.owner === entry.owner)) {
    return `the task ${id} is that of the entry ${task.key}: remove one of the two`;
  }
  return undefined;
}

/** Projects or agents by what a file calls them. */
interface Names {
  /** The name, or the id where the name says too little. */
  wordOf(id: number | null): string | number | null;
  /** The id, or why there is none. */
  find(word: unknown): number | null | string;
}

async function readNames(q: Queryable, users: readonly User[]) {
  const ownerIds = users.map(({ id }) => id);
  const projects = await findProjectsOf(q, ownerIds);
  const agents = await findAgentsFor(q, ownerIds);
  const lazily = (make: (user: User) => Names) => {
    const made = new Map<number, Names>();
    return (user: User): Names => {
      const names = made.get(user.id) ?? make(user);
      made.set(user.id, names);
      return names;
    };
  };
  return {
    projects: lazily((user) =>
      namesOf(
        'project',
        user,
        projects.filter(({ userId }) => userId === user.id),
      ),
    ),
    agents: lazily((user) =>
      namesOf(
        'agent',
        user,
        agents.filter(({ userId, shared }) => shared || userId === user.id),
      ),
    ),
  };
}

function grouped<T>(things: readonly T[], by: (thing: T) => string | null): Map<string | null, T[]> {
  const groups = new Map<string | null, T[]>();
  for (const thing of things) {
    const group = groups.get(by(thing));
    if (group) group.push(thing);
    else groups.set(by(thing), [thing]);
  }
  return groups;
}

function namesOf(what: string, { email }: User, things: readonly { id: number; name: string }[]): Names {
  const byId = new Map(things.map((thing) => [thing.id, thing]));
  const byName = grouped(things, ({ name }) => name);
  const alone = (name: string) => byName.get(name)?.length === 1;
  return {
    wordOf(id) {
      const thing = id === null ? undefined : byId.get(id);
      return thing && alone(thing.name) ? thing.name : id;
    },
    find(word) {
      if (word === null) return null;
      if (typeof word === 'number') return byId.has(word) ? word : `there is no ${what} ${word} for ${email}`;
      const named = byName.get(String(word)) ?? [];
      const ids = named.map(({ id }) => id);
      if (ids.length > 1)
        return `${ids.length} of that name are there for ${email}: write the id instead, ${ids.join(' or ')}`;
      return ids[0] ?? `there is no ${what} "${word}" for ${email}: create it first, or correct the name`;
    },
  };
}
