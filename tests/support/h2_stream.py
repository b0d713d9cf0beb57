"""One request and its response on an :class:`~tests.support.h2_upstream.H2Upstream`, driven by the test."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h2.exceptions
from h2.errors import ErrorCodes

from tests.support.upstream import Request
from tests.support.wire import Pairs, WireClosed, within

if TYPE_CHECKING:
    from tests.support.h2_upstream import H2Connection


@dataclass(slots=True, kw_only=True)
class H2Request(Request):
    """A request as the upstream saw it; ``headers`` are without the pseudo-header fields."""

    authority: str
    scheme: str


class H2Stream:
    """One request and its response."""

    def __init__(self, connection: H2Connection, number: int, request: H2Request, *, ended: bool) -> None:
        self.connection = connection
        self.number = number
        self.seen = request
        self.requests = [request]
        # Pieces of the body as they came in DATA frames.
        self.pieces: list[bytes] = []
        # END_STREAM came.
        self.ended = ended
        self.trailers: list[tuple[str, str]] = []
        # The code of RST_STREAM, and whether the connection is gone.
        self.reset_code: int | None = None
        self.lost = False
        # The response is complete, or was broken off from here.
        self.finished = False
        self._changed = asyncio.Event()

    # Requests

    async def read_head(self) -> H2Request:
        return self.seen

    async def read_request(self) -> H2Request:
        self.seen.body = await self.read_body()
        return self.seen

    async def read_body(self, size: int | None = None) -> bytes:
        """Return the rest of the body, or its next ``size`` bytes; what is returned is acknowledged."""
        body = b""
        while size is None or len(body) < size:
            if not self.pieces:
                if self.ended:
                    break
                if self.reset_code is not None or self.lost:
                    raise WireClosed(f"stream {self.number}: reset {self.reset_code}; had {body[-80:]!r}")
                await self._wait("a piece of the body")
                continue
            piece = self.pieces.pop(0)
            if size is not None and len(body) + len(piece) > size:
                self.pieces.insert(0, piece[size - len(body) :])
                piece = piece[: size - len(body)]
            body += piece
            self._acknowledge(len(piece))
        assert size is None or len(body) == size, f"stream {self.number}: the body ended; had {body[-80:]!r}"
        return body

    async def read_piece(self) -> bytes:
        """Return the data of the next DATA frame; empty at the end."""
        while not self.pieces and not self.ended:
            await self._wait("a piece of the body")
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        self._acknowledge(len(piece))
        return piece

    def _acknowledge(self, size: int) -> None:
        if size and not self.lost:
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self.connection.h2.acknowledge_received_data(size, self.number)
            self.connection.flush()

    # Responses

    async def send_head(self, status: int, headers: Pairs = (), *, reason: str = "", end: bool = False) -> None:
        """Send a head of these fields, without what HTTP/2 has no words for; with ``end`` there is nothing after it."""
        fields = [(name, value) for name, value in headers if name != "Transfer-Encoding"]
        self.send_fields([(":status", str(status)), *fields], end=end)

    async def send_chunk(self, data: bytes) -> None:
        """Send ``data`` as far and as soon as the windows allow; an empty one ends the body."""
        if not data:
            self.end()
        await self.send_data(data)

    async def send_data(self, data: bytes, *, end: bool = False) -> None:
        while data:
            window = self.connection.h2.local_flow_control_window(self.number)
            size = min(window, len(data), self.connection.h2.max_outbound_frame_size)
            if not size:
                await self._wait("room in a window")
                if self.reset_code is not None or self.lost:
                    raise WireClosed(f"stream {self.number}: reset {self.reset_code}")
                continue
            self.connection.h2.send_data(self.number, data[:size])
            self.connection.flush()
            data = data[size:]
            # Whoever sends much shall hear what the other side says meanwhile.
            await self.connection.writer.drain()
        if end:
            self.end()

    async def respond(
        self, status: int = 200, headers: Pairs = (), body: bytes = b"", *, trailers: Pairs = (), reason: str = ""
    ) -> None:
        """Send a whole response: exactly these fields."""
        end = not body and not trailers
        await self.send_head(status, headers, end=end)
        if not end:
            await self.send_data(body, end=not trailers)
        if trailers:
            self.send_fields(trailers, end=True)

    def send_fields(self, fields: Pairs, *, end: bool = False) -> None:
        """Send a HEADERS frame of these fields, whatever they are: a head, or trailers."""
        lines = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        self.connection.h2.send_headers(self.number, lines, end_stream=end)
        self.finished = end
        self.connection.flush()

    def end(self) -> None:
        """Send END_STREAM."""
        self.finished = True
        self.connection.h2.end_stream(self.number)
        self.connection.flush()

    # Ending

    def reset(self, code: int = ErrorCodes.INTERNAL_ERROR) -> None:
        """Send RST_STREAM."""
        self.finished = True
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self.connection.h2.reset_stream(self.number, code)
        self.connection.flush()

    close = reset

    async def closed(self) -> str:
        """Wait until the other side has reset the stream, or closed its connection; return how."""
        while self.reset_code is None and not self.lost:
            await self._wait("a reset")
        return "connection" if self.reset_code is None else "reset"

    async def _wait(self, what: str) -> None:
        self._changed.clear()
        await within(self._changed.wait(), f"stream {self.number}: {what}")

    def changed(self) -> None:
        self._changed.set()
