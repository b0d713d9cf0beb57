"""What the tests of CurlClient with HTTP/2 have in common."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import hpack
import pytest

from tests.clients.support import request_for
from tests.support.h2_upstream import H2Stream, H2Upstream
from tests.support.wire import within
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.clients.curl import CurlClient

OK = [(":status", "200")]
DATA, HEADERS, PING, SETTINGS, PUSH_PROMISE, WINDOW_UPDATE, CONTINUATION = 0, 1, 6, 4, 5, 8, 9
END_STREAM, END_HEADERS = 1, 4


class OverHTTP2:
    client_class = CurlClient
    http1 = False

    @classmethod
    def make(cls, **options: Any) -> HTTPClient:
        return CurlClient(**{"http_version": "2-prior-knowledge", **options})

    @pytest.fixture
    async def upstream(self) -> AsyncIterator[H2Upstream]:
        async with H2Upstream() as upstream:
            yield upstream


class Suite(OverHTTP2):
    @pytest.fixture
    async def make_client(self) -> AsyncIterator[Any]:
        with contextlib.ExitStack() as stack:

            def make(**options: Any) -> HTTPClient:
                client = self.make(**options)
                stack.callback(client.close)
                return client

            yield make

    @pytest.fixture
    async def client(self, make_client: Any) -> HTTPClient:
        return make_client()


async def warm(client: HTTPClient, upstream: H2Upstream) -> None:
    """Have the client make its connection."""
    sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url + "/warm")))
    stream, _ = await upstream.request()
    await stream.respond(200, [], b"warm")
    assert await (await within(sending, "the response")).read() == b"warm"


async def begun(client: HTTPClient, upstream: H2Upstream, request: Any) -> tuple[H2Stream, Any]:
    """Return the stream and the response, whose head is there and whose body is not."""
    sending = asyncio.ensure_future(client.send(request))
    stream = await upstream.accept()
    await stream.send_head(200)
    return stream, await within(sending, "the response")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def encoded(*fields: tuple[str, str]) -> bytes:
    return hpack.Encoder().encode(fields)


async def hang_up(stream: H2Stream) -> None:
    stream.connection.writer.close()


async def reset_connection(stream: H2Stream) -> None:
    sock = stream.connection.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.connection.writer.transport.abort()
