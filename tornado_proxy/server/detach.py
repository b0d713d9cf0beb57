"""A connection that is no HTTP connection any more, as an ``IOStream``: for websockets and other tunnels.

A plain socket becomes a real ``IOStream``. Under TLS the bytes are the transport's business, so there the stream is one
of our own, over the transport. Both reach into private names of Tornado 6.6's ``BaseIOStream``, here only.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, cast

from tornado.ioloop import IOLoop
from tornado.iostream import BaseIOStream, IOStream

# Bytes that are taken in before someone reads them.
READ_AHEAD = 64 * 1024


def hand_over(transport: asyncio.Transport, received: bytes, *, paused: bool) -> IOStream:
    """Return a stream that goes on where ``transport`` stands; ``received`` is what was read and not used.

    ``paused`` says that the transport does not read at the moment. The caller forgets the transport.
    """
    if transport.is_closing():
        return closed_stream()
    sock = transport.get_extra_info("socket")
    if transport.get_extra_info("sslcontext") is None and not transport.get_write_buffer_size():
        transport.pause_reading()
        # A duplicate, because nobody can take the socket out of a transport; aborting that closes only its own.
        own = socket.socket(fileno=os.dup(sock.fileno()))
        own.setblocking(False)
        transport.abort()
        stream = IOStream(own)
        stream._read_buffer += received
        stream._read_buffer_size += len(received)
        return stream
    # Also for a plain socket with output still to go, which must not be overtaken.
    over_transport = TransportStream(transport, received, paused=paused)
    transport.set_protocol(_Feeder(over_transport))
    return cast(IOStream, over_transport)


def closed_stream() -> IOStream:
    """Return what a connection that has gone looks like as a stream."""
    stream = IOStream(socket.socket())
    stream.close()
    return stream


class TransportStream(BaseIOStream):
    """An ``IOStream`` over an asyncio transport: the "file descriptor" below ``BaseIOStream`` is two buffers."""

    def __init__(self, transport: asyncio.Transport, received: bytes, *, paused: bool) -> None:
        super().__init__()
        self.socket = transport.get_extra_info("ssl_object") or transport.get_extra_info("socket")
        self._transport = transport
        # Received from the transport, not read by BaseIOStream yet.
        self._received = bytearray(received)
        self._ended = False
        self._paused = paused
        self._write_paused = False
        # What BaseIOStream would have told the IOLoop that it waits for.
        self._wanted = 0

    # -- BaseIOStream calls these

    def fileno(self) -> int:
        sock = self._transport.get_extra_info("socket")
        return sock.fileno() if sock is not None else -1

    def close_fd(self) -> None:
        self._transport.close()

    def write_to_fd(self, data: memoryview) -> int:
        if self._write_paused:
            raise BlockingIOError
        self._transport.write(bytes(data))
        return len(data)

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        size = min(len(buf), len(self._received))
        if not size:
            return 0 if self._ended else None
        buf[:size] = self._received[:size]
        del self._received[:size]
        if self._paused and len(self._received) < READ_AHEAD and not self._ended:
            self._paused = False
            self._transport.resume_reading()
        return size

    def _add_io_state(self, state: int) -> None:
        # Instead of waiting for events of a file descriptor: the transport reports them.
        if self.closed():
            return
        self._wanted |= state
        if state & IOLoop.READ and (self._received or self._ended):
            self.io_loop.add_callback(self._readable)

    # -- the transport's protocol calls these

    def feed(self, data: bytes) -> None:
        self._received += data
        if len(self._received) >= READ_AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._readable()

    def end(self, error: BaseException | None) -> None:
        self._ended = True
        if error is not None and not self.closed():
            self.close(exc_info=error)
        self._readable()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if not self.closed():
            self._handle_write()

    def _readable(self) -> None:
        if self.closed() or not self._wanted & IOLoop.READ:
            return
        if self.reading():
            self._handle_read()
        if not self.closed() and not self.reading() and self._ended and not self._received:
            # Nobody reads; whoever set a close callback wants to know.
            self.close()


class _Feeder(asyncio.Protocol):
    """Between the transport and its stream."""

    def __init__(self, stream: TransportStream) -> None:
        self._stream = stream

    def data_received(self, data: bytes) -> None:
        self._stream.feed(data)

    def eof_received(self) -> Any:
        self._stream.end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream.end(exc)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()
