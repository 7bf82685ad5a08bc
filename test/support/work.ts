import type { Caller } from './server.ts';

/** A claimed run, as the wire has it. */
export interface ClaimedRun {
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

let counter = 0;
/** A name that no other test uses. */
export const unique = (prefix: string) => `${prefix}-${process.pid}-${++counter}`;

/** Makes a task; answers it. */
export async function makeTask(call: Caller, fields: Record<string, unknown> = {}) {
  const { status, body } = await call('POST', '/tasks', { skill_name: unique('skill'), ...fields });
  if (status !== 201) throw new Error(`POST /tasks answered ${status}: ${JSON.stringify(body)}`);
  return body;
}

/** Registers an agent; answers how to claim with it. */
export async function makeAgent(call: Caller, fields: Record<string, unknown> = {}) {
  const { status, body } = await call('POST', '/agents', { name: unique('agent'), max_concurrency: 100, ...fields });
  if (status !== 201) throw new Error(`POST /agents answered ${status}: ${JSON.stringify(body)}`);
  return {
    id: body.id as number,
    async claim(wish: { max?: number; wait_ms?: number; skills?: string[] } = {}): Promise<ClaimedRun[]> {
      const answer = await call('POST', `/agents/${body.id}/claim`, { max: 1, wait_ms: 0, ...wish });
      if (answer.status !== 200) throw new Error(`claim answered ${answer.status}: ${JSON.stringify(answer.body)}`);
      return answer.body.executions;
    },
    /** Claims one run, waiting up to 20 s for it. */
    async claimOne(skills?: string[]): Promise<ClaimedRun> {
      const [run] = await this.claim({ wait_ms: 20_000, ...(skills ? { skills } : {}) });
      if (!run) throw new Error('Nothing to claim within 20 s.');
      return run;
    },
  };
}

/** Reports the end of a run. */
export function complete(call: Caller, run: ClaimedRun, report: Record<string, unknown> = { status: 'success' }) {
  return call('POST', `/executions/${run.execution_id}/complete`, { lease_token: run.lease_token, ...report });
}

/** Asks until the answer satisfies; fails after `seconds`. */
export async function until<T>(ask: () => Promise<T>, satisfied: (value: T) => boolean, seconds = 20): Promise<T> {
  const deadline = performance.now() + seconds * 1000;
  for (;;) {
    const value = await ask();
    if (satisfied(value)) return value;
    if (performance.now() > deadline) throw new Error(`Not so within ${seconds} s; last: ${JSON.stringify(value)}`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}
