"""A tunnel: bytes both ways between two connections, until both have ended. Not one of them is looked at.

Each direction is a loop that reads a chunk and writes it, and waits for room before it reads the next; so a side that
does not read makes the other wait, and what is held stays small. A tunnel ends in one of these ways:

1. One side ends what it sends. The end is passed on at once; the other direction goes on until its own end, but not for
   more than ``HALF_CLOSED`` seconds. TLS has no half of a connection to close, so there both directions end.
2. One side resets its connection, or cannot be written to: an error that names the side.
3. No byte moved for ``tunnel_idle_timeout``, or the exchange is stopped: both are closed.

The two ends are :class:`TunnelSide`. asyncio's transports are used because Tornado's ``IOStream`` closes both
directions when the other end closes one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable
from time import monotonic
from typing import Any, Protocol

from tornado.iostream import IOStream, StreamClosedError

from tornado_proxy.errors import DownstreamClosed, Phase, ProxyError, TunnelClosed, UpstreamClosed
from tornado_proxy.kernel import take_less_ahead, was_reset

# Bytes that may wait on either side of a direction before the reading stops.
CHUNK = 64 * 1024
# What a transport may have received at a time. To take less would move the rest for each piece: half the speed.
_RECEIVED = 256 * 1024
# Seconds that one direction may go on after the other has ended.
HALF_CLOSED = 30.0
# Seconds that the last bytes may take to leave once the tunnel is over.
LAST_WRITE = 5.0
# Seconds between looks at a side that we do not read from, because nobody would tell us that it was reset.
LOOK = 0.5
# Seconds after which the kernel asks a silent other end whether it is still there (tcp(7)).
KEEP_ALIVE = 60


class TunnelSide(Protocol):
    """One end of a tunnel. What goes wrong is raised as ``OSError``."""

    # Whether it can end what it sends and go on receiving.
    half_closes: bool

    async def read(self) -> bytes:
        """Return the next bytes, ``b""`` at the end."""

    def write(self, chunk: bytes) -> Awaitable[Any] | None:
        """Send ``chunk``; return ``None`` (go on) or an awaitable that is done when there is room again."""

    def end(self) -> None:
        """Tell the other end that nothing more comes. Only where it :attr:`half_closes`."""

    def close(self) -> None:
        """Send what is held, then close. Idempotent."""

    def reset(self) -> None:
        """Close now, so that the other end sees that something broke. Idempotent."""

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once it is closed or where there is none."""


class TransportSide:
    """A side over asyncio's transport. Whoever made it closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._transport = writer.transport
        self._writer = writer
        self.half_closes = self._transport.can_write_eof()
        self._transport.set_write_buffer_limits(high=CHUNK)
        sock = self._transport.get_extra_info("socket")
        take_less_ahead(sock)
        _keep_alive(sock)

    async def read(self) -> bytes:
        return await self.reader.read(_RECEIVED)

    def write(self, chunk: bytes) -> Awaitable[Any] | None:
        self._writer.write(chunk)
        if self._transport.get_write_buffer_size() <= CHUNK and not self._transport.is_closing():
            return None
        return self._writer.drain()

    def end(self) -> None:
        if not self._transport.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        if not self._transport.is_closing():
            self._transport.close()
            asyncio.get_running_loop().call_later(LAST_WRITE, self._transport.abort)

    def reset(self) -> None:
        if not self._transport.is_closing():
            _reset_on_close(self._transport.get_extra_info("socket"))
        self._transport.abort()

    def fileno(self) -> int:
        # asyncio's TLS closes by itself when the other end has ended, and then has no socket any more.
        sock = self._transport.get_extra_info("socket")
        return -1 if sock is None else int(sock.fileno())


class StreamSide:
    """A side over a stream with the methods of Tornado's ``IOStream``: one under TLS, or another server's own."""

    half_closes = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        try:
            chunk: bytes = await self._stream.read_bytes(CHUNK, partial=True)
        except StreamClosedError as exc:
            if exc.real_error is not None:
                raise
            return b""
        return chunk

    def write(self, chunk: bytes) -> Awaitable[Any] | None:
        written: asyncio.Future[None] = self._stream.write(chunk)
        if written.done():
            written.result()
            return None
        return written

    def end(self) -> None:
        raise NotImplementedError("only both directions can be closed")

    def close(self) -> None:
        self._stream.close()

    def reset(self) -> None:
        self._stream.close()

    def fileno(self) -> int:
        descriptor = -1 if self._stream.closed() else getattr(self._stream, "fileno", lambda: -1)()
        # That of Tornado's streams returns the socket.
        return descriptor if isinstance(descriptor, int) else int(descriptor.fileno())


async def downstream_side(stream: Any) -> TunnelSide:
    """Return the side of a stream that an HTTP server has detached. It begins with what that server read too much.

    Raises ``StreamClosedError`` when the downstream has left.
    """
    if stream.closed():
        raise StreamClosedError
    if type(stream) is not IOStream:
        return StreamSide(stream)
    try:
        sock = stream.socket.dup()
    except OSError:
        # No descriptor to be had. Without one only the half-close is lost.
        return StreamSide(stream)
    # Frames that came together with the handshake, or while it went on. There is no public way to ask for no more than
    # what is held (Tornado 6.6).
    held = stream._read_buffer_size
    early = await stream.read_bytes(held) if held else b""
    # Ends Tornado's interest in the connection, which lives on in the duplicate.
    stream.close()
    return await adopt(sock, early)


async def adopt(sock: socket.socket, early: bytes = b"") -> TransportSide:
    """Return the side of a connected socket, which from then on belongs to it."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=CHUNK, loop=loop)
    reader.feed_data(early)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
    except BaseException:
        sock.close()
        raise
    return TransportSide(reader, asyncio.StreamWriter(transport, protocol, reader, loop))


class Tunnel:
    """Two sides, which it closes, and what passed between them."""

    def __init__(
        self, downstream: TunnelSide, upstream: TunnelSide, *, origin: str, idle_timeout: float | None
    ) -> None:
        self.downstream = downstream
        self.upstream = upstream
        self.bytes_up = 0
        self.bytes_down = 0
        # "scheme://host:port" of the upstream, for errors.
        self._origin = origin
        self._idle_timeout = idle_timeout
        self._last_byte = monotonic()

    async def run(self) -> None:
        """Pass bytes until the tunnel ends. Raises a ``ProxyError`` unless both sides ended it well."""
        up = asyncio.ensure_future(self._pass_up())
        down = asyncio.ensure_future(self._pass_down())
        try:
            await self._until_ended(up, down)
        except DownstreamClosed:
            # What it has sent is of no use any more; what the upstream has sent would be, hence the difference.
            self.upstream.reset()
            raise
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            self.downstream.close()
            self.upstream.close()

    async def _until_ended(self, up: asyncio.Future[None], down: asyncio.Future[None]) -> None:
        ended: set[asyncio.Future[None]] = set()
        while not ended:
            ended, _ = await asyncio.wait({up, down}, timeout=self._time_left(), return_when=asyncio.FIRST_COMPLETED)
        for direction in ended:
            direction.result()
        if self.downstream.half_closes and self.upstream.half_closes:
            ended, _ = await asyncio.wait({up, down}, timeout=HALF_CLOSED)
            for direction in ended:
                direction.result()

    def _time_left(self) -> float | None:
        """Return for how many seconds the tunnel may still be silent."""
        limit = self._idle_timeout
        if limit is None:
            return None
        left = self._last_byte + limit - monotonic()
        if left <= 0:
            raise TunnelClosed(f"no byte either way for {limit:g} s", phase=Phase.UPGRADE, upstream=self._origin)
        return left

    async def _pass_up(self) -> None:
        while chunk := await self._read(self.downstream):
            self.bytes_up += len(chunk)
            await self._write(self.upstream, chunk, self.downstream)
        self._end(self.upstream)

    async def _pass_down(self) -> None:
        while chunk := await self._read(self.upstream):
            self.bytes_down += len(chunk)
            await self._write(self.downstream, chunk, self.upstream)
        self._end(self.downstream)

    async def _read(self, source: TunnelSide) -> bytes:
        try:
            chunk = await source.read()
        except OSError as exc:
            raise self._broken(source) from exc
        self._last_byte = monotonic()
        return chunk

    async def _write(self, sink: TunnelSide, chunk: bytes, source: TunnelSide) -> None:
        """Write to ``sink``; while that takes time, see whether ``source``, which is not read from, is still there."""
        try:
            room = sink.write(chunk)
            if room is None:
                return
            written = asyncio.ensure_future(room)
            try:
                while not (await asyncio.wait({written}, timeout=LOOK))[0]:
                    if _was_reset(source):
                        raise self._broken(source)
                written.result()
            finally:
                written.cancel()
        except OSError as exc:
            raise self._broken(sink) from exc
        self._last_byte = monotonic()

    def _end(self, sink: TunnelSide) -> None:
        """Pass on that the other side has ended, where that can be said without ending both directions."""
        if sink.half_closes:
            try:
                sink.end()
            except OSError as exc:
                # It had ended before, so nobody read from it, and then refused what came last.
                raise self._broken(sink) from exc

    def _broken(self, side: TunnelSide) -> ProxyError:
        if side is self.downstream:
            return DownstreamClosed("downstream reset the tunnel", phase=Phase.UPGRADE, upstream=self._origin)
        return UpstreamClosed(f"upstream {self._origin} reset the tunnel", phase=Phase.UPGRADE, upstream=self._origin)


def _was_reset(side: TunnelSide) -> bool:
    descriptor = side.fileno()
    # One that is closed may have ended well, with bytes that wait to be read; if not, read() will say so.
    return descriptor >= 0 and was_reset(descriptor)


def _reset_on_close(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _keep_alive(sock: Any) -> None:
    """Have the kernel find out when the other end has gone without a word; a tunnel may be silent for days."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE)
