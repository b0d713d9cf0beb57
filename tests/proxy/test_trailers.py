"""The upstream's trailers, downstream: to who asks, and where the server in front can send them."""

from __future__ import annotations

import pytest

from tests.support.declared import CLIENT
from tests.support.proxy import SERVER
from tests.support.wire import LAST_CHUNK, chunk

CHUNKED = [("Transfer-Encoding", "chunked")]
# Tornado's server cannot send any, and two of the clients cannot tell of them.
PASS = SERVER == "own" and CLIENT in (None, "curl", "simple")


class TestTrailers:
    @pytest.mark.parametrize(("te", "passed"), [("trailers", PASS), ("gzip", False)])
    async def test_they_follow_the_body_to_who_asks(self, proxy, upstream, te, passed):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x", [("TE", te), ("Connection", "TE")])
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await conn.send(b"0\r\nGrpc-Status: 0\r\nContent-Type: x\r\n\r\n")
        head = await downstream.read_head()
        assert head.chunked
        assert await downstream.read_until(LAST_CHUNK[:1]) == b"3\r\none\r\n0"
        expected = b"\r\nGrpc-Status: 0\r\n\r\n" if passed else b"\r\n\r\n"
        assert await downstream.read_exactly(len(expected)) == expected
        assert (await running.next_outcome()).error is None

    async def test_a_body_of_known_length_has_none(self, proxy, upstream):
        running = await proxy(upstream.url, response_mode="buffer")
        downstream = await running.ask("GET", "/x", [("TE", "trailers"), ("Connection", "TE")])
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send(chunk(b"one") + b"0\r\nGrpc-Status: 0\r\n\r\n")
        response = await downstream.read_response()
        assert (response.content_length, response.body) == (3, b"one")
        assert (await running.next_outcome()).error is None
