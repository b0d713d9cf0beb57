"""A downstream that leaves takes the upstream transfer with it, at once and wherever the exchange is."""

from __future__ import annotations

import asyncio
import fcntl
import random
import socket
import struct
import termios
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from tests.support.downstream import Downstream
from tests.support.wire import LAST_CHUNK, WireClosed, chunk
from tornado_proxy import forwarder

CHUNKED = [("Transfer-Encoding", "chunked")]
LEAVE = pytest.mark.parametrize("leave", ["close", "reset"])
UPLOADS = pytest.mark.parametrize("framing", ["chunked", "length"])
# Seconds until the upstream must have seen the end.
AT_ONCE = 1.0
PIECE = b"x" * 65_536


def upload_head(framing: str) -> bytes:
    length = "Content-Length: 1000000000" if framing == "length" else "Transfer-Encoding: chunked"
    return f"POST /x HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode()


def piece(framing: str, data: bytes) -> bytes:
    return chunk(data) if framing == "chunked" else data


async def until(condition: Callable[[], object], what: str, timeout: float = 5.0) -> None:
    """Poll `condition` until it holds."""
    deadline = monotonic() + timeout
    while not condition():
        assert monotonic() < deadline, f"{what} within {timeout} s"
        await asyncio.sleep(0.005)


def send_until_stalled(sock, data: bytes) -> Callable[[], bool]:
    """Return a condition: the kernel has taken nothing of `data`, sent again and again, for a fifth of a second."""
    view = memoryview(data)
    position, last = 0, monotonic()

    def stalled() -> bool:
        nonlocal position, last
        try:
            while True:
                position = (position + sock.send(view[position:])) % len(view)
                last = monotonic()
        except BlockingIOError:
            return monotonic() - last > 0.2

    return stalled


async def send_until_held_back(downstream: Downstream, data: bytes) -> None:
    """Send until the proxy takes no more, though its kernel does: else the end could not reach it past the bytes."""
    (exchange,) = forwarder._exchanges
    full_since = monotonic()
    while monotonic() - full_since < 0.2:
        assert exchange.upload is not None
        if exchange.upload.size < exchange.upload.limit:
            await downstream.send(data)
            await until(lambda: not unacknowledged(downstream.sock), "the proxy's kernel took the bytes")
            full_since = monotonic()
        await asyncio.sleep(0.005)


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes the kernel holds for the peer."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0])


async def check(running, conn, leave: Callable[[], None], phase: str) -> None:
    """Leave: the upstream sees it at once, and the one outcome blames the downstream."""
    left = monotonic()
    leave()
    deadline = left + AT_ONCE
    await until(conn.is_closed_by_other, "the upstream saw the end", deadline - monotonic())
    outcome = await running.next_outcome()
    assert (outcome.side, outcome.phase) == ("downstream", phase)
    await until(lambda: forwarder.active_exchanges() == 0, "no exchange was left")
    assert len(running.outcomes) == 1


class TestUpstreamSeesTheEnd:
    """FA-01, FA-02: within a second of the downstream's leaving the upstream connection is closed."""

    @LEAVE
    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    async def test_before_the_head(self, proxy, upstream, leave, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await check(running, conn, getattr(downstream, leave), "head")

    @LEAVE
    async def test_while_the_body_is_idle(self, proxy, upstream, leave):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        await check(running, conn, getattr(downstream, leave), "body")

    @LEAVE
    async def test_while_the_downstream_is_not_reading(self, proxy, upstream, leave):
        running = await proxy(upstream.url)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await until(send_until_stalled(conn.sock, chunk(PIECE)), "the upstream was held back")
        await check(running, conn, getattr(downstream, leave), "body")

    @LEAVE
    @UPLOADS
    async def test_in_an_upload_that_the_upstream_reads(self, proxy, upstream, leave, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing) + piece(framing, b"one"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"one"
        await check(running, conn, getattr(downstream, leave), "send")

    @LEAVE
    @UPLOADS
    async def test_in_an_upload_that_the_upstream_does_not_read(self, proxy, upstream, leave, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing))
        conn = await upstream.accept()
        await conn.read_head()
        await send_until_held_back(downstream, piece(framing, PIECE))
        # The outcome, not the upstream's socket, tells when: its end waits behind bytes that the upstream has not read.
        left = monotonic()
        getattr(downstream, leave)()
        outcome = await running.next_outcome()
        assert monotonic() - left < AT_ONCE
        assert (outcome.side, outcome.phase) == ("downstream", "send")
        await until(conn.is_closed_by_other, "the upstream saw the end")
        assert forwarder.active_exchanges() == 0
        assert len(running.outcomes) == 1

    @LEAVE
    async def test_in_a_full_duplex_exchange(self, proxy, upstream, leave):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head("chunked") + chunk(b"one"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"one"
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        left = monotonic()
        getattr(downstream, leave)()
        await until(conn.is_closed_by_other, "the upstream saw the end", left + AT_ONCE - monotonic())
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.status) == ("downstream", 200)
        assert len(running.outcomes) == 1

    @LEAVE
    async def test_while_queued(self, proxy, upstream, leave):
        running = await proxy(upstream.url, client_options={"max_clients": 1})
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        second = await running.ask("GET", "/second")
        await until(lambda: forwarder.active_exchanges() == 2, "the second request waited")
        left = monotonic()
        getattr(second, leave)()
        outcome = await running.next_outcome()
        assert monotonic() - left < AT_ONCE
        assert (outcome.side, outcome.status) == ("downstream", 499)
        # It never reaches the upstream, and does not keep the place of those behind it.
        await conn.respond(200, body=b"first")
        assert (await first.read_response()).body == b"first"
        third = await running.ask("GET", "/third")
        request = await conn.read_request()
        assert request.target == "/third"
        await conn.respond(200, body=b"third")
        assert (await third.read_response()).body == b"third"
        assert upstream.accepted == 1
        assert len(running.outcomes) == 3


class TestNothingIsLeft:
    """FA-02, FA-27: downstreams that leave anywhere, many at a time, leave nothing behind."""

    async def test_after_three_hundred_that_left_at_random_points(self, proxy, upstream):
        chance = random.Random(9)
        body = PIECE * 4

        async def serve(conn, request):
            await conn.send_head(200, CHUNKED)
            for _ in range(4):
                await conn.send_chunk(body)
            await conn.send(LAST_CHUNK)

        upstream.serve(serve)
        running = await proxy(upstream.url, client_options={"max_clients": 20})
        # What the first exchange sets up for good is no leak.
        assert (await running.get("/warm")).complete
        await running.next_outcome()
        tasks = asyncio.all_tasks()

        def descriptors_left() -> int:
            # Kept-alive connections are no leak: each has a descriptor at either end, here both ours.
            kept = sum(conn.sock.fileno() >= 0 for conn in upstream.connections)
            return len(list(Path("/proc/self/fd").iterdir())) - 2 * kept

        async def leave_somewhere(number: int) -> None:
            downstream = await Downstream.connect(running.port, receive_buffer=4096 if number % 3 else None)
            try:
                if number % 4 == 0:
                    await downstream.send(upload_head("chunked" if number % 8 else "length"))
                    for _ in range(chance.randrange(4)):
                        await downstream.send(piece("chunked" if number % 8 else "length", PIECE[:9000]))
                elif number % 4 == 1:
                    await downstream.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"[: chance.randrange(28)])
                else:
                    await downstream.request("GET", "/x")
                    for _ in range(chance.randrange(6)):
                        await downstream.read_some(chance.randrange(1, 65536))
                for _ in range(chance.randrange(10)):
                    await asyncio.sleep(0)
            except (ConnectionError, WireClosed):
                pass
            finally:
                (downstream.reset if chance.random() < 0.5 else downstream.close)()

        before = descriptors_left()
        for start in range(0, 300, 50):
            await asyncio.gather(*(leave_somewhere(number) for number in range(start, start + 50)))
        await until(lambda: forwarder.active_exchanges() == 0, "every exchange ended")
        await until(lambda: not upstream.busy, "no upstream connection stayed in the middle of an exchange")
        await until(lambda: descriptors_left() <= before, "every descriptor came back")
        await until(
            lambda: not [task for task in asyncio.all_tasks() - tasks if "_serve" not in repr(task.get_coro())],
            "every task ended",
        )
        assert len(running.outcomes) <= 301
        # And it still works.
        assert (await running.get("/after")).body == body * 4
