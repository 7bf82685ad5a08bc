import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdir, readlink, realpath } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import type { Account } from './postgres-binaries.ts';

/*
 * Starting Postgres so that it ends with this process, ending it, and finding one that did not end.
 *
 * Nothing in Node runs after kill -9, so something outside must see our death: a shell that reads a pipe whose other end
 * this process alone holds. The kernel closes that end whatever happened here. PR_SET_PDEATHSIG would need native code,
 * exists on Linux only and is lost when the user changes.
 *
 *     Node ── sh ─┬─ watchdog: reads the pipe, then signals the group
 *                 └─ Postgres ── its children, each in a session of its own
 *
 * The three are one session and process group, so Ctrl-C in the terminal does not reach them, and a signal to the group
 * reaches Postgres without anybody knowing its pid, which could be another's by then. The shells ignore what they send.
 * The first shell exists to reap the other two: left to a PID 1 that does not reap, as in many containers, a dead
 * postmaster would stay a zombie, which the next one takes for alive.
 */
const WATCHED = `
trap '' HUP INT QUIT TERM
exec 3<&0 </dev/null
(
  read -r _ <&3
  for signal in INT INT INT INT INT QUIT QUIT QUIT QUIT QUIT KILL; do
    kill -s $signal 0
    sleep 1
  done
) >/dev/null 2>&1 &
exec 3<&-
(
  trap - HUP INT QUIT TERM
  exec "$@"
)
code=$?
kill -s KILL $!
wait $! 2>/dev/null
exit $code
`;

/**
 * Runs `program` as `account` (undefined: as ourselves) in `cwd`, which it enters before it becomes that user. When this
 * process ends in any way it gets SIGINT, after 5 s SIGQUIT and after 10 s SIGKILL. Its output goes to the descriptor
 * `output`; its exit code is the child's, with 128 and the signal for one that a signal ended. Rejects when it cannot be
 * spawned.
 */
export async function spawnWatched(
  program: string,
  args: string[],
  { cwd, account, output }: { cwd: string; account: Account | undefined; output: number },
): Promise<ChildProcess> {
  const child = spawn('/bin/sh', ['-c', WATCHED, 'muster-postgres', program, ...args], {
    cwd,
    detached: true,
    stdio: ['pipe', output, output],
    // Nothing of ours: it holds secrets, and variables that Postgres would obey.
    env: { PATH: '/usr/local/bin:/usr/bin:/bin', LC_ALL: 'C', TZ: 'UTC' },
    ...account,
  });
  child.stdin?.on('error', () => {}); // Nothing is ever written; the pipe only has to be there.
  await once(child, 'spawn');
  return child;
}

export function hasEnded(child: ChildProcess): boolean {
  return child.exitCode !== null || child.signalCode !== null;
}

/** Waits for the end of what `spawnWatched` started; answers its exit code, or null when the shell around it was killed. */
export async function exitOf(child: ChildProcess): Promise<number | null> {
  if (!hasEnded(child)) await once(child, 'exit');
  return child.exitCode;
}

/** Postgres's fast shutdown; after 10 s its immediate one; after 5 s more SIGKILL. Answers when it has ended. */
export async function endPostgres(child: ChildProcess): Promise<void> {
  for (const [signal, patience] of [
    ['SIGINT', 10_000],
    ['SIGQUIT', 5_000],
    ['SIGKILL', 5_000],
  ] as const) {
    if (hasEnded(child) || child.pid === undefined) return;
    process.kill(-child.pid, signal);
    const timer = new AbortController();
    await Promise.race([exitOf(child), delay(patience, undefined, { signal: timer.signal }).catch(() => {})]);
    timer.abort();
  }
}

/**
 * The pids of the Postgres processes that work in the folder `pgdata`. Zombies are not among them. On Linux these are the
 * postmaster and its children, known by their working folder, which a reused pid cannot have; elsewhere the postmaster
 * alone, known by its command line.
 */
export async function processesIn(pgdata: string): Promise<number[]> {
  const folder = await realpath(pgdata);
  return process.platform === 'linux' ? byWorkingFolder(folder) : byCommandLine(pgdata);
}

async function byWorkingFolder(wanted: string): Promise<number[]> {
  const found: number[] = [];
  for (const name of await readdir('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    // Processes of others and those that are just ending cannot be read, and are not ours.
    const folder = await readlink(`/proc/${name}/cwd`).catch(() => '');
    if (folder !== wanted) continue;
    const program = await readlink(`/proc/${name}/exe`).catch(() => '');
    // An update of node_modules deletes the program that runs.
    if (/\/postgres( \(deleted\))?$/.test(program)) found.push(Number(name));
  }
  return found;
}

async function byCommandLine(pgdata: string): Promise<number[]> {
  const { stdout } = await promisify(execFile)('ps', ['-axww', '-o', 'pid=,command=']);
  return stdout
    .split('\n')
    .filter((line) => line.includes(`/postgres -D ${pgdata} -c `))
    .map((line) => Number.parseInt(line, 10));
}
