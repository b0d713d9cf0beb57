"""An upstream that speaks HTTP/2, driven by the test: every frame, every window, and what no sound server would send.

The library h2 keeps the state and judges what the proxy sends: a request that RFC 9113 forbids fails the test. Data
that the test has not read is not acknowledged, so a test that does not read makes the other side wait, stream by
stream.

A stream has the methods of ``UpstreamConnection``, so that the contract of clients runs on either::

    async with H2Upstream() as upstream:
        stream, request = await upstream.request()
        await stream.respond(200, [("x-a", "1")], b"hello", trailers=[("grpc-status", "0")])
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from tests.support.h2_stream import H2Request, H2Stream
from tests.support.serving import Serving
from tests.support.wire import TIMEOUT, WireClosed, within

# Of the whole connection, in which many streams may be held back without any of them noticing the others.
CONNECTION_WINDOW = 256 * 1024 * 1024


class H2Connection:
    """One connection that the proxy made. What ``h2`` cannot say, ``write`` sends as bytes."""

    def __init__(self, upstream: H2Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.upstream = upstream
        self.reader = reader
        self.writer = writer
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=False,
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.streams: dict[int, H2Stream] = {}
        self.goaway: h2.events.ConnectionTerminated | None = None
        # A ping was answered.
        self.pong = asyncio.Event()
        self.lost = asyncio.Event()

    async def run(self) -> None:
        self.h2.local_settings = h2.settings.Settings(
            client=False, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: self.upstream.window}
        )
        self.h2.initiate_connection()
        self.flush()
        # Said by hand: h2 would hold the other side to it before that has heard of it.
        self.writer.write(b"\0\0\6\4\0\0\0\0\0\0\3" + self.upstream.max_streams.to_bytes(4, "big"))
        self.h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self.flush()
        try:
            while data := await self.reader.read(65536):
                for event in self.h2.receive_data(data):
                    self._handle(event)
                self.flush()
        except OSError:
            pass  # the proxy hung up; a test that minds looks at its side
        except h2.exceptions.ProtocolError as error:
            # After what a test sent past the library, the answers need not make sense to it.
            if not self.upstream.reckless:
                self.upstream.failures.append(error)
        finally:
            self.lost.set()
            for stream in self.streams.values():
                stream.lost = True
                stream.changed()
            self.writer.close()

    def _handle(self, event: Any) -> None:
        stream = self.streams.get(getattr(event, "stream_id", 0) or 0)
        match event:
            case h2.events.RequestReceived():
                self._begin(event)
                return
            case h2.events.DataReceived() if stream is not None:
                if event.data:
                    stream.pieces.append(event.data)
                padding = event.flow_controlled_length - len(event.data)
                if padding:
                    self.h2.acknowledge_received_data(padding, event.stream_id)
            case h2.events.TrailersReceived() if stream is not None:
                stream.trailers = list(event.headers)
            case h2.events.StreamEnded() if stream is not None:
                stream.ended = True
            case h2.events.StreamReset() if stream is not None:
                stream.reset_code = event.error_code
            case h2.events.PingAckReceived():
                self.pong.set()
            case h2.events.ConnectionTerminated():
                self.goaway = event
        for one in [stream] if stream is not None else list(self.streams.values()):
            one.changed()

    def _begin(self, event: Any) -> None:
        pseudo = {name: value for name, value in event.headers if name.startswith(":")}
        request = H2Request(
            raw=b"",
            start_line=f"{pseudo[':method']} {pseudo[':path']} HTTP/2",
            headers=[(name, value) for name, value in event.headers if not name.startswith(":")],
            method=pseudo[":method"],
            target=pseudo[":path"],
            version="HTTP/2",
            authority=pseudo.get(":authority", ""),
            scheme=pseudo[":scheme"],
        )
        stream = H2Stream(self, event.stream_id, request, ended=event.stream_ended is not None)
        if self.h2.open_inbound_streams > self.upstream.max_streams:
            stream.reset(ErrorCodes.REFUSED_STREAM)
            return
        self.streams[event.stream_id] = stream
        self.upstream.begin(stream)

    def flush(self) -> None:
        """Send what the library has to say."""
        if (data := self.h2.data_to_send()) and not self.writer.is_closing():
            self.writer.write(data)

    def write(self, data: bytes) -> None:
        """Send these bytes, behind the library's back."""
        self.upstream.reckless = True
        self.flush()
        self.writer.write(data)

    def send_goaway(self, last_stream: int, code: int = ErrorCodes.NO_ERROR) -> None:
        """Send GOAWAY; streams up to ``last_stream`` go on."""
        self.write(
            b"\0\0\x08\x07\0\0\0\0\0" + last_stream.to_bytes(4, "big") + int(code).to_bytes(4, "big"),
        )

    def close(self) -> None:
        self.writer.transport.abort()


class H2Upstream(Serving[H2Stream]):
    """Listens for HTTP/2 with prior knowledge, or with ``tls`` for what ALPN agrees on; hands streams to the test.

    ``connections`` are all that were made, open or not; ``accepted`` is the number of requests.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        max_streams: int = 1000,
        window: int = 65535,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__()
        self.timeout = timeout
        self.host = host
        self.port = port
        self.max_streams = max_streams
        self.window = window
        self.connections: list[H2Connection] = []
        self.streams: list[H2Stream] = []
        # A test has sent what h2 would not.
        self.reckless = False
        self._tls = tls

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self._tls, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        await self.end_tasks()
        for connection in self.connections:
            connection.close()
        self.raise_failure()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}" if self._tls is None else f"https://localhost:{self.port}"

    @property
    def accepted(self) -> int:
        return len(self.streams)

    @property
    def busy(self) -> list[H2Stream]:
        """The streams that the proxy keeps open although they have no whole response yet."""
        return [
            stream for stream in self.streams if not (stream.finished or stream.lost or stream.reset_code is not None)
        ]

    def refuse(self) -> None:
        """Stop listening: further connections are refused, those made stay."""
        self._server.close()

    async def accept(self) -> H2Stream:
        """Return the next request's stream that no test has had yet."""
        return await within(self._new.get(), f"a request to upstream (so far {self.accepted})", self.timeout)

    async def request(self) -> tuple[H2Stream, H2Request]:
        """Return the next stream and its request, whole."""
        stream = await self.accept()
        return stream, await stream.read_request()

    def begin(self, begun: H2Stream) -> None:
        self.streams.append(begun)
        super().begin(begun)

    async def answer(self, begun: H2Stream) -> None:
        """Await ``handler(stream, request)``, once the head is there."""
        with contextlib.suppress(WireClosed, ConnectionError, h2.exceptions.StreamClosedError):
            # The proxy may have reset it; a test that minds looks at its side.
            await self.handler(begun, begun.seen)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(self, reader, writer)
        self.connections.append(connection)
        self.run(connection.run())


def server_context(certificates: Any) -> ssl.SSLContext:
    """Return what serves HTTP/2 over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.chain, certificates.key)
    context.set_alpn_protocols(["h2"])
    return context
