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

/** How a command ended. */
export interface CommandEnd {
  /** Undefined for success, else a sentence's worth of why. */
  failure: string | undefined;
  /** It said by its exit code that it would fail again. */
  hopeless: boolean;
}

export interface RunningCommand {
  ended: Promise<CommandEnd>;
  /** Asks the whole process group to end, and ends it after `graceMs`. */
  stop(graceMs: number): void;
}

/** Exit codes of sysexits.h that say that a second try would end as the first did: EX_DATAERR, EX_CONFIG. */
const HOPELESS_CODES = [65, 78];
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

function endOf(child: ChildProcess): Promise<CommandEnd> {
  return new Promise((resolve) => {
    child.once('error', (error) => resolve({ failure: `could not be started: ${error.message}`, hopeless: false }));
    child.once('exit', (code, signal) => {
      const failure = signal ? `killed by ${signal}` : code === 0 ? undefined : `exit code ${code}`;
      const end = { failure, hopeless: code !== null && HOPELESS_CODES.includes(code) };
      // Its output may still be on the way; but what it left in the background may hold the pipes for ever.
      const late = setTimeout(() => resolve(end), OUTPUT_AFTER_EXIT_MS);
      child.once('close', () => {
        clearTimeout(late);
        resolve(end);
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
