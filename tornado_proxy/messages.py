"""The data that flows through an exchange: what we send, what came back, how it ended. No I/O.

``UpstreamRequest`` and ``UpstreamResponse`` are what hooks see and may change; ``Outcome`` is what ``on_done`` gets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from tornado_proxy.errors import InvalidResponse, Phase, ProxyError, Side
from tornado_proxy.flow import BodyPipe


@dataclass(slots=True)
class UpstreamRequest:
    """What will be sent upstream. Hooks may change everything but ``inbound``.

    ``headers`` hold no hop-by-hop and no framing fields: Content-Length or Transfer-Encoding follow from ``body``, and
    what a hook sets there is ignored. ``body`` is ``None`` (no body), ``bytes``, or the stream of the inbound body;
    assigning ``bytes`` replaces it and the inbound body is then dropped as it arrives.
    """

    method: str
    # Absolute, http or https; path and query are sent byte for byte.
    url: str
    headers: HTTPHeaders
    body: bytes | BodyPipe | None
    # What arrived; read-only.
    inbound: HTTPServerRequest
    # Seconds for the client to connect in, waiting for a free slot included; None is no limit.
    connect_timeout: float | None = 10.0
    # Do not use a kept-alive connection: the last one turned out to be stale.
    fresh_connection: bool = False
    # High-water mark of the response's pipe, bytes.
    buffer_size: int = 256 * 1024
    # Ask the upstream before the body is sent (RFC 9110 section 10.1.1); on_interim(100, ...) then says when to begin.
    expect_continue: bool = False
    # Called from the loop with status, reason and headers of each interim response, before the final one is there.
    on_interim: Callable[[int, str, HTTPHeaders], None] | None = None
    # Ask the upstream to switch to websocket. Set for a handshake; a hook may clear it to have a plain request sent.
    upgrade: bool = False


@dataclass(slots=True)
class UpstreamResponse:
    """The upstream's answer, from its head on. Hooks may change ``status``, ``reason``, ``headers`` and ``body``.

    The body is pulled: it is read by ``await read()`` (whole, into ``body``) or by ``async for chunk in response``;
    while nobody reads, the upstream is held back. ``body`` is ``None`` until it was read; assigning ``bytes`` replaces
    whatever the upstream still sends.
    """

    status: int
    reason: str
    headers: HTTPHeaders
    stream: BodyPipe
    # "scheme://host:port" that answered.
    upstream: str
    # "HTTP/1.1", as the upstream wrote it.
    version: str = "HTTP/1.1"
    body: bytes | None = None
    # Largest body that read() collects, bytes; None is no limit.
    max_size: int | None = None
    # Seconds, by phase, as far as the client knows them; complete once the body has ended.
    timings: dict[str, float] = field(default_factory=dict)
    # Ends the transfer at once; set by the client. Idempotent.
    on_abort: Callable[[], None] | None = None

    async def read(self) -> bytes:
        """Return the whole body, waiting for its end; it is kept in ``body``.

        Raises :class:`~tornado_proxy.errors.InvalidResponse` beyond ``max_buffered_response``, and the upstream's error
        when the body broke off.
        """
        if self.body is None:
            chunks = []
            size = 0
            async for chunk in self:
                size += len(chunk)
                if self.max_size is not None and size > self.max_size:
                    self.abort()
                    raise InvalidResponse(
                        f"upstream {self.upstream} sent more than {self.max_size} bytes to a buffered response",
                        phase=Phase.BODY,
                        upstream=self.upstream,
                    )
                chunks.append(chunk)
            self.body = b"".join(chunks)
        return self.body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Bytes that were yielded are gone: they are not sent downstream."""
        while chunk := await self.stream.read():
            yield chunk

    def abort(self) -> None:
        """End the upstream transfer at once and close its connection. What is held is dropped. Idempotent."""
        if self.on_abort is not None:
            self.on_abort()
        self.stream.discard()


@dataclass(slots=True)
class Outcome:
    """How an exchange ended. ``side`` and ``phase`` are ``None`` when all went well.

    ``status`` is what the downstream was sent (499 when it left before that). Bytes are body bytes: ``bytes_up`` to the
    upstream, ``bytes_down`` to the downstream. ``timings`` are seconds; ``total`` is always there, the others
    (``queue``, ``resolve``, ``connect``, ``tls``, ``head``) as far as the client knows them.
    """

    status: int = 0
    side: Side | None = None
    phase: Phase | None = None
    error: ProxyError | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    # "scheme://host:port" of the last attempt, or None when none was chosen.
    upstream: str | None = None
    attempts: int = 0
