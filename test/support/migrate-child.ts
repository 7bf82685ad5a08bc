import { migrateDatabase } from '../../src/db/migrate.ts';

// Migrates as a process of its own, which a test may kill: migrate-child.ts <url> <folder>
const [url = '', folder = ''] = process.argv.slice(2);
await migrateDatabase(url, { folder });
