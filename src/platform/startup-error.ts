/** A failure to start that a person can fix: its message is one sentence that says how. */
export class StartupError extends Error {
  override readonly name = 'StartupError';
}
