"""Which protocol a new connection speaks: RFC 9113 section 3, without the Upgrade that RFC 9113 has removed.

Under TLS both sides have agreed by ALPN. Without it the first bytes tell: a client that knows beforehand (section 3.3)
begins with the preface, ``PRI * HTTP/2.0``, which nobody else sends.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import cast

from tornado_proxy.server.http2.connection import Http2Connection
from tornado_proxy.server.http2.ending import Http2Server
from tornado_proxy.server.http2.frames import PREFACE


class Choice(asyncio.BufferedProtocol):
    """A connection until it is known what it is."""

    transport: asyncio.Transport

    def __init__(self, server: Http2Server, http1: Callable[[], asyncio.BufferedProtocol]) -> None:
        self._server = server
        self._http1 = http1
        self._received = b""
        self.deadline = math.inf

    # -- the transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.opened(self)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._become(tls.selected_alpn_protocol() == "h2")
            return
        limit = self._server.linger_time if self._server.draining else self._server.header_timeout
        self.deadline = self._server.loop.time() + limit

    def get_buffer(self, sizehint: int) -> memoryview:
        # Not all of it: what came before goes in front of what comes now.
        return self._server.buffer_ahead

    def buffer_updated(self, nbytes: int) -> None:
        self._received += bytes(self._server.buffer[:nbytes])
        if self._received.startswith(PREFACE):
            self._become(True)
        elif not PREFACE.startswith(self._received):
            self._become(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)

    def _become(self, http2: bool) -> None:
        protocol: asyncio.BufferedProtocol = Http2Connection(self._server) if http2 else self._http1()
        self.transport.set_protocol(protocol)
        # The new one is counted before this one is not any more: the server must not look empty.
        protocol.connection_made(self.transport)
        self._server.closed(self)
        if received := self._received:
            self._server.buffer[: len(received)] = received
            protocol.buffer_updated(len(received))

    # -- the server calls these

    @property
    def idle(self) -> bool:
        """No request has arrived."""
        return True

    def begin_drain(self) -> None:
        """Say nothing: nobody knows in which language."""

    def close_idle(self) -> None:
        """Close for want of a request."""
        self.transport.close()

    def sweep(self, now: float) -> None:
        """Close who does not say what it speaks."""
        if now >= self.deadline:
            self.transport.close()
