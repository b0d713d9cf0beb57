"""The data that flows through an exchange: what we send, what came back, how it ended. No I/O.

``UpstreamRequest`` and ``UpstreamResponse`` are what hooks see and may change; ``Outcome`` is what ``on_done`` gets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from tornado_proxy.decoded import DecodedStream
from tornado_proxy.decoding import DecodingError, decode_whole, decoder_for
from tornado_proxy.errors import InvalidResponse, Phase, ProxyError, Side
from tornado_proxy.flow import BodyPipe
from tornado_proxy.headers import body_changed


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
    # Called by a client that can tell when it has a connection and begins to send; it must not call the client.
    on_sending: Callable[[], None] | None = None
    # Whether anybody may look at the response's timings.
    timed: bool = True
    # Ask the upstream to switch to websocket. Set for a handshake; a hook may clear it to have a plain request sent.
    upgrade: bool = False

    @property
    def trailers(self) -> HTTPHeaders:
        """The fields to send behind the body (RFC 9110 section 6.5): what may pass of those that came behind it.

        Empty until the inbound body has ended, and where ``body`` is not its stream. Where `rewrite_request` is the
        user's, only those pass that it names in the Trailer field of ``headers``: it cannot see what is yet to come.
        """
        trailers = self.body.trailers if isinstance(self.body, BodyPipe) else None
        return HTTPHeaders() if trailers is None else trailers


@dataclass(slots=True)
class UpstreamResponse:
    """The upstream's answer, from its head on. Hooks may change ``status``, ``reason``, ``headers`` and ``body``.

    The body is pulled: it is read by ``await read()`` (whole, into ``body``) or by ``async for chunk in response``;
    while nobody reads, the upstream is held back. ``body`` is ``None`` until it was read; assigning ``bytes`` replaces
    whatever the upstream still sends. Content-Length, ETag and digests then follow from what is sent; Content-Encoding
    is the hook's business, unless it calls :meth:`decode`.
    """

    status: int
    reason: str
    headers: HTTPHeaders
    stream: BodyPipe | DecodedStream
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
    # Whether filter_response_body is asked, where there is one. A hook sets False for a body that passes as it is.
    filtered: bool = True
    # What read() or decode() put into ``body``.
    _as_read: bytes | None = field(default=None, init=False, repr=False)
    # Made on the first look: most responses have none, and nobody asks.
    _trailers: HTTPHeaders | None = field(default=None, init=False, repr=False)

    @property
    def trailers(self) -> HTTPHeaders:
        """The fields that came behind the body (RFC 9110 section 6.5), such as ``grpc-status``.

        Empty until the body has ended, and where there are none or the client cannot tell. Hop-by-hop fields and those
        about framing, authentication and the content's format are left out.
        """
        if self._trailers is None:
            self._trailers = HTTPHeaders()
        return self._trailers

    @trailers.setter
    def trailers(self, fields: HTTPHeaders) -> None:
        self._trailers = fields

    @property
    def body_replaced(self) -> bool:
        """Whether ``body`` is another than the upstream's."""
        return self.body is not self._as_read and self.body != self._as_read

    def decode(self) -> None:
        """Undo the Content-Encoding: from now on the body, read here or sent downstream, is the decoded one.

        Content-Encoding, Content-Length and digests are removed and a strong ETag becomes weak; so do it for HEAD too.
        Decoding goes on as the body is read, in small steps. Does nothing where there is no Content-Encoding.

        Raises :class:`~tornado_proxy.errors.InvalidResponse` for a coding that is not known here, and for a part of a
        body (206), which cannot be decoded. Bytes that are not what the coding says raise it from the read that meets
        them; a body that was read before is decoded at once, up to ``max_buffered_response``.
        """
        if "Content-Encoding" not in self.headers:
            return
        if self.stream.consumed and self.body is None:
            raise RuntimeError("decode() after a part of the body was taken; call it before")
        try:
            decoder = decoder_for(self.headers["Content-Encoding"])
            if decoder is not None and self.status == 206:
                raise DecodingError("a part of an encoded body; remove Range in rewrite_request")
            if decoder is not None and self.body is not None:
                self.body = self._as_read = decode_whole(decoder, self.body, self.max_size)
        except DecodingError as exc:
            raise InvalidResponse(
                f"upstream {self.upstream} sent: {exc}", phase=Phase.BODY, upstream=self.upstream
            ) from None
        del self.headers["Content-Encoding"]
        if decoder is not None:
            body_changed(self.headers, None)
            if self.body is None:
                assert isinstance(self.stream, BodyPipe)
                self.stream = DecodedStream(self.stream, decoder, self.upstream)

    def decoded(self) -> AsyncIterator[bytes]:
        """Yield the decoded body as it comes: :meth:`decode`, then the response's own loop."""
        self.decode()
        return self.__aiter__()

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
            self.body = self._as_read = b"".join(chunks)
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
    (``resolve``, ``connect``, ``tls``, ``head``, ``upstream``) as far as the client knows them.
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
