"""The two loops of a tunnel, on sides that are only queues, or connections of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from tornado.iostream import IOStream

from tests.support.wire import within
from tornado_proxy import tunnel
from tornado_proxy.errors import DownstreamClosed, TunnelClosed, UpstreamClosed
from tornado_proxy.tunnel import StreamSide, Tunnel, adopt


class QueueSide:
    """A side that the test fills, and whose other end it looks at."""

    def __init__(self, *, half_closes: bool = True) -> None:
        self.half_closes = half_closes
        self.incoming: asyncio.Queue[bytes | OSError] = asyncio.Queue()
        self.sent: list[bytes] = []
        self.events: list[str] = []
        # What write() returns: None, or a future that the test resolves.
        self.room: asyncio.Future[None] | None = None
        self.descriptor = -1

    async def read(self) -> bytes:
        item = await self.incoming.get()
        if isinstance(item, OSError):
            raise item
        return item

    def write(self, chunk: bytes) -> asyncio.Future[None] | None:
        self.sent.append(chunk)
        return self.room

    def end(self) -> None:
        self.events.append("end")

    def close(self) -> None:
        self.events.append("close")

    def reset(self) -> None:
        self.events.append("reset")

    def fileno(self) -> int:
        return self.descriptor


@pytest.fixture
def sides() -> tuple[QueueSide, QueueSide]:
    return QueueSide(), QueueSide()


def between(downstream: QueueSide, upstream: QueueSide, idle_timeout: float | None = None) -> Tunnel:
    return Tunnel(downstream, upstream, origin="http://up", idle_timeout=idle_timeout)


class TestBytes:
    async def test_pass_both_ways_and_are_counted(self, sides):
        downstream, upstream = sides
        for item in (b"abc", b"d", b""):
            downstream.incoming.put_nowait(item)
        for item in (b"xy", b""):
            upstream.incoming.put_nowait(item)
        tunnel = between(downstream, upstream)
        await tunnel.run()
        assert (upstream.sent, downstream.sent) == ([b"abc", b"d"], [b"xy"])
        assert (tunnel.bytes_up, tunnel.bytes_down) == (4, 2)
        assert upstream.events == downstream.events == ["end", "close"]

    async def test_are_not_read_while_there_is_no_room_for_them(self, sides, monkeypatch):
        monkeypatch.setattr(tunnel, "_was_reset", lambda side: False)
        downstream, upstream = sides
        upstream.room = asyncio.get_running_loop().create_future()
        for item in (b"one", b"two", b""):
            downstream.incoming.put_nowait(item)
        upstream.incoming.put_nowait(b"")
        running = asyncio.ensure_future(between(downstream, upstream).run())
        while not upstream.sent:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert upstream.sent == [b"one"]
        assert downstream.incoming.qsize() == 2
        room, upstream.room = upstream.room, None
        room.set_result(None)
        await running
        assert upstream.sent == [b"one", b"two"]


class TestTheEnd:
    async def test_of_one_direction_leaves_the_other(self, sides):
        downstream, upstream = sides
        downstream.incoming.put_nowait(b"")
        running = asyncio.ensure_future(between(downstream, upstream).run())
        while upstream.events != ["end"]:
            await asyncio.sleep(0)
        upstream.incoming.put_nowait(b"late")
        while not downstream.sent:
            await asyncio.sleep(0)
        assert not running.done()
        upstream.incoming.put_nowait(b"")
        await running
        assert downstream.sent == [b"late"]

    async def test_comes_for_both_when_the_other_takes_too_long(self, sides, monkeypatch):
        monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.01)
        downstream, upstream = sides
        downstream.incoming.put_nowait(b"")
        await between(downstream, upstream).run()
        assert upstream.events == ["end", "close"]
        assert downstream.events == ["close"]

    @pytest.mark.parametrize("which", ["downstream", "upstream"])
    async def test_is_that_of_both_where_one_cannot_half_close(self, which):
        downstream = QueueSide(half_closes=which != "downstream")
        upstream = QueueSide(half_closes=which != "upstream")
        upstream.incoming.put_nowait(b"last")
        upstream.incoming.put_nowait(b"")
        await between(downstream, upstream).run()
        assert downstream.sent == [b"last"]
        assert (downstream.events[-1], upstream.events[-1]) == ("close", "close")


class TestFaults:
    async def test_a_reset_downstream_resets_the_upstream(self, sides):
        downstream, upstream = sides
        downstream.incoming.put_nowait(ConnectionResetError())
        with pytest.raises(DownstreamClosed):
            await between(downstream, upstream).run()
        assert upstream.events[0] == "reset"

    async def test_a_reset_upstream_closes_the_downstream_after_what_it_sent(self, sides):
        downstream, upstream = sides
        upstream.incoming.put_nowait(b"last words")
        upstream.incoming.put_nowait(ConnectionResetError())
        with pytest.raises(UpstreamClosed) as caught:
            await between(downstream, upstream).run()
        assert caught.value.upstream == "http://up"
        assert (downstream.sent, downstream.events) == ([b"last words"], ["close"])

    async def test_a_side_that_is_not_read_from_is_looked_at(self, sides, monkeypatch):
        monkeypatch.setattr(tunnel, "LOOK", 0.01)
        downstream, upstream = sides
        upstream.room = asyncio.get_running_loop().create_future()
        downstream.incoming.put_nowait(b"x")
        downstream.descriptor = 7
        monkeypatch.setattr(tunnel, "was_reset", lambda fd: fd == 7)
        with pytest.raises(DownstreamClosed):
            await between(downstream, upstream).run()

    @pytest.mark.parametrize("which", ["downstream", "upstream"])
    async def test_one_that_is_closed_is_not_taken_for_reset(self, sides, monkeypatch, which):
        """asyncio's TLS closes a connection by itself whose other end has ended well, with bytes that wait."""
        monkeypatch.setattr(tunnel, "LOOK", 0.001)
        source, sink = sides if which == "downstream" else reversed(sides)
        sink.room = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.05, sink.room.set_result, None)
        for item in (b"one", b"two", b""):
            source.incoming.put_nowait(item)
        sink.incoming.put_nowait(b"")
        await between(*sides).run()
        assert sink.sent == [b"one", b"two"]

    async def test_silence_ends_it_where_there_is_a_limit(self, sides):
        downstream, upstream = sides
        with pytest.raises(TunnelClosed, match=r"no byte either way for 0\.05 s"):
            await between(downstream, upstream, idle_timeout=0.05).run()
        assert downstream.events == upstream.events == ["close"]

    async def test_being_stopped_closes_both(self, sides):
        downstream, upstream = sides
        running = asyncio.ensure_future(between(downstream, upstream).run())
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled()
        assert downstream.events == upstream.events == ["close"]


def connected(held: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection, of which the kernel holds about ``held`` at each, if that is set."""
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as undo:
        first = undo.enter_context(socket.socket())
        for sock in (listening, first) if held is not None else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, held)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, held)
        first.connect(listening.getsockname())
        second, _ = listening.accept()
        undo.pop_all()
    first.setblocking(False)
    second.setblocking(False)
    return first, second


class TestDescriptors:
    """A side is looked at by its descriptor, as long as it has one."""

    async def test_of_a_transport(self):
        client, downstream = connected()
        with client:
            side = await adopt(downstream)
            assert side.fileno() == downstream.fileno() >= 0
            side.reset()
            await asyncio.sleep(0)
            assert side.fileno() == -1

    async def test_of_tornados_stream(self):
        client, downstream = connected()
        with client:
            stream = IOStream(downstream)
            side = StreamSide(stream)
            assert side.fileno() == downstream.fileno() >= 0
            stream.close()
            assert side.fileno() == -1


class TestASlowReader:
    async def test_gets_all_of_an_upstream_that_both_sides_have_ended(self, monkeypatch):
        """Which is no reset, though the kernel says of both that the connection is over."""
        looks: list[Any] = []
        enough = asyncio.Event()

        def was_reset(fd: int) -> bool:
            looks.append(fd)
            if len(looks) == 3:
                enough.set()
            return look(fd)

        look = tunnel.was_reset
        monkeypatch.setattr(tunnel, "was_reset", was_reset)
        monkeypatch.setattr(tunnel, "LOOK", 0.01)
        loop = asyncio.get_running_loop()
        client, downstream = connected(8 * 1024)
        server, upstream = connected(1024 * 1024)
        passing = Tunnel(await adopt(downstream), await adopt(upstream), origin="http://up", idle_timeout=None)
        with client, server:
            running = asyncio.ensure_future(passing.run())
            client.shutdown(socket.SHUT_WR)
            assert await within(loop.sock_recv(server, 1), "the end of what the client sends") == b""
            await within(loop.sock_sendall(server, bytes(500_000)), "sending")
            server.shutdown(socket.SHUT_WR)
            await within(enough.wait(), "looks at the upstream while the client does not read")
            received = 0
            while chunk := await within(loop.sock_recv(client, 65536), "what was sent"):
                received += len(chunk)
            await within(running, "the end of the tunnel")
        assert received == passing.bytes_down == 500_000

    @pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no TCP_NOTSENT_LOWAT")
    async def test_has_little_waiting_for_it_in_the_kernel(self):
        client, downstream = connected()
        with client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024)
            side = await adopt(downstream)
            taken = 0
            with contextlib.suppress(TimeoutError):
                while taken < 32 * 1024 * 1024:
                    async with asyncio.timeout(0.3):
                        await (side.write(bytes(65536)) or asyncio.sleep(0))
                    taken += 65536
            side.reset()
        assert taken < 1.5 * 1024 * 1024
