"""An upstream for what nginx cannot do: ``python -m tests.benchmark.live_upstream PORT``.

    PUT /swallow    reads a body of known length and answers how long it was
    GET /events     server-sent events without end, one a second for each stream, the streams one after the other
    GET /stamps     a chunk every 5 ms without end, each a line with the clock (``time.monotonic_ns``)
    GET /echo       a websocket that sends back what it gets
    GET /           1 KiB

It is only as much of HTTP as the load in this directory needs, so that it costs little: it shares a core with the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import re
import sys
import time
from collections.abc import Callable
from typing import cast

from tornado_proxy.handshake import accept_value

BUFFER_SIZE = 512 * 1024
PAGE = b"x" * 1024
STAMP_INTERVAL = 0.005
EVENT_INTERVAL = 1.0
# Streams begin at different times within the interval, as those of different users do.
PHASES = 500

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Connection(asyncio.BufferedProtocol):
    """Whatever arrives goes to ``_take``: first a head, then a body to swallow, or the frames of a websocket."""

    streams = itertools.count()
    # One for all: each takes its bytes out before another one's turn.
    buffer = memoryview(bytearray(BUFFER_SIZE))

    def __init__(self) -> None:
        self._take: Callable[[memoryview], None] = self._take_head
        self._kept = b""
        self._length = self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not by isinstance: uvloop's are no subclasses.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self._take(self.buffer[:count])

    def _take_head(self, data: memoryview) -> None:
        self._kept += data
        head, end, rest = self._kept.partition(b"\r\n\r\n")
        if not end:
            return
        self._kept = b""
        target = head.split(b" ", 2)[1]
        field = dict(re.findall(rb"\r\n([^:]+):[ \t]*([^\r]*)", head.lower()))
        if target == b"/swallow":
            self._begin_to_swallow(field, rest)
        elif target == b"/events":
            self._transport.write(STREAM % b"text/event-stream")
            first = next(self.streams) % PHASES / PHASES * EVENT_INTERVAL
            self._tick(asyncio.get_running_loop().time() + first, EVENT_INTERVAL, self._event)
        elif target == b"/stamps":
            self._transport.write(STREAM % b"text/plain")
            self._tick(asyncio.get_running_loop().time(), STAMP_INTERVAL, self._stamp)
        elif target == b"/echo" and field.get(b"upgrade") == b"websocket":
            key = re.search(rb"\r\nsec-websocket-key:[ \t]*(\S+)", head, re.IGNORECASE)
            assert key, head
            self._transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept_value(key[1].decode()).encode()
            )
            self._take = self._take_frames
            self._take(memoryview(rest))
        else:
            self._transport.write(answer(PAGE))

    # Bodies

    def _begin_to_swallow(self, field: dict[bytes, bytes], rest: bytes) -> None:
        if b"content-length" not in field:
            self._transport.write(b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self._transport.close()
            return
        if field.get(b"expect"):
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._length = self._left = int(field[b"content-length"])
        self._take = self._swallow
        self._swallow(memoryview(rest))

    def _swallow(self, data: memoryview) -> None:
        self._left -= len(data)
        if self._left <= 0:
            self._transport.write(answer(b"%d" % (self._length - self._left)))
            self._take = self._take_head

    # Streams

    def _tick(self, when: float, interval: float, send: Callable[[], None]) -> None:
        """Call ``send`` at ``when``, and from then on each ``interval`` seconds."""

        def due() -> None:
            send()
            self._tick(when + interval, interval, send)

        self._timer = asyncio.get_running_loop().call_at(when, due)

    def _event(self) -> None:
        self._chunk(b'data: {"at": %d, "text": "something that happened"}\n\n' % time.monotonic_ns())

    def _stamp(self) -> None:
        self._chunk(b"%d\n" % time.monotonic_ns())

    def _chunk(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    # Frames

    def _take_frames(self, data: memoryview) -> None:
        """Echo messages of up to 64 KiB, each in one frame; anything else ends the connection."""
        pending = self._kept + data
        echoed: list[bytes] = []
        while len(pending) >= 6:
            opcode, length, at = pending[0] & 15, pending[1] & 127, 2
            if opcode not in (1, 2) or length == 127:
                self._transport.close()
                return
            if length == 126:
                length, at = int.from_bytes(pending[2:4]), 4
            end = at + 4 + length
            if len(pending) < end:
                break
            mask = (pending[at : at + 4] * (length // 4 + 1))[:length]
            payload = int.from_bytes(pending[at + 4 : end]) ^ int.from_bytes(mask)
            # The same head without the bit that says masked.
            echoed += pending[:1], bytes([pending[1] & 127]), pending[2:at], payload.to_bytes(length)
            pending = pending[end:]
        self._kept = pending
        if echoed:
            self._transport.write(b"".join(echoed))


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    # Where it is there; this is not what is measured.
    make_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        make_loop = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main(int(sys.argv[1])))
