import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';

/** A misuse of the command line: one sentence that says what is right. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}

/** Where a server is and what opens it. */
export interface ServerOptions {
  server: string;
  key: string;
}

export interface AgentOptions extends ServerOptions {
  name: string;
  type: string;
  capabilities: string[];
  concurrency: number;
  /** The local command of each skill; nothing else is ever run. */
  commands: ReadonlyMap<string, string>;
  /** Between asking a command to stop (SIGTERM) and ending it (SIGKILL). */
  graceMs: number;
  /** How long commands under way may go on after a SIGTERM to the agent. */
  drainMs: number;
  json: boolean;
}

export interface WatchOptions extends ServerOptions {
  topics: string | undefined;
  json: boolean;
}

export const AGENT_HELP = `Runs local commands for the due runs of a Muster server.

  npm run agent -- --skill report --exec './report.sh' [--skill … --exec …] [options]

  --skill NAME --exec COMMAND   what to run for a skill, by /bin/sh; may be given several times
  --server URL                  the server (MUSTER_SERVER, else http://127.0.0.1:8080)
  --key KEY                     an API key with the scope agent (MUSTER_KEY, else .muster/admin-key)
  --concurrency N               how many runs at once (1)
  --name NAME                   how the registry calls this agent (made from host and folder)
  --type TYPE                   its type in the registry (custom)
  --capability NAME             what it can do; may be given several times
  --grace SECONDS               between SIGTERM and SIGKILL for a command that must stop (5)
  --drain-timeout SECONDS       how long commands may go on after SIGTERM to the agent (60)
  --json                        one JSON object a line instead of text
  --help                        this text

A command gets the run's params as JSON on standard input and in MUSTER_PARAMS, each plain one also as
MUSTER_PARAM_<NAME>, and MUSTER_EXECUTION_ID, MUSTER_TASK_ID, MUSTER_SKILL, MUSTER_ATTEMPT, MUSTER_SCHEDULED_FOR.
What it prints is the run's output; its last line is shown as progress, and a line "::progress 40 halfway" sets
the percentage. The output is sent while it runs. Exit code 0 is success; 65 (bad input) and 78 (bad configuration)
say that it would fail again, so that there is no retry; 75 (try later) and every other one are tried again as the
task allows. It runs in a process group of its own, which is stopped as a whole.`;

export const WATCH_HELP = `Prints the events of a Muster server as they happen.

  npm run watch [-- options]

  --server URL     the server (MUSTER_SERVER, else http://127.0.0.1:8080)
  --key KEY        an API key with the scope read, or an access token (MUSTER_KEY, else .muster/admin-key)
  --topics LIST    some of tasks,agents,calendar (all)
  --json           the events as they are, one a line
  --help           this text`;

type Env = Record<string, string | undefined>;

/** The agent's options; 'help' when that is asked for. Throws UsageError. */
export function readAgentOptions(
  args: string[],
  env: Env = process.env,
  folder = process.cwd(),
): AgentOptions | 'help' {
  const { values, tokens } = parse(args, {
    skill: { type: 'string', multiple: true },
    exec: { type: 'string', multiple: true },
    server: { type: 'string' },
    key: { type: 'string' },
    concurrency: { type: 'string' },
    name: { type: 'string' },
    type: { type: 'string' },
    capability: { type: 'string', multiple: true },
    grace: { type: 'string' },
    'drain-timeout': { type: 'string' },
    json: { type: 'boolean' },
    help: { type: 'boolean' },
  });
  if (values['help']) return 'help';
  const commands = readCommands(tokens);
  const name = text(values['name']) ?? defaultName(folder);
  if (name.length > 255) throw new UsageError('--name must have at most 255 characters.');
  return {
    ...readServer(values, env, folder),
    name,
    type: text(values['type']) ?? 'custom',
    capabilities: [...new Set((values['capability'] as string[] | undefined) ?? [])],
    concurrency: number(values['concurrency'], '--concurrency', 1, 1, 100),
    commands,
    graceMs: 1000 * number(values['grace'], '--grace', 5, 0, 3_600),
    drainMs: 1000 * number(values['drain-timeout'], '--drain-timeout', 60, 0, 86_400),
    json: values['json'] === true,
  };
}

/** The watcher's options; 'help' when that is asked for. Throws UsageError. */
export function readWatchOptions(
  args: string[],
  env: Env = process.env,
  folder = process.cwd(),
): WatchOptions | 'help' {
  const { values } = parse(args, {
    server: { type: 'string' },
    key: { type: 'string' },
    topics: { type: 'string' },
    json: { type: 'boolean' },
    help: { type: 'boolean' },
  });
  if (values['help']) return 'help';
  const topics = text(values['topics']);
  if (topics !== undefined && !topics.split(',').every((topic) => ['tasks', 'agents', 'calendar'].includes(topic))) {
    throw new UsageError('--topics must be some of tasks,agents,calendar.');
  }
  return { ...readServer(values, env, folder), topics, json: values['json'] === true };
}

type Values = Record<string, string | boolean | (string | boolean)[] | undefined>;
interface Token {
  kind: string;
  name?: string;
  value?: string | undefined;
}

function parse(args: string[], options: Record<string, { type: 'string' | 'boolean'; multiple?: boolean }>) {
  try {
    const { values, tokens } = parseArgs({ args, options, tokens: true });
    return { values: values as Values, tokens: tokens as Token[] };
  } catch (error) {
    const [sentence] = (error as Error).message.split('. ');
    throw new UsageError(`${sentence?.replace(/\.$/, '')}; --help lists what there is.`);
  }
}

function readCommands(tokens: readonly Token[]): Map<string, string> {
  const commands = new Map<string, string>();
  let skill: string | undefined;
  for (const { kind, name, value = '' } of tokens) {
    if (kind !== 'option') continue;
    if (name === 'skill') {
      if (skill !== undefined) throw new UsageError(`--skill ${skill} needs an --exec behind it.`);
      if (!/^[a-zA-Z0-9_-]{1,255}$/.test(value)) {
        throw new UsageError(`--skill must be letters, digits, _ and - only, at most 255 of them.`);
      }
      if (commands.has(value)) throw new UsageError(`--skill ${value} is given twice.`);
      skill = value;
    } else if (name === 'exec') {
      if (skill === undefined) throw new UsageError('--exec needs a --skill before it.');
      if (value.trim() === '') throw new UsageError(`--exec of the skill ${skill} is empty.`);
      commands.set(skill, value);
      skill = undefined;
    }
  }
  if (skill !== undefined) throw new UsageError(`--skill ${skill} needs an --exec behind it.`);
  if (commands.size === 0) throw new UsageError(`Say what to run: --skill report --exec './report.sh'.`);
  return commands;
}

function readServer(values: Values, env: Env, folder: string): ServerOptions {
  const server = (text(values['server']) ?? text(env['MUSTER_SERVER']) ?? 'http://127.0.0.1:8080').replace(/\/+$/, '');
  if (!URL.canParse(server) || !['http:', 'https:'].includes(new URL(server).protocol)) {
    throw new UsageError('--server must be a URL such as http://127.0.0.1:8080.');
  }
  const key =
    text(values['key']) ?? text(env['MUSTER_KEY']) ?? readKeyFile(resolve(folder, text(env['DATA_DIR']) ?? '.muster'));
  if (!/^[\w.~+/=-]+$/.test(key)) throw new UsageError('--key must be an API key or an access token.');
  return { server, key };
}

function readKeyFile(dataDir: string): string {
  const file = join(dataDir, 'admin-key');
  try {
    return readFileSync(file, 'utf8').trim();
  } catch {
    throw new UsageError(
      `No key: give --key or MUSTER_KEY (POST /api/v1/auth/api-keys makes one), or start the server first, which keeps its admin's in ${file}.`,
    );
  }
}

/** The same agent for the same folder of the same host, however often it starts. */
function defaultName(folder: string): string {
  return `${hostname()}-${createHash('sha256').update(folder).digest('hex').slice(0, 6)}`;
}

const text = (value: Values[string]) => (typeof value === 'string' && value !== '' ? value : undefined);

function number(value: Values[string], name: string, otherwise: number, min: number, max: number): number {
  if (value === undefined) return otherwise;
  const n = typeof value === 'string' && /^\d{1,6}$/.test(value) ? Number(value) : Number.NaN;
  if (!(n >= min && n <= max)) throw new UsageError(`${name} must be a whole number from ${min} to ${max}.`);
  return n;
}
