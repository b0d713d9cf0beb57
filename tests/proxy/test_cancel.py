"""A downstream that leaves takes the upstream transfer with it, at once and wherever the exchange is."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from time import monotonic

import pytest

from tests.support.downstream import Downstream
from tests.support.proxy import ProxyFactory
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import chunk, until
from tornado_proxy import draining

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
    (exchange,) = draining._exchanges
    full_since = monotonic()
    while monotonic() - full_since < 0.2:
        assert exchange.upload is not None
        if exchange.upload.pipe.held < exchange.upload.pipe.limit:
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
    await until(lambda: draining.active_exchanges() == 0, "no exchange was left")
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
    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_before_the_request_was_read(self, proxy, upstream, leave, method):
        """The request and the end arrive together, before the proxy has looked at either."""
        running = await proxy(upstream.url)
        downstream = await running.connect()
        # Nothing is awaited, so the loop, which is the proxy's too, does not turn between the two.
        length = "Content-Length: 3\r\n\r\nabc" if method == "POST" else "\r\n"
        downstream.sock.send(f"{method} /x HTTP/1.1\r\nHost: h\r\n{length}".encode())
        getattr(downstream, leave)()
        # The kernel hands over what came before a reset.
        assert (await running.next_outcome()).side == "downstream"
        await until(lambda: all(conn.is_closed_by_other() for conn in upstream.connections), "the upstream saw the end")

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
        assert draining.active_exchanges() == 0
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
        await until(lambda: draining.active_exchanges() == 2, "the second request waited")
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

    @LEAVE
    async def test_while_queued_without_a_limit_of_time(self, proxy, upstream, leave):
        running = await proxy(upstream.url, client_options={"max_clients": 1}, connect_timeout=None)
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        second = await running.ask("GET", "/second")
        await until(lambda: draining.active_exchanges() == 2, "the second request waited")
        getattr(second, leave)()
        assert (await running.next_outcome()).side == "downstream"
        await conn.respond(200, body=b"first")
        assert (await first.read_response()).body == b"first"
        third = await running.ask("GET", "/third")
        assert (await conn.read_request()).target == "/third"
        await conn.respond(200, body=b"third")
        assert (await third.read_response()).body == b"third"


class TestUvloop:
    def test_a_reset_that_came_with_the_request(self):
        """It tells of a reset once, together with the request's bytes, and not again."""
        uvloop = pytest.importorskip("uvloop")

        async def leave() -> None:
            factory = ProxyFactory([])
            async with ScriptedUpstream() as upstream:
                running = await factory(upstream.url)
                downstream = await running.connect()
                while not getattr(running.server, "_connections", True):
                    await asyncio.sleep(0)
                # Nothing is awaited, so the loop does not turn between the two.
                downstream.sock.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
                downstream.reset()
                assert (await running.next_outcome()).side == "downstream"
                await factory.stop()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(leave())
