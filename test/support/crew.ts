import { type ChildProcess, spawn } from 'node:child_process';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';

const AGENT = resolve(import.meta.dirname, 'storm-agent.mjs');

/** A report that was sent: what the server answered to each try, 0 where no answer came. */
export interface Report {
  execution: number;
  token: string;
  answers: number[];
}

interface Member {
  name: string;
  child: ChildProcess;
  stalled: { execution: number; token: string } | undefined;
  /** It has got as far as to hold a lease. */
  worked: boolean;
}

/** Agents as processes (storm-agent.mjs), and all that they did. */
export interface Crew {
  /** By lease token: every lease has its own. */
  claims: Map<string, { execution: number; task: number; attempt: number }>;
  reports: Map<string, Report>;
  kills: number;
  /** How many reports were taken. */
  taken: number;
  /** Those that stopped themselves in a run that asks for it. */
  stalled(): { execution: number; token: string; resume: () => void }[];
  /** SIGKILLs one that has come to work and is not stalled, if there is one; another one comes in its place. */
  killOne(): void;
  /** Lets all of them finish what they have, and waits for their ends. */
  stop(): Promise<void>;
}

/** Starts `size` agents that are replaced when they die, whoever killed them. */
export function startCrew(options: {
  size: number;
  urls: string[];
  key: string;
  skill: string;
  name: string;
  folder: string;
  /** How many runs each takes at a time; it works on them one after the other. */
  max?: number;
}): Crew {
  const members = new Set<Member>();
  const crew: Pick<Crew, 'claims' | 'reports' | 'kills' | 'taken'> = {
    claims: new Map(),
    reports: new Map(),
    kills: 0,
    taken: 0,
  };
  let leaving = false;
  const ends: Promise<unknown>[] = [];

  const hire = (name: string) => {
    const child = spawn(
      process.execPath,
      [AGENT, name, options.skill, options.urls.join(','), String(options.max ?? 2)],
      {
        cwd: options.folder,
        env: { PATH: process.env['PATH'], MUSTER_KEY: options.key },
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    const member: Member = { name, child, stalled: undefined, worked: false };
    members.add(member);
    createInterface({ input: child.stdout }).on('line', (line) => hear(member, line));
    ends.push(
      new Promise<void>((done) =>
        child.once('close', () => {
          members.delete(member);
          if (!leaving) hire(name);
          done();
        }),
      ),
    );
  };
  const hear = (member: Member, line: string) => {
    const said = JSON.parse(line) as {
      claimed?: { execution: number; token: string; task: number; attempt: number };
      stalling?: { execution: number; token: string };
      reporting?: { execution: number; token: string };
      reported?: { execution: number; token: string; status: number };
    };
    if (said.claimed) {
      crew.claims.set(said.claimed.token, said.claimed);
      member.worked = true;
    }
    if (said.stalling) member.stalled = said.stalling;
    if (said.reporting) crew.reports.set(said.reporting.token, { ...said.reporting, answers: [] });
    if (said.reported) {
      crew.reports.get(said.reported.token)?.answers.push(said.reported.status);
      if (said.reported.status === 200) crew.taken += 1;
    }
  };
  for (let i = 0; i < options.size; i++) hire(`${options.name}-${i}`);

  return Object.assign(crew, {
    stalled: () =>
      [...members].flatMap((member) => {
        const { stalled, child } = member;
        if (!stalled) return [];
        const resume = () => {
          member.stalled = undefined;
          child.kill('SIGCONT');
        };
        return [{ ...stalled, resume }];
      }),
    killOne() {
      const candidates = [...members].filter(({ stalled, worked }) => worked && !stalled);
      const victim = candidates[Math.floor(Math.random() * candidates.length)];
      if (victim?.child.kill('SIGKILL')) crew.kills += 1;
    },
    async stop() {
      leaving = true;
      for (const { child } of members) {
        child.kill('SIGCONT');
        child.kill('SIGTERM');
      }
      const late = setTimeout(() => {
        for (const { child } of members) child.kill('SIGKILL');
      }, 30_000);
      await Promise.all(ends);
      clearTimeout(late);
    },
  });
}
