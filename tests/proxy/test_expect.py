"""Expect: 100-continue asks the upstream, not us: its 100 is relayed, and its refusal keeps the body here.

RFC 9110 section 10.1.1. Other interim responses are in ``test_interim_responses``.
"""

from __future__ import annotations

import pytest

from tests.support.process import free_port
from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import ProxyHandler

FRAMINGS = pytest.mark.parametrize("framing", ["chunked", "length"])
BODY = b"the body " * 1000
LENGTH = ("Content-Length", str(len(BODY)))


def head(framing: str, expect: str = "100-continue") -> bytes:
    length = f"Content-Length: {len(BODY)}" if framing == "length" else "Transfer-Encoding: chunked"
    return f"POST /x HTTP/1.1\r\nHost: h\r\nExpect: {expect}\r\n{length}\r\n\r\n".encode()


def framed(framing: str) -> bytes:
    return BODY if framing == "length" else chunk(BODY) + LAST_CHUNK


async def ask(running, data):
    """Send exactly this, which is a POST."""
    downstream = await running.connect()
    await downstream.send(data)
    downstream.expect("POST")
    return downstream


class TestAnUpstreamThatRefuses:
    """ST-01: the client gets the refusal and no 100, and the body is never sent."""

    @FRAMINGS
    # libcurl drops the body of a 417.
    @pytest.mark.parametrize(("status", "body"), [(401, b"no"), (413, b"no"), (417, b"")])
    async def test_its_refusal_comes_without_a_100(self, proxy, upstream, framing, status, body):
        running = await proxy(upstream.url)
        downstream = await ask(running, head(framing))
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Expect") == "100-continue"
        await conn.respond(status, [("X-A", "1")], body)
        response = await downstream.read_response()
        assert (response.status, response.interim, response.header("X-A")) == (status, [], "1")
        assert (response.body, response.complete) == (body, True)
        # Whether the body still comes cannot be told from a next request, so there is none.
        assert response.header("Connection") == "close"
        # Nor is there a 100 behind it, nor a byte of body: at most the end of the connection.
        assert await downstream.read_until_closed() == b""
        assert await conn.read_until_closed() == b""
        assert (await running.next_outcome()).bytes_up == 0
        assert upstream.accepted == 1

    @FRAMINGS
    async def test_it_is_readable_though_the_upstream_hangs_up(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await ask(running, head(framing))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(401, [("WWW-Authenticate", "Basic"), ("Connection", "close")], b"no")
        conn.close()
        response = await downstream.read_response()
        assert (response.status, response.interim, response.body, response.complete) == (401, [], b"no", True)


class TestAnUpstreamThatAccepts:
    """ST-02: its 100 reaches the client, then the body the upstream, then the answer the client."""

    @pytest.mark.parametrize(
        ("framing", "spelling"),
        [
            ("chunked", "100-continue"),
            ("length", "100-continue"),
            ("length", "100-Continue"),
            ("length", "a-miracle, 100-continue"),
        ],
    )
    async def test_the_100_is_its_own(self, proxy, upstream, framing, spelling):
        running = await proxy(upstream.url)
        downstream = await ask(running, head(framing, spelling))
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Expect") == "100-continue"
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert (await downstream.read_head()).start_line == "HTTP/1.1 100 Continue"
        await downstream.send(framed(framing))
        assert await conn.read_body() == BODY
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        # Had anybody else said 100 too, there would be a second one.
        assert (response.status, response.body, response.interim) == (200, b"ok", [])

    @FRAMINGS
    async def test_who_does_not_wait_is_not_told(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await ask(running, head(framing) + framed(framing))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await conn.read_body() == BODY
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.body, response.interim) == (200, b"ok", [])
        # The connection is as good as after any other request.
        await downstream.request("GET", "/y")
        assert (await conn.read_request()).target == "/y"
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200


class TestAnUpstreamThatSaysNothing:
    async def test_it_gets_the_body_after_a_second(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", [("Expect", "100-continue"), LENGTH])
        conn = await upstream.accept()
        await conn.read_head()
        assert (await downstream.read_head()).status == 100
        await downstream.send(BODY)
        assert await conn.read_body() == BODY
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200


class TestWhoMayNotGetA100:
    @pytest.mark.parametrize(
        "request_head",
        [
            b"POST /x HTTP/1.0\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
            b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n\r\n",
            b"POST /x HTTP/1.1\r\nHost: h\r\nExpect: a-miracle\r\nContent-Length: 5\r\n\r\nhello",
        ],
    )
    async def test_an_expectation_that_means_nothing_goes_no_further(self, proxy, upstream, request_head):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(request_head)
        conn, request = await upstream.request()
        assert not request.has("Expect")
        await conn.respond(200, body=b"ok")
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_no_body_that_is_too_large_is_asked_for(self, proxy, upstream):
        running = await proxy(upstream.url, max_body_size=4)
        downstream = await running.ask("POST", "/x", [("Expect", "100-continue"), LENGTH])
        response = await downstream.read_response()
        assert (response.status, response.interim) == (413, [])
        assert upstream.accepted == 0


class TestAnAnswerThatIsNotTheUpstreams:
    """Whether the body still comes cannot be told from a next request, so there is none."""

    @FRAMINGS
    async def test_an_error_page_ends_the_connection(self, proxy, expect_log, framing):
        expect_log("upstream http://127.0.0.1")
        running = await proxy(f"http://127.0.0.1:{free_port()}")
        await self.ends_with(502, running, framing)

    @FRAMINGS
    async def test_so_does_a_hooks(self, proxy, framing):
        def choose(handler):
            handler.set_status(401)
            handler.finish("no")

        running = await proxy(choose)
        await self.ends_with(401, running, framing)

    async def ends_with(self, status, running, framing):
        downstream = await ask(running, head(framing))
        response = await downstream.read_response()
        assert (response.status, response.complete, response.interim) == (status, True, [])
        assert response.header("Connection") == "close"
        assert await downstream.read_until_closed() == b""

    @FRAMINGS
    async def test_not_where_the_body_came_all_the_same(self, proxy, framing):
        """Most clients wait for a second only."""

        class Answering(ProxyHandler):
            async def filter_request_body(self, chunk):
                self.set_status(401)
                await self.finish("no")

        running = await proxy("http://127.0.0.1:1", Answering)
        downstream = await ask(running, head(framing) + framed(framing))
        response = await downstream.read_response()
        assert (response.status, response.complete, response.header("Connection")) == (401, True, None)
