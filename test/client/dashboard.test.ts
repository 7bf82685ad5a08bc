import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { build } from 'esbuild';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import WebSocket from 'ws';
import { startServer, type TestServer } from '../support/server.ts';
import { createTcpProxy } from '../support/tcp-proxy.ts';
import { makeAgent, makeTask, until } from '../support/work.ts';

const ROOT = resolve(import.meta.dirname, '../..');

function haveChromium(): boolean {
  if (spawnSync('chromium', ['--version']).status === 0) return true;
  if (process.env['REQUIRE_CHROMIUM'] === '1')
    throw new Error('REQUIRE_CHROMIUM=1, and there is no chromium on the PATH.');
  console.warn('SKIPPED: the test of the dashboard, since there is no chromium on the PATH.');
  return false;
}

/** A page in a headless Chromium, driven over the DevTools protocol. */
async function openPage(url: string): Promise<{ evaluate<T>(expression: string): Promise<T>; close(): Promise<void> }> {
  const profile = await mkdtemp(join(tmpdir(), 'muster-chromium-'));
  const browser: ChildProcess = spawn(
    'chromium',
    [
      '--headless=new',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-dev-shm-usage',
      '--remote-debugging-port=0',
      `--user-data-dir=${profile}`,
      'about:blank',
    ],
    { stdio: 'ignore' },
  );
  const ended = once(browser, 'exit');
  const port = await until(
    () =>
      readFile(join(profile, 'DevToolsActivePort'), 'utf8').then(
        (text) => text.split('\n')[0] ?? '',
        () => '',
      ),
    (text) => text !== '',
    40,
  );
  const target = (await (
    await fetch(`http://127.0.0.1:${port}/json/new?${encodeURIComponent(url)}`, { method: 'PUT' })
  ).json()) as {
    webSocketDebuggerUrl: string;
  };
  const devtools = new WebSocket(target.webSocketDebuggerUrl);
  await once(devtools, 'open');
  let calls = 0;
  const evaluate = <T>(expression: string) =>
    new Promise<T>((done, fail) => {
      const id = ++calls;
      const listen = (data: unknown) => {
        const answer = JSON.parse(String(data)) as {
          id?: number;
          result?: { result: { value: T }; exceptionDetails?: unknown };
        };
        if (answer.id !== id) return;
        devtools.off('message', listen);
        if (!answer.result || answer.result.exceptionDetails) fail(new Error(JSON.stringify(answer)));
        else done(answer.result.result.value);
      };
      devtools.on('message', listen);
      devtools.send(JSON.stringify({ id, method: 'Runtime.evaluate', params: { expression, returnByValue: true } }));
    });
  return {
    evaluate,
    async close() {
      devtools.terminate();
      browser.kill('SIGKILL');
      await ended;
      await rm(profile, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 });
    },
  };
}

describe.runIf(haveChromium())('the dashboard in a browser', () => {
  let server: TestServer;
  let pages: Server;
  let origin: string;
  beforeAll(async () => {
    const { outputFiles } = await build({
      entryPoints: [join(ROOT, 'src/client/muster-client.ts')],
      format: 'esm',
      write: false,
    });
    const script = outputFiles[0]?.text ?? '';
    const page = await readFile(join(ROOT, 'examples/dashboard.html'), 'utf8');
    pages = createServer((request, response) => {
      const [type, text] = request.url === '/muster-client.js' ? ['text/javascript', script] : ['text/html', page];
      response.writeHead(200, { 'content-type': `${type}; charset=utf-8` }).end(text);
    }).listen(0, '127.0.0.1');
    await once(pages, 'listening');
    origin = `http://127.0.0.1:${(pages.address() as AddressInfo).port}`;
    server = await startServer({ env: { CORS_ORIGINS: origin } });
  });
  afterAll(async () => {
    pages?.close();
    await server?.stop();
  });

  test('shows what is there and what happens, also after it was cut off, and names as text', {
    timeout: 120_000,
  }, async () => {
    const user = await server.newUser();
    const before = await makeTask(user.call, { name: 'was there before' });
    const proxy = await createTcpProxy(server.url);
    const page = await openPage(origin);
    const inBoard = (id: string) => page.evaluate<string>(`document.getElementById('${id}')?.textContent ?? ''`);
    const shows = (id: string, text: string) =>
      until(
        () => inBoard(id),
        (found) => found.includes(text),
        30,
      );
    try {
      await until(
        () => page.evaluate<boolean>(`document.readyState === 'complete' && !!document.getElementById('login')`),
        Boolean,
        30,
      );
      await page.evaluate(`
        document.getElementById('server').value = '${proxy.url}';
        document.getElementById('key').value = '${user.token}';
        document.getElementById('login').requestSubmit();`);
      await shows('tasks-pending', before.name);
      await shows('state', 'live');

      const html = '<img src=x onerror="document.title=1">';
      const task = await makeTask(user.call, { name: html });
      await makeAgent(user.call, { name: 'builder' });
      await shows('tasks-pending', html);
      await shows('agents', 'builder');
      await shows('events', 'agent_activity_update builder');
      expect(await page.evaluate(`document.querySelectorAll('main img').length`)).toBe(0);

      proxy.cut();
      await user.call('POST', `/tasks/${before.id}/pause`);
      await user.call('DELETE', `/tasks/${task.id}`);
      await proxy.restore();
      await shows('tasks-disabled', before.name);
      await until(
        () => inBoard('tasks-pending'),
        (found) => !found.includes(html),
        30,
      );
      await shows('state', 'live');
      expect(await page.evaluate(`location.href`)).not.toContain(user.token);
    } finally {
      await page.close();
      proxy.close();
    }
  });
});
