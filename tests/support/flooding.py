"""Senders without end, and how much of it may be under way while nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from time import monotonic

from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import chunk

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 256
CHUNK = chunk(PIECE)
# What may be under way when one side reads nothing: what the proxy holds, and what the kernel does for the two sockets
# that the test cannot shrink, the proxy's own (net.ipv4.tcp_wmem and tcp_rmem let each grow to megabytes).
HELD = 1 * MIB
KERNEL = 16 * MIB


def shrink(sock: socket.socket) -> None:
    """Let the kernel hold little for this socket."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 8192)


class Sender:
    """Sends without end and counts what the kernel took."""

    def __init__(self, sock: socket.socket, framing: str) -> None:
        self.sock = sock
        self.sent = 0
        self.since = monotonic()
        self._data = CHUNK if framing == "chunked" else PIECE
        self._task = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        view = memoryview(self._data)
        writable = asyncio.Event()
        loop.add_writer(self.sock, writable.set)
        position = 0
        try:
            while True:
                try:
                    size = self.sock.send(view[position:])
                except BlockingIOError:
                    writable.clear()
                    await writable.wait()
                    continue
                position = (position + size) % len(view)
                self.sent += size
                self.since = monotonic()
        except ConnectionError:
            pass
        finally:
            with contextlib.suppress(OSError, ValueError):
                loop.remove_writer(self.sock)

    def stalled(self) -> bool:
        return self.sent > 0 and monotonic() - self.since > 0.3

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def upload_head(framing: str, target: str = "/x") -> bytes:
    length = f"Content-Length: {10**12}" if framing == "length" else "Transfer-Encoding: chunked"
    return f"POST {target} HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode()


async def start_download(upstream: ScriptedUpstream, proxy: StandaloneProxy, framing: str) -> tuple[Downstream, Sender]:
    """Ask for a response without end, whose sender this returns too; both ends hold little."""
    downstream = await Downstream.connect(proxy.port, receive_buffer=4096)
    await downstream.request("GET", "/endless")
    conn, _ = await upstream.request()
    shrink(conn.sock)
    length = ("Content-Length", str(10**12)) if framing == "length" else ("Transfer-Encoding", "chunked")
    await conn.send_head(200, [length])
    return downstream, Sender(conn.sock, framing)


async def start_upload(upstream: ScriptedUpstream, proxy: StandaloneProxy, framing: str) -> tuple[Downstream, Sender]:
    """Begin a request without end; the same the other way."""
    downstream = await Downstream.connect(proxy.port)
    shrink(downstream.sock)
    await downstream.send(upload_head(framing))
    conn = await upstream.accept()
    shrink(conn.sock)
    await conn.read_head()
    return downstream, Sender(downstream.sock, framing)


async def warm_up(upstream: ScriptedUpstream, proxy: StandaloneProxy) -> None:
    """Let what a first exchange sets up for good be there before anything is measured."""
    async with await Downstream.connect(proxy.port) as downstream:
        await downstream.request("GET", "/warm")
        conn, _ = await upstream.request()
        await conn.respond(200, [("Connection", "close")], b"warm")
        conn.close()
        assert (await downstream.read_response()).body == b"warm"
