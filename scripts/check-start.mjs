// Starts the built server as a newcomer would, in an empty folder with an empty environment, and checks that it serves
// /health, answers SIGTERM with exit code 0, and leaves no process behind. Usage: check-start.mjs [node binary]
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

const node = process.argv[2] ?? process.execPath;
const folder = mkdtempSync(join(tmpdir(), 'muster-start-'));
const started = performance.now();
const server = spawn(node, [resolve('dist/main.js')], {
  cwd: folder,
  env: {},
  stdio: ['ignore', 'inherit', 'inherit'],
});
const exited = new Promise((done) => server.on('exit', (code, signal) => done(code ?? signal)));
let gone = false;
exited.then(() => {
  gone = true;
});

async function untilHealthy() {
  while (!gone && performance.now() - started < 60_000) {
    const response = await fetch('http://127.0.0.1:8080/health').catch(() => undefined);
    if (response?.status === 200) return response.json();
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error('The server did not become healthy.');
}

/** The processes whose command line or environment names the folder. */
function leftBehind() {
  return readdirSync('/proc')
    .filter((pid) => /^\d+$/.test(pid) && Number(pid) !== process.pid)
    .filter((pid) => {
      try {
        return readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(folder);
      } catch {
        return false;
      }
    });
}

try {
  const health = await untilHealthy();
  console.log(`healthy after ${((performance.now() - started) / 1000).toFixed(2)} s:`, JSON.stringify(health));
  server.kill('SIGTERM');
  const code = await exited;
  if (code !== 0) throw new Error(`SIGTERM was answered with exit ${code}.`);
  const left = leftBehind();
  if (left.length > 0) throw new Error(`Processes were left behind: ${left.join(', ')}`);
  console.log('stopped, exit 0, no process left behind');
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  if (!gone) server.kill('SIGKILL');
  await exited;
  rmSync(folder, { recursive: true, force: true });
}
