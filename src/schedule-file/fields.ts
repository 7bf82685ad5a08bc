import { z } from 'zod';
import { type FieldError, Problem } from '../http/problem.ts';
import { fieldErrors, guardInput, id } from '../http/validation.ts';
import { type CreateTask, createTaskBody, taskView, type UpdateTask, updateTaskBody } from '../tasks/schemas.ts';
import type { Task } from '../tasks/task-events.ts';

// What an entry of a schedule file can say of its task: every field that a body of POST /tasks can, by the same schema and
// under the same names, but for four that people write shorter and by name instead of by id; and whether it is paused.

/** A value of every field, as JSON; what a file leaves out has its default. */
export type Fields = Readonly<Record<string, unknown>>;

/** An entry of a file. */
export interface Entry {
  key: string;
  /** The e-mail address of its owner, in lower case. */
  owner: string;
  /** The task that it takes over, made by other means. */
  adopt: number | null;
  fields: Fields;
}

const SHORT_NAMES: Readonly<Record<string, string>> = {
  skill_name: 'skill',
  schedule_cron: 'cron',
  project_id: 'project',
  agent_id: 'agent',
};
const WIRE_NAMES = Object.fromEntries(Object.entries(SHORT_NAMES).map(([wire, short]) => [short, wire]));
const BODY_FIELDS = Object.keys(createTaskBody.shape);

const fileName = (wire: string) => SHORT_NAMES[wire] ?? wire;
const wireName = (field: string) => WIRE_NAMES[field] ?? field;

/** Who owns a task. Looser than what may register: the first admin of the embedded mode is admin@localhost. */
export const ownerEmail = z
  .string()
  .max(254)
  .regex(/^[^\s@]+@[^\s@]+$/, { error: 'must be an email address' })
  .toLowerCase();

/** A project or an agent: by its name, or by its id where several have one. */
const reference = z.union([z.string().trim().min(1).max(255), id], { error: 'must be a name or an id' });

/** What the body of a task does not have, or has by id. */
const head = z.object({
  owner: ownerEmail.optional(),
  adopt: id.nullable().default(null),
  status: z.enum(['active', 'paused'], { error: 'must be active or paused' }).default('active'),
  project: reference.nullable().default(null),
  agent: reference.nullable().default(null),
});

/** As JSON would bring it back: no undefined, no -0, times as text. */
const plain = (value: unknown): unknown => JSON.parse(JSON.stringify(value ?? null));

/** The value of every field of a body, under the names that a file uses. */
function fromBody(body: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(BODY_FIELDS.map((wire) => [fileName(wire), plain(body[wire])]));
}

/** What a field is when a file does not say it. */
export const DEFAULTS: Fields = { ...fromBody(createTaskBody.parse({ skill_name: 'any' })), status: 'active' };

/** The names of all fields, in the order in which they are written. */
export const FIELDS: readonly string[] = [...new Set(['name', 'project', 'skill', 'cron', ...Object.keys(DEFAULTS)])];

/**
 * Reads what a file says of a task. Its errors name the field first (`cron`, `params.x`), and there is no entry when there
 * are any.
 */
export function readEntry(key: string, raw: unknown, defaultOwner: string | undefined): Entry | FieldError[] {
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) {
    return [{ path: '', message: 'must have fields below it, of which `skill` is required' }];
  }
  try {
    guardInput([[raw, 'entry']]);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    return inFile(error.errors ?? []);
  }
  const errors: FieldError[] = [];
  const body: Record<string, unknown> = {};
  for (const [field, value] of Object.entries(raw)) {
    const short = SHORT_NAMES[field];
    if (short !== undefined) errors.push({ path: field, message: `is written \`${short}\` in a schedule file` });
    else if (field === '<<') errors.push({ path: field, message: 'is not read: write the fields out' });
    else if (!(field in head.shape)) body[wireName(field)] = value;
  }
  const said = head.safeParse(raw);
  const task = createTaskBody.safeParse(body);
  errors.push(
    ...inFile(said.error ? fieldErrors(said.error, 'entry') : []),
    ...inFile(task.error ? fieldErrors(task.error, 'entry') : []),
  );
  const owner = said.data?.owner ?? defaultOwner;
  if (said.success && owner === undefined) {
    errors.push({ path: 'owner', message: 'is required: the e-mail address of its owner; or give --owner for all' });
  }
  if (task.data?.schedule_cron != null && task.data.run_at != null) {
    errors.push({ path: 'run_at', message: 'cannot stand beside cron: leave one of them out' });
  }
  if (errors.length > 0 || !said.success || !task.success || owner === undefined) return errors;
  const { adopt, status, project, agent } = said.data;
  return { key, owner, adopt, fields: { ...fromBody(task.data), project, agent, status } };
}

/** Errors of a body as errors of an entry. */
export function inFile(errors: readonly FieldError[]): FieldError[] {
  return errors.map(({ path, message }) => {
    const [, field = '', ...rest] = path.split('.');
    return {
      path: [fileName(field), ...rest].join('.'),
      message: message === 'is not a known field' ? `${message}: remove it` : message,
    };
  });
}

/** The fields of a task; `project` and `agent` are what a file calls those that it has. */
export function fieldsOf(task: Task, project: string | number | null, agent: string | number | null): Fields {
  // Paused with its project: that is said of the project.
  const paused = task.status === 'disabled' && task.pauseReason !== 'project';
  return { ...fromBody(taskView(task)), project, agent, status: paused ? 'paused' : 'active' };
}

/** Fields as the body that creates such a task of this project and agent. */
export function toCreate(fields: Fields, ids: { project: number | null; agent: number | null }): CreateTask {
  return createTaskBody.parse(toBody(fields, ids));
}

/** Fields that change as the body that changes them. Undefined when a body has none of them. */
export function toUpdate(
  fields: Fields,
  ids: { project: number | null; agent: number | null },
): UpdateTask | undefined {
  const body = toBody(fields, ids);
  return Object.keys(body).length === 0 ? undefined : updateTaskBody.parse(body);
}

function toBody(fields: Fields, ids: { project: number | null; agent: number | null }): Record<string, unknown> {
  const named = { ...fields, ...('project' in fields ? { project: ids.project } : {}) };
  const both = { ...named, ...('agent' in fields ? { agent: ids.agent } : {}) };
  return Object.fromEntries(
    Object.entries(both).flatMap(([field, value]) => (field === 'status' ? [] : [[wireName(field), value]])),
  );
}
