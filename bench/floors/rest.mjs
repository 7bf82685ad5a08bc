// The least that answers the same two calls with the same libraries: Fastify, a JWT, and one named statement each.
import jwt from '@fastify/jwt';
import { fastify } from 'fastify';
import pg from 'pg';

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 10 });
const app = fastify();
await app.register(jwt, { secret: process.env.JWT_SECRET });
const onRequest = (request) => request.jwtVerify();
app.get('/', async () => ({ status: 'ok' }));

const text = { type: 'string' };
const task = {
  type: 'object',
  properties: {
    id: { type: 'integer' },
    user_id: { type: 'integer' },
    name: { type: ['string', 'null'] },
    skill_name: text,
    params: { type: 'object', additionalProperties: true },
    priority: { type: 'integer' },
    schedule_cron: { type: ['string', 'null'] },
    timezone: text,
    next_run_at: { type: ['string', 'null'], format: 'date-time' },
    status: text,
    version: { type: 'integer' },
    created_at: { type: 'string', format: 'date-time' },
    updated_at: { type: 'string', format: 'date-time' },
  },
};

app.get('/api/v1/tasks/:id', { onRequest, schema: { response: { 200: task } } }, async (request, reply) => {
  const { rows } = await pool.query({
    name: 'get',
    text: 'select * from tasks where id = $1 and user_id = $2',
    values: [request.params.id, request.user.sub],
  });
  return rows[0] ?? reply.code(404).send({});
});

app.post(
  '/api/v1/tasks',
  {
    onRequest,
    schema: {
      body: { type: 'object', required: ['skill_name'], properties: { skill_name: text } },
      response: { 201: task },
    },
  },
  async (request, reply) => {
    const { rows } = await pool.query({
      name: 'post',
      text: `
        with t as (
          insert into tasks (user_id, skill_name) values ($1, $2) returning *
        ), a as (
          insert into audit_log (user_id, owner_id, operation, entity_type, entity_id, changed_fields)
          select $1, $1, 'CREATE', 'task', id, jsonb_build_object('skill_name', skill_name) from t
        ), e as (
          insert into event_outbox (user_id, topic, type, task_id, data)
          select $1, 'tasks', 'task_status_update', id, json_build_object('task_id', id)::text from t
        ) select * from t`,
      values: [request.user.sub, request.body.skill_name],
    });
    return reply.code(201).send(rows[0]);
  },
);

await app.listen({ port: Number(process.env.PORT) });
process.once('SIGTERM', () => process.exit(0));
