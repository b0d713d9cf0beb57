"""Clients that are slow on purpose hold nothing but themselves."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from tests.proxy.test_cancel import upload_head
from tests.support.downstream import Downstream
from tests.support.wire import chunk, until

LIMIT = 0.4


class TestSlowHeads:
    """TO-01: a head must be complete within the limit, however steadily its bytes come."""

    async def test_are_cut_at_the_limit_and_others_served(self, proxy, echo):
        running = await proxy(echo.url, server_options={"idle_connection_timeout": LIMIT})
        started = monotonic()
        slow = [await running.connect() for _ in range(100)]
        for downstream in slow:
            await downstream.send(b"GET /x HTTP/1.1\r\nHost: h\r\nX-a: b")
        closed = 0
        while closed < len(slow):
            assert monotonic() - started < 5, f"only {closed} were cut"
            assert (await running.get("/good")).status == 200
            for downstream in slow:
                if not downstream.is_closed_by_other():
                    try:
                        await downstream.send(b"x")
                    except ConnectionError:
                        continue
            closed = sum(downstream.is_closed_by_other() for downstream in slow)
            await asyncio.sleep(0.05)
        assert monotonic() - started >= LIMIT - 0.05
        assert all(request.target == "/good" for request in echo.requests)


class TestSlowBodies:
    """TO-02: many uploads that stop are each given up, and their upstream requests with them."""

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_are_cut_and_others_served(self, proxy, upstream, framing):
        async def serve(conn, request):
            await conn.respond(200)

        running = await proxy(upstream.url, idle_timeout=LIMIT)
        slow = []
        for _ in range(50):
            downstream = await running.connect()
            await downstream.send(upload_head(framing) + (chunk(b"one") if framing == "chunked" else b"one"))
            slow.append(downstream)
        upstream.serve(serve)
        assert (await running.get("/good")).status == 200
        for downstream in slow:
            assert (await downstream.read_response()).status == 408
        await until(lambda: all(c.is_closed_by_other() or c.between_exchanges for c in upstream.connections), "let go")


class TestIdleConnections:
    """TO-04: an idle connection is closed at the limit, never in the middle of a request."""

    async def test_are_closed_in_good_order(self, proxy, echo):
        running = await proxy(echo.url, server_options={"idle_connection_timeout": LIMIT})
        downstream = await running.connect()
        for _ in range(3):
            assert (await downstream.exchange("GET", "/x")).status == 200
            await asyncio.sleep(LIMIT / 2)
        started = monotonic()
        assert await downstream.closed() == "end"
        assert monotonic() - started < LIMIT + 2

    async def test_are_not_closed_while_an_exchange_runs(self, proxy, upstream):
        running = await proxy(upstream.url, server_options={"idle_connection_timeout": LIMIT})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await asyncio.sleep(2 * LIMIT)
        await conn.send_head(200, [("Content-Length", "6")])
        assert (await downstream.read_head()).status == 200
        await asyncio.sleep(2 * LIMIT)
        await conn.send(b"hello!")
        assert await downstream.read_body() == b"hello!"

    async def test_are_not_closed_while_a_slow_body_comes(self, proxy, upstream):
        running = await proxy(upstream.url, server_options={"idle_connection_timeout": LIMIT})
        downstream = await running.connect()
        await downstream.request("POST", "/x", [("Content-Length", "3")])
        conn = await upstream.accept()
        await conn.read_head()
        for byte in (b"a", b"b", b"c"):
            await asyncio.sleep(LIMIT * 0.6)
            await downstream.send(byte)
            assert await conn.read_body(1) == byte
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200


class TestSlowReaders:
    """TO-03: many readers that stop are each cut, and their upstreams let go."""

    async def test_are_cut_and_others_served(self, proxy, upstream):
        async def serve(conn, request):
            await conn.respond(200, body=b"x" * (20_000_000 if request.target == "/big" else 10))

        upstream.serve(serve)
        upstream.timeout = 20
        running = await proxy(upstream.url, write_timeout=LIMIT)
        slow = []
        for _ in range(10):
            downstream = await Downstream.connect(running.port, receive_buffer=4096)
            await downstream.request("GET", "/big")
            slow.append(downstream)
        assert (await running.get("/good")).status == 200
        await until(lambda: len(running.outcomes) == 11, "all were cut", 10)
        assert sorted(outcome.side or "" for outcome in running.outcomes) == ["", *["downstream"] * 10]
        for downstream in slow:
            downstream.close()
