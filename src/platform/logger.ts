import { type Logger as PinoLogger, pino, stdSerializers } from 'pino';
import prettyStream from 'pino-pretty';

export type Logger = PinoLogger;

/** Parameters of a URL that carry credentials (the WebSocket takes them there, since browsers set no headers). */
const SECRET_PARAMETERS = /([?&](?:token|ticket|access_token|refresh_token|key|password)=)[^&#\s]*/gi;

/** The URL as it may be logged. */
export function redactUrl(url: string): string {
  return url.replace(SECRET_PARAMETERS, '$1[redacted]');
}

/**
 * What is logged of an error. Errors of the database driver carry the statement and its parameters in `message`, and the
 * row's values in `detail`: of those only the code and what names the constraint goes out.
 */
function serializeError(error: Error): object {
  const cause = error.cause;
  if ('query' in error && cause instanceof Error) return serializeError(cause);
  if ('severity' in error && 'code' in error) {
    const { code, constraint, table, column, routine } = error as unknown as Record<string, unknown>;
    // The server's message can quote input for class 22 (bad data); the others name objects only.
    const message = String(code).startsWith('22') ? 'invalid data' : error.message;
    return { type: 'DatabaseError', message, code, constraint, table, column, routine };
  }
  return stdSerializers.err(error);
}

/**
 * The process's log: readable when `pretty`, else one JSON object a line on standard output. Headers and bodies are never
 * logged; URLs go out without their credentials.
 */
export function createLogger(level: string, pretty: boolean): Logger {
  const options = {
    level,
    redact: {
      paths: ['authorization', 'password', 'token', 'ticket', 'refresh_token', 'access_token', 'key', 'secret'].flatMap(
        (name) => [name, `*.${name}`, `*.*.${name}`],
      ),
      censor: '[redacted]',
    },
    serializers: {
      err: serializeError,
      error: serializeError,
      req: (request: { method: string; url: string; ip?: string }) => ({
        method: request.method,
        url: redactUrl(request.url),
        ip: request.ip,
      }),
      res: (reply: { statusCode: number }) => ({ status: reply.statusCode }),
    },
  };
  // Within this thread: lines of a worker are lost when the process ends, and the worker may outlive its terminal.
  if (pretty) {
    return pino(
      options,
      prettyStream({ ignore: 'pid,hostname', translateTime: 'HH:MM:ss.l', singleLine: true, sync: true }),
    );
  }
  return pino(options);
}
