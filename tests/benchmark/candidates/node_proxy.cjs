// A reverse proxy on node with http-proxy, or with http-proxy-3, which is called the same way:
//     NODE_PACKAGE=/where/node_modules/http-proxy node node_proxy.cjs UPSTREAM PORT
'use strict';
const http = require('node:http');
const { createProxyServer } = require(process.env.NODE_PACKAGE);

const [upstream, port] = process.argv.slice(2);
const proxy = createProxyServer({
  target: upstream,
  agent: new http.Agent({ keepAlive: true }),
  xfwd: true,
  ws: true,
});

// Without this the first client that leaves would end the process. For upgrades the third argument is a socket.
proxy.on('error', (error, request, answer) => {
  if (answer instanceof http.ServerResponse && !answer.headersSent) {
    answer.writeHead(502).end();
  } else if (answer) {
    answer.destroy();
  }
});

const server = http.createServer((request, response) => proxy.web(request, response));
server.on('upgrade', (request, socket, head) => proxy.ws(request, socket, head));
server.listen({ port: Number(port), host: '127.0.0.1', backlog: 1024 });
process.on('SIGTERM', () => process.exit(0));
