"""A client that speaks HTTP/2 by hand: every frame it sends is the test's, and every frame that comes is checked.

::

    async with await Http2.connect(port) as client:
        stream = await client.request("GET", "/x", [("x-a", "1")])
        response = await client.response(stream)
        await client.send(frame(Type.PING, b"12345678"))
        await client.read_until(lambda seen: seen.type == Type.PING)

What comes is read by h2 too, as a client that forgives nothing; so a frame that the server must not send fails the
test, wherever it comes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
from hyperframe import frame as hyperframe

from tests.support.downstream import Downstream
from tests.support.wire import Pairs

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Type:
    """Frame types (RFC 9113 section 6)."""

    DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)


class Code:
    """Error codes (RFC 9113 section 7)."""

    NO_ERROR, PROTOCOL, INTERNAL, FLOW_CONTROL, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE, REFUSED, CANCEL = range(9)
    COMPRESSION, CONNECT, ENHANCE_YOUR_CALM = 9, 10, 11


END_STREAM, END_HEADERS, PADDED, PRIORITY = 0x1, 0x4, 0x8, 0x20
ACK = 0x1


class Seen(NamedTuple):
    """A frame that came."""

    type: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> int:
        """The error code of RST_STREAM and GOAWAY."""
        return int(struct.unpack(">L", self.payload[:4] if self.type == Type.RST_STREAM else self.payload[4:8])[0])

    @property
    def last_stream(self) -> int:
        """Of GOAWAY."""
        return int(struct.unpack(">L", self.payload[:4])[0])


def frame(type_: int, payload: bytes = b"", *, stream: int = 0, flags: int = 0, length: int | None = None) -> bytes:
    """Return a frame, which need not be one that makes sense; `length` is what it says of itself."""
    size = len(payload) if length is None else length
    return struct.pack(">BHBBL", size >> 16, size & 0xFFFF, type_, flags, stream) + payload


def settings(pairs: Mapping[int, int] | None = None, *, ack: bool = False) -> bytes:
    """Return SETTINGS."""
    payload = b"".join(struct.pack(">HL", *pair) for pair in (pairs or {}).items())
    return frame(Type.SETTINGS, payload, flags=ACK if ack else 0)


def window_update(increment: int, stream: int = 0) -> bytes:
    return frame(Type.WINDOW_UPDATE, struct.pack(">L", increment), stream=stream)


def rst_stream(stream: int, code: int = Code.CANCEL) -> bytes:
    return frame(Type.RST_STREAM, struct.pack(">L", code), stream=stream)


def request_fields(
    method: str = "GET", path: str = "/", headers: Pairs = (), authority: str | None = "a"
) -> list[tuple[str, str]]:
    """Return the fields of a request."""
    pseudo = [(":method", method), (":scheme", "http"), (":path", path)]
    if authority is not None:
        pseudo.append((":authority", authority))
    return [*pseudo, *headers]


@dataclass
class Response2:
    """A response as it came. ``reset`` is the code of an RST_STREAM, also of one behind a complete response."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    interim: list[tuple[int, list[tuple[str, str]]]] = field(default_factory=list)
    complete: bool = False
    reset: int | None = None

    def header(self, name: str) -> str | None:
        values = [value for other, value in self.headers if other == name]
        assert len(values) < 2, f"{name} is repeated: {values}"
        return values[0] if values else None


class Http2(Downstream):
    """A connection with prior knowledge, its preface and settings sent.

    Windows are given back as content is read, unless ``keep_windows``: then the test opens them.
    """

    keep_windows = False

    def __init__(self, sock: socket.socket, who: str, timeout: float = 5.0) -> None:
        super().__init__(sock, who, timeout)
        # Every frame that came, in order.
        self.frames: list[Seen] = []
        self.responses: dict[int, Response2] = {}
        # Of our own head; the table is the connection's.
        self.encoder = hpack.Encoder()
        self._checker = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="latin-1")
        )
        self._next_stream = 1

    @classmethod
    async def connect(  # type: ignore[override]
        cls,
        port: int,
        host: str = "127.0.0.1",
        *,
        own: Mapping[int, int] | None = None,
        receive_buffer: int | None = None,
        timeout: float = 5.0,
    ) -> Self:
        """Connect and send the preface, with `own` settings."""
        client = await super().connect(port, host, receive_buffer=receive_buffer, timeout=timeout)
        # The checker shall know what we have promised.
        for code, value in (own or {}).items():
            client._checker.local_settings[code] = value
        client._checker.initiate_connection()
        client._checker.data_to_send()
        if own:
            client._checker.local_settings.acknowledge()
        await client.send(PREFACE + settings(own))
        return client

    # Sending

    def block(self, fields: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
        """Return a field block. The table keeps what is in it, so it must be sent, and in this order."""
        return self.encoder.encode([(name, value) for name, value in fields])

    def open_stream(self) -> int:
        """Return the number of the next stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def head(
        self, fields: Iterable[tuple[str | bytes, str | bytes]], *, stream: int | None = None, end: bool = True
    ) -> bytes:
        """Return HEADERS that open a stream; they must be sent."""
        if stream is None:
            stream = self.open_stream()
        self._expect_response(stream)
        return frame(Type.HEADERS, self.block(fields), stream=stream, flags=END_HEADERS | (END_STREAM if end else 0))

    def _expect_response(self, stream: int) -> None:
        # The checker takes frames of streams that it has opened only.
        if stream % 2 and stream > self._checker.highest_outbound_stream_id:
            fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]
            self._checker.send_headers(stream, fields, end_stream=True)
            self._checker.data_to_send()

    async def request(
        self,
        method: str,
        path: str,
        headers: Pairs = (),
        body: bytes | None = None,
        *,
        end: bool = True,
    ) -> int:
        """Send a request and return the number of its stream. Content beyond 16 KiB is for :meth:`data`."""
        stream = self._next_stream
        await self.send(self.head(request_fields(method, path, headers), end=end and body is None))
        if method == "HEAD":
            self._checker.streams[stream].request_method = b"HEAD"
        if body is not None:
            await self.data(stream, body, end=end)
        return stream

    async def data(self, stream: int, content: bytes = b"", *, end: bool = False) -> None:
        """Send content, in frames of 16 KiB, without a look at any window."""
        pieces = [content[at : at + 16384] for at in range(0, len(content), 16384)] or [b""]
        for at, piece in enumerate(pieces):
            flags = END_STREAM if end and at == len(pieces) - 1 else 0
            await self.send(frame(Type.DATA, piece, stream=stream, flags=flags))

    # Receiving

    async def read_frame(self) -> Seen:
        """Return the next frame, whatever it is."""
        head = await self.read_exactly(9)
        high, low, type_, flags, stream = struct.unpack(">BHBBL", head)
        payload = await self.read_exactly(high << 16 | low)
        seen = Seen(type_, flags, stream & 0x7FFFFFFF, payload)
        self.frames.append(seen)
        await self._check(seen, head + payload)
        return seen

    async def _check(self, seen: Seen, raw: bytes) -> None:
        assert len(seen.payload) <= 16384
        parsed, _ = hyperframe.Frame.parse_frame_header(memoryview(raw[:9]))
        parsed.parse_body(memoryview(seen.payload))
        if len(self.frames) == 1:
            assert seen.type == Type.SETTINGS
            assert not seen.flags & ACK
        if seen.type == Type.GOAWAY or (seen.type == Type.SETTINGS and seen.flags & ACK):
            # h2 would read nothing after the first; and of the second it has sent none.
            return
        for event in self._checker.receive_data(raw):
            self._note(event)
        self._checker.data_to_send()
        if seen.type == Type.SETTINGS:
            # Some tests want to open more streams than they may.
            self._checker.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 2**31 - 1
            self._checker.remote_settings.acknowledge()
            await self.send(settings(ack=True))
        if seen.type == Type.DATA and seen.payload and not self.keep_windows:
            response = self.responses[seen.stream]
            self._checker.increment_flow_control_window(len(seen.payload))
            grants = window_update(len(seen.payload))
            if not response.complete and response.reset is None:
                self._checker.increment_flow_control_window(len(seen.payload), seen.stream)
                grants += window_update(len(seen.payload), seen.stream)
            self._checker.data_to_send()
            await self.send(grants)

    async def grant(self, increment: int, stream: int = 0) -> None:
        """Open a window, for :attr:`keep_windows`."""
        self._checker.increment_flow_control_window(increment, stream or None)
        self._checker.data_to_send()
        await self.send(window_update(increment, stream))

    def _note(self, event: h2.events.Event) -> None:
        stream = getattr(event, "stream_id", None)
        if not stream:
            return
        response = self.responses.setdefault(stream, Response2())
        if isinstance(event, h2.events.InformationalResponseReceived):
            status, *fields = event.headers
            response.interim.append((int(status[1]), [(str(n), str(v)) for n, v in fields]))
        elif isinstance(event, h2.events.ResponseReceived):
            (_, status), *fields = event.headers
            response.status, response.headers = int(status), [(str(n), str(v)) for n, v in fields]
        elif isinstance(event, h2.events.DataReceived):
            response.body += event.data
        elif isinstance(event, h2.events.TrailersReceived):
            response.trailers = [(str(n), str(v)) for n, v in event.headers]
        elif isinstance(event, h2.events.StreamEnded):
            response.complete = True
        elif isinstance(event, h2.events.StreamReset):
            response.reset = int(event.error_code)

    async def read_until(self, wanted: Callable[[Seen], object]) -> Seen:
        """Return the next frame that is `wanted`; read those before it too."""
        while True:
            seen = await self.read_frame()
            if wanted(seen):
                return seen

    async def response(self, stream: int) -> Response2:
        """Return the response on `stream`, complete or cut."""
        while not ((seen := self.responses.get(stream)) and (seen.complete or seen.reset is not None)):
            await self.read_frame()
        return self.responses[stream]

    async def response_head(self, stream: int) -> Response2:
        """Return the response on `stream` as soon as it has a head."""
        while not ((seen := self.responses.get(stream)) and (seen.status or seen.reset is not None)):
            await self.read_frame()
        return self.responses[stream]

    async def body(self, stream: int, size: int) -> bytes:
        """Return what came of the body, when it is at least so much."""
        while not ((seen := self.responses.get(stream)) and len(seen.body) >= size):
            await self.read_frame()
        return self.responses[stream].body

    async def exchange(  # type: ignore[override]
        self, method: str, path: str, headers: Pairs = (), body: bytes | None = None
    ) -> Response2:
        """Send a request and return its response."""
        return await self.response(await self.request(method, path, headers, body))

    async def ready(self) -> None:
        """Wait until both sides know each other's settings."""
        while not any(seen.type == Type.SETTINGS and seen.flags & ACK for seen in self.frames):
            await self.read_frame()

    async def ping(self) -> None:
        """Wait until everything that was sent has been read."""
        data = struct.pack(">Q", len(self.frames))
        await self.send(frame(Type.PING, data))
        await self.read_until(lambda seen: (seen.type, seen.payload) == (Type.PING, data))

    async def goaway(self) -> Seen:
        """Return the next GOAWAY."""
        return await self.read_until(lambda seen: seen.type == Type.GOAWAY)

    async def rst_stream(self, stream: int) -> Seen:
        """Return the next RST_STREAM on `stream`."""
        return await self.read_until(lambda seen: (seen.type, seen.stream) == (Type.RST_STREAM, stream))
