import { Readable } from 'node:stream';
import type { App, Deps } from '../http/app.ts';
import { invalid } from '../http/problem.ts';
import { exportAudit, listAudit } from './queries.ts';
import { auditList, auditQuery, auditSummaryView, auditView } from './schemas.ts';

/** The audit log: who changed what. It is only read here; nothing changes or deletes an entry. */
export function auditRoutes(app: App, { db }: Deps): void {
  app.get(
    '/audit',
    {
      config: { access: { rule: 'owner', scopes: ['read'] } },
      schema: {
        tags: ['audit'],
        summary: 'Who changed what, newest first',
        description:
          'Entries of what the caller owns. Each has a place in its owner’s chain of hashes, by which `npm run audit:verify` finds what was tampered with, in the database or in an export.',
        querystring: auditQuery,
        response: { 200: auditList },
      },
    },
    async (request, reply) => {
      const { actor, query } = request;
      if (query.format !== 'ndjson') {
        const { rows, ...page } = await listAudit(db, actor, query);
        return { entries: rows.map(auditSummaryView), ...page };
      }
      for (const name of ['limit', 'offset', 'cursor', 'sort_order'] as const) {
        if (query[name] !== undefined)
          throw invalid(`query.${name}`, 'does not go with format=ndjson, which sends all');
      }
      const lines = exportAudit(db, actor, query);
      // The first batch before anything is sent, so that what is wrong is still answered as a problem.
      const first = await lines.next();
      const text = async function* () {
        for (let batch = first; !batch.done; batch = await lines.next()) {
          yield batch.value.map((row) => `${JSON.stringify(auditView(row))}\n`).join('');
        }
      };
      return reply
        .type('application/x-ndjson')
        .header('content-disposition', 'attachment; filename="audit.ndjson"')
        .serializer((payload: unknown) => payload as string)
        .send(Readable.from(text()) as never);
    },
  );
}
