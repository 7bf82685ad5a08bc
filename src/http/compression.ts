import compress from '@fastify/compress';
import type { FastifyInstance } from 'fastify';

/**
 * Compresses the answers of all routes that follow, above 1 KiB and for clients that take br or gzip; never those of paths
 * that match `except`: where secrets are answered, the length of a compressed answer tells of them (BREACH). Streams of
 * events (SSE) and lines (NDJSON) go out as they are written: their types are not among those that the plugin compresses.
 * Bodies of requests are never decompressed; validation.ts refuses compressed ones.
 */
export async function compressAnswers(app: FastifyInstance, { except }: { except: RegExp }): Promise<void> {
  app.addHook('onRoute', (route) => {
    if (except.test(route.url)) route.compress = false;
  });
  await app.register(compress, { threshold: 1_024, encodings: ['br', 'gzip'], globalDecompression: false });
}
