import { type Api, ApiError, createApi, pause, pauseAfter } from './api.ts';
import { type Run, startCommand } from './command.ts';
import type { AgentOptions } from './options.ts';
import { createProgressReader, createTail, type Progress } from './output.ts';
import { streamOutput } from './stream.ts';

// An agent's work: register, then claim, run, report, over and over.
//
// The lease is what everything hangs on. While a command runs, heartbeats extend it; one that is refused says that the run
// is somebody else's by now, so the command is stopped and nothing is reported. A server that does not answer changes
// nothing about that: the command goes on, heartbeats and the report are tried until they get through, and whether the
// lease was still good by then is the server's to say.

/** Something that happened, for the log. */
export type Tell = (what: string, facts?: Record<string, unknown>) => void;

const HEARTBEAT_MS = 15_000;
const CLAIM_WAIT_MS = 20_000;
/** How long the answer to a claim under way may still come in when the agent is told to stop. */
const LAST_CLAIM_MS = 1_000;
const OUTPUT_BYTES = 1_048_576;
const ERROR_BYTES = 4_096;
const PROGRESS_EVERY_MS = 1_000;
const OUTPUT_EVERY_MS = 1_000;
/** With more commands at once each sends its output less often, or they would reach the server's rate limit together. */
const RUNS_AT_FULL_PACE = 4;
const MAX_BEAT_MS = 5_000;
const MIN_BEAT_MS = 250;

export interface Agent {
  /** Resolves when it has drained; rejects when the server refuses it for good. */
  done: Promise<void>;
  /** Takes no more work and lets what runs finish; called again, stops that too. */
  drain(): void;
}

/** Starts an agent. */
export function startAgent(options: AgentOptions, tell: Tell): Agent {
  const api = createApi(options.server, options.key);
  const draining = new AbortController();
  const stopping = new AbortController();
  const done = work(options, api, tell, draining.signal, stopping.signal);
  return {
    done,
    drain() {
      if (draining.signal.aborted) return stopping.abort();
      draining.abort();
      setTimeout(() => stopping.abort(), options.drainMs).unref();
    },
  };
}

async function work(
  options: AgentOptions,
  api: Api,
  tell: Tell,
  draining: AbortSignal,
  stopping: AbortSignal,
): Promise<void> {
  const registered = await register(options, api, tell, draining);
  if (registered === undefined) return;
  const path = `/agents/${registered.id}`;
  tell(`registered as agent ${registered.id}, ${options.name}`, { agent_id: registered.id });

  const beating = keepAlive(api, path, tell, draining);
  const runs = new Set<Promise<void>>();
  let slotFreed: () => void = () => {};
  let refused: Error | undefined;

  for (let troubles = 0; !draining.aborted && !refused; ) {
    const free = options.concurrency - runs.size;
    if (free === 0) {
      await Promise.race([
        new Promise<void>((resolve) => {
          slotFreed = resolve;
        }),
        pause(60_000, draining),
      ]);
      continue;
    }
    try {
      const { body, date } = await claim(api, path, free, [...options.commands.keys()], draining);
      if (troubles > 0) tell('the server is back');
      troubles = 0;
      for (const run of body.executions) {
        const leaseMs = Date.parse(run.lease_expires_at) - date.getTime();
        const handled = handle(options, api, tell, run, leaseMs, stopping).finally(() => {
          runs.delete(handled);
          slotFreed();
        });
        runs.add(handled);
      }
    } catch (error) {
      if (draining.aborted) break;
      if (error instanceof ApiError && !error.passing) refused = error;
      else {
        if (troubles === 0) tell(`the server cannot be reached (${reason(error)}); trying on`);
        await pause(pauseAfter(error, Math.min(troubles++, 5)), draining);
      }
    }
  }
  if (runs.size > 0) tell(`draining: ${runs.size} under way`);
  await Promise.all(runs);
  await beating;
  if (refused) throw refused;
  await api.post(`${path}/heartbeat`, { status: 'offline' }, { timeoutMs: 2_000 }).catch(() => {});
  tell('stopped');
}

async function register(
  options: AgentOptions,
  api: Api,
  tell: Tell,
  draining: AbortSignal,
): Promise<{ id: number } | undefined> {
  let told = false;
  try {
    const { body } = await api.insist<{ id: number }>(
      '/agents',
      {
        name: options.name,
        type: options.type,
        capabilities: options.capabilities,
        max_concurrency: options.concurrency,
      },
      {
        signal: draining,
        onTrouble: (error) => {
          if (!told) tell(`waiting for the server at ${options.server} (${reason(error)})`);
          told = true;
        },
      },
    );
    return body;
  } catch (error) {
    if (draining.aborted) return undefined;
    throw error;
  }
}

async function keepAlive(api: Api, path: string, tell: Tell, draining: AbortSignal): Promise<void> {
  while (!draining.aborted) {
    await pause(HEARTBEAT_MS, draining);
    if (draining.aborted) return;
    await api.post(`${path}/heartbeat`, {}, { signal: draining }).catch((error: unknown) => {
      if (error instanceof ApiError) tell(`heartbeat refused: ${error.message}`);
    });
  }
}

/** A long poll. When the agent drains, its answer gets a moment to come in: runs that were leased to us should not wait. */
async function claim(api: Api, path: string, max: number, skills: string[], draining: AbortSignal) {
  const cancel = new AbortController();
  let timer: NodeJS.Timeout | undefined;
  const onDrain = () => {
    timer = setTimeout(() => cancel.abort(), LAST_CLAIM_MS);
  };
  draining.addEventListener('abort', onDrain);
  try {
    return await api.post<{ executions: Run[] }>(
      `${path}/claim`,
      { max, wait_ms: CLAIM_WAIT_MS, skills },
      { timeoutMs: CLAIM_WAIT_MS + 10_000, signal: cancel.signal },
    );
  } finally {
    draining.removeEventListener('abort', onDrain);
    clearTimeout(timer);
  }
}

/** Runs one run from its claim to its report. Never rejects. */
async function handle(
  options: AgentOptions,
  api: Api,
  tell: Tell,
  run: Run,
  leaseMs: number,
  stopping: AbortSignal,
): Promise<void> {
  const facts = { execution_id: run.execution_id, task_id: run.task_id, skill: run.skill_name, attempt: run.attempt };
  const label = `run ${run.execution_id} of task ${run.task_id} (${run.skill_name}, attempt ${run.attempt})`;
  const command = options.commands.get(run.skill_name);
  if (command === undefined) return tell(`${label} is for a skill that was not asked for; its lease will end`, facts);
  tell(`claimed ${label}`, facts);

  const output = createTail(OUTPUT_BYTES);
  const errors = createTail(ERROR_BYTES);
  const progress = createProgressReader();
  const pace = Math.max(1, options.concurrency / RUNS_AT_FULL_PACE);
  const sent = streamOutput(api, run, OUTPUT_EVERY_MS * pace);
  let changed = false;
  let why: string | undefined;
  let lost = false;
  const running = startCommand(command, run, (chunk, stream) => {
    output.add(chunk);
    sent.add(chunk, stream);
    if (stream === 'stderr') errors.add(chunk);
    progress.add(chunk);
    changed = true;
  });
  const stop = (reasonToStop: string) => {
    why ??= reasonToStop;
    running.stop(options.graceMs);
  };
  const timeout = setTimeout(
    () => stop(`timed out after ${run.timeout_seconds} s`),
    Math.min(run.timeout_seconds * 1000, 2 ** 31 - 1),
  );
  const onStopping = () => stop('the agent was stopped');
  stopping.addEventListener('abort', onStopping);
  if (stopping.aborted) onStopping();

  const over = new AbortController();
  const beatMs = Math.max(MIN_BEAT_MS, Math.min(MAX_BEAT_MS, leaseMs / 3));
  const beating = (async () => {
    for (let beatAt = performance.now(); ; ) {
      await pause(Math.min(PROGRESS_EVERY_MS, beatMs), over.signal);
      if (over.signal.aborted) return;
      if (!changed && performance.now() - beatAt < beatMs) continue;
      const told: { progress?: Progress } = changed ? { progress: progress.current() } : {};
      changed = false;
      try {
        const path = `/executions/${run.execution_id}/heartbeat`;
        const { body } = await api.post<{ cancel_requested: boolean }>(path, { lease_token: run.lease_token, ...told });
        beatAt = performance.now();
        if (body.cancel_requested) stop('cancelled');
      } catch (error) {
        if (error instanceof ApiError && !error.passing) {
          lost = true;
          stop(error.message);
          return;
        }
        changed ||= 'progress' in told;
        await pause(Math.min(1_000, beatMs), over.signal);
      }
    }
  })();

  const { failure, hopeless } = await running.ended;
  clearTimeout(timeout);
  stopping.removeEventListener('abort', onStopping);
  const cause = why ?? failure;
  const streamed = await sent.finish();
  if (!lost) {
    const report = {
      lease_token: run.lease_token,
      status: cause === undefined ? 'success' : 'failed',
      ...(streamed ? {} : { output: output.text() }),
      ...(hopeless && why === undefined ? { non_retryable: true } : {}),
      ...(cause === undefined ? {} : { error: [cause, errors.text().trim()].filter(Boolean).join('\n') }),
    };
    lost = !(await deliver(api, run, report, stopping, tell, label));
  }
  over.abort();
  await beating;
  if (lost) tell(`lost ${label}: it is not ours any more`, facts);
  else tell(`${cause === undefined ? 'finished' : `failed (${cause})`} ${label}`, { ...facts, error: cause });
}

/** Reports until the server takes it; false when it says that the run is not ours any more. */
async function deliver(
  api: Api,
  run: Run,
  report: object,
  stopping: AbortSignal,
  tell: Tell,
  label: string,
): Promise<boolean> {
  let troubled = false;
  // An agent that must stop gives the report one more chance, and then leaves the run to its lease.
  const giveUp = new AbortController();
  const onStopping = () => setTimeout(() => giveUp.abort(), 5_000).unref();
  stopping.addEventListener('abort', onStopping);
  if (stopping.aborted) onStopping();
  try {
    await api.insist(`/executions/${run.execution_id}/complete`, report, {
      signal: giveUp.signal,
      onTrouble: (error) => {
        if (!troubled) tell(`the report on ${label} does not get through (${reason(error)}); trying on`);
        troubled = true;
      },
    });
    return true;
  } catch (error) {
    // After a try whose answer was lost, a refusal may well be about a run that we ended ourselves.
    return troubled && error instanceof ApiError && error.status === 409;
  } finally {
    stopping.removeEventListener('abort', onStopping);
  }
}

function reason(error: unknown): string {
  const cause = (error as { cause?: { code?: string } }).cause?.code;
  return cause ?? (error as Error).message;
}
