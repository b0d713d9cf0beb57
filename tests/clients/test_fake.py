"""The part of the contract that needs no network, kept by FakeClient; and what it is for: tests of applications."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from tornado.httputil import HTTPHeaders

from tests.clients.contract import Aborting, Bodies, Heads
from tests.clients.support import collected, request_for
from tests.support.wire import within
from tornado_proxy import ConnectError, UpstreamClosed
from tornado_proxy.clients.fake import FakeClient, FakeUpstream, answer
from tornado_proxy.flow import BodyPipe


class Connection:
    """An exchange with the fake, with the names of the scripted upstream's connections."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._body = b""
        self.ended = asyncio.Event()
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def play(self) -> None:
        try:
            await self._finished
        finally:
            self.ended.set()

    async def read_head(self) -> None:
        pass

    async def read_body(self, size: int | None = None) -> bytes:
        while (size is None or len(self._body) < size) and (piece := await self._upstream.read()):
            self._body += piece
        data, self._body = self._body[:size], self._body[len(self._body) if size is None else size :]
        return data

    async def read_request(self) -> Any:
        request, fields = self._upstream.request, self._upstream.fields
        body = await self.read_body()

        def all_values(name: str) -> list[str]:
            return [value for other, value in fields if other == name]

        return SimpleNamespace(method=request.method, body=body, all=all_values)

    async def send_head(self, status: int, headers: Any = ()) -> None:
        if status < 200:
            self._upstream.interim(status, headers)
        else:
            self._upstream.send_head(status, headers)
            # As over a socket, the head has arrived once this returns.
            await asyncio.sleep(0)

    async def send_chunk(self, data: bytes) -> None:
        if data:
            await self._upstream.write(data)
        else:
            self._finished.set_result(None)

    async def respond(self, status: int = 200, headers: Any = (), body: bytes = b"", reason: str | None = None) -> None:
        self._upstream.send_head(status, headers, HTTPStatus(status).phrase if reason is None else reason)
        await self._upstream.write(body)
        self._finished.set_result(None)

    async def closed(self) -> None:
        # A script sees that an upload broke off where it reads.
        reading = asyncio.ensure_future(self.read_body())
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait([reading, ended], return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and (error := reading.exception()) is not None:
                self._finished.set_exception(error)
            await ended
        finally:
            reading.cancel()
            ended.cancel()

    def close(self) -> None:
        self._finished.set_exception(UpstreamClosed("cut", phase="body", upstream="http://upstream.example"))


class Upstream:
    """What the scripted upstream is to the others."""

    url = "http://upstream.example"

    def __init__(self) -> None:
        self._new: asyncio.Queue[Connection] = asyncio.Queue()

    async def script(self, upstream: FakeUpstream) -> None:
        conn = Connection(upstream)
        self._new.put_nowait(conn)
        await conn.play()

    async def accept(self) -> Connection:
        return await within(self._new.get(), "a request")

    async def request(self) -> tuple[Connection, Any]:
        conn = await self.accept()
        return conn, await conn.read_request()


class TestFake(Heads, Bodies, Aborting):
    client_class = FakeClient

    @pytest.fixture
    async def upstream(self):
        return Upstream()

    @pytest.fixture
    async def client(self, make_client, upstream):
        client = make_client()
        client._answers = [upstream.script]
        return client


class TestInAnApplication:
    """What the README says of it."""

    async def test_each_request_takes_the_next_answer_and_the_last_one_stays(self, proxy):
        client = FakeClient(answer(201, {"X-A": "1"}, b"one"), answer(404, body=b"none"))
        running = await proxy("http://upstream.example/base", client=client)
        first = await running.request("POST", "/x?y=1", [("X-B", "2")], b"hello")
        assert (first.status, first.header("X-A"), first.body) == (201, "1", b"one")
        assert [(await running.get("/y")).status for _ in range(2)] == [404, 404]
        assert [(request.method, request.url) for request in client.requests] == [
            ("POST", "http://upstream.example/base/x?y=1"),
            ("GET", "http://upstream.example/base/y"),
            ("GET", "http://upstream.example/base/y"),
        ]
        assert client.requests[0].headers["X-B"] == "2"
        client.close()

    async def test_an_error_is_what_the_application_sees(self, proxy, expect_log):
        expect_log("refused")
        client = FakeClient(ConnectError("refused"))
        errors: list[Any] = []
        running = await proxy("http://upstream.example", client=client, error_callback=errors.append, retries=0)
        assert (await running.get("/x")).status == 502
        assert [type(error) for error in errors] == [ConnectError]
        client.close()

    async def test_a_script_plays_the_upstream(self, proxy, expect_log):
        expect_log("the cable was cut")
        seen = []

        async def script(upstream: FakeUpstream) -> None:
            seen.append(await upstream.read_all())
            upstream.send_head(200, {"Content-Type": "text/plain"})
            await upstream.write(b"one")
            raise UpstreamClosed("the cable was cut")

        client = FakeClient(script)
        running = await proxy("http://upstream.example", client=client)
        downstream = await running.ask("POST", "/x", [], b"hello")
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (200, b"one", False)
        assert seen == [b"hello"]
        client.close()

    async def test_trailers_are_there_with_the_end(self):
        async def script(upstream: FakeUpstream) -> None:
            with pytest.raises(RuntimeError):
                upstream.send_trailers({})
            upstream.send_head(200)
            await upstream.write(b"one")
            upstream.send_trailers({"grpc-status": "0"})

        client = FakeClient(script)
        response = await client.send(request_for("GET", "http://upstream.example"))
        assert await collected(response) == (b"one", None)
        assert list(response.trailers.get_all()) == [("Grpc-Status", "0")]
        client.close()
        await client.wait_closed()

    async def test_so_are_those_of_a_request(self):
        seen = []

        async def script(upstream: FakeUpstream) -> None:
            seen.append((await upstream.read_all(), upstream.trailers))
            upstream.send_head(200)

        pipe = BodyPipe(1024)
        pipe.write(b"one")
        pipe.trailers = HTTPHeaders({"X-Checksum": "1"})
        pipe.close()
        client = FakeClient(script)
        await client.send(request_for("POST", "http://upstream.example", pipe))
        await client.send(request_for("POST", "http://upstream.example", b"two"))
        assert seen == [(b"one", [("X-Checksum", "1")]), (b"two", [])]
        client.close()
        await client.wait_closed()

    async def test_a_script_that_goes_wrong_is_an_error(self):
        async def wrong(upstream: FakeUpstream) -> None:
            raise KeyError("x")

        async def silent(upstream: FakeUpstream) -> None:
            pass

        client = FakeClient(wrong, silent, answer())
        for message in (r"script raised KeyError\('x'\)", "without an answer"):
            with pytest.raises(Exception, match=message):
                await client.send(request_for("GET", "http://upstream.example"))
        response = await client.send(request_for("GET", "http://upstream.example"))
        assert await collected(response) == (b"", None)
        client.close()
        await client.wait_closed()
