import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/support/global-setup.ts'],
    pool: 'forks',
    testTimeout: 30_000,
    hookTimeout: 60_000,
    coverage: {
      provider: 'v8',
      include: ['src/**/*.ts'],
      // Entries of processes: the tests run them as such, where this does not see them.
      exclude: [
        'src/main.ts',
        'src/write-openapi.ts',
        'src/auth/create-admin.ts',
        'src/runner/agent.ts',
        'src/runner/watch.ts',
      ],
      reporter: ['text-summary', 'lcovonly'],
      thresholds: { lines: 90 },
    },
  },
});
