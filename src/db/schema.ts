import { type SQL, sql } from 'drizzle-orm';
import {
  bigint,
  boolean,
  check,
  customType,
  foreignKey,
  index,
  integer,
  jsonb,
  pgTable,
  primaryKey,
  smallint,
  text,
  timestamp,
  unique,
  uniqueIndex,
  uuid,
} from 'drizzle-orm/pg-core';

// Every table. Statuses are exported constants with their meaning, and the check constraints are made from them.
// Times are timestamptz(3): the wire, cursors and JavaScript know milliseconds, so the rows must not know more.

/** What a user may do: `user` sees and changes only its own, `admin` sees all. */
export const USER_ROLES = ['user', 'admin'] as const;
/** What an API key may do: `read` (GET), `write` (create and change), `agent` (register, claim, report). */
export const API_KEY_SCOPES = ['read', 'write', 'agent'] as const;
export const PROJECT_STATUSES = ['active', 'archived', 'deleted'] as const;

export const TASK_STATUSES = [
  'pending', // waiting: for its time, for an agent, or for somebody to run it
  'running', // an agent is at it
  'completed', // ran well and has no further time
  'failed', // its last run ended badly and it has no further time
  'disabled', // paused: nothing fires until it is resumed
  'deleted', // soft-deleted
] as const;
/** In rising order: the place in this list is what the database stores and sorts by. */
export const PRIORITIES = ['low', 'medium', 'high', 'critical'] as const;
export const OVERLAP_POLICIES = [
  'skip', // a tick that finds a run unfinished is recorded and not run
  'queue_one', // at most one run waits behind the unfinished one
  'queue_all', // every run waits its turn
  'cancel_previous', // the unfinished run is cancelled, the new one follows it
  'allow', // runs side by side
] as const;
export const MISFIRE_POLICIES = [
  'skip', // a missed tick stays missed
  'fire_last', // of the missed ticks the latest is run
  'fire_all', // every missed tick is run, oldest first
] as const;
export const DST_GAP_POLICIES = [
  'skip', // a time that clocks going forward leave out is not run
  'shift', // it is run later, by as much as is left out
] as const;
export const DST_FOLD_POLICIES = [
  'first', // of a time that clocks going back bring twice the first is run
  'both',
] as const;
/** Why a task is paused. */
export const PAUSE_REASONS = [
  'manual', // somebody paused it
  'project', // its project was archived, and restoring that resumes it
  'failures', // it failed as often in a row as its pause_after_failures allows
] as const;

/** Why something was remembered. */
export const MEMORY_INTENTS = [
  'implementation',
  'bugfix',
  'refactor',
  'testing',
  'documentation',
  'analysis',
  'planning',
  'research',
] as const;
export const MEMORY_KINDS = [
  'note', // somebody stored it
  'execution', // a run that ended
  'activity', // what an agent reported of its own accord
  'task_change',
] as const;

export const EXECUTION_STATUSES = [
  'queued', // waiting for an agent, for its backoff, or for the run before it
  'running', // leased to an agent
  'success',
  'failed', // the agent said so, or its lease was lost
  'timeout', // longer than the task's timeout_seconds
  'cancelled',
] as const;
export const EXECUTION_TRIGGERS = [
  'schedule',
  'manual', // somebody asked for it
  'retry',
  'activity', // an agent did it of its own accord
  'backfill', // a tick of the past that somebody had made up for
  'replay', // a run that somebody had repeated
  'adopted', // a report that came after its lease was lost, taken for the result
] as const;
/** Why a run did not succeed; null while it may, and when it did. */
export const EXECUTION_CAUSES = [
  'agent_failed',
  'lease_lost',
  'run_timeout',
  'cancelled',
  'queue_expired', // no agent took it within the task's queue_ttl_seconds
] as const;

/** How a tick of a schedule ended: every one gets exactly one verdict. */
export const VERDICTS = [
  'fired', // on time
  'late', // run after its time, since nobody was there to fire it
  'coalesced', // missed, and covered by a later tick's run
  'skipped_overlap', // an unfinished run was in the way
  'skipped_misfire', // missed, and the policy says to leave it
  'paused', // the task was paused
  'dst_gap', // clocks went forward over it, and dst_gap says to skip it
] as const;
/** Why a tick has its verdict, where the verdict alone does not say. */
export const OCCURRENCE_CAUSES = [
  'delay', // late by less than the task allows: a restart, a stall
  'downtime', // nobody was there to fire it
  'catch_up_limit', // more were missed than are made up for
  'open_run', // an unfinished run, `blocked_by`
  'queue_full', // as many runs wait as may
  'manual', // paused by somebody
  'project', // paused with its project
  'failures', // paused after failures
  'clock_change',
  'backfill', // made up for because somebody asked
] as const;

export const AGENT_TYPES = [
  'coder',
  'reviewer',
  'tester',
  'planner',
  'researcher',
  'api-designer',
  'backend-dev',
  'mobile-dev',
  'ml-developer',
  'system-architect',
  'code-analyzer',
  'hierarchical-coordinator',
  'mesh-coordinator',
  'adaptive-coordinator',
  'custom',
] as const;
export const AGENT_STATUSES = [
  'active', // alive, says nothing of its load
  'idle', // alive, free
  'busy', // holds at least one lease
  'offline', // silent for too long, or said goodbye
  'error', // says of itself that it cannot work
] as const;

export const AUDIT_OPERATIONS = ['CREATE', 'UPDATE', 'DELETE'] as const;
export const EVENT_TOPICS = ['tasks', 'agents', 'calendar', 'memory'] as const;

const at = (name: string) => timestamp(name, { withTimezone: true, precision: 3, mode: 'date' });
const id = () =>
  bigint('id', { mode: 'number' }).primaryKey().generatedAlwaysAsIdentity({ maxValue: Number.MAX_SAFE_INTEGER });
const reference = (name: string) => bigint(name, { mode: 'number' });
const createdAt = () => at('created_at').notNull().defaultNow();
const updatedAt = () => at('updated_at').notNull().defaultNow();
const version = () => integer('version').notNull().default(1);
/**
 * Any JSON value. Drizzle's own jsonb parses a string that it reads once more, which turns the text "5" into the number.
 */
const anyJson = customType<{ data: unknown; driverData: string }>({
  dataType: () => 'jsonb',
  toDriver: (value) => JSON.stringify(value),
});
const oneOf = (column: string, values: readonly string[]): SQL =>
  sql.raw(`${column} in (${values.map((value) => `'${value}'`).join(', ')})`);

export const users = pgTable(
  'users',
  {
    id: id(),
    /** Lower case: one address, one user. */
    email: text('email').notNull(),
    name: text('name'),
    role: text('role', { enum: USER_ROLES }).notNull().default('user'),
    /** Null for users who come with tokens of another issuer or only with API keys. */
    passwordHash: text('password_hash'),
    disabledAt: at('disabled_at'),
    version: version(),
    createdAt: createdAt(),
    updatedAt: updatedAt(),
  },
  (t) => [uniqueIndex('users_email_key').on(t.email), check('users_role_check', oneOf('role', USER_ROLES))],
);

export const refreshTokens = pgTable(
  'refresh_tokens',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    /** One family per login; access tokens carry it, so that ending the family ends them too. */
    familyId: uuid('family_id').notNull(),
    tokenHash: text('token_hash').notNull(),
    expiresAt: at('expires_at').notNull(),
    /** Set when it was exchanged for the next one; a second use after that is theft. */
    spentAt: at('spent_at'),
    revokedAt: at('revoked_at'),
    createdAt: createdAt(),
  },
  (t) => [
    uniqueIndex('refresh_tokens_hash_key').on(t.tokenHash),
    index('refresh_tokens_family_idx').on(t.familyId),
    index('refresh_tokens_user_idx').on(t.userId),
    index('refresh_tokens_expiry_idx').on(t.expiresAt),
  ],
);

export const apiKeys = pgTable(
  'api_keys',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    name: text('name').notNull(),
    /** The first characters, to recognise a key by. */
    prefix: text('prefix').notNull(),
    keyHash: text('key_hash').notNull(),
    scopes: text('scopes', { enum: API_KEY_SCOPES }).array().notNull(),
    expiresAt: at('expires_at'),
    lastUsedAt: at('last_used_at'),
    revokedAt: at('revoked_at'),
    createdAt: createdAt(),
  },
  (t) => [
    uniqueIndex('api_keys_hash_key').on(t.keyHash),
    index('api_keys_user_idx').on(t.userId, t.id),
    check('api_keys_scopes_check', sql.raw(`scopes <@ array['read','write','agent'] and cardinality(scopes) > 0`)),
  ],
);

export const projects = pgTable(
  'projects',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    name: text('name').notNull(),
    description: text('description'),
    status: text('status', { enum: PROJECT_STATUSES }).notNull().default('active'),
    /** Kept true by whoever creates, moves or deletes a task, so that lists can sort by it. */
    tasksCount: integer('tasks_count').notNull().default(0),
    version: version(),
    createdAt: createdAt(),
    updatedAt: updatedAt(),
  },
  (t) => [
    // One for each order that lists offer, led by the owner; the last is what admins see first.
    index('projects_owner_created_idx').on(t.userId, t.createdAt, t.id).where(sql`status <> 'deleted'`),
    index('projects_owner_updated_idx').on(t.userId, t.updatedAt, t.id).where(sql`status <> 'deleted'`),
    index('projects_owner_name_idx').on(t.userId, t.name, t.id).where(sql`status <> 'deleted'`),
    index('projects_owner_count_idx').on(t.userId, t.tasksCount, t.id).where(sql`status <> 'deleted'`),
    index('projects_created_idx').on(t.createdAt, t.id).where(sql`status <> 'deleted'`),
    index('projects_search_idx')
      .using('gin', sql`(name || chr(10) || coalesce(description, '')) gin_trgm_ops`)
      .where(sql`status <> 'deleted'`),
    check('projects_status_check', oneOf('status', PROJECT_STATUSES)),
    check('projects_tasks_count_check', sql`${t.tasksCount} >= 0`),
  ],
);

export const agents = pgTable(
  'agents',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    name: text('name').notNull(),
    type: text('type', { enum: AGENT_TYPES }).notNull(),
    capabilities: text('capabilities').array().notNull().default([]),
    status: text('status', { enum: AGENT_STATUSES }).notNull().default('idle'),
    /** Set by an admin: everybody sees it, and it runs everybody's tasks. */
    shared: boolean('shared').notNull().default(false),
    /** Finishes what it has and is given nothing more. */
    draining: boolean('draining').notNull().default(false),
    maxConcurrency: integer('max_concurrency').notNull().default(1),
    lastActiveAt: at('last_active_at').notNull().defaultNow(),
    deletedAt: at('deleted_at'),
    version: version(),
    createdAt: createdAt(),
    updatedAt: updatedAt(),
  },
  (t) => [
    uniqueIndex('agents_owner_name_key').on(t.userId, t.name).where(sql`deleted_at is null`),
    index('agents_alive_idx').on(t.lastActiveAt).where(sql`deleted_at is null and status <> 'offline'`),
    index('agents_owner_created_idx').on(t.userId, t.createdAt, t.id).where(sql`deleted_at is null`),
    index('agents_created_idx').on(t.createdAt, t.id).where(sql`deleted_at is null`),
    index('agents_shared_idx').on(t.createdAt, t.id).where(sql`deleted_at is null and shared`),
    index('agents_capabilities_idx').using('gin', t.capabilities).where(sql`deleted_at is null`),
    check('agents_type_check', oneOf('type', AGENT_TYPES)),
    check('agents_status_check', oneOf('status', AGENT_STATUSES)),
    check('agents_max_concurrency_check', sql`${t.maxConcurrency} between 1 and 1000`),
  ],
);

export const tasks = pgTable(
  'tasks',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    projectId: reference('project_id').references(() => projects.id),
    name: text('name'),
    skillName: text('skill_name').notNull(),
    params: jsonb('params').$type<Record<string, unknown>>().notNull().default({}),
    /** Place in PRIORITIES. */
    priority: smallint('priority').notNull().default(1),
    scheduleCron: text('schedule_cron'),
    timezone: text('timezone').notNull().default('UTC'),
    runAt: at('run_at'),
    /** The next tick; null when nothing is due any more, or paused or deleted. The scheduler looks at this column alone. */
    nextRunAt: at('next_run_at'),
    lastRunAt: at('last_run_at'),
    status: text('status', { enum: TASK_STATUSES }).notNull().default('pending'),
    overlapPolicy: text('overlap_policy', { enum: OVERLAP_POLICIES }).notNull().default('skip'),
    misfirePolicy: text('misfire_policy', { enum: MISFIRE_POLICIES }).notNull().default('fire_last'),
    /** How late a tick may be and simply run; beyond it is missed. Null: half the period, an hour at the most. */
    maxLatenessSeconds: integer('max_lateness_seconds'),
    /** Null: as suits the schedule (schedule/occurrences.ts). */
    dstGap: text('dst_gap', { enum: DST_GAP_POLICIES }),
    dstFold: text('dst_fold', { enum: DST_FOLD_POLICIES }),
    /** No tick before, and none from. */
    startsAt: at('starts_at'),
    endsAt: at('ends_at'),
    /** Its ticks run so much later at the most, each time by the same, so that tasks of one time do not run at once. */
    spreadSeconds: integer('spread_seconds').notNull().default(0),
    /** How many ticks may run in all. */
    maxRuns: integer('max_runs'),
    /** How many ticks have. */
    firedCount: integer('fired_count').notNull().default(0),
    pauseReason: text('pause_reason', { enum: PAUSE_REASONS }),
    pauseUntil: at('pause_until'),
    /** The next moment at which nothing runs but something is to be noted: see scheduler/quiet.ts. */
    quietAt: at('quiet_at'),
    pauseAfterFailures: integer('pause_after_failures'),
    /** How many fires have failed for good since the last success. */
    consecutiveFailures: integer('consecutive_failures').notNull().default(0),
    maxAttempts: integer('max_attempts').notNull().default(3),
    retryBackoffSeconds: integer('retry_backoff_seconds').notNull().default(10),
    timeoutSeconds: integer('timeout_seconds').notNull().default(3600),
    /** How many leases of one fire may be lost before it has failed. Null: one less than max_attempts. */
    maxLostLeases: integer('max_lost_leases'),
    /** How long a run may wait for an agent. Null: for ever. */
    queueTtlSeconds: integer('queue_ttl_seconds'),
    /** How long a lease lasts without a heartbeat. Null: LEASE_SECONDS. */
    heartbeatTimeoutSeconds: integer('heartbeat_timeout_seconds'),
    /** It is overdue when it did not succeed for so long. */
    expectSuccessWithinSeconds: integer('expect_success_within_seconds'),
    lastSuccessAt: at('last_success_at'),
    /** When it will be overdue unless it succeeds; null when nobody asks, while it is paused, and once it is. */
    overdueAt: at('overdue_at'),
    overdueSince: at('overdue_since'),
    agentId: reference('agent_id').references(() => agents.id),
    requiredCapabilities: text('required_capabilities').array().notNull().default([]),
    /** Its name in a schedule file, and what that said of it when it was last applied. */
    scheduleKey: text('schedule_key'),
    scheduleBase: jsonb('schedule_base').$type<Record<string, unknown>>(),
    version: version(),
    createdAt: createdAt(),
    updatedAt: updatedAt(),
  },
  (t) => [
    // Serves the scheduler: the due ones, soonest first.
    index('tasks_due_idx').on(t.nextRunAt, t.id).where(sql`next_run_at is not null`),
    index('tasks_quiet_idx').on(t.quietAt, t.id).where(sql`quiet_at is not null`),
    index('tasks_overdue_idx').on(t.overdueAt, t.id).where(sql`overdue_at is not null`),
    index('tasks_overdue_since_idx').on(t.userId, t.overdueSince, t.id).where(sql`overdue_since is not null`),
    uniqueIndex('tasks_schedule_key')
      .on(t.userId, t.scheduleKey)
      .where(sql`status <> 'deleted' and schedule_key is not null`),
    // One for each order that lists offer, led by the owner; ties are broken by id.
    index('tasks_owner_created_idx').on(t.userId, t.createdAt, t.id).where(sql`status <> 'deleted'`),
    index('tasks_owner_updated_idx').on(t.userId, t.updatedAt, t.id).where(sql`status <> 'deleted'`),
    index('tasks_owner_next_run_idx')
      .on(t.userId, sql`coalesce(next_run_at, 'infinity'::timestamptz)`, t.id)
      .where(sql`status <> 'deleted'`),
    index('tasks_owner_status_idx').on(t.userId, t.status, t.id).where(sql`status <> 'deleted'`),
    index('tasks_owner_priority_idx').on(t.userId, t.priority, t.id).where(sql`status <> 'deleted'`),
    // What admins see first.
    index('tasks_created_idx').on(t.createdAt, t.id).where(sql`status <> 'deleted'`),
    // Serve filters, and what a project or an agent takes with it.
    index('tasks_project_idx')
      .on(t.projectId, t.createdAt, t.id)
      .where(sql`status <> 'deleted' and project_id is not null`),
    index('tasks_agent_idx').on(t.agentId, t.createdAt, t.id).where(sql`status <> 'deleted' and agent_id is not null`),
    index('tasks_owner_skill_idx').on(t.userId, t.skillName, t.createdAt, t.id).where(sql`status <> 'deleted'`),
    index('tasks_search_idx')
      .using('gin', sql`(coalesce(name, '') || chr(10) || skill_name) gin_trgm_ops`)
      .where(sql`status <> 'deleted'`),
    // Serves the calendar: an owner's different schedules, and the tasks of each.
    index('tasks_owner_schedule_idx')
      .on(t.userId, t.scheduleCron, t.timezone, sql`coalesce(dst_gap, '')`, sql`coalesce(dst_fold, '')`, t.id)
      .where(sql`schedule_cron is not null and next_run_at is not null`),
    check('tasks_status_check', oneOf('status', TASK_STATUSES)),
    check('tasks_priority_check', sql.raw(`priority between 0 and ${PRIORITIES.length - 1}`)),
    check('tasks_overlap_check', oneOf('overlap_policy', OVERLAP_POLICIES)),
    check('tasks_misfire_check', oneOf('misfire_policy', MISFIRE_POLICIES)),
    check('tasks_dst_gap_check', oneOf('dst_gap', DST_GAP_POLICIES)),
    check('tasks_dst_fold_check', oneOf('dst_fold', DST_FOLD_POLICIES)),
    check('tasks_pause_reason_check', oneOf('pause_reason', PAUSE_REASONS)),
    check('tasks_bounds_check', sql`starts_at < ends_at`),
    check('tasks_spread_check', sql`${t.spreadSeconds} between 0 and 86400`),
    check('tasks_schedule_check', sql`schedule_cron is null or run_at is null`),
    check('tasks_max_attempts_check', sql`${t.maxAttempts} between 1 and 20`),
    check('tasks_armed_check', sql`next_run_at is null or status not in ('disabled', 'deleted')`),
  ],
);

export const executions = pgTable(
  'executions',
  {
    id: id(),
    taskId: reference('task_id')
      .notNull()
      .references(() => tasks.id),
    /** The task's owner, kept here so that lists, claims and events need no join. */
    userId: reference('user_id').notNull(),
    /** The agent that holds or held the lease. */
    agentId: reference('agent_id').references(() => agents.id),
    trigger: text('trigger', { enum: EXECUTION_TRIGGERS }).notNull(),
    /** The tick that fired it. */
    occurrenceId: reference('occurrence_id'),
    /** The tick it runs for; when it was asked for, if it was not a tick. */
    scheduledFor: at('scheduled_for').notNull(),
    attempt: integer('attempt').notNull().default(1),
    /** The attempt before this one. */
    retryOf: reference('retry_of'),
    status: text('status', { enum: EXECUTION_STATUSES }).notNull().default('queued'),
    cause: text('cause', { enum: EXECUTION_CAUSES }),
    // What the run needs, as it was when it was asked for: a later change of the task does not change it.
    skillName: text('skill_name').notNull(),
    params: jsonb('params').$type<Record<string, unknown>>().notNull(),
    priority: smallint('priority').notNull(),
    timeoutSeconds: integer('timeout_seconds').notNull(),
    heartbeatTimeoutSeconds: integer('heartbeat_timeout_seconds'),
    pinnedAgentId: reference('pinned_agent_id'),
    requiredCapabilities: text('required_capabilities').array().notNull().default([]),
    /** From when an agent may take it; null while it waits for the run before it. */
    availableAt: at('available_at'),
    /** Until when it waits for an agent. */
    expiresAt: at('expires_at'),
    /** How many leases were lost before this attempt, of the same fire. */
    lostLeases: integer('lost_leases').notNull().default(0),
    /** The run that it repeats. */
    replayOf: reference('replay_of'),
    /** The fence: a new one at each claim, so a report on an older lease matches no row. */
    leaseToken: uuid('lease_token'),
    leaseExpiresAt: at('lease_expires_at'),
    /** The fence that was taken away: who still reports under it is heard as an orphan. */
    lostToken: uuid('lost_token'),
    deadlineAt: at('deadline_at'),
    cancelRequested: boolean('cancel_requested').notNull().default(false),
    progress: jsonb('progress').$type<{ percent?: number; message?: string }>(),
    startedAt: at('started_at'),
    endedAt: at('ended_at'),
    outputText: text('output_text'),
    errorText: text('error_text'),
    outputTruncated: boolean('output_truncated').notNull().default(false),
    /** How many characters of output were sent while it ran (execution_output). */
    streamedLength: integer('streamed_length').notNull().default(0),
    /** What it answered, as JSON. */
    result: anyJson('result'),
    createdAt: createdAt(),
  },
  (t) => [
    // Serve the claim: an owner's queue, everybody's queue, and one agent's leases.
    index('executions_owner_queue_idx')
      .on(t.userId, t.priority.desc(), t.availableAt, t.id)
      .where(sql`status = 'queued'`),
    index('executions_queue_idx').on(t.priority.desc(), t.availableAt, t.id).where(sql`status = 'queued'`),
    index('executions_agent_running_idx').on(t.agentId).where(sql`status = 'running'`),
    // Serves the scheduler, which wakes agents when a retry's backoff is over.
    index('executions_available_idx').on(t.availableAt).where(sql`status = 'queued'`),
    // Serve the reaper.
    index('executions_lease_idx').on(t.leaseExpiresAt).where(sql`status = 'running'`),
    index('executions_expiry_idx').on(t.expiresAt).where(sql`status = 'queued' and expires_at is not null`),
    // Serves limits, and what is fair between owners.
    index('executions_owner_running_idx').on(t.userId, t.skillName).where(sql`status = 'running'`),
    // Serves overlap rules, pause, delete.
    index('executions_task_open_idx').on(t.taskId, t.id).where(sql`status in ('queued', 'running')`),
    index('executions_task_idx').on(t.taskId, t.createdAt, t.id),
    index('executions_owner_created_idx').on(t.userId, t.createdAt, t.id),
    index('executions_agent_idx').on(t.agentId, t.createdAt, t.id).where(sql`agent_id is not null`),
    // The rare ends that people look for; the others are found by walking the orders above.
    index('executions_owner_unsuccessful_idx')
      .on(t.userId, t.status, t.createdAt, t.id)
      .where(sql`status in ('failed', 'timeout', 'cancelled')`),
    // Serves admins and retention.
    index('executions_created_idx').on(t.createdAt, t.id),
    check('executions_status_check', oneOf('status', EXECUTION_STATUSES)),
    check('executions_trigger_check', oneOf('trigger', EXECUTION_TRIGGERS)),
    check('executions_cause_check', oneOf('cause', EXECUTION_CAUSES)),
    check(
      'executions_lease_check',
      sql`(status = 'running') = (lease_token is not null) and (status = 'running') = (lease_expires_at is not null)`,
    ),
    check('executions_end_check', sql`(status in ('queued', 'running')) = (ended_at is null)`),
  ],
);

/** Output that agents send while they run: pieces in their order, each known by where it begins. */
export const executionOutput = pgTable(
  'execution_output',
  {
    executionId: reference('execution_id')
      .notNull()
      .references(() => executions.id, { onDelete: 'cascade' }),
    /** In characters (code points) from the beginning of the output. */
    startsAt: integer('starts_at').notNull(),
    length: integer('length').notNull(),
    text: text('text').notNull(),
    createdAt: createdAt(),
  },
  (t) => [primaryKey({ columns: [t.executionId, t.startsAt] })],
);

/** Reports that came after their lease was lost. They change nothing, but nobody's work is thrown away. */
export const orphanResults = pgTable(
  'orphan_results',
  {
    id: id(),
    executionId: reference('execution_id')
      .notNull()
      .references(() => executions.id, { onDelete: 'cascade' }),
    userId: reference('user_id').notNull(),
    agentId: reference('agent_id'),
    leaseToken: uuid('lease_token').notNull(),
    status: text('status', { enum: ['success', 'failed'] }).notNull(),
    outputText: text('output_text'),
    errorText: text('error_text'),
    outputTruncated: boolean('output_truncated').notNull().default(false),
    result: anyJson('result'),
    /** The run that was made of it. */
    adoptedBy: reference('adopted_by'),
    createdAt: createdAt(),
  },
  (t) => [
    // One a lease: who reports twice is heard once.
    unique('orphan_results_lease_key').on(t.executionId, t.leaseToken),
    index('orphan_results_owner_idx').on(t.userId, t.createdAt, t.id),
    check('orphan_results_status_check', oneOf('status', ['success', 'failed'])),
  ],
);

/** How many runs of an owner, or of one skill of an owner, may be under way at once. */
export const concurrencyLimits = pgTable(
  'concurrency_limits',
  {
    id: id(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    /** Null: all skills together. */
    skillName: text('skill_name'),
    maxRunning: integer('max_running').notNull(),
    version: version(),
    createdAt: createdAt(),
    updatedAt: updatedAt(),
  },
  (t) => [
    uniqueIndex('concurrency_limits_key').on(t.userId, sql`coalesce(skill_name, '')`),
    index('concurrency_limits_created_idx').on(t.createdAt, t.id),
    check('concurrency_limits_check', sql`${t.maxRunning} between 0 and 100000`),
  ],
);

export const occurrences = pgTable(
  'occurrences',
  {
    id: id(),
    taskId: reference('task_id').notNull(),
    userId: reference('user_id').notNull(),
    scheduledFor: at('scheduled_for').notNull(),
    verdict: text('verdict', { enum: VERDICTS }).notNull(),
    /** The unfinished run that was in the way. */
    blockedBy: reference('blocked_by'),
    cause: text('cause', { enum: OCCURRENCE_CAUSES }),
    /** The tick whose run stands for this one too. */
    coveredBy: at('covered_by'),
    /** A stretch of ticks with one verdict: how many from `scheduled_for` on, and where the last of them lies before. */
    ticks: integer('ticks').notNull().default(1),
    until: at('until'),
    createdAt: createdAt(),
  },
  (t) => [
    // What makes a double fire impossible, whoever schedules.
    unique('occurrences_tick_key').on(t.taskId, t.scheduledFor),
    index('occurrences_created_idx').on(t.createdAt),
    // Serves the calendar's past.
    index('occurrences_owner_idx').on(t.userId, t.scheduledFor, t.id),
    check('occurrences_verdict_check', oneOf('verdict', VERDICTS)),
    check('occurrences_cause_check', oneOf('cause', OCCURRENCE_CAUSES)),
    check('occurrences_stretch_check', sql`ticks >= 1 and (ticks > 1) <= (until is not null)`),
    foreignKey({ name: 'occurrences_task_fk', columns: [t.taskId], foreignColumns: [tasks.id] }),
  ],
);

export const auditLog = pgTable(
  'audit_log',
  {
    id: id(),
    /** Who did it. Null when Muster did. */
    userId: reference('user_id'),
    /** Whose thing it is: who may read the entry. Null when it is nobody's, such as a login to no account: for admins. */
    ownerId: reference('owner_id'),
    operation: text('operation', { enum: AUDIT_OPERATIONS }).notNull(),
    entityType: text('entity_type').notNull(),
    entityId: reference('entity_id').notNull(),
    changedFields: jsonb('changed_fields').$type<Record<string, { old: unknown; new: unknown }>>().notNull(),
    ipAddress: text('ip_address'),
    userAgent: text('user_agent'),
    requestId: text('request_id'),
    createdAt: createdAt(),
  },
  (t) => [
    index('audit_log_owner_idx').on(t.ownerId, t.createdAt, t.id),
    index('audit_log_created_idx').on(t.createdAt, t.id),
    index('audit_log_actor_idx').on(t.userId, t.createdAt, t.id),
    index('audit_log_entity_idx').on(t.entityType, t.entityId, t.createdAt, t.id),
    check('audit_log_operation_check', oneOf('operation', AUDIT_OPERATIONS)),
  ],
);

/** Entries of the audit log that wait for their place in the chain: written with them, deleted when they are sealed. */
export const auditPending = pgTable('audit_pending', { auditId: bigint('audit_id', { mode: 'number' }).primaryKey() });

/** Each entry's place in its owner's chain of hashes, given by the sealer (audit/seal.ts). Never changed, as the log itself. */
export const auditChain = pgTable(
  'audit_chain',
  {
    /** The entry's owner; 0 for entries of nobody. */
    ownerId: reference('owner_id').notNull(),
    /** From 1, without holes. */
    seq: reference('seq').notNull(),
    auditId: reference('audit_id').notNull(),
    /** SHA-256 in hex, over the hash before it and the entry. */
    hash: text('hash').notNull(),
    prevHash: text('prev_hash').notNull(),
  },
  (t) => [primaryKey({ columns: [t.ownerId, t.seq] }), uniqueIndex('audit_chain_entry_key').on(t.auditId)],
);

/** How the runs of an agent ended, counted by hour, so that metrics survive the history they were counted from. */
export const agentStatsHourly = pgTable(
  'agent_stats_hourly',
  {
    agentId: reference('agent_id')
      .notNull()
      .references(() => agents.id),
    hour: at('hour').notNull(),
    /** `success`, or the cause. */
    outcome: text('outcome', { enum: ['success', ...EXECUTION_CAUSES] }).notNull(),
    /** Place in a logarithmic scale of durations (agents/metrics.ts), from which percentiles are read. */
    durationBucket: smallint('duration_bucket').notNull(),
    runs: integer('runs').notNull(),
    durationMsSum: bigint('duration_ms_sum', { mode: 'number' }).notNull(),
  },
  (t) => [
    primaryKey({ columns: [t.agentId, t.hour, t.outcome, t.durationBucket] }),
    check('agent_stats_hourly_outcome_check', oneOf('outcome', ['success', ...EXECUTION_CAUSES])),
  ],
);

/** Answers to calls that carried an Idempotency-Key, written in the transaction of their effect. */
export const idempotencyKeys = pgTable(
  'idempotency_keys',
  {
    userId: reference('user_id').notNull(),
    /** Method and path pattern. */
    route: text('route').notNull(),
    key: text('key').notNull(),
    /** SHA-256 of what was asked for: the same key for something else is refused. */
    requestHash: text('request_hash').notNull(),
    status: smallint('status').notNull(),
    headers: jsonb('headers').$type<Record<string, string>>().notNull(),
    /** The JSON that was answered; null when it carried a secret and so is not kept. */
    body: text('body'),
    createdAt: createdAt(),
  },
  (t) => [primaryKey({ columns: [t.userId, t.route, t.key] }), index('idempotency_keys_created_idx').on(t.createdAt)],
);

const tsvector = customType<{ data: string }>({ dataType: () => 'tsvector' });

/**
 * What was done: the system of record, of which a Memory MCP server is an index. `search` holds the words and, as one more
 * word, the owner: so the index finds the words of one owner without those of all others.
 */
export const memories = pgTable(
  'memories',
  {
    id: id(),
    /** Its name on Memory MCP servers, which others may write to as well. */
    key: uuid('key').notNull().defaultRandom(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    agentId: reference('agent_id').references(() => agents.id),
    projectId: reference('project_id').references(() => projects.id),
    taskId: reference('task_id').references(() => tasks.id),
    executionId: reference('execution_id'),
    kind: text('kind', { enum: MEMORY_KINDS }).notNull().default('note'),
    intent: text('intent', { enum: MEMORY_INTENTS }).notNull(),
    content: text('content').notNull(),
    metadata: jsonb('metadata').$type<Record<string, unknown>>().notNull().default({}),
    /** Names as they were then: of the agent, the project, the task. */
    tags: jsonb('tags').$type<MemoryTags>().notNull(),
    /** When a Memory MCP server took it; null while none did. */
    deliveredAt: at('delivered_at'),
    createdAt: createdAt(),
    search: tsvector('search').generatedAlwaysAs(
      sql`to_tsvector('english'::regconfig, content) || array_to_tsvector(array['owner:' || user_id::text])`,
    ),
  },
  (t) => [
    uniqueIndex('memories_key_key').on(t.key),
    uniqueIndex('memories_execution_key').on(t.executionId).where(sql`execution_id is not null`),
    index('memories_owner_created_idx').on(t.userId, t.createdAt, t.id),
    index('memories_project_idx').on(t.projectId, t.createdAt),
    index('memories_task_idx').on(t.taskId, t.createdAt),
    index('memories_delivered_idx').on(t.deliveredAt),
    index('memories_search_idx').using('gin', t.search),
    index('memories_trigram_idx').using('gin', sql`left(content, 1000) gin_trgm_ops`),
    check('memories_intent_check', oneOf('intent', MEMORY_INTENTS)),
    check('memories_kind_check', oneOf('kind', MEMORY_KINDS)),
  ],
);

/** The names that go with a memory, nested as the wire has them. */
export interface MemoryTags {
  who: {
    user_id: number;
    agent_id: number | null;
    agent_name: string | null;
    agent_category: string | null;
    capabilities: string[];
  };
  project: { project_id: number | null; project_name: string | null; task_id: number | null; task_name: string | null };
}

/** Memories that a Memory MCP server has yet to take. */
export const memoryOutbox = pgTable(
  'memory_outbox',
  {
    memoryId: reference('memory_id')
      .primaryKey()
      .references(() => memories.id, { onDelete: 'cascade' }),
    /** From when it may be sent: the end of somebody's turn at it, or of its backoff. */
    availableAt: at('available_at').notNull().defaultNow(),
    attempts: integer('attempts').notNull().default(0),
    /** It may have arrived: it must be looked for before it is sent again. */
    ambiguous: boolean('ambiguous').notNull().default(false),
    lastError: text('last_error'),
    /** Given up: a person has to look (npm run memory:replay). */
    deadAt: at('dead_at'),
    createdAt: createdAt(),
  },
  (t) => [
    index('memory_outbox_available_idx').on(t.availableAt).where(sql`dead_at is null`),
    index('memory_outbox_dead_idx').on(t.deadAt).where(sql`dead_at is not null`),
  ],
);

/** How far the events were read for what Muster remembers by itself. One row. */
export const memoryCursor = pgTable('memory_cursor', {
  id: smallint('id').primaryKey(),
  lastEventId: reference('last_event_id').notNull(),
});

const eventColumns = () => ({
  /** Who may see it besides admins. */
  userId: reference('user_id').notNull(),
  /** True for what everybody may see: the doings of shared agents. */
  shared: boolean('shared').notNull().default(false),
  topic: text('topic', { enum: EVENT_TOPICS }).notNull(),
  type: text('type').notNull(),
  taskId: reference('task_id'),
  projectId: reference('project_id'),
  agentId: reference('agent_id'),
  /** The wire's `data`, kept as the text that goes out. */
  data: text('data').notNull(),
  createdAt: createdAt(),
});

/** Events as they are written, in the transaction that caused them. Its ids are not commit order: see realtime/relay.ts. */
export const eventOutbox = pgTable('event_outbox', { id: id(), ...eventColumns() }, () => [
  check('event_outbox_topic_check', oneOf('topic', EVENT_TOPICS)),
]);

/** Events with their place in the one order, given by the relay. */
export const events = pgTable(
  'events',
  {
    eventId: bigint('event_id', { mode: 'number' })
      .primaryKey()
      .generatedAlwaysAsIdentity({ maxValue: Number.MAX_SAFE_INTEGER }),
    ...eventColumns(),
  },
  (t) => [
    // Serve the replay of what one user may see: its own, and what everybody may see.
    index('events_owner_idx').on(t.userId, t.eventId),
    index('events_shared_idx').on(t.eventId).where(sql`shared`),
    check('events_topic_check', oneOf('topic', EVENT_TOPICS)),
  ],
);

/** Tickets for opening one WebSocket or event stream (auth/tickets.ts). */
export const wsTickets = pgTable(
  'ws_tickets',
  {
    ticketHash: text('ticket_hash').primaryKey(),
    userId: reference('user_id')
      .notNull()
      .references(() => users.id),
    role: text('role', { enum: USER_ROLES }).notNull(),
    scopes: text('scopes', { enum: API_KEY_SCOPES }).array().notNull(),
    apiKeyId: reference('api_key_id').references(() => apiKeys.id),
    familyId: uuid('family_id'),
    credentialExpiresAt: at('credential_expires_at'),
    expiresAt: at('expires_at').notNull(),
  },
  (t) => [index('ws_tickets_expiry_idx').on(t.expiresAt)],
);
