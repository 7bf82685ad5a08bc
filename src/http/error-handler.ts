import type { Socket } from 'node:net';
import type { FastifyError, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { databaseProblem, PROBLEMS, Problem, type ProblemKind } from './problem.ts';

/** Errors of Fastify and its plugins that are the caller's, and what to tell it. */
const FRAMEWORK_ERRORS: Record<string, [kind: ProblemKind, detail: string]> = {
  FST_ERR_CTP_INVALID_MEDIA_TYPE: ['unsupported-media-type', 'Send the body as application/json.'],
  FST_ERR_CTP_EMPTY_TYPE: ['unsupported-media-type', 'Send the body as application/json.'],
  FST_ERR_CTP_BODY_TOO_LARGE: ['body-too-large', 'The body is larger than this server takes.'],
  FST_ERR_CTP_INVALID_CONTENT_LENGTH: ['invalid-request', 'The body is not as long as Content-Length says.'],
  FST_ERR_CTP_INVALID_JSON_BODY: ['invalid-json', 'The body is not valid JSON.'],
  FST_ERR_CTP_EMPTY_JSON_BODY: ['invalid-json', 'The body is empty: send a JSON object.'],
  FST_ERR_BAD_URL: ['invalid-request', 'The path is not a valid URL path.'],
  FST_ERR_MAX_PARAM_LENGTH: ['not-found', 'There is nothing at this path.'],
  FST_ERR_ASYNC_CONSTRAINT: ['invalid-request', 'The request cannot be routed.'],
};

/** Turns whatever was thrown into the problem that is answered; a fault of ours becomes a bare 500. */
export function toProblem(error: unknown): Problem {
  if (error instanceof Problem) return error;
  const known = databaseProblem(error);
  if (known) return known;
  const { code, statusCode } = (error ?? {}) as Partial<FastifyError>;
  const framework = code === undefined ? undefined : FRAMEWORK_ERRORS[code];
  if (framework) return new Problem(...framework);
  if (error instanceof SyntaxError && statusCode === 400) {
    return new Problem('invalid-json', 'The body is not valid JSON, or has a key that is not allowed.');
  }
  if (statusCode === 408) return new Problem('timeout', 'The request took too long to arrive.');
  return new Problem('internal-error', 'Something went wrong on our side; the log has it under the request id.', {
    cause: error,
  });
}

/** The body of a problem, RFC 9457. */
export function problemBody(problem: Problem, request: FastifyRequest): Record<string, unknown> {
  return {
    type: `urn:muster:problem:${problem.kind}`,
    title: PROBLEMS[problem.kind].title,
    status: problem.status,
    detail: problem.message,
    instance: request.url.split('?', 1)[0],
    request_id: request.id,
    ...(problem.errors ? { errors: problem.errors } : {}),
  };
}

/** The one place that turns errors, and paths that lead nowhere, into problem+json. */
export function handleErrors(app: FastifyInstance): void {
  app.setErrorHandler((error, request, reply) => {
    const problem = toProblem(error);
    if (problem.status >= 500) request.log.error({ err: problem.cause ?? error }, 'request failed');
    else if (problem.cause !== undefined) request.log.warn({ err: problem.cause }, 'the database refused a value');
    return sendProblem(problem, request, reply);
  });
  app.setNotFoundHandler((request, reply) =>
    sendProblem(new Problem('not-found', 'There is nothing at this path; /docs lists what there is.'), request, reply),
  );
}

/**
 * Answers what Fastify refuses before there is a route: paths that cannot be decoded, or whose parts are too long. No hook
 * has run by then.
 */
export function handleFrameworkError(error: FastifyError, request: FastifyRequest, reply: FastifyReply): void {
  sendProblem(toProblem(error), request, reply.header('x-request-id', request.id));
}

/** What Node's parser refuses never becomes a request: the problem is written by hand, and the connection ends. */
export function handleClientError(error: NodeJS.ErrnoException, socket: Socket): void {
  if (error.code === 'ECONNRESET' || !socket.writable) return void socket.destroy();
  const [line, kind, detail]: [string, string, string] =
    error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
      ? ['408 Request Timeout', 'timeout', 'The request took too long to arrive.']
      : error.code === 'HPE_HEADER_OVERFLOW'
        ? ['431 Request Header Fields Too Large', 'invalid-request', 'The headers are larger than this server takes.']
        : ['400 Bad Request', 'invalid-request', 'This is not valid HTTP.'];
  const status = Number(line.slice(0, 3));
  const title = line.slice(4);
  const body = JSON.stringify({ type: `urn:muster:problem:${kind}`, title, status, detail });
  socket.end(
    `HTTP/1.1 ${line}\r\nContent-Type: application/problem+json; charset=utf-8\r\nContent-Length: ${Buffer.byteLength(body)}\r\nConnection: close\r\n\r\n${body}`,
  );
}

/** Answers a problem. Serialised by hand: no response schema of the route may get in its way. */
export function sendProblem(problem: Problem, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  return reply
    .code(problem.status)
    .headers(problem.headers)
    .header('content-type', 'application/problem+json; charset=utf-8')
    .serializer((body: unknown) => JSON.stringify(body))
    .send(problemBody(problem, request));
}
