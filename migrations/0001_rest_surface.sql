-- For search by any part of a name. Trusted since Postgres 13: the owner of the database may create it.
CREATE EXTENSION IF NOT EXISTS pg_trgm;--> statement-breakpoint
CREATE TABLE "agent_stats_hourly" (
	"agent_id" bigint NOT NULL,
	"hour" timestamp (3) with time zone NOT NULL,
	"outcome" text NOT NULL,
	"duration_bucket" smallint NOT NULL,
	"runs" integer NOT NULL,
	"duration_ms_sum" bigint NOT NULL,
	CONSTRAINT "agent_stats_hourly_agent_id_hour_outcome_duration_bucket_pk" PRIMARY KEY("agent_id","hour","outcome","duration_bucket"),
	CONSTRAINT "agent_stats_hourly_outcome_check" CHECK (outcome in ('success', 'agent_failed', 'lease_lost', 'run_timeout', 'cancelled'))
);
--> statement-breakpoint
CREATE TABLE "audit_chain" (
	"owner_id" bigint NOT NULL,
	"seq" bigint NOT NULL,
	"audit_id" bigint NOT NULL,
	"hash" text NOT NULL,
	"prev_hash" text NOT NULL,
	CONSTRAINT "audit_chain_owner_id_seq_pk" PRIMARY KEY("owner_id","seq")
);
--> statement-breakpoint
CREATE TABLE "audit_pending" (
	"audit_id" bigint PRIMARY KEY NOT NULL
);
--> statement-breakpoint
CREATE TABLE "idempotency_keys" (
	"user_id" bigint NOT NULL,
	"route" text NOT NULL,
	"key" text NOT NULL,
	"request_hash" text NOT NULL,
	"status" smallint NOT NULL,
	"headers" jsonb NOT NULL,
	"body" text,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "idempotency_keys_user_id_route_key_pk" PRIMARY KEY("user_id","route","key")
);
--> statement-breakpoint
DROP INDEX "audit_log_owner_idx";--> statement-breakpoint
DROP INDEX "audit_log_entity_idx";--> statement-breakpoint
DROP INDEX "executions_created_idx";--> statement-breakpoint
DROP INDEX "projects_owner_created_idx";--> statement-breakpoint
DROP INDEX "tasks_project_idx";--> statement-breakpoint
ALTER TABLE "audit_log" ALTER COLUMN "owner_id" DROP NOT NULL;--> statement-breakpoint
ALTER TABLE "agents" ADD COLUMN "draining" boolean DEFAULT false NOT NULL;--> statement-breakpoint
ALTER TABLE "tasks" ADD COLUMN "paused_with_project" boolean DEFAULT false NOT NULL;--> statement-breakpoint
ALTER TABLE "agent_stats_hourly" ADD CONSTRAINT "agent_stats_hourly_agent_id_agents_id_fk" FOREIGN KEY ("agent_id") REFERENCES "public"."agents"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
CREATE UNIQUE INDEX "audit_chain_entry_key" ON "audit_chain" USING btree ("audit_id");--> statement-breakpoint
CREATE INDEX "idempotency_keys_created_idx" ON "idempotency_keys" USING btree ("created_at");--> statement-breakpoint
CREATE INDEX "agents_owner_created_idx" ON "agents" USING btree ("user_id","created_at","id") WHERE deleted_at is null;--> statement-breakpoint
CREATE INDEX "agents_created_idx" ON "agents" USING btree ("created_at","id") WHERE deleted_at is null;--> statement-breakpoint
CREATE INDEX "agents_shared_idx" ON "agents" USING btree ("created_at","id") WHERE deleted_at is null and shared;--> statement-breakpoint
CREATE INDEX "agents_capabilities_idx" ON "agents" USING gin ("capabilities") WHERE deleted_at is null;--> statement-breakpoint
CREATE INDEX "audit_log_created_idx" ON "audit_log" USING btree ("created_at","id");--> statement-breakpoint
CREATE INDEX "audit_log_actor_idx" ON "audit_log" USING btree ("user_id","created_at","id");--> statement-breakpoint
CREATE INDEX "executions_agent_idx" ON "executions" USING btree ("agent_id","created_at","id") WHERE agent_id is not null;--> statement-breakpoint
CREATE INDEX "executions_owner_unsuccessful_idx" ON "executions" USING btree ("user_id","status","created_at","id") WHERE status in ('failed', 'timeout', 'cancelled');--> statement-breakpoint
CREATE INDEX "occurrences_owner_idx" ON "occurrences" USING btree ("user_id","scheduled_for","id");--> statement-breakpoint
CREATE INDEX "projects_owner_updated_idx" ON "projects" USING btree ("user_id","updated_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "projects_owner_name_idx" ON "projects" USING btree ("user_id","name","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "projects_owner_count_idx" ON "projects" USING btree ("user_id","tasks_count","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "projects_created_idx" ON "projects" USING btree ("created_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "projects_search_idx" ON "projects" USING gin ((name || chr(10) || coalesce(description, '')) gin_trgm_ops) WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_created_idx" ON "tasks" USING btree ("created_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_agent_idx" ON "tasks" USING btree ("agent_id","created_at","id") WHERE status <> 'deleted' and agent_id is not null;--> statement-breakpoint
CREATE INDEX "tasks_owner_skill_idx" ON "tasks" USING btree ("user_id","skill_name","created_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_search_idx" ON "tasks" USING gin ((coalesce(name, '') || chr(10) || skill_name) gin_trgm_ops) WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_owner_schedule_idx" ON "tasks" USING btree ("user_id","schedule_cron","timezone","id") WHERE schedule_cron is not null and next_run_at is not null;--> statement-breakpoint
CREATE INDEX "audit_log_owner_idx" ON "audit_log" USING btree ("owner_id","created_at","id");--> statement-breakpoint
CREATE INDEX "audit_log_entity_idx" ON "audit_log" USING btree ("entity_type","entity_id","created_at","id");--> statement-breakpoint
CREATE INDEX "executions_created_idx" ON "executions" USING btree ("created_at","id");--> statement-breakpoint
CREATE INDEX "projects_owner_created_idx" ON "projects" USING btree ("user_id","created_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_project_idx" ON "tasks" USING btree ("project_id","created_at","id") WHERE status <> 'deleted' and project_id is not null;--> statement-breakpoint
CREATE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION 'the audit log is only added to: % of % is refused', TG_OP, TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;--> statement-breakpoint
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON "audit_log" FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();--> statement-breakpoint
CREATE TRIGGER audit_chain_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON "audit_chain" FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change();--> statement-breakpoint
-- What was there before: entries get their place in the chain, and the runs that ended are counted.
INSERT INTO "audit_pending" ("audit_id") SELECT "id" FROM "audit_log";--> statement-breakpoint
INSERT INTO "agent_stats_hourly" ("agent_id", "hour", "outcome", "duration_bucket", "runs", "duration_ms_sum")
SELECT "agent_id", date_trunc('hour', "ended_at", 'UTC'), "outcome", floor(ln(greatest("ms", 1)) / ln(1.1))::smallint, count(*), sum("ms")
FROM (
	SELECT "agent_id", "ended_at", CASE WHEN "status" = 'success' THEN 'success' ELSE "cause" END AS "outcome",
		greatest(0, extract(epoch FROM "ended_at" - "started_at") * 1000)::bigint AS "ms"
	FROM "executions" WHERE "agent_id" IS NOT NULL AND "started_at" IS NOT NULL AND "ended_at" IS NOT NULL
) "ended" WHERE "outcome" IS NOT NULL GROUP BY 1, 2, 3, 4;
