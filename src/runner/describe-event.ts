import type { Envelope } from '../client/muster-client.ts';

const MAX_TEXT = 200;

/** What a frame says, on one line; undefined for those that say nothing to a person. */
export function describeEvent({ type, data }: Envelope): string | undefined {
  switch (type) {
    case 'ack':
      return data['resumed'] ? 'connected again; what was missed follows' : 'connected; waiting for events';
    case 'task_status_update':
      return describeTask(data);
    case 'task_overdue':
      return `task ${data['task_id']} ${shown(data['title'])}: no success within ${data['expect_success_within_seconds']} s (the last: ${data['last_success_at'] ?? 'none so far'})`;
    case 'agent_activity_update':
      return `agent ${data['agent_id']} ${shown(data['agent_name'])}: ${shown(data['action'])}, now ${shown(data['status'])}${run(data)}`;
    case 'calendar_event_created':
    case 'calendar_event_updated':
    case 'calendar_event_deleted':
      return `calendar: ${shown(data['title'])} (task ${data['task_id']}) ${data['start_time'] ? `at ${data['start_time']}` : 'has no further time'}`;
    case 'error':
      return `error: ${shown(data['detail'])}`;
    case 'resync_required':
      return 'events were missed that the server does not keep any more: look at the REST API for what is now';
    default:
      return undefined;
  }
}

function describeTask(data: Record<string, unknown>): string {
  const { previous_status: before, status, execution_status: runStatus, duration_ms: ms } = data;
  const parts = [`task ${data['task_id']} ${shown(data['skill_name'])}:`];
  parts.push(before && before !== status ? `${before} → ${status}` : String(status));
  if (runStatus) parts.push(`(${run(data).trim()} ${runStatus}${typeof ms === 'number' ? ` after ${ms} ms` : ''})`);
  const progress = data['progress'] as { percent?: number; message?: string } | undefined;
  if (progress?.percent !== undefined) parts.push(`${progress.percent} %`);
  const text = data['error'] ?? data['output'] ?? progress?.message;
  if (text) parts.push(`· ${shown(text)}`);
  return parts.join(' ');
}

const run = (data: Record<string, unknown>) => (data['execution_id'] ? ` run ${data['execution_id']}` : '');

/** One line of text without what would move a terminal's cursor or change its colours. */
function shown(value: unknown): string {
  const text = String(value ?? '')
    .trim()
    // biome-ignore lint/suspicious/noControlCharactersInRegex: those are what must not reach the terminal.
    .replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/g, ' ');
  return text.length > MAX_TEXT ? `…${text.slice(-MAX_TEXT)}` : text;
}
