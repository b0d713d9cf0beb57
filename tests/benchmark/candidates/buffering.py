"""What one writes by hand in Tornado: fetch the whole response, copy it. The measure of the others."""

from __future__ import annotations

import asyncio
import signal
import sys

from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import HTTPRequest
from tornado.httputil import HTTPHeaders
from tornado.web import Application, RequestHandler

HOP_BY_HOP = frozenset(
    {
        "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer",
        "Transfer-Encoding", "Upgrade",
    }
)  # fmt: skip


class Proxy(RequestHandler):
    """Neither streams, nor limits, nor cancels."""

    def initialize(self, client: CurlAsyncHTTPClient, upstream: str) -> None:
        self.client = client
        self.upstream = upstream

    async def forward(self) -> None:
        inbound = self.request
        headers = HTTPHeaders()
        for name, value in inbound.headers.get_all():
            if name not in HOP_BY_HOP and name not in ("Host", "Content-Length"):
                headers.add(name, value)
        headers["X-Forwarded-For"] = inbound.remote_ip
        headers["X-Forwarded-Proto"] = inbound.protocol
        headers["X-Forwarded-Host"] = inbound.host
        request = HTTPRequest(
            self.upstream + inbound.uri,
            method=inbound.method,
            headers=headers,
            body=inbound.body or None,
            follow_redirects=False,
            decompress_response=False,
            allow_nonstandard_methods=True,
        )
        response = await self.client.fetch(request, raise_error=False)
        self.set_status(response.code, response.reason)
        self._headers = HTTPHeaders()
        for name, value in response.headers.get_all():
            if name not in HOP_BY_HOP and name != "Content-Length":
                self._headers.add(name, value)
        if response.body:
            self.write(response.body)

    get = head = post = put = patch = delete = options = forward


async def main(upstream: str, port: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    client = CurlAsyncHTTPClient(max_clients=256)
    app = Application([(r".*", Proxy, {"client": client, "upstream": upstream})], log_function=lambda handler: None)
    app.listen(int(port), "127.0.0.1")
    print("listening", flush=True)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
