"""A client in pure Python: nothing but asyncio and our own strict reader of responses.

For where pycurl is missing. Tornado's ``SimpleAsyncHTTPClient`` is the model and not the base: it adds fields of its
own, holds bodies to 100 MB, refuses trailers and chunk extensions, keeps no connection, and cannot be cancelled in the
middle of a TLS handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.dial import Reader, dial, ready
from tornado_proxy.clients.settings import PoolSettings
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import Phase, ProxyError, UpstreamError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.responses import FAULTS, MAX_HEAD, MAX_INTERIM, Head, blamed, keeps_alive, read_body, read_head
from tornado_proxy.trailers import field_lines, trailer_fields

# Bytes that may wait for the kernel before an upload waits.
_HIGH_WATER = 64 * 1024

# Seconds that an upstream which knows nothing of expectations holds the body up (RFC 9110 section 10.1.1).
_CONTINUE_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleSettings(PoolSettings):
    """What ``client_options`` may say to the simple client."""

    # Seconds after which a connection, however busy, takes no further request. Without this one in steady use would
    # never notice that the upstream's name leads elsewhere.
    max_connection_seconds: int = 300


@dataclass(slots=True)
class _Connection:
    """A connection, in use or between two requests."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    made: float
    # The end of its last exchange.
    idle_since: float = 0.0

    def is_sound(self, settings: SimpleSettings) -> bool:
        """Return whether it may be used: it is open, and no byte waits on it that would be nobody's answer."""
        transport = self.writer.transport
        if transport.is_closing() or self.reader.at_eof():
            return False
        now = monotonic()
        if now - self.idle_since > settings.max_idle_seconds or now - self.made > settings.max_connection_seconds:
            return False
        # Read ahead or still in the kernel. Under TLS the latter may be a session ticket.
        if self.reader._buffer:  # type: ignore[attr-defined]
            return False
        return transport.get_extra_info("sslcontext") is not None or not ready(transport, select.POLLIN)


class SimpleClient(TaskClient):
    """Pure Python, HTTP/1.1."""

    capabilities = Capabilities(tells_sending=True, trailers=True, request_trailers=True, sees_tls_cut=False)

    def __init__(self, **options: Any) -> None:
        self._settings = SimpleSettings.parse("simple", options)
        super().__init__(self._settings.max_clients)
        # Connections that wait for a request, by origin, the most recently used last.
        self._idle: dict[str, list[_Connection]] = {}

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        SimpleSettings.parse("simple", options)

    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        if isinstance(exc, FAULTS):
            return blamed(exc, transfer.origin, transfer.phase)
        return UpstreamError(f"upstream {transfer.origin}: {exc!r}", phase=transfer.phase, upstream=transfer.origin)

    async def transfer(self, transfer: Transfer) -> None:
        request = transfer.request
        connection = await self._connection(transfer)
        reader, writer = connection.reader, connection.writer
        # Not in the task, whose turn comes later: the upstream may close a kept connection in between.
        self._send_head(transfer, writer)
        if request.on_sending is not None:
            request.on_sending()
        # Set when the body may go: at once, when the upstream asks for it, or when it says nothing.
        asked = asyncio.Event()
        sending = asyncio.create_task(self._send(transfer, writer, asked))
        reusable = False
        try:
            head = await self._final_head(transfer, reader, asked)
            if request.expect_continue and not asked.is_set():
                # The answer came in place of the question's: the body is not wanted.
                sending.cancel()
            # A copy: what is removed from it on its way downstream still says how the body ends.
            transfer.begin(head.status, head.reason, head.headers.copy(), head.version)
            trailers: list[bytes] = []
            async for piece in read_body(request.method, head, reader, trailers):
                await transfer.write(piece)
            if trailers:
                transfer.trailers(trailer_fields(trailers))
            reusable = (
                sending.done() and not sending.cancelled() and sending.result() and keeps_alive(request.method, head)
            )
        finally:
            sending.cancel()
            if reusable:
                self._keep(transfer.origin, connection)
            else:
                # Nothing is lost: either both messages are complete, or the one that is not shall be seen to break off.
                writer.transport.abort()

    async def release(self) -> None:
        for waiting in self._idle.values():
            for idle in waiting:
                idle.writer.transport.abort()
        self._idle.clear()

    async def _connection(self, transfer: Transfer) -> _Connection:
        settings = self._settings
        waiting = self._idle.get(transfer.origin)
        while waiting and not transfer.request.fresh_connection:
            idle = waiting.pop()
            if idle.is_sound(settings):
                return idle
            idle.writer.transport.abort()
        context = settings.context() if transfer.origin.startswith("https:") else None
        reader, writer = await dial(
            transfer.origin,
            transfer.connect_timeout,
            context=context,
            unix_socket=settings.unix_socket,
            limit=MAX_HEAD,
            reader_class=Reader,
        )
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)
        return _Connection(reader, writer, monotonic())

    def _keep(self, origin: str, idle: _Connection) -> None:
        """Keep a connection for the next request, and no more than are allowed: the oldest go."""
        idle.idle_since = monotonic()
        self._idle.setdefault(origin, []).append(idle)
        every = [(other.idle_since, name) for name, waiting in self._idle.items() for other in waiting]
        if len(every) > self._settings.max_idle_connections:
            _, oldest = min(every)
            self._idle[oldest].pop(0).writer.transport.abort()
        self._idle = {name: waiting for name, waiting in self._idle.items() if waiting}

    def _send_head(self, transfer: Transfer, writer: asyncio.StreamWriter) -> None:
        request = transfer.request
        fields = transfer.fields
        if request.expect_continue:
            fields.append(("Expect", "100-continue"))
        lines = [
            f"{request.method} {transfer.target} HTTP/1.1",
            *(f"{name}: {value}" if value else f"{name}:" for name, value in fields),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def _send(self, transfer: Transfer, writer: asyncio.StreamWriter, asked: asyncio.Event) -> bool:
        """Send the body; return whether all of it is sent."""
        request = transfer.request
        if request.expect_continue:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), _CONTINUE_TIMEOUT)
            asked.set()
        chunked = isinstance(request.body, BodyPipe) and request.body.length is None
        try:
            async for piece in transfer.upload():
                if ready(writer.transport, 0):
                    # Reset: to write would drop what has arrived, which may be the answer.
                    return False
                # Not writelines(), which knows no limit up to Python 3.12.8 and 3.13.1 (CVE-2024-12254).
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
            if chunked:
                writer.write(b"\r\n".join([b"0", *field_lines(request.trailers), b"", b""]))
        except OSError:
            # The upstream takes no more; whether it has answered, the reader sees.
            return False
        except Exception as exc:
            # Half a body: the connection says so by closing.
            if transfer.upload_error is None:
                transfer.upload_error = UpstreamError(f"upload failed: {exc!r}", phase=Phase.SEND)
            writer.transport.abort()
            return False
        return True

    async def _final_head(self, transfer: Transfer, reader: asyncio.StreamReader, asked: asyncio.Event) -> Head:
        for _ in range(MAX_INTERIM + 1):
            head = await read_head(reader)
            if head.status >= 200:
                return head
            if head.status == 101:
                raise ValueError("answered with status 101")
            if head.status == 100:
                asked.set()
            transfer.interim(head.status, head.reason, head.headers)
        raise ValueError("sent too many interim responses")
