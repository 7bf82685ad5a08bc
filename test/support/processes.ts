import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, readdir, readFile, readlink, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { until } from './work.ts';

// By its path, since processes work in folders from which tsx is not found by its name.
const TSX = pathToFileURL(createRequire(import.meta.url).resolve('tsx')).href;
const ROOT = resolve(import.meta.dirname, '../..');
const running = new Set<Started>();
/** A start that takes two seconds takes a minute where twenty others want the same core. */
const SAYS_WITHIN_SECONDS = 120;

export interface Started {
  child: ChildProcess;
  folder: string;
  /** How it ended: the exit code, or the signal. */
  exited: Promise<number | string>;
  out(): string;
  err(): string;
  /** Waits until it has said something, and answers the match. Fails when it ends without. */
  saying(text: RegExp): Promise<RegExpMatchArray>;
}

/** A folder that nothing else uses; the caller removes it. */
export const newFolder = () => mkdtemp(join(tmpdir(), 'muster-process-'));

/** Starts one of our programs from its source, with just the environment that is given. */
export function startProgram(
  file: string,
  options: { env?: Record<string, string>; folder: string; args?: string[]; uid?: number },
): Started {
  const { uid } = options;
  const child = spawn(process.execPath, ['--import', TSX, resolve(ROOT, file), ...(options.args ?? [])], {
    cwd: options.folder,
    env: { PATH: process.env['PATH'], ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(uid === undefined ? {} : { uid, gid: uid }),
  });
  let out = '';
  let err = '';
  let ended = false;
  child.stdout.on('data', (chunk) => {
    out += chunk;
  });
  child.stderr.on('data', (chunk) => {
    err += chunk;
  });
  const exited = new Promise<number | string>((done) => {
    child.once('close', (code, signal) => {
      ended = true;
      running.delete(started);
      done(code ?? signal ?? '');
    });
  });
  const started: Started = {
    child,
    folder: options.folder,
    exited,
    out: () => out,
    err: () => err,
    async saying(text) {
      const found = () => (out + err).match(text);
      await until(
        async () => found() !== null || ended,
        (done) => done,
        SAYS_WITHIN_SECONDS,
      ).catch(() => {});
      const match = found();
      if (!match) {
        const how = ended ? 'ended' : `went on for ${SAYS_WITHIN_SECONDS} s`;
        throw new Error(`It ${how} without saying ${text}; it said:\n${out}\n${err}`);
      }
      return match;
    },
  };
  running.add(started);
  return started;
}

/** Starts the server on a port of its own; answers it when it listens, with its address. */
export async function startServerProcess(options: {
  env?: Record<string, string>;
  folder: string;
  uid?: number;
}): Promise<Started & { url: string; key: string }> {
  const env = {
    PORT: '0',
    RATE_LIMIT_PER_MINUTE: '1000000',
    RATE_LIMIT_ACTIVITY_PER_MINUTE: '1000000',
    ...options.env,
  };
  const started = startProgram('src/main.ts', { ...options, env });
  const [, url = ''] = await started.saying(/^ {2}server +(https?:\S+)$/m);
  const key = (await readFile(join(options.folder, '.muster/admin-key'), 'utf8').catch(() => '')).trim();
  return Object.assign(started, { url, key });
}

/** Ends every program that a test left running. For afterEach. */
export async function endPrograms(): Promise<void> {
  for (const started of running) {
    started.child.kill('SIGKILL');
    await started.exited;
  }
}

/** Removes a folder, with what a Postgres that is just ending may still write to it. */
export const removeFolder = (folder: string) =>
  rm(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });

/** The processes that name a folder in their command line or work in it. */
export async function processesIn(folder: string): Promise<number[]> {
  const found: number[] = [];
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name) && Number(name) !== process.pid)) {
    const command = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    const place = await readlink(`/proc/${pid}/cwd`).catch(() => '');
    if (command.includes(folder) || place.startsWith(folder)) found.push(Number(pid));
  }
  return found;
}

/** A port that nobody listens on at the moment. */
export function freePort(): Promise<number> {
  return new Promise((done, failed) => {
    const probe = createServer();
    probe.once('error', failed);
    probe.listen(0, '127.0.0.1', () => {
      const address = probe.address();
      probe.close(() => done(typeof address === 'object' && address ? address.port : 0));
    });
  });
}
