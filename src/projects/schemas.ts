import { z } from 'zod';
import { PROJECT_STATUSES } from '../db/schema.ts';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, integerText, time, toTime } from '../http/validation.ts';
import { taskSummary } from '../tasks/schemas.ts';
import type { Project } from './projects.ts';

const LISTED = PROJECT_STATUSES.filter((status) => status !== 'deleted');

const name = z.string().trim().min(1).max(255).meta({ example: 'Website' });
const description = z.string().max(2_000).nullable().meta({ example: 'Everything that the website needs.' });

export const createProjectBody = z.strictObject({ name, description: description.default(null) });
export type CreateProject = z.output<typeof createProjectBody>;

export const updateProjectBody = z
  .strictObject({
    name,
    description,
    status: z
      .enum(LISTED, { error: `must be ${LISTED.join(' or ')}; to delete it, DELETE it` })
      .meta({ description: 'The same as archive and restore.' }),
  })
  .partial()
  .refine((body) => Object.keys(body).length > 0, { error: 'must have at least one field to change' })
  .meta({ examples: [{ description: 'The public pages and the shop.' }] });
export type UpdateProject = z.output<typeof updateProjectBody>;

/** What projects can be sorted by. */
export const PROJECT_SORTS = ['created_at', 'name', 'tasks_count', 'updated_at'] as const;
const SORT_WORDS = [...PROJECT_SORTS, '-created_at', '-name', '-tasks_count', '-updated_at'] as const;

export const projectQuery = z.strictObject({
  ...pageQuery(),
  status: z.enum(LISTED, { error: `must be ${LISTED.join(' or ')}; deleted projects are not listed` }).optional(),
  search: z
    .string()
    .min(1)
    .max(255)
    .optional()
    .meta({ description: 'Part of the name or description, in any case; one or two letters: the start of a word.' }),
  sort_by: z
    .enum(SORT_WORDS)
    .optional()
    .meta({ description: 'created_at unless given. A minus in front, as in -name, is sort_order=desc.' }),
});
export type ProjectQuery = z.output<typeof projectQuery>;

export const projectDetailQuery = z.strictObject({
  tasks_limit: integerText(1, 100)
    .optional()
    .transform((limit) => limit ?? 20)
    .meta({ description: 'How many of its tasks to show; 20 unless given.' }),
  tasks_cursor: z.string().max(512).optional().meta({ description: 'The tasks_next_cursor of the page before.' }),
});

const projectFields = {
  id,
  user_id: id,
  name,
  description,
  status: z.enum(PROJECT_STATUSES),
  tasks_count: z.int().min(0),
  version: z.int(),
  created_at: time,
  updated_at: time,
};

export const projectAnswer = z.object(projectFields).meta({ id: 'Project' });
/** A project with a page of its tasks, newest first. */
export const projectDetail = z
  .object({
    ...projectFields,
    tasks: z.array(taskSummary),
    tasks_has_more: z.boolean(),
    tasks_next_cursor: z.string().nullable(),
  })
  .meta({ id: 'ProjectDetail' });
export const projectList = z.object({ projects: z.array(projectAnswer), ...pageAnswer });

/** A project on the wire. */
export function projectView(project: Project): z.input<typeof projectAnswer> {
  return {
    id: project.id,
    user_id: project.userId,
    name: project.name,
    description: project.description,
    status: project.status,
    tasks_count: project.tasksCount,
    version: project.version,
    created_at: toTime(project.createdAt),
    updated_at: toTime(project.updatedAt),
  };
}
