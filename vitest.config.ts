import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/support/global-setup.ts'],
    pool: 'forks',
    // Files mostly wait for processes and timers: a worker a core, where the default leaves one core out.
    maxWorkers: '100%',
    // Bounds what hangs, and nothing else: a busy machine may take its time.
    testTimeout: 180_000,
    hookTimeout: 180_000,
    coverage: {
      provider: 'v8',
      include: ['src/**/*.ts'],
      // Entries of processes, which tests start as such, where this does not look; and types alone.
      exclude: [
        'src/main.ts',
        'src/write-openapi.ts',
        'src/auth/create-admin.ts',
        'src/audit/audit-verify.ts',
        'src/schedule-file/schedule-sync.ts',
        'src/runner/agent.ts',
        'src/runner/watch.ts',
        'src/platform/stop-signals.ts',
        'src/http/app.ts',
      ],
      reporter: ['text', 'json-summary'],
      thresholds: { lines: 90 },
    },
  },
});
