import { once } from 'node:events';
import { createServer, connect as netConnect, type Socket } from 'node:net';

/** A way to a Postgres that can fail as networks do. */
export interface TcpProxy {
  /** Leads to the same database through the proxy. */
  url: string;
  /** Closes every connection, and refuses new ones. */
  cut(): void;
  /** Says nothing more in either direction and closes nothing; new connections are taken, and hear nothing. */
  swallow(): void;
  /**
   * Lets new connections through again. Those that were swallowed are reset: what went through them is lost, as after a
   * firewall that forgot them.
   */
  restore(): Promise<void>;
  /** From now on the given share of commits is passed on and its connection reset before the answer. */
  resetCommits(share: number): void;
  close(): void;
}

/** A proxy before the Postgres of a URL, whether that leads to a TCP port or to the folder of a Unix socket. */
export async function createTcpProxy(databaseUrl: string): Promise<TcpProxy> {
  const target = new URL(databaseUrl);
  const host = decodeURIComponent(target.hostname);
  const port = Number(target.port || 5432);
  const connections = new Set<Socket>();
  let commitsReset = 0;
  let state: 'open' | 'swallowing' | 'cut' = 'open';

  // Half open, or the end of one side would be answered also where nothing must be.
  const server = createServer({ allowHalfOpen: true }, (near) => {
    connections.add(near);
    near.on('error', () => {});
    near.on('close', () => connections.delete(near));
    if (state === 'cut') return void near.resetAndDestroy();
    // Data must be read even where it is swallowed, or the end of the connection is not seen.
    if (state === 'swallowing') return void near.resume();
    const far = netConnect({
      ...(host.startsWith('/') ? { path: `${host}/.s.PGSQL.${port}` } : { host, port }),
      allowHalfOpen: true,
    });
    connections.add(far);
    far.on('error', () => {});
    far.on('close', () => connections.delete(far));
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      from.on('data', (chunk) => {
        if (state === 'open') to.write(chunk);
        if (from === near && chunk.includes('commit\0') && Math.random() < commitsReset) near.resetAndDestroy();
      });
      from.on('end', () => {
        if (state === 'open') to.end();
      });
      from.on('close', () => {
        if (state !== 'swallowing') to.destroy();
      });
    }
  });
  const listen = async (at: number) => {
    server.listen(at, '127.0.0.1');
    await once(server, 'listening');
  };
  await listen(0);
  const { port: own } = server.address() as { port: number };
  const url = new URL(databaseUrl);
  url.hostname = '127.0.0.1';
  url.port = String(own);
  const drop = () => {
    for (const socket of connections) socket.destroy();
  };

  return {
    url: url.href,
    cut() {
      state = 'cut';
      server.close();
      drop();
    },
    swallow() {
      state = 'swallowing';
    },
    async restore() {
      const before = state;
      drop();
      state = 'open';
      if (before === 'cut') await listen(own);
    },
    resetCommits(share) {
      commitsReset = share;
    },
    close() {
      if (state !== 'cut') server.close();
      state = 'cut';
      drop();
    },
  };
}
