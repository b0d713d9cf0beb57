"""gRPC: grpcio as the upstream of the curl client, without a proxy between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest

pytest.importorskip("grpc", reason="grpcio is not installed")

from tests.clients.support import collected, request_for
from tests.real.grpc_service import PREFIX, EchoService, message, messages
from tests.support.wire import within
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.errors import UpstreamClosed
from tornado_proxy.flow import BodyPipe

FIELDS = [("Content-Type", "application/grpc"), ("Te", "trailers")]
OK, NOT_FOUND, DEADLINE_EXCEEDED, UNIMPLEMENTED = "0", "5", "4", "12"


@pytest.fixture(scope="module")
def service() -> Iterator[EchoService]:
    with EchoService() as service:
        yield service


class TestUpstream:
    """What the forwarder is given, call by call."""

    @pytest.fixture
    async def client(self) -> AsyncIterator[CurlClient]:
        client = CurlClient(http_version="2-prior-knowledge")
        yield client
        client.close()

    @pytest.fixture
    def call(self, client: CurlClient, service: EchoService) -> Any:
        async def call(method: str, body: Any, *fields: tuple[str, str]) -> Any:
            request = request_for("POST", service.url + PREFIX + method, body, [*FIELDS, *fields])
            return await within(client.send(request), f"the answer to {method}")

        return call

    async def test_unary(self, call):
        response = await call("Unary", message(b"hello"))
        assert (response.status, response.headers["Content-Type"]) == (200, "application/grpc")
        assert response.headers["X-Initial"] == "1"
        assert messages(await response.read()) == [b"hellohello"]
        assert (response.trailers["Grpc-Status"], response.trailers["X-Trailing"]) == (OK, "2")
        assert response.trailers["X-Trailing-Bin"] == "AAEC"

    async def test_an_error(self, call):
        response = await call("Unary", message(b"fail"))
        assert response.status == 200
        assert await response.read() == b""
        assert response.trailers["Grpc-Status"] == NOT_FOUND
        assert response.trailers["Grpc-Message"] == "nothing like that: %C3%A9"

    async def test_an_error_that_is_only_a_head(self, call):
        response = await call("Unknown", message(b""))
        assert response.headers["Grpc-Status"] == UNIMPLEMENTED
        # Which can be passed on as such.
        assert response.stream.exhausted

    async def test_it_needs_to_be_asked_for_trailers(self, client, service):
        """Why TE: trailers is passed on."""
        request = request_for("POST", service.url + PREFIX + "Unary", message(b"hello"), FIELDS[:1])
        with pytest.raises(UpstreamClosed, match="INTERNAL_ERROR"):
            await within(client.send(request), "the failure")

    async def test_server_streaming(self, call):
        response = await call("ServerStream", message(b"1000"))
        body, error = await within(collected(response), "the stream")
        assert error is None
        assert messages(body) == [b"message %d" % number for number in range(1000)]
        assert response.trailers["Grpc-Status"] == OK

    async def test_client_streaming(self, call):
        pipe = BodyPipe(64 * 1024)
        calling = asyncio.ensure_future(call("ClientStream", pipe))
        for _ in range(100):
            if (room := pipe.write(message(b"x" * 10_000))) is not None:
                await within(room, "room")
        pipe.close()
        response = await calling
        assert messages(await response.read()) == [b"100 1000000"]
        assert response.trailers["Grpc-Status"] == OK

    async def test_both_ways_message_by_message(self, call):
        pipe = BodyPipe(64 * 1024)
        pipe.write(message(b"message"))
        response = await call("Bidi", pipe)
        assert messages(await within(response.stream.read(), "the first echo")) == [b"message"]
        took = []
        for number in range(200):
            started = time.perf_counter()
            pipe.write(message(b"message %d" % number))
            assert messages(await within(response.stream.read(), "the echo")) == [b"message %d" % number]
            took.append(time.perf_counter() - started)
        # Nothing waits for a timer, as it would if messages were held back to be sent together.
        assert sorted(took)[100] < 0.02
        pipe.close()
        assert await within(collected(response), "the end") == (b"", None)
        assert response.trailers["Grpc-Status"] == OK

    async def test_a_call_that_the_server_ends(self, call):
        pipe = BodyPipe(64 * 1024)
        pipe.write(message(b"one"))
        response = await call("Bidi", pipe)
        assert messages(await within(response.stream.read(), "the echo")) == [b"one"]
        pipe.write(message(b"stop"))
        assert await within(collected(response), "the end") == (b"", None)
        assert response.trailers["Grpc-Status"] == OK

    async def test_a_deadline(self, call):
        response = await call("Hang", message(b"silent"), ("grpc-timeout", "100m"))
        await within(response.read(), "the end")
        status = response.headers.get("Grpc-Status") or response.trailers.get("Grpc-Status")
        assert status == DEADLINE_EXCEEDED

    @pytest.mark.parametrize("when", ["before the head", "in the stream"])
    async def test_cancelling(self, call, service, when):
        service.cancelled.clear()
        calling = asyncio.ensure_future(call("Hang", message(b"silent" if when == "before the head" else b"")))
        if when == "before the head":
            await asyncio.wait([calling], timeout=0.2)
            calling.cancel()
        else:
            response = await calling
            assert messages(await within(response.stream.read(), "the first message")) == [b"first"]
            response.abort()
        assert await asyncio.to_thread(service.cancelled.wait, 5)

    async def test_large_messages(self, call):
        large = bytes(range(256)) * 24_000
        pipe = BodyPipe(64 * 1024)
        calling = asyncio.ensure_future(call("Unary", pipe))
        framed = message(large)
        for at in range(0, len(framed), 50_000):
            if (room := pipe.write(framed[at : at + 50_000])) is not None:
                await within(room, "room")
        pipe.close()
        response = await calling
        assert messages(await response.read()) == [large * 2]

    async def test_a_hundred_streams_on_one_connection(self, call, service):
        async def begin(number: int) -> tuple[BodyPipe, Any]:
            pipe = BodyPipe(64 * 1024)
            pipe.write(message(b"%d" % number))
            return pipe, await call("Bidi", pipe)

        streams = await asyncio.gather(*map(begin, range(100)))
        connections = psutil.Process().net_connections()
        assert len([one for one in connections if one.raddr and one.raddr.port == service.port]) == 1
        for number, (pipe, response) in enumerate(streams):
            assert messages(await within(response.stream.read(), "the echo")) == [b"%d" % number]
            pipe.close()
        for _, response in streams:
            assert await within(collected(response), "the end") == (b"", None)
            assert response.trailers["Grpc-Status"] == OK
