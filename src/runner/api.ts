/** The server said no: an answer that is not 2xx. */
export class ApiError extends Error {
  override readonly name = 'ApiError';
  readonly status: number;
  /** How long to wait before the next try, in ms, if the server says so. */
  readonly retryAfterMs: number | undefined;

  constructor(status: number, detail: string, retryAfterMs: number | undefined) {
    super(detail);
    this.status = status;
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether the same call may succeed later. */
  get passing(): boolean {
    return this.status >= 500 || this.status === 429 || this.status === 408;
  }
}

export interface Api {
  /** POSTs JSON and answers the parsed body, and when the server sent it. Throws ApiError, or what fetch throws. */
  post<T>(
    path: string,
    body: unknown,
    options?: { timeoutMs?: number; signal?: AbortSignal },
  ): Promise<{ body: T; date: Date }>;
  /** The same until it succeeds or is refused for good, with growing, jittered pauses; `signal` ends it. */
  insist<T>(
    path: string,
    body: unknown,
    options: { signal: AbortSignal; onTrouble?: (error: Error) => void },
  ): Promise<{ body: T; date: Date }>;
}

const TIMEOUT_MS = 15_000;
const FIRST_PAUSE_MS = 250;
const MAX_PAUSE_MS = 10_000;

/** The server's REST API, called with one key. */
export function createApi(server: string, key: string): Api {
  const post: Api['post'] = async <T>(
    path: string,
    body: unknown,
    { timeoutMs = TIMEOUT_MS, signal }: { timeoutMs?: number; signal?: AbortSignal } = {},
  ) => {
    const timeout = AbortSignal.timeout(timeoutMs);
    const response = await fetch(`${server}/api/v1${path}`, {
      method: 'POST',
      headers: { authorization: `Bearer ${key}`, 'content-type': 'application/json' },
      body: JSON.stringify(body),
      redirect: 'error',
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    });
    const text = await response.text();
    if (!response.ok) throw new ApiError(response.status, detailOf(text, response.status), retryAfter(response));
    return { body: JSON.parse(text) as T, date: new Date(response.headers.get('date') ?? Date.now()) };
  };
  return {
    post,
    async insist<T>(
      path: string,
      body: unknown,
      { signal, onTrouble }: { signal: AbortSignal; onTrouble?: (error: Error) => void },
    ) {
      for (let tries = 0; ; tries++) {
        try {
          return await post<T>(path, body, { signal });
        } catch (error) {
          if (signal.aborted || (error instanceof ApiError && !error.passing)) throw error;
          onTrouble?.(error as Error);
          await pause(pauseAfter(error, tries), signal);
        }
      }
    },
  };
}

/** How long to wait after the `tries`-th failure: what the server asks for, else up to a doubling time. */
export function pauseAfter(error: unknown, tries: number): number {
  if (error instanceof ApiError && error.retryAfterMs !== undefined) return error.retryAfterMs;
  const ceiling = Math.min(MAX_PAUSE_MS, FIRST_PAUSE_MS * 2 ** tries);
  return ceiling / 2 + (Math.random() * ceiling) / 2;
}

/** Resolves after `ms`, or at once when `signal` is aborted. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener('abort', done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener('abort', done);
    if (signal.aborted) done();
  });
}

function detailOf(text: string, status: number): string {
  try {
    const { detail } = JSON.parse(text) as { detail?: unknown };
    if (typeof detail === 'string') return detail;
  } catch {
    // Not one of ours: a proxy's page, say.
  }
  return `The server answered ${status}.`;
}

function retryAfter(response: Response): number | undefined {
  const seconds = Number(response.headers.get('retry-after') ?? Number.NaN);
  return seconds >= 0 && seconds <= 300 ? seconds * 1000 : undefined;
}
