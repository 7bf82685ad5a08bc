CREATE TABLE "agents" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "agents_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"name" text NOT NULL,
	"type" text NOT NULL,
	"capabilities" text[] DEFAULT '{}' NOT NULL,
	"status" text DEFAULT 'idle' NOT NULL,
	"shared" boolean DEFAULT false NOT NULL,
	"max_concurrency" integer DEFAULT 1 NOT NULL,
	"last_active_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"deleted_at" timestamp (3) with time zone,
	"version" integer DEFAULT 1 NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "agents_type_check" CHECK (type in ('coder', 'reviewer', 'tester', 'planner', 'researcher', 'api-designer', 'backend-dev', 'mobile-dev', 'ml-developer', 'system-architect', 'code-analyzer', 'hierarchical-coordinator', 'mesh-coordinator', 'adaptive-coordinator', 'custom')),
	CONSTRAINT "agents_status_check" CHECK (status in ('active', 'idle', 'busy', 'offline', 'error')),
	CONSTRAINT "agents_max_concurrency_check" CHECK ("agents"."max_concurrency" between 1 and 1000)
);
--> statement-breakpoint
CREATE TABLE "api_keys" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "api_keys_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"name" text NOT NULL,
	"prefix" text NOT NULL,
	"key_hash" text NOT NULL,
	"scopes" text[] NOT NULL,
	"expires_at" timestamp (3) with time zone,
	"last_used_at" timestamp (3) with time zone,
	"revoked_at" timestamp (3) with time zone,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "api_keys_scopes_check" CHECK (scopes <@ array['read','write','agent'] and cardinality(scopes) > 0)
);
--> statement-breakpoint
CREATE TABLE "audit_log" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "audit_log_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint,
	"owner_id" bigint NOT NULL,
	"operation" text NOT NULL,
	"entity_type" text NOT NULL,
	"entity_id" bigint NOT NULL,
	"changed_fields" jsonb NOT NULL,
	"ip_address" text,
	"user_agent" text,
	"request_id" text,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "audit_log_operation_check" CHECK (operation in ('CREATE', 'UPDATE', 'DELETE'))
);
--> statement-breakpoint
CREATE TABLE "event_outbox" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "event_outbox_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"shared" boolean DEFAULT false NOT NULL,
	"topic" text NOT NULL,
	"type" text NOT NULL,
	"task_id" bigint,
	"project_id" bigint,
	"agent_id" bigint,
	"data" text NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "event_outbox_topic_check" CHECK (topic in ('tasks', 'agents', 'calendar'))
);
--> statement-breakpoint
CREATE TABLE "events" (
	"event_id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "events_event_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"shared" boolean DEFAULT false NOT NULL,
	"topic" text NOT NULL,
	"type" text NOT NULL,
	"task_id" bigint,
	"project_id" bigint,
	"agent_id" bigint,
	"data" text NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "events_topic_check" CHECK (topic in ('tasks', 'agents', 'calendar'))
);
--> statement-breakpoint
CREATE TABLE "executions" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "executions_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"task_id" bigint NOT NULL,
	"user_id" bigint NOT NULL,
	"agent_id" bigint,
	"trigger" text NOT NULL,
	"occurrence_id" bigint,
	"scheduled_for" timestamp (3) with time zone NOT NULL,
	"attempt" integer DEFAULT 1 NOT NULL,
	"retry_of" bigint,
	"status" text DEFAULT 'queued' NOT NULL,
	"cause" text,
	"skill_name" text NOT NULL,
	"params" jsonb NOT NULL,
	"priority" smallint NOT NULL,
	"timeout_seconds" integer NOT NULL,
	"pinned_agent_id" bigint,
	"required_capabilities" text[] DEFAULT '{}' NOT NULL,
	"available_at" timestamp (3) with time zone,
	"lease_token" uuid,
	"lease_expires_at" timestamp (3) with time zone,
	"deadline_at" timestamp (3) with time zone,
	"cancel_requested" boolean DEFAULT false NOT NULL,
	"progress" jsonb,
	"started_at" timestamp (3) with time zone,
	"ended_at" timestamp (3) with time zone,
	"output_text" text,
	"error_text" text,
	"output_truncated" boolean DEFAULT false NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "executions_status_check" CHECK (status in ('queued', 'running', 'success', 'failed', 'timeout', 'cancelled')),
	CONSTRAINT "executions_trigger_check" CHECK (trigger in ('schedule', 'manual', 'retry', 'activity')),
	CONSTRAINT "executions_cause_check" CHECK (cause in ('agent_failed', 'lease_lost', 'run_timeout', 'cancelled')),
	CONSTRAINT "executions_lease_check" CHECK ((status = 'running') = (lease_token is not null) and (status = 'running') = (lease_expires_at is not null)),
	CONSTRAINT "executions_end_check" CHECK ((status in ('queued', 'running')) = (ended_at is null))
);
--> statement-breakpoint
CREATE TABLE "occurrences" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "occurrences_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"task_id" bigint NOT NULL,
	"user_id" bigint NOT NULL,
	"scheduled_for" timestamp (3) with time zone NOT NULL,
	"verdict" text NOT NULL,
	"blocked_by" bigint,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "occurrences_tick_key" UNIQUE("task_id","scheduled_for"),
	CONSTRAINT "occurrences_verdict_check" CHECK (verdict in ('fired', 'late', 'coalesced', 'skipped_overlap', 'skipped_misfire'))
);
--> statement-breakpoint
CREATE TABLE "projects" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "projects_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"name" text NOT NULL,
	"description" text,
	"status" text DEFAULT 'active' NOT NULL,
	"tasks_count" integer DEFAULT 0 NOT NULL,
	"version" integer DEFAULT 1 NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "projects_status_check" CHECK (status in ('active', 'archived', 'deleted')),
	CONSTRAINT "projects_tasks_count_check" CHECK ("projects"."tasks_count" >= 0)
);
--> statement-breakpoint
CREATE TABLE "refresh_tokens" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "refresh_tokens_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"family_id" uuid NOT NULL,
	"token_hash" text NOT NULL,
	"expires_at" timestamp (3) with time zone NOT NULL,
	"spent_at" timestamp (3) with time zone,
	"revoked_at" timestamp (3) with time zone,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL
);
--> statement-breakpoint
CREATE TABLE "tasks" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "tasks_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"user_id" bigint NOT NULL,
	"project_id" bigint,
	"name" text,
	"skill_name" text NOT NULL,
	"params" jsonb DEFAULT '{}'::jsonb NOT NULL,
	"priority" smallint DEFAULT 1 NOT NULL,
	"schedule_cron" text,
	"timezone" text DEFAULT 'UTC' NOT NULL,
	"run_at" timestamp (3) with time zone,
	"next_run_at" timestamp (3) with time zone,
	"last_run_at" timestamp (3) with time zone,
	"status" text DEFAULT 'pending' NOT NULL,
	"overlap_policy" text DEFAULT 'skip' NOT NULL,
	"misfire_policy" text DEFAULT 'fire_last' NOT NULL,
	"max_attempts" integer DEFAULT 3 NOT NULL,
	"retry_backoff_seconds" integer DEFAULT 10 NOT NULL,
	"timeout_seconds" integer DEFAULT 3600 NOT NULL,
	"agent_id" bigint,
	"required_capabilities" text[] DEFAULT '{}' NOT NULL,
	"version" integer DEFAULT 1 NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "tasks_status_check" CHECK (status in ('pending', 'running', 'completed', 'failed', 'disabled', 'deleted')),
	CONSTRAINT "tasks_priority_check" CHECK (priority between 0 and 3),
	CONSTRAINT "tasks_overlap_check" CHECK (overlap_policy in ('skip', 'queue_one', 'queue_all', 'cancel_previous', 'allow')),
	CONSTRAINT "tasks_misfire_check" CHECK (misfire_policy in ('skip', 'fire_last', 'fire_all')),
	CONSTRAINT "tasks_schedule_check" CHECK (schedule_cron is null or run_at is null),
	CONSTRAINT "tasks_max_attempts_check" CHECK ("tasks"."max_attempts" between 1 and 20),
	CONSTRAINT "tasks_armed_check" CHECK (next_run_at is null or status not in ('disabled', 'deleted'))
);
--> statement-breakpoint
CREATE TABLE "users" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "users_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"email" text NOT NULL,
	"name" text,
	"role" text DEFAULT 'user' NOT NULL,
	"password_hash" text,
	"disabled_at" timestamp (3) with time zone,
	"version" integer DEFAULT 1 NOT NULL,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"updated_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	CONSTRAINT "users_role_check" CHECK (role in ('user', 'admin'))
);
--> statement-breakpoint
ALTER TABLE "agents" ADD CONSTRAINT "agents_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "api_keys" ADD CONSTRAINT "api_keys_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "executions" ADD CONSTRAINT "executions_task_id_tasks_id_fk" FOREIGN KEY ("task_id") REFERENCES "public"."tasks"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "executions" ADD CONSTRAINT "executions_agent_id_agents_id_fk" FOREIGN KEY ("agent_id") REFERENCES "public"."agents"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "occurrences" ADD CONSTRAINT "occurrences_task_fk" FOREIGN KEY ("task_id") REFERENCES "public"."tasks"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "projects" ADD CONSTRAINT "projects_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "refresh_tokens" ADD CONSTRAINT "refresh_tokens_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_project_id_projects_id_fk" FOREIGN KEY ("project_id") REFERENCES "public"."projects"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "tasks" ADD CONSTRAINT "tasks_agent_id_agents_id_fk" FOREIGN KEY ("agent_id") REFERENCES "public"."agents"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
CREATE UNIQUE INDEX "agents_owner_name_key" ON "agents" USING btree ("user_id","name") WHERE deleted_at is null;--> statement-breakpoint
CREATE INDEX "agents_alive_idx" ON "agents" USING btree ("last_active_at") WHERE deleted_at is null and status <> 'offline';--> statement-breakpoint
CREATE UNIQUE INDEX "api_keys_hash_key" ON "api_keys" USING btree ("key_hash");--> statement-breakpoint
CREATE INDEX "api_keys_user_idx" ON "api_keys" USING btree ("user_id","id");--> statement-breakpoint
CREATE INDEX "audit_log_owner_idx" ON "audit_log" USING btree ("owner_id","id");--> statement-breakpoint
CREATE INDEX "audit_log_entity_idx" ON "audit_log" USING btree ("entity_type","entity_id","id");--> statement-breakpoint
CREATE INDEX "events_owner_idx" ON "events" USING btree ("user_id","event_id");--> statement-breakpoint
CREATE INDEX "events_shared_idx" ON "events" USING btree ("event_id") WHERE shared;--> statement-breakpoint
CREATE INDEX "executions_owner_queue_idx" ON "executions" USING btree ("user_id","priority" DESC NULLS LAST,"available_at","id") WHERE status = 'queued';--> statement-breakpoint
CREATE INDEX "executions_queue_idx" ON "executions" USING btree ("priority" DESC NULLS LAST,"available_at","id") WHERE status = 'queued';--> statement-breakpoint
CREATE INDEX "executions_agent_running_idx" ON "executions" USING btree ("agent_id") WHERE status = 'running';--> statement-breakpoint
CREATE INDEX "executions_available_idx" ON "executions" USING btree ("available_at") WHERE status = 'queued';--> statement-breakpoint
CREATE INDEX "executions_lease_idx" ON "executions" USING btree ("lease_expires_at") WHERE status = 'running';--> statement-breakpoint
CREATE INDEX "executions_task_open_idx" ON "executions" USING btree ("task_id","id") WHERE status in ('queued', 'running');--> statement-breakpoint
CREATE INDEX "executions_task_idx" ON "executions" USING btree ("task_id","created_at","id");--> statement-breakpoint
CREATE INDEX "executions_owner_created_idx" ON "executions" USING btree ("user_id","created_at","id");--> statement-breakpoint
CREATE INDEX "executions_created_idx" ON "executions" USING btree ("created_at");--> statement-breakpoint
CREATE INDEX "occurrences_created_idx" ON "occurrences" USING btree ("created_at");--> statement-breakpoint
CREATE INDEX "projects_owner_created_idx" ON "projects" USING btree ("user_id","created_at","id");--> statement-breakpoint
CREATE UNIQUE INDEX "refresh_tokens_hash_key" ON "refresh_tokens" USING btree ("token_hash");--> statement-breakpoint
CREATE INDEX "refresh_tokens_family_idx" ON "refresh_tokens" USING btree ("family_id");--> statement-breakpoint
CREATE INDEX "refresh_tokens_user_idx" ON "refresh_tokens" USING btree ("user_id");--> statement-breakpoint
CREATE INDEX "refresh_tokens_expiry_idx" ON "refresh_tokens" USING btree ("expires_at");--> statement-breakpoint
CREATE INDEX "tasks_due_idx" ON "tasks" USING btree ("next_run_at","id") WHERE next_run_at is not null;--> statement-breakpoint
CREATE INDEX "tasks_owner_created_idx" ON "tasks" USING btree ("user_id","created_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_owner_updated_idx" ON "tasks" USING btree ("user_id","updated_at","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_owner_next_run_idx" ON "tasks" USING btree ("user_id",coalesce(next_run_at, 'infinity'::timestamptz),"id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_owner_status_idx" ON "tasks" USING btree ("user_id","status","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_owner_priority_idx" ON "tasks" USING btree ("user_id","priority","id") WHERE status <> 'deleted';--> statement-breakpoint
CREATE INDEX "tasks_project_idx" ON "tasks" USING btree ("project_id") WHERE status <> 'deleted' and project_id is not null;--> statement-breakpoint
CREATE UNIQUE INDEX "users_email_key" ON "users" USING btree ("email");