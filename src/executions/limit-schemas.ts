import { z } from 'zod';
import { pageAnswer, pageQuery } from '../http/pagination.ts';
import { id, idText, time, toTime } from '../http/validation.ts';
import { skillName } from '../tasks/schemas.ts';
import type { Limit } from './limits.ts';

const maxRunning = z
  .int()
  .min(0)
  .max(100_000)
  .meta({ description: 'How many runs may be under way at once; 0: none is started.', example: 2 });

export const setLimitBody = z
  .strictObject({
    skill_name: skillName
      .nullable()
      .optional()
      .meta({ description: 'The skill whose runs are counted; all skills together when it is null or left out.' }),
    max_running: maxRunning,
    user_id: id.optional().meta({ description: 'Whose runs; your own when it is left out. Admins only.' }),
  })
  .meta({ examples: [{ skill_name: 'report', max_running: 2 }] });

export const limitQuery = z.strictObject({
  ...pageQuery(),
  user_id: idText.optional().meta({ description: 'Only those of this user: for admins, who see all.' }),
});
export type LimitQuery = z.output<typeof limitQuery>;

export const limitAnswer = z
  .object({
    id,
    user_id: id,
    skill_name: z.string().nullable().meta({ description: 'Null: all skills together.' }),
    max_running: maxRunning,
    running: z.int().min(0).meta({ description: 'How many are under way now.', example: 1 }),
    version: z.int(),
    created_at: time,
    updated_at: time,
  })
  .meta({ id: 'ConcurrencyLimit' });
export const limitList = z.object({ concurrency_limits: z.array(limitAnswer), ...pageAnswer });

/** A limit on the wire. */
export function limitView(limit: Limit): z.input<typeof limitAnswer> {
  return {
    id: limit.id,
    user_id: limit.userId,
    skill_name: limit.skillName,
    max_running: limit.maxRunning,
    running: limit.running,
    version: limit.version,
    created_at: toTime(limit.createdAt),
    updated_at: toTime(limit.updatedAt),
  };
}
