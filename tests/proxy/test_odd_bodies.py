"""Bodies in a million pieces, at a snail's pace, compressed beyond measure, or refused: all arrive whole or say no."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
from time import monotonic
from typing import Any

import pytest

from tests.support.downstream import Downstream
from tests.support.flooding import MIB, start_download, warm_up
from tests.support.wire import LAST_CHUNK, chunk, until, within
from tornado_proxy import ProxyHandler

CHUNKED = [("Transfer-Encoding", "chunked")]
# The full gigabyte of BP-10, for the run that has the time: TORNADO_PROXY_LARGE=1.
EXPANDED = (1024 if os.environ.get("TORNADO_PROXY_LARGE") else 128) * MIB


class TestTinyChunks:
    """ST-05, ST-06: one byte a chunk, and nobody else waits for it."""

    @pytest.mark.parametrize("count", [10_000, 100_000])
    @pytest.mark.parametrize("direction", ["download", "upload"])
    async def test_arrive_equal_in_a_few_seconds(self, served, direction, count):
        upstream, proxy = served
        await warm_up(upstream, proxy)
        body = os.urandom(1000) * (count // 1000)
        pieces = b"".join(chunk(body[i : i + 1]) for i in range(count)) + LAST_CHUNK
        downstream = await Downstream.connect(proxy.port)
        used, started = proxy.cpu(), monotonic()
        if direction == "download":
            await downstream.request("GET", "/x")
            conn, _ = await upstream.request()
            await conn.send_head(200, CHUNKED)
            await downstream.read_head()
            source, sink = conn, downstream
        else:
            await downstream.request("POST", "/x", CHUNKED)
            conn = await upstream.accept()
            await conn.read_head()
            source, sink = downstream, conn
        sending = asyncio.ensure_future(source.send(pieces))
        reading = asyncio.ensure_future(read_raw_chunked(sink))
        others = await others_meanwhile(proxy.port, reading)
        await sending
        assert await reading == body
        elapsed = monotonic() - started
        used = proxy.cpu() - used
        print(f"{direction} {count}: {elapsed:.2f} s, proxy cpu {used:.2f} s, others {others[-1] * 1000:.0f} ms")
        assert used < 5
        assert elapsed < 15
        assert others[-1] < 1.0
        # Most of them; the machine may have something else to do. That much is asked of ST-05 only.
        assert count > 10_000 or others[len(others) // 2] < 0.1
        downstream.close()


async def others_meanwhile(port: int, working: asyncio.Future[Any]) -> list[float]:
    """Return, sorted, how long other clients waited for answers of the proxy's own until ``working`` was done."""
    took = []
    while not took or not working.done():
        asked = monotonic()
        async with await Downstream.connect(port) as other:
            await other.send(b"CONNECT / HTTP/1.1\r\nHost: h\r\n\r\n")
            await other.read_head()
        took.append(monotonic() - asked)
        await asyncio.sleep(0.01)
    return sorted(took)


async def read_raw_chunked(wire) -> bytes:
    """Return a chunked body, parsed once it is there: reading it chunk by chunk would be the slow part here."""
    raw = bytearray()
    while not raw.endswith(b"\r\n0\r\n\r\n"):
        data = await wire.read_some(MIB)
        assert data
        raw += data
    body, position = bytearray(), 0
    while True:
        end = raw.index(b"\r\n", position)
        size = int(raw[position:end], 16)
        if not size:
            return bytes(body)
        body += raw[end + 2 : end + 2 + size]
        position = end + 4 + size


class TestACompressedBody:
    """BP-10: a body is passed as it is, however large it would become."""

    async def test_is_not_expanded(self, served):
        upstream, proxy = served
        upstream.timeout = 30
        await warm_up(upstream, proxy)
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as archive:
            for _ in range(EXPANDED // MIB):
                archive.write(bytes(MIB))
        body = packed.getvalue()
        rss = proxy.rss()
        downstream = await Downstream.connect(proxy.port)
        await downstream.request("GET", "/x", [("Accept-Encoding", "gzip")])
        conn, request = await upstream.request()
        assert request.header("Accept-Encoding") == "gzip"
        sending = asyncio.ensure_future(conn.respond(200, [("Content-Encoding", "gzip")], body))
        response = await downstream.read_response()
        await sending
        assert response.header("Content-Encoding") == "gzip"
        assert hashlib.sha256(response.body).digest() == hashlib.sha256(body).digest()
        assert proxy.rss() - rss < 8 * MIB
        downstream.close()


class TestMemoryAfterAnAbort:
    """BP-09: what a stalled download held is given back when its client leaves."""

    async def test_is_given_back(self, served):
        upstream, proxy = served
        await warm_up(upstream, proxy)
        async with await Downstream.connect(proxy.port) as first:
            await first.request("HEAD", "/endless")
            conn, _ = await upstream.request()
            await conn.respond(200, [("Content-Length", str(10**12)), ("Connection", "close")])
            conn.close()
            assert (await first.read_response()).status == 200
        rss, fds = proxy.rss(), proxy.fds()
        for _ in range(3):
            downstream, sender = await start_download(upstream, proxy, "length")
            await until(sender.stalled, "the sender was held back")
            downstream.reset()
            await until(lambda: proxy.fds() <= fds, "the descriptors came back", 2)
            await sender.stop()
        assert proxy.rss() - rss < 4 * MIB


class TestALongStream:
    """BP-08: server-sent events with long silences outlive every limit but the one on silence."""

    async def test_is_not_cut_by_a_limit_on_the_head(self, proxy, upstream):
        running = await proxy(
            upstream.url, connect_timeout=0.2, response_timeout=0.2, write_timeout=0.2, idle_timeout=5
        )
        downstream = await running.ask("GET", "/events", [("Accept", "text/event-stream")])
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Type", "text/event-stream"), *CHUNKED])
        await downstream.read_head()
        for number in range(3):
            # Time is the subject: longer than any other limit.
            await asyncio.sleep(0.3)
            event = b"data: %d\n\n" % number
            await conn.send_chunk(event)
            assert await downstream.read_body(len(event)) == event
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""


class TestASlowUpload:
    """ST-07: a byte now and then is progress; when it stops, the client is told, and the upstream let go."""

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_byte_by_byte_it_arrives(self, proxy, upstream, framing):
        running = await proxy(upstream.url, idle_timeout=0.4)
        downstream = await running.connect()
        await downstream.request("POST", "/x", CHUNKED if framing == "chunked" else [("Content-Length", "10")])
        conn = await upstream.accept()
        await conn.read_head()
        for number in range(10):
            await asyncio.sleep(0.06)
            byte = b"%d" % number
            await downstream.send(chunk(byte) if framing == "chunked" else byte)
            assert await conn.read_body(1) == byte
        if framing == "chunked":
            await downstream.send(LAST_CHUNK)
        assert await conn.read_body() == b""
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"


class Forbidding(ProxyHandler):
    """Answers without reading the body."""

    async def prepare(self) -> None:
        if self.request.path == "/forbidden":
            self.set_status(403)
            await self.finish(PAGE)
            return
        await super().prepare()


PAGE = b"you may not " * 5000


class TestARefusedUpload:
    """ST-09: a refusal is readable to the last byte, however much the client goes on sending."""

    async def upload(self, running, target: str, framing: str, size: int, method: str = "POST"):
        """Send all of it, as a client does that does not look before it has sent, and read the answer."""
        downstream = await running.connect()
        await downstream.request(method, target, CHUNKED if framing == "chunked" else [("Content-Length", str(size))])
        sent = 0

        async def send() -> None:
            nonlocal sent
            piece = bytes(MIB)
            while sent < size:
                await downstream.send(chunk(piece) if framing == "chunked" else piece)
                sent += len(piece)
            if framing == "chunked":
                await downstream.send(LAST_CHUNK)

        error = None
        try:
            await within(send(), "sending all of it")
        except (ConnectionError, AssertionError) as exc:
            error = exc
        response = await downstream.read_response()
        return response, sent, error

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_413_beyond_max_body_size(self, proxy, upstream, expect_log, framing):
        running = await proxy(upstream.url, max_body_size=MIB)
        size = 20 * MIB

        async def take_in() -> None:
            await (await upstream.accept()).closed()

        # That it is too long shows only as it passes, unless it is announced.
        taking = asyncio.ensure_future(take_in())
        response, sent, error = await self.upload(running, "/x", framing, size)
        assert error is None, f"{error!r} after {sent}"
        assert (response.status, response.complete) == (413, True)
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side) == (413, "downstream")
        if framing == "length":
            assert upstream.accepted == 0
            taking.cancel()
        else:
            await within(taking, "the end of what the upstream got")

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_413_of_the_upstreams(self, proxy, upstream, framing):
        running = await proxy(upstream.url)

        async def refuse() -> None:
            conn = await upstream.accept()
            await conn.read_head()
            await conn.respond(413, [("Connection", "close")], PAGE)
            conn.close()

        refusing = asyncio.ensure_future(refuse())
        response, sent, error = await self.upload(running, "/x", framing, 20 * MIB)
        await refusing
        assert error is None, f"{error!r} after {sent}"
        assert (response.status, response.complete, response.body) == (413, True, PAGE)

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_403_of_a_handlers_own(self, proxy, upstream, framing):
        running = await proxy(upstream.url, Forbidding)
        response, sent, error = await self.upload(running, "/forbidden", framing, 20 * MIB)
        assert error is None, f"{error!r} after {sent}"
        assert (response.status, response.complete, response.body) == (403, True, PAGE)
        assert upstream.accepted == 0

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_502_when_nobody_listens(self, proxy, upstream, expect_log, framing):
        expect_log("upstream")
        upstream.refuse()
        running = await proxy(upstream.url)
        response, sent, error = await self.upload(running, "/x", framing, 20 * MIB)
        assert error is None, f"{error!r} after {sent}"
        assert (response.status, response.complete) == (502, True)

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_501_of_our_own_verdict(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        response, sent, error = await self.upload(running, "/x", framing, 20 * MIB, "BREW")
        assert error is None, f"{error!r} after {sent}"
        assert (response.status, response.complete) == (501, True)


class TestBodyHashes:
    """LD-06 in small: mixed sizes, hashed on both sides."""

    async def test_both_ways(self, proxy, upstream):
        running = await proxy(upstream.url)

        async def serve(conn, request):
            seen = hashlib.sha256(request.body or b"").hexdigest()
            await conn.respond(200, [("X-Seen", seen)], json.dumps(seen).encode() + (request.body or b""))

        upstream.serve(serve)
        downstream = await running.connect()
        for size in (0, 1, 2, 1459, 1460, 1461, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 262_144, 262_145, MIB):
            body = os.urandom(size)
            digest = hashlib.sha256(body).hexdigest()
            response = await downstream.exchange("POST", "/x", body=body)
            assert response.header("X-Seen") == digest
            assert response.body == json.dumps(digest).encode() + body
