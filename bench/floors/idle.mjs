// The least that serves HTTP on Postgres with the same libraries.
import { fastify } from 'fastify';
import pg from 'pg';

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 2 });
await pool.query('select 1');
const app = fastify();
app.get('/', async () => ({ status: 'ok' }));
await app.listen({ port: Number(process.env.PORT) });
process.once('SIGTERM', () => process.exit(0));
