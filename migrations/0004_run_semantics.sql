CREATE TABLE "concurrency_limits" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "concurrency_limits_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"skill_name" text,
	"max_running" integer NOT NULL,
	"version" integer DEFAULT 1 NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "concurrency_limits_check" CHECK ("concurrency_limits"."max_running" between 0 and 100000)
);
--> statement-breakpoint
CREATE TABLE "execution_output" (
	"execution_id" bigint NOT NULL,
	"starts_at" integer NOT NULL,
	"length" integer NOT NULL,
	"text" text NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "execution_output_execution_id_starts_at_pk" PRIMARY KEY("execution_id","starts_at")
);
--> statement-breakpoint
CREATE TABLE "orphan_results" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "orphan_results_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"execution_id" bigint NOT NULL,
	"user_id" bigint NOT NULL,
	"agent_id" bigint,
	"lease_token" uuid NOT NULL,
	"status" text NOT NULL,
	"output_text" text,
	"error_text" text,
	"output_truncated" boolean DEFAULT false NOT NULL,
	"result" jsonb,
	"adopted_by" bigint,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "orphan_results_lease_key" UNIQUE("execution_id","lease_token"),
	CONSTRAINT "orphan_results_status_check" CHECK (status in ('success', 'failed'))
);
--> statement-breakpoint
ALTER TABLE "agent_stats_hourly" DROP CONSTRAINT "agent_stats_hourly_outcome_check";--> statement-breakpoint
ALTER TABLE "executions" DROP CONSTRAINT "executions_trigger_check";--> statement-breakpoint
ALTER TABLE "executions" DROP CONSTRAINT "executions_cause_check";--> statement-breakpoint
ALTER TABLE "occurrences" DROP CONSTRAINT "occurrences_verdict_check";--> statement-breakpoint
DROP INDEX "tasks_owner_schedule_idx";--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "heartbeat_timeout_seconds" integer;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "expires_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "lost_leases" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "replay_of" bigint;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "lost_token" uuid;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "streamed_length" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE "executions" ADD COLUMN "result" jsonb;--> statement-breakpoint
ALTER TABLE "occurrences" ADD COLUMN "cause" text;--> statement-breakpoint
ALTER TABLE "occurrences" ADD COLUMN "covered_by" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "occurrences" ADD COLUMN "ticks" integer DEFAULT 1 NOT NULL;--> statement-breakpoint
ALTER TABLE "occurrences" ADD COLUMN "until" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "max_lateness_seconds" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "dst_gap" text;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "dst_fold" text;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "starts_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "ends_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "spread_seconds" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "max_runs" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "fired_count" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "pause_reason" text;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "pause_until" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "quiet_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "pause_after_failures" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "consecutive_failures" integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "max_lost_leases" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "queue_ttl_seconds" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "heartbeat_timeout_seconds" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "expect_success_within_seconds" integer;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "last_success_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "overdue_at" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "overdue_since" timestamp (3) with time zone;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "schedule_key" text;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "schedule_base" jsonb;--> statement-breakpoint
ALTER TABLE "concurrency_limits" ADD CONSTRAINT "concurrency_limits_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "execution_output" ADD CONSTRAINT "execution_output_execution_id_executions_id_fk" FOREIGN KEY ("execution_id") REFERENCES "public"."executions"("id") ON DELETE cascade ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "orphan_results" ADD CONSTRAINT "orphan_results_execution_id_executions_id_fk" FOREIGN KEY ("execution_id") REFERENCES "public"."executions"("id") ON DELETE cascade ON UPDATE no action;--> statement-breakpoint
CREATE UNIQUE INDEX "concurrency_limits_key" ON "concurrency_limits" USING btree ("user_id",coalesce(skill_name, ''));--> statement-breakpoint
CREATE INDEX "concurrency_limits_created_idx" ON "concurrency_limits" USING btree ("created_at","id");--> statement-breakpoint
CREATE INDEX "orphan_results_owner_idx" ON "orphan_results" USING btree ("user_id","created_at","id");--> statement-breakpoint
CREATE INDEX "executions_expiry_idx" ON "executions" USING btree ("expires_at") WHERE status = 'queued' and expires_at is not null;--> statement-breakpoint
CREATE INDEX "executions_owner_running_idx" ON "executions" USING btree ("user_id","skill_name") WHERE status = 'running';--> statement-breakpoint
CREATE INDEX "tasks_quiet_idx" ON "tasks" USING btree ("quiet_at","id") WHERE quiet_at is not null;--> statement-breakpoint
CREATE INDEX "tasks_overdue_idx" ON "tasks" USING btree ("overdue_at","id") WHERE overdue_at is not null;--> statement-breakpoint
CREATE INDEX "tasks_overdue_since_idx" ON "tasks" USING btree ("user_id","overdue_since","id") WHERE overdue_since is not null;--> statement-breakpoint
CREATE UNIQUE INDEX "tasks_schedule_key" ON "tasks" USING btree ("user_id","schedule_key") WHERE status <> 'deleted' and schedule_key is not null;--> statement-breakpoint
CREATE INDEX "tasks_owner_schedule_idx" ON "tasks" USING btree ("user_id","schedule_cron","timezone",coalesce(dst_gap, ''),coalesce(dst_fold, ''),"id") WHERE schedule_cron is not null and next_run_at is not null;--> statement-breakpoint
ALTER TABLE "agent_stats_hourly" ADD CONSTRAINT "agent_stats_hourly_outcome_check" CHECK (outcome in ('success', 'agent_failed', 'lease_lost', 'run_timeout', 'cancelled', 'queue_expired'));--> statement-breakpoint
ALTER TABLE "executions" ADD CONSTRAINT "executions_trigger_check" CHECK (trigger in ('schedule', 'manual', 'retry', 'activity', 'backfill', 'replay', 'adopted'));--> statement-breakpoint
ALTER TABLE "executions" ADD CONSTRAINT "executions_cause_check" CHECK (cause in ('agent_failed', 'lease_lost', 'run_timeout', 'cancelled', 'queue_expired'));--> statement-breakpoint
ALTER TABLE "occurrences" ADD CONSTRAINT "occurrences_cause_check" CHECK (cause in ('delay', 'downtime', 'catch_up_limit', 'open_run', 'queue_full', 'manual', 'project', 'failures', 'clock_change', 'backfill'));--> statement-breakpoint
ALTER TABLE "occurrences" ADD CONSTRAINT "occurrences_stretch_check" CHECK (ticks >= 1 and (ticks > 1) <= (until is not null));--> statement-breakpoint
ALTER TABLE "occurrences" ADD CONSTRAINT "occurrences_verdict_check" CHECK (verdict in ('fired', 'late', 'coalesced', 'skipped_overlap', 'skipped_misfire', 'paused', 'dst_gap'));--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_dst_gap_check" CHECK (dst_gap in ('skip', 'shift'));--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_dst_fold_check" CHECK (dst_fold in ('first', 'both'));--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_pause_reason_check" CHECK (pause_reason in ('manual', 'project', 'failures'));--> statement-breakpoint
UPDATE "tasks" SET "pause_reason" = CASE WHEN "paused_with_project" THEN 'project' ELSE 'manual' END WHERE "status" = 'disabled';--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_bounds_check" CHECK (starts_at < ends_at);--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_spread_check" CHECK ("tasks"."spread_seconds" between 0 and 86400);--> statement-breakpoint
ALTER TABLE "tasks" DROP COLUMN "paused_with_project";