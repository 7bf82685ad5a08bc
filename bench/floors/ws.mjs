// A bare WebSocket server: what POST / or the Redis channel `floor` brings is sent to everybody.
import { createServer } from 'node:http';
import { Redis } from 'ioredis';
import { WebSocketServer } from 'ws';

const http = createServer((request, response) => {
  if (request.method === 'POST') {
    const text = JSON.stringify({ type: 'floor', filler: 'x'.repeat(300), sent: request.headers['x-sent'] });
    for (const socket of server.clients) socket.send(text);
  }
  response.end('ok');
});
const server = new WebSocketServer({ server: http, perMessageDeflate: false });
if (process.env.REDIS_URL) {
  const redis = new Redis(process.env.REDIS_URL);
  redis.on('message', (_channel, text) => {
    for (const socket of server.clients) socket.send(text);
  });
  await redis.subscribe('floor');
}
http.listen(Number(process.env.PORT), '127.0.0.1', 4096);
process.once('SIGTERM', () => process.exit(0));
