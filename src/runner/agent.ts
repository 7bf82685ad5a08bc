import { onStopSignals } from '../platform/stop-signals.ts';
import { AGENT_HELP, type AgentOptions, readAgentOptions, UsageError } from './options.ts';
import { startAgent, type Tell } from './work.ts';

// npm run agent: see AGENT_HELP.

function main(): void {
  let options: AgentOptions | 'help';
  try {
    options = readAgentOptions(process.argv.slice(2));
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    process.stderr.write(`${error.message}\n`);
    process.exit(2);
  }
  if (options === 'help') {
    process.stdout.write(`${AGENT_HELP}\n`);
    return;
  }
  const { json } = options;
  const tell: Tell = (what, facts = {}) => {
    const now = new Date();
    const line = json
      ? JSON.stringify({ time: now, msg: what, ...facts })
      : `${now.toTimeString().slice(0, 8)} ${what}`;
    process.stdout.write(`${line}\n`);
  };
  const agent = startAgent(options, tell);
  onStopSignals(agent.drain, agent.drain);
  agent.done.then(
    () => process.exit(0),
    (error: unknown) => {
      process.stderr.write(`The server refuses this agent: ${(error as Error).message}\n`);
      process.exit(1);
    },
  );
}

main();
