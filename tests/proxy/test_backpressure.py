"""Whoever reads slowly makes the other side wait, and the proxy holds little meanwhile.

Against the standalone program, so that its memory and descriptors can be told from the test's own.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tracemalloc
from time import monotonic

import pytest

from tests.support.downstream import Downstream
from tests.support.flooding import (
    HELD,
    KERNEL,
    MIB,
    Sender,
    start_download,
    start_upload,
    upload_head,
    warm_up,
)
from tests.support.memory import bytes_held
from tests.support.wire import chunk, until
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.draining import active_exchanges

FRAMINGS = pytest.mark.parametrize("framing", ["chunked", "length"])
START = {"download": start_download, "upload": start_upload}
DIRECTIONS = pytest.mark.parametrize("direction", list(START))
# Gigabytes for the run that has the time: TORNADO_PROXY_LARGE=5.
LARGE = int(os.environ.get("TORNADO_PROXY_LARGE", "0"))
# glibc keeps small blocks that were freed for later; with this, what is freed is the system's again at once, so that
# resident memory is memory held.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "8192", "MALLOC_TRIM_THRESHOLD_": "0"}


async def read_with_pauses(wire, size: int) -> bytes:
    """Return the digest of so much of a body, with pauses that are long enough for everything between to fill."""
    digest, left, number = hashlib.sha256(), size, 0
    while left:
        data = await wire.read_body(min(left, 65_536))
        digest.update(data)
        left -= len(data)
        number += 1
        if number % 8 == 0:
            await asyncio.sleep(0.01)
    return digest.digest()


class TestNobodyReads:
    """BP-01, BP-04: the sender is held back, and the proxy holds no more than its buffers."""

    @FRAMINGS
    @DIRECTIONS
    async def test_the_sender_stalls(self, served, direction, framing):
        upstream, proxy = served
        await warm_up(upstream, proxy)
        rss = proxy.rss()
        downstream, sender = await START[direction](upstream, proxy, framing)
        await until(sender.stalled, "the sender was held back")
        assert sender.sent < HELD + KERNEL
        assert proxy.rss() - rss < 4 * MIB
        await sender.stop()
        downstream.close()

    @DIRECTIONS
    @pytest.mark.parametrize("served", [EXACT], ids=["exact"], indirect=True)
    async def test_a_hundred_cost_little_and_go_without_a_trace(self, served, direction):
        upstream, proxy = served
        await warm_up(upstream, proxy)
        await until(lambda: len(upstream.connections) == 1, "one connection")
        rss, fds = proxy.rss(), proxy.fds()
        pairs = [await START[direction](upstream, proxy, ("chunked", "length")[n % 2]) for n in range(100)]
        await until(lambda: all(sender.stalled() for _, sender in pairs), "all senders were held back", 10)
        most = proxy.rss()
        assert most - rss < 64 * MIB
        # Others do not notice. Most of them: the machine may have something else to do.
        took = []
        for _ in range(9):
            async with await Downstream.connect(proxy.port) as other:
                started = monotonic()
                await other.request("GET", "/other")
                conn, _ = await upstream.request()
                await conn.respond(200, [("Connection", "close")], b"other")
                assert (await other.read_response()).body == b"other"
                took.append(monotonic() - started)
                conn.close()
        assert max(took) < 0.5
        assert sorted(took)[len(took) // 2] < 0.05
        # They leave: what they held is given back.
        for _, sender in pairs:
            await sender.stop()
        for downstream, _ in pairs:
            downstream.reset()
        # An upstream that never reads could not see the end either.
        for conn in upstream.connections:
            if direction == "upload":
                conn.close()
        left = monotonic()
        await until(lambda: proxy.fds() <= fds, "the descriptors came back", 2)
        # What stays are libcurl's hundred handles, for those who come next, and blocks too small for EXACT.
        await until(lambda: proxy.rss() - rss < 20 * MIB, "the memory came back", left + 2 - monotonic())
        print(f"{direction}: {[round(each / MIB, 1) for each in (rss, most, proxy.rss())]} MiB before, during, after")


class TestBytesHeld:
    """BP-03, BP-09: counted where they are held, by a proxy in this process."""

    @DIRECTIONS
    async def test_a_hundred_hold_little_and_leave_nothing(self, proxy, upstream, direction):
        running = await proxy(upstream.url)
        async with await Downstream.connect(running.port) as downstream:
            await downstream.request("GET", "/warm")
            conn, _ = await upstream.request()
            await conn.respond(200, [("Connection", "close")], b"warm")
            assert (await downstream.read_response()).body == b"warm"
            await conn.closed()
        tracemalloc.start()
        try:
            allocated = tracemalloc.get_traced_memory()[0]
            pairs = [await START[direction](upstream, running, ("chunked", "length")[n % 2]) for n in range(100)]
            await until(lambda: all(sender.stalled() for _, sender in pairs), "all senders were held back", 20)
            held, most = bytes_held(), tracemalloc.get_traced_memory()[0] - allocated
            # As much as the option buffer_size says, and the piece that came last: libcurl reads up to 512 KiB, and the
            # more, the busier the machine is. In all, little more than that.
            assert 100 * 64 * 1024 < held < 100 * (256 + 512) * 1024
            assert most < held + 32 * MIB
            for downstream, sender in pairs:
                await sender.stop()
                downstream.reset()
            left = monotonic()
            await until(lambda: active_exchanges() == 0, "every exchange ended", 2)
            for conn in upstream.connections:
                conn.close()
            assert bytes_held() < 64 * 1024
            # Without help from the collector of cycles, whose turn may come much later.
            await until(
                lambda: tracemalloc.get_traced_memory()[0] - allocated < 4 * MIB,
                "the memory came back",
                left + 2 - monotonic(),
            )
            after = tracemalloc.get_traced_memory()[0] - allocated
        finally:
            tracemalloc.stop()
        print(f"{direction}: {[round(each / MIB, 2) for each in (held, most, after)]} MiB held, allocated, left")


class TestSlowReader:
    """BP-02, BP-05: what a slow reader reads in the end is equal, however often it made the sender wait."""

    async def test_a_download_that_pauses_often_arrives_equal(self, served):
        upstream, proxy = served
        size = 16 * MIB
        downstream = await Downstream.connect(proxy.port, receive_buffer=65_536)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        body = os.urandom(MIB) * (size // MIB)
        sending = asyncio.ensure_future(conn.respond(200, body=body))
        await downstream.read_head()
        read = await read_with_pauses(downstream, size)
        await sending
        assert read == hashlib.sha256(body).digest()
        downstream.close()

    @FRAMINGS
    async def test_an_upload_whose_reader_pauses_often_arrives_equal(self, served, framing):
        upstream, proxy = served
        size = 16 * MIB
        downstream = await Downstream.connect(proxy.port)
        body = os.urandom(MIB) * (size // MIB)
        headers = [("Transfer-Encoding", "chunked")] if framing == "chunked" else [("Content-Length", str(size))]
        pieces = b"".join(chunk(body[i : i + MIB // 3]) for i in range(0, size, MIB // 3)) + b"0\r\n\r\n"
        sent = body if framing == "length" else pieces
        sending = asyncio.ensure_future(downstream.request("POST", "/x", headers, sent))
        conn = await upstream.accept()
        await conn.read_head()
        read = await read_with_pauses(conn, size)
        assert await conn.read_body() == b""
        await sending
        assert read == hashlib.sha256(body).digest()
        await conn.respond(204)
        assert (await downstream.read_response()).status == 204
        downstream.close()

    async def test_an_upload_goes_as_fast_as_it_is_read(self, served):
        """BP-05: the sender is never further ahead than buffers are large, and memory does not grow."""
        upstream, proxy = served
        await warm_up(upstream, proxy)
        downstream = await Downstream.connect(proxy.port)
        await downstream.send(upload_head("length"))
        conn = await upstream.accept()
        await conn.read_head()
        sender = Sender(downstream.sock, "length")
        await until(sender.stalled, "the sender was held back")
        rss, ahead, received = proxy.rss(), sender.sent, 0
        for _ in range(32):
            # A quarter of a megabyte, and then time to send more than that.
            await conn.read_exactly(MIB // 4)
            received += MIB // 4
            await asyncio.sleep(0.02)
            assert sender.sent - received < HELD + KERNEL
            assert proxy.rss() - rss < 4 * MIB
        # Nor does it fall behind; the kernel may have made its buffers larger meanwhile, never smaller.
        await until(sender.stalled, "the sender was held back")
        assert sender.sent - received > ahead - HELD
        await sender.stop()
        downstream.close()

    async def test_after_a_long_stall_the_rest_arrives(self, served):
        upstream, proxy = served
        downstream = await Downstream.connect(proxy.port, receive_buffer=262_144)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        body = os.urandom(MIB) * 32
        await conn.send_head(200, [("Content-Length", str(len(body)))])
        sending = asyncio.ensure_future(conn.send(body))
        await downstream.read_head()
        await asyncio.sleep(0.5)
        assert not sending.done()
        digest, left = hashlib.sha256(), len(body)
        while left:
            data = await downstream.read_some(MIB)
            assert data
            digest.update(data)
            left -= len(data)
        await sending
        assert digest.digest() == hashlib.sha256(body).digest()
        downstream.close()


class TestAThousandPauses:
    """BP-12: libcurl is paused and resumed again and again, and no wake-up is lost."""

    async def test_every_byte_arrives(self, proxy, upstream, monkeypatch):
        pauses = 0
        resume = CurlTransfer.resume_receiving

        def counted(transfer: CurlTransfer) -> None:
            nonlocal pauses
            pauses += transfer._recv_paused
            resume(transfer)

        monkeypatch.setattr(CurlTransfer, "resume_receiving", counted)
        running = await proxy(upstream.url, client="curl", buffer_size=16 * 1024)
        downstream = await running.connect(receive_buffer=16 * 1024)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Transfer-Encoding", "chunked")])
        # Whoever sends or reads less than there is room for would never make the other wait.
        block = os.urandom(MIB)
        sent = hashlib.sha256()
        enough = asyncio.Event()

        async def send() -> None:
            while not enough.is_set():
                sent.update(block)
                await conn.send_chunk(block)
            await conn.send_chunk(b"")

        sending = asyncio.ensure_future(send())
        await downstream.read_head()
        seen = hashlib.sha256()
        while data := await downstream.read_chunk():
            seen.update(data)
            if pauses >= 1000:
                enough.set()
        await sending
        assert seen.digest() == sent.digest()
        assert pauses >= 1000


class TestLargeBodies:
    """BP-11: no size is a limit, and memory does not grow with it."""

    @pytest.mark.parametrize(
        "size",
        [
            256 * MIB,
            pytest.param(
                LARGE * 1024 * MIB,
                marks=pytest.mark.skipif(not LARGE, reason="TORNADO_PROXY_LARGE=5 sends 5 GB each way"),
            ),
        ],
        ids=["256M", "large"],
    )
    @DIRECTIONS
    async def test_every_byte_arrives(self, served, direction, size):
        upstream, proxy = served
        upstream.timeout = 5 + size / MIB
        await warm_up(upstream, proxy)
        rss, started = proxy.rss(), monotonic()
        downstream = await Downstream.connect(proxy.port)
        if direction == "download":
            await downstream.request("GET", "/x")
            conn, _ = await upstream.request()
            await conn.send_head(200, [("Content-Length", str(size))])
            await downstream.read_head()
            source, sink = conn, downstream
        else:
            await downstream.send(f"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n".encode())
            conn = await upstream.accept()
            assert (await conn.read_head()).content_length == size
            source, sink = downstream, conn
        block = os.urandom(MIB)

        async def send() -> None:
            for _ in range(size // MIB):
                await source.send(block)

        sending = asyncio.ensure_future(send())
        peak = received = 0
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(MIB))
        while received < size:
            # Each byte stands where it belongs: the body is one block, repeated.
            offset = received % MIB
            count = await asyncio.wait_for(loop.sock_recv_into(sink.sock, buffer[offset:]), 5)
            assert count
            assert buffer[offset : offset + count] == block[offset : offset + count]
            if offset + count == MIB and received // MIB % 16 == 0:
                peak = max(peak, proxy.rss())
            received += count
        await sending
        assert received == size
        # Shown by pytest -rP: the figures are worth keeping.
        print(
            f"{direction} of {size // MIB} MiB in {monotonic() - started:.1f} s: "
            f"{rss / MIB:.1f} MiB resident before, {peak / MIB:.1f} MiB at most"
        )
        assert peak - rss < 8 * MIB
        if direction == "upload":
            await conn.respond(204)
            assert (await downstream.read_response()).status == 204
        downstream.close()
