// Checks that migrations/ says what src/db/schema.ts says: generating into a copy must add nothing.
import { execFileSync } from 'node:child_process';
import { cpSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';

const copy = mkdtempSync(join(tmpdir(), 'muster-migrations-'));
try {
  cpSync('migrations', copy, { recursive: true });
  const before = readdirSync(copy).length;
  const drizzle = (...args) => execFileSync('npx', ['drizzle-kit', ...args], { encoding: 'utf8' });
  const out = relative(process.cwd(), copy);
  drizzle('check', '--dialect', 'postgresql', '--out', out);
  const said = drizzle('generate', '--dialect', 'postgresql', '--schema', './src/db/schema.ts', '--out', out);
  if (readdirSync(copy).length !== before) {
    console.error(`${said}\nThe schema has changes without a migration: run npm run db:generate.`);
    process.exitCode = 1;
  } else {
    console.log('migrations are in step with the schema');
  }
} finally {
  rmSync(copy, { recursive: true, force: true });
}
