"""The lower half of a connection: an asyncio transport, with what it lacks. Nothing here knows HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import struct
from typing import Any, Protocol, cast

from tornado.concurrent import Future
from tornado.httputil import HTTPMessageDelegate
from tornado.iostream import StreamClosedError

from tornado_proxy.kernel import has_left, unacknowledged
from tornado_proxy.server.turns import BUSY, Together

# Bytes that may wait in the transport before a writer must wait too: none, as with Tornado's streams. The kernel holds
# enough to keep the line busy, and each slow reader costs 64 KB less than with asyncio's default.
HIGH_WATER = 0
# asyncio's TLS pauses as soon as there are as many, so that none would mean for ever.
HIGH_WATER_TLS = 16 * 1024

# What is smaller may wait for the end of the turn; most responses are.
HOLD_BELOW = 16 * 1024


class Context:
    """Who is on the other side, as Tornado's requests want to know it."""

    __slots__ = ("address", "address_family", "protocol", "remote_ip")

    def __init__(self, address: Any, address_family: int | None, protocol: str, remote_ip: str) -> None:
        self.address = address
        self.address_family = address_family
        self.protocol = protocol
        self.remote_ip = remote_ip

    def __str__(self) -> str:
        return self.remote_ip


class Server(Protocol):
    """What a connection needs of its server."""

    loop: asyncio.AbstractEventLoop
    done: Future[None]
    draining: bool
    protocol: str | None
    buffer: memoryview
    buffer_ahead: memoryview
    # Requests that are not answered yet, and what waits for the end of this turn of the loop.
    running: int
    reads: Together
    writes: Together
    max_header_size: int
    max_body_size: int
    header_timeout: float
    idle_timeout: float
    linger_time: float
    linger_bytes: int

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate: ...
    def opened(self, connection: Any) -> None: ...
    def closed(self, connection: Any) -> None: ...


class _Nobody(asyncio.BufferedProtocol):
    """The protocol of a transport that nobody uses any more."""

    def get_buffer(self, sizehint: int) -> memoryview:
        raise RuntimeError("received on a connection that is lost")

    def buffer_updated(self, nbytes: int) -> None:
        raise RuntimeError("received on a connection that is lost")


_NOBODY = _Nobody()


def leave_tls(transport: asyncio.BaseTransport) -> None:
    """Break the circle of a TLS transport and its protocol, which has no more use for it.

    asyncio's, and uvloop's, keep two methods of a buffered protocol for ever. So the two, and a buffer of 256 KiB,
    would wait for the garbage collector: a thousand connections that were closed are 300 MB.
    """
    # A transport that was closed twice has let go by itself, of all that this needs.
    with contextlib.suppress(AttributeError):
        transport.set_protocol(_NOBODY)


class Link(asyncio.BufferedProtocol):
    """The protocol of an asyncio transport."""

    # Seconds without progress after which a client that does not read its last response is given up.
    write_stall = 60.0

    transport: asyncio.Transport
    context: Context

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop
        # Resolved, for everyone who need not wait.
        self.done = server.done
        # When the sweep looks at us again, by the loop's clock; and what was unsent when it last did.
        self.deadline = math.inf
        self._unsent_at_sweep = 0
        self.tls = False
        self.reading_paused = False
        # The transport has asked us to stop for a while.
        self.write_paused = False
        self._write_waiters: list[Future[None]] = []
        # Output that waits for the end of this turn of the loop.
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.tls = transport.get_extra_info("sslcontext") is not None
        self.transport.set_write_buffer_limits(high=HIGH_WATER_TLS if self.tls else HIGH_WATER)
        sock = transport.get_extra_info("socket")
        address = transport.get_extra_info("peername")
        family = sock.family if sock is not None else None
        inet = family in (socket.AF_INET, socket.AF_INET6) and bool(address)
        # Tornado's stand-in for clients without an address.
        remote_ip = address[0] if inet else "0.0.0.0"
        server = self._server
        self.context = Context(address, family, server.protocol or ("https" if self.tls else "http"), remote_ip)
        # Who comes when the end has begun must have something to say soon.
        limit = server.linger_time if server.draining else server.header_timeout
        self.deadline = self._loop.time() + limit
        server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline = math.inf
        self.writing_ended(exc)
        if self.tls:
            leave_tls(self.transport)

    def fileno(self) -> int:
        sock = self.transport.get_extra_info("socket")
        return sock.fileno() if sock is not None else -1

    def unsent(self) -> int:
        waiting = len(self._held) + self.transport.get_write_buffer_size()
        if not waiting or self.transport.is_closing():
            return waiting
        return waiting + unacknowledged(self.fileno())

    def has_left(self) -> bool:
        return self.transport.is_closing() or has_left(self.fileno())

    # -- writing

    def write(self, data: bytes) -> None:
        if self.transport.is_closing():
            # It has gone, and connection_lost is about to say so. uvloop would raise.
            return
        if self._held:
            data = self._held + data
            self._held = b""
        self.transport.write(data)

    def hold(self, data: bytes) -> None:
        """Write ``data`` with what follows in this turn of the loop, or at its end."""
        if self._held:
            self._held += data
            return
        self._held = data
        self._server.writes.add(self.flush)

    def send(self, data: bytes) -> None:
        """Write ``data`` in this turn of the loop: at once, or together with what others write (`turns`)."""
        if self._server.running < BUSY or len(data) + len(self._held) >= HOLD_BELOW:
            self.write(data)
        else:
            self.hold(data)

    def flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self.write(data)

    def write_waiter(self) -> Future[None]:
        waiter: Future[None] = self._loop.create_future()
        self._write_waiters.append(waiter)
        return waiter

    def writing_ended(self, error: BaseException | None) -> None:
        """Tell everyone who waits for a write that it will not be."""
        self._held = b""
        waiters, self._write_waiters = self._write_waiters, []
        end_waiting(waiters, error)

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        waiters, self._write_waiters = self._write_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- reading and ending

    def pause_reading(self) -> None:
        if not self.reading_paused and not self.transport.is_closing():
            self.reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused and not self.transport.is_closing():
            self.reading_paused = False
            self.transport.resume_reading()

    def reset_on_close(self) -> None:
        # A duplicate, because a transport's socket has no setsockopt in uvloop.
        with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def end_waiting(writes: list[Future[None]], error: BaseException | None = None) -> None:
    """Tell those who wait for these writes that they will not be."""
    for write in writes:
        if not write.done():
            write.set_exception(StreamClosedError(real_error=error))
            # Nobody need look at it.
            write.exception()
