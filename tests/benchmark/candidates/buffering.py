"""What one writes by hand in Tornado: fetch the response, copy it. It neither streams, nor limits, nor cancels."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httputil import HTTPHeaders
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.web import RequestHandler

from tests.benchmark.candidates.serving import arguments, run, serving_rules

HOP_BY_HOP = frozenset(
    {
        "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer",
        "Transfer-Encoding", "Upgrade",
    }
)  # fmt: skip
CLIENTS: dict[str, type[AsyncHTTPClient]] = {"curl": CurlAsyncHTTPClient, "simple": SimpleAsyncHTTPClient}


class Proxy(RequestHandler):
    def initialize(self, client: AsyncHTTPClient, upstream: str) -> None:
        self.client = client
        self.upstream = upstream

    async def forward(self) -> None:
        inbound = self.request
        headers = HTTPHeaders()
        for name, value in inbound.headers.get_all():
            if name not in HOP_BY_HOP and name not in ("Host", "Content-Length"):
                headers.add(name, value)
        headers["X-Forwarded-For"] = inbound.remote_ip or ""
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


@asynccontextmanager
async def serving(args: argparse.Namespace) -> AsyncIterator[None]:
    client = CLIENTS[args.client](force_instance=True, max_clients=256)
    async with serving_rules([(r".*", Proxy, {"client": client, "upstream": args.upstream})], args.port):
        yield


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--client", choices=sorted(CLIENTS), default="curl")
    run(serving, parser.parse_args())
