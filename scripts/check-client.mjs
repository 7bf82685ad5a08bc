// Checks that openapi.json is good enough for a typed client: openapi-typescript makes one in which nothing is unknown. It
// is fetched here and not a dependency, since it needs a TypeScript 5 beside it and ours is 7.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const folder = mkdtempSync(join(tmpdir(), 'muster-client-'));
try {
  const file = join(folder, 'client.d.ts');
  const packages = ['-p', 'openapi-typescript@7.13.0', '-p', 'typescript@5.9.3'];
  execFileSync('npx', ['--yes', ...packages, 'openapi-typescript', 'openapi.json', '-o', file], { stdio: 'inherit' });
  // Headers of answers are typed so by the tool, whatever the document says.
  const text = readFileSync(file, 'utf8').replace(/headers: \{\s*\[name: string\]: unknown;\s*\}/g, 'headers');
  const unknown = text.split('\n').filter((line) => /\bunknown\b/.test(line));
  const operations = text.match(/operations\["/g)?.length ?? 0;
  if (operations === 0) throw new Error('The client has no operations.');
  if (unknown.length > 0) {
    console.error(`The client has what is unknown, ${unknown.length} times:\n${unknown.slice(0, 10).join('\n')}`);
    process.exitCode = 1;
  } else {
    console.log(`a client of ${operations} operations, and nothing in it is unknown`);
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
