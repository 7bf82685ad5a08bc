import { type ChildProcess, spawn } from 'node:child_process';

/** A run as the claim gives it. */
export interface Run {
  execution_id: number;
  task_id: number;
  skill_name: string;
  params: Record<string, unknown>;
  attempt: number;
  scheduled_for: string;
  lease_token: string;
  lease_expires_at: string;
  timeout_seconds: number;
}

export interface RunningCommand {
  /** How it ended: undefined for success, else a sentence's worth of why. */
  ended: Promise<string | undefined>;
  /** Asks the whole process group to end, and ends it after `graceMs`. */
  stop(graceMs: number): void;
}

const OUTPUT_AFTER_EXIT_MS = 1_000;
const groups = new Set<number>();

// Whatever ends this process in an orderly way takes the commands along.
process.once('exit', () => {
  for (const pid of groups) signalGroup(pid, 'SIGKILL');
});

/**
 * Starts a local command for a run, by /bin/sh and in a process group of its own, with the params on its standard input and
 * in its environment. `onOutput` gets what it prints.
 */
export function startCommand(
  command: string,
  run: Run,
  onOutput: (chunk: Buffer, stream: 'stdout' | 'stderr') => void,
): RunningCommand {
  const child = spawn('/bin/sh', ['-c', command], {
    env: commandEnvironment(run, process.env),
    detached: true,
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  const { pid } = child;
  if (pid !== undefined) groups.add(pid);
  child.stdout.on('data', (chunk: Buffer) => onOutput(chunk, 'stdout'));
  child.stderr.on('data', (chunk: Buffer) => onOutput(chunk, 'stderr'));
  // A command need not read its input.
  child.stdin.on('error', () => {});
  child.stdin.end(JSON.stringify(run.params));

  let killing: NodeJS.Timeout | undefined;
  const ended = endOf(child).finally(() => {
    clearTimeout(killing);
    if (pid === undefined) return;
    // What the command left running in its group goes with it.
    signalGroup(pid, 'SIGKILL');
    groups.delete(pid);
  });
  return {
    ended,
    stop(graceMs) {
      if (pid === undefined || killing) return;
      signalGroup(pid, 'SIGTERM');
      killing = setTimeout(() => signalGroup(pid, 'SIGKILL'), graceMs);
    },
  };
}

function endOf(child: ChildProcess): Promise<string | undefined> {
  return new Promise((resolve) => {
    child.once('error', (error) => resolve(`could not be started: ${error.message}`));
    child.once('exit', (code, signal) => {
      const why = signal ? `killed by ${signal}` : code === 0 ? undefined : `exit code ${code}`;
      // Its output may still be on the way; but what it left in the background may hold the pipes for ever.
      const late = setTimeout(() => resolve(why), OUTPUT_AFTER_EXIT_MS);
      child.once('close', () => {
        clearTimeout(late);
        resolve(why);
      });
    });
  });
}

function signalGroup(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(-pid, signal);
  } catch {
    // It has ended.
  }
}

/** The environment of a command: ours without our key, and what the run is about. */
export function commandEnvironment(
  run: Run,
  env: Record<string, string | undefined>,
): Record<string, string | undefined> {
  const { MUSTER_KEY: _, ...rest } = env;
  const params: Record<string, string> = {};
  for (const [name, value] of Object.entries(run.params)) {
    if (typeof value !== 'string' && typeof value !== 'number' && typeof value !== 'boolean') continue;
    params[`MUSTER_PARAM_${name.replace(/[^a-zA-Z0-9]/g, '_').toUpperCase()}`] = String(value).replaceAll('\0', '');
  }
  return {
    ...rest,
    ...params,
    MUSTER_PARAMS: JSON.stringify(run.params),
    MUSTER_EXECUTION_ID: String(run.execution_id),
    MUSTER_TASK_ID: String(run.task_id),
    MUSTER_SKILL: run.skill_name,
    MUSTER_ATTEMPT: String(run.attempt),
    MUSTER_SCHEDULED_FOR: run.scheduled_for,
  };
}
