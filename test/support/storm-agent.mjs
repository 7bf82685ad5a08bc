// An agent that tells its parent, a JSON object a line, what it is about to do and what was answered, so that the parent
// knows what happened even when it kills this process at any moment. Plain JavaScript, since many are started a second.
//     node storm-agent.mjs NAME SKILL URL,URL… MAX      takes MAX runs at a time; the key is in MUSTER_KEY
// A run's params may ask for more than a moment of work: `stall` stops the process (SIGSTOP) at the first attempt, `poison`
// kills it at every one, `hang` sends heartbeats for as long as the server takes them, and reports nothing.
// SIGTERM ends it after what it has claimed.

const [name, skill, list, max] = process.argv.slice(2);
const urls = list.split(',');
const headers = { authorization: `Bearer ${process.env.MUSTER_KEY}`, 'content-type': 'application/json' };
let turn = Math.floor(Math.random() * urls.length);
let leaving = false;
process.on('SIGTERM', () => {
  leaving = true;
});
process.on('SIGINT', () => {});

// Standard output is a pipe, to which Node writes at once on Unix: what was said arrives whatever happens next.
const say = (fact) => process.stdout.write(`${JSON.stringify(fact)}\n`);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** One try; status 0 when there was no answer. */
async function post(path, body) {
  try {
    const answer = await fetch(`${urls[turn]}/api/v1${path}`, {
      method: 'POST',
      headers,
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(8_000),
    });
    return { status: answer.status, body: await answer.json() };
  } catch {
    turn = (turn + 1) % urls.length;
    return { status: 0 };
  }
}

async function insist(path, body, each) {
  for (let tries = 1; ; tries++) {
    const answer = await post(path, body);
    each?.(answer, tries);
    if (answer.status > 0 && answer.status < 500) return answer;
    await pause(50);
  }
}

async function work(run) {
  const { execution_id: execution, lease_token: token, params, attempt } = run;
  say({ claimed: { execution, token, task: run.task_id, attempt } });
  if (params.poison) process.kill(process.pid, 'SIGKILL');
  if (params.stall && attempt === 1) {
    say({ stalling: { execution, token } });
    process.kill(process.pid, 'SIGSTOP');
  }
  const beat = () => insist(`/executions/${execution}/heartbeat`, { lease_token: token, progress: { percent: 50 } });
  if (params.hang) {
    while ((await beat()).status === 200) await pause(300);
    return;
  }
  for (let left = params.beats ?? 0; left > 0; left--) {
    await pause(300);
    await beat();
  }
  await pause(10 + Math.random() * 60);
  say({ reporting: { execution, token } });
  await insist(
    `/executions/${execution}/complete`,
    { lease_token: token, status: 'success', output: token },
    ({ status }, tries) => say({ reported: { execution, token, status, tries } }),
  );
}

const { body: agent } = await insist('/agents', { name, max_concurrency: 8 });
say({ registered: agent.id });
while (!leaving) {
  const { status, body } = await post(`/agents/${agent.id}/claim`, { max: Number(max), wait_ms: 500, skills: [skill] });
  if (status !== 200) await pause(50);
  else for (const run of body.executions) await work(run);
}
