"""What one writes by hand in aiohttp: both bodies streamed, websockets relayed message by message."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientSession, ClientTimeout, ClientWebSocketResponse, DummyCookieJar, TCPConnector, WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

from tests.benchmark.candidates.serving import arguments, run

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip

WebSocket = ClientWebSocketResponse | web.WebSocketResponse


async def relay(source: WebSocket, sink: WebSocket) -> None:
    async for message in source:
        if message.type is WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await sink.send_bytes(message.data)
    await sink.close()


class Proxy:
    def __init__(self, session: ClientSession, upstream: str) -> None:
        self.session = session
        self.upstream = upstream

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.tunnel(request)
        return await self.forward(request)

    async def tunnel(self, request: web.Request) -> web.StreamResponse:
        downstream = web.WebSocketResponse()
        async with self.session.ws_connect(URL(self.upstream + request.raw_path, encoded=True)) as upstream:
            await downstream.prepare(request)
            await asyncio.gather(relay(downstream, upstream), relay(upstream, downstream))
        return downstream

    async def forward(self, request: web.Request) -> web.StreamResponse:
        headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in HOP_BY_HOP and name.lower() != "host"
        )
        headers["X-Forwarded-For"] = request.remote or ""
        headers["X-Forwarded-Proto"] = request.scheme
        headers["X-Forwarded-Host"] = request.host
        async with self.session.request(
            request.method,
            URL(self.upstream + request.raw_path, encoded=True),
            headers=headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
        ) as answer:
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    response.headers.add(name, value)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


@asynccontextmanager
async def serving(args: argparse.Namespace) -> AsyncIterator[None]:
    async with ClientSession(
        connector=TCPConnector(limit=0),
        timeout=ClientTimeout(total=None),
        auto_decompress=False,
        cookie_jar=DummyCookieJar(),
    ) as session:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", Proxy(session, args.upstream).handle)
        # Streams that never end would hold up the end for a minute.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", args.port, backlog=1024).start()
        yield
        await runner.cleanup()


if __name__ == "__main__":
    # wrk leaves in the middle of its last requests; aiohttp writes a traceback for each.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    run(serving, arguments().parse_args())
