CREATE TABLE "memories" (
	"id" bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY (sequence name "memories_id_seq" INCREMENT BY 1 MINVALUE 1 MAXVALUE 9007199254740991 START WITH 1 CACHE 1),
	"key" uuid DEFAULT gen_random_uuid() NOT NULL,
	"user_id" bigint NOT NULL,
	"agent_id" bigint,
	"project_id" bigint,
	"task_id" bigint,
	"execution_id" bigint,
	"kind" text DEFAULT 'note' NOT NULL,
	"intent" text NOT NULL,
	"content" text NOT NULL,
	"metadata" jsonb DEFAULT '{}'::jsonb NOT NULL,
	"tags" jsonb NOT NULL,
	"delivered_at" timestamp (3) with time zone,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"search" "tsvector" GENERATED ALWAYS AS (to_tsvector('english'::regconfig, content) || array_to_tsvector(array['owner:' || user_id::text])) STORED,
	CONSTRAINT "memories_intent_check" CHECK (intent in ('implementation', 'bugfix', 'refactor', 'testing', 'documentation', 'analysis', 'planning', 'research')),
	CONSTRAINT "memories_kind_check" CHECK (kind in ('note', 'execution', 'activity', 'task_change'))
);
--> statement-breakpoint
CREATE TABLE "memory_cursor" (
	"id" smallint PRIMARY KEY NOT NULL,
	"last_event_id" bigint NOT NULL
);
--> statement-breakpoint
CREATE TABLE "memory_outbox" (
	"memory_id" bigint PRIMARY KEY NOT NULL,
	"available_at" timestamp (3) with time zone DEFAULT now() NOT NULL,
	"attempts" integer DEFAULT 0 NOT NULL,
	"ambiguous" boolean DEFAULT false NOT NULL,
	"last_error" text,
	"dead_at" timestamp (3) with time zone,
	"created_at" timestamp (3) with time zone DEFAULT now() NOT NULL
);
--> statement-breakpoint
ALTER TABLE "event_outbox" DROP CONSTRAINT "event_outbox_topic_check";--> statement-breakpoint
ALTER TABLE "events" DROP CONSTRAINT "events_topic_check";--> statement-breakpoint
ALTER TABLE "memories" ADD CONSTRAINT "memories_user_id_users_id_fk" FOREIGN KEY ("user_id") REFERENCES "public"."users"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "memories" ADD CONSTRAINT "memories_agent_id_agents_id_fk" FOREIGN KEY ("agent_id") REFERENCES "public"."agents"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "memories" ADD CONSTRAINT "memories_project_id_projects_id_fk" FOREIGN KEY ("project_id") REFERENCES "public"."projects"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "memories" ADD CONSTRAINT "memories_task_id_tasks_id_fk" FOREIGN KEY ("task_id") REFERENCES "public"."tasks"("id") ON DELETE no action ON UPDATE no action;--> statement-breakpoint
ALTER TABLE "memory_outbox" ADD CONSTRAINT "memory_outbox_memory_id_memories_id_fk" FOREIGN KEY ("memory_id") REFERENCES "public"."memories"("id") ON DELETE cascade ON UPDATE no action;--> statement-breakpoint
CREATE UNIQUE INDEX "memories_key_key" ON "memories" USING btree ("key");--> statement-breakpoint
CREATE UNIQUE INDEX "memories_execution_key" ON "memories" USING btree ("execution_id") WHERE execution_id is not null;--> statement-breakpoint
CREATE INDEX "memories_owner_created_idx" ON "memories" USING btree ("user_id","created_at","id");--> statement-breakpoint
CREATE INDEX "memories_project_idx" ON "memories" USING btree ("project_id","created_at");--> statement-breakpoint
CREATE INDEX "memories_task_idx" ON "memories" USING btree ("task_id","created_at");--> statement-breakpoint
CREATE INDEX "memories_delivered_idx" ON "memories" USING btree ("delivered_at");--> statement-breakpoint
CREATE INDEX "memories_search_idx" ON "memories" USING gin ("search");--> statement-breakpoint
CREATE INDEX "memories_trigram_idx" ON "memories" USING gin (left(content, 1000) gin_trgm_ops);--> statement-breakpoint
CREATE INDEX "memory_outbox_available_idx" ON "memory_outbox" USING btree ("available_at") WHERE dead_at is null;--> statement-breakpoint
CREATE INDEX "memory_outbox_dead_idx" ON "memory_outbox" USING btree ("dead_at") WHERE dead_at is not null;--> statement-breakpoint
ALTER TABLE "event_outbox" ADD CONSTRAINT "event_outbox_topic_check" CHECK (topic in ('tasks', 'agents', 'calendar', 'memory'));--> statement-breakpoint
ALTER TABLE "events" ADD CONSTRAINT "events_topic_check" CHECK (topic in ('tasks', 'agents', 'calendar', 'memory'));