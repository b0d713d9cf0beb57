"""Expect: 100-continue asks the upstream, not us: its 100 is relayed, and its refusal keeps the body here."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.test_cancel import until
from tests.support.wire import LAST_CHUNK, WireClosed, chunk

FRAMINGS = pytest.mark.parametrize("framing", ["chunked", "length"])
BODY = b"the body " * 1000


def head(framing: str, version: str = "1.1", expect: str = "100-continue") -> bytes:
    length = f"Content-Length: {len(BODY)}" if framing == "length" else "Transfer-Encoding: chunked"
    return f"POST /x HTTP/{version}\r\nHost: h\r\nExpect: {expect}\r\n{length}\r\n\r\n".encode()


def framed(framing: str) -> bytes:
    return BODY if framing == "length" else chunk(BODY) + LAST_CHUNK


class TestAnUpstreamThatRefuses:
    """ST-01: the client gets the refusal and no 100, and the body is never sent."""

    @FRAMINGS
    async def test_its_401_comes_without_a_100(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head(framing))
        downstream.expect("POST")
        conn = await upstream.accept()
        request = await conn.read_head()
        assert request.header("Expect") == "100-continue"
        await conn.respond(401, [("WWW-Authenticate", "Basic"), ("Connection", "close")], b"no")
        response = await downstream.read_response()
        assert (response.status, response.interim, response.body) == (401, [], b"no")
        # Not a byte of body, at most the end of the connection.
        assert await conn.read_until_closed() == b""

    @FRAMINGS
    async def test_a_refusal_is_readable_whatever_came_before(self, proxy, upstream, framing):
        """Without the relay there is a 100 of our own before it, but the refusal still arrives whole."""
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head(framing))
        downstream.expect("POST")
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(401, [("Connection", "close")], b"no")
        conn.close()
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (401, b"no", True)


class TestAnUpstreamThatAccepts:
    """ST-02: its 100 reaches the client, then the body the upstream, then the answer the client."""

    @FRAMINGS
    async def test_the_100_is_its_own(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        downstream.timeout = 1.0
        await downstream.send(head(framing))
        conn = await upstream.accept()
        request = await conn.read_head()
        assert request.header("Expect") == "100-continue"
        # Nothing yet; nobody has said 100.
        await until(lambda: not downstream.is_closed_by_other(), "the connection stays open")
        assert not downstream._buffer
        await conn.send_head(100)
        assert (await downstream.read_head()).status == 100
        await downstream.send(framed(framing))
        assert await conn.read_body() == BODY
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    @FRAMINGS
    async def test_the_body_arrives_whoever_says_100(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head(framing))

        async def serve() -> None:
            conn = await upstream.accept()
            request = await conn.read_head()
            if request.has("Expect"):
                await conn.send_head(100)
            assert await conn.read_body() == BODY
            await conn.respond(200, body=b"ok")

        serving = asyncio.ensure_future(serve())
        assert (await downstream.read_head()).status == 100
        await downstream.send(framed(framing))
        await serving
        response = await downstream.read_response()
        assert (response.status, response.body, response.interim) == (200, b"ok", [])

    @FRAMINGS
    async def test_a_client_that_does_not_wait_is_served(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head(framing) + framed(framing))

        async def serve() -> None:
            conn = await upstream.accept()
            request = await conn.read_head()
            if request.has("Expect"):
                await conn.send_head(100)
            assert await conn.read_body() == BODY
            await conn.respond(200, body=b"ok")

        serving = asyncio.ensure_future(serve())
        response = await downstream.read_response()
        await serving
        assert (response.status, response.body) == (200, b"ok")


class TestWhoMayNotGetA100:
    """RFC 9110 section 10.1.1."""

    async def test_an_http_1_0_client_does_not(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head("length", version="1.0") + BODY)
        conn, request = await upstream.request()
        assert not request.has("Expect")
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_a_request_without_a_body_does_not(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x", [("Expect", "100-continue")])
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).interim == []

    async def test_a_final_answer_is_not_followed_by_one(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(head("length"))
        downstream.expect("POST")
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(413, [("Connection", "close")], b"no")
        conn.close()
        assert (await downstream.read_response()).status == 413
        try:
            rest = await downstream.read_until_closed()
        except WireClosed:
            rest = b""
        assert rest == b""

    async def test_the_expectation_may_be_in_any_case(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        downstream.timeout = 1.0
        await downstream.send(head("length", expect="100-Continue"))

        async def serve() -> None:
            conn = await upstream.accept()
            request = await conn.read_head()
            if request.has("Expect"):
                await conn.send_head(100)
            assert await conn.read_body() == BODY
            await conn.respond(200, body=b"ok")

        serving = asyncio.ensure_future(serve())
        try:
            assert (await downstream.read_head()).status == 100
            await downstream.send(BODY)
            assert (await downstream.read_response()).status == 200
        finally:
            serving.cancel()
