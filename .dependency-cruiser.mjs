// Who may import whom, read from the built files: this tool does not see the modules of TypeScript 7.
const NOUNS = 'auth|tasks|executions|projects|agents|memory|audit|realtime|health|scheduler|schedule-file';

export default {
  forbidden: [
    { name: 'no-circles', severity: 'error', from: {}, to: { circular: true } },
    {
      name: 'schedule-is-pure',
      comment: 'Time arithmetic imports nothing of ours and does no I/O.',
      severity: 'error',
      from: { path: '^dist/schedule/' },
      to: { path: '^dist/', pathNot: '^dist/schedule/' },
    },
    {
      name: 'schedule-does-no-io',
      severity: 'error',
      from: { path: '^dist/schedule/' },
      to: { dependencyTypes: ['core'] },
    },
    {
      name: 'platform-knows-no-domain',
      comment: 'What the process stands on has no word of the domain.',
      severity: 'error',
      from: { path: '^dist/platform/' },
      to: { path: '^dist/', pathNot: '^dist/(platform/|config\\.js)' },
    },
    {
      name: 'db-stands-on-platform',
      severity: 'error',
      from: { path: '^dist/db/' },
      to: { path: '^dist/', pathNot: '^dist/(db|platform)/' },
    },
    {
      name: 'http-knows-no-noun',
      severity: 'error',
      from: { path: '^dist/http/' },
      to: { path: `^dist/(${NOUNS})/` },
    },
    {
      name: 'nouns-do-not-know-the-server',
      severity: 'error',
      from: { path: `^dist/(${NOUNS}|http|db|schedule|platform)/` },
      to: { path: '^dist/(server|start|main)\\.js$' },
    },
    {
      name: 'fastify-at-the-edge',
      comment: 'The domain has no word of Fastify outside its routes.',
      severity: 'error',
      from: { path: `^dist/(${NOUNS})/`, pathNot: '/(routes|access-tokens|credentials|sockets)\\.js$' },
      to: { path: 'node_modules/(@fastify/|fastify)' },
    },
    {
      name: 'runner-stands-alone',
      comment: 'The command line agent talks to the server over HTTP only.',
      severity: 'error',
      from: { path: '^dist/runner/' },
      to: { path: '^dist/', pathNot: '^dist/(runner/|client/|platform/stop-signals\\.js$)' },
    },
    {
      name: 'client-stands-on-nothing',
      comment: 'It is copied beside pages as it is.',
      severity: 'error',
      from: { path: '^dist/client/' },
      to: { path: '.' },
    },
    {
      name: 'not-resolvable',
      severity: 'error',
      from: {},
      to: { couldNotResolve: true },
    },
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    includeOnly: undefined,
    enhancedResolveOptions: { exportsFields: ['exports'], conditionNames: ['import', 'node', 'default'] },
  },
};
