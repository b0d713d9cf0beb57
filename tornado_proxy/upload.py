"""The inbound body on its way up: from the server's connection, through the user's filter, to whom the client reads.

An exchange has an :class:`Upload` where its request's body is still to come.
"""

from __future__ import annotations

from typing import Any, Protocol

from tornado.httputil import HTTPHeaders

from tornado_proxy.downstream import Downstream, awaited
from tornado_proxy.errors import BodyTooLarge, HookError, Phase, ProxyError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.heads import check_trailers, pass_trailers
from tornado_proxy.messages import UpstreamRequest
from tornado_proxy.options import ProxyOptions
from tornado_proxy.timeouts import Watchdog


class Uploading(Protocol):
    """An exchange, as far as its upload goes."""

    committed: bool

    def stop(self, error: ProxyError) -> None: ...


class Upload:
    """Takes the inbound body as it comes, and stops the exchange where it must not go on. Ended by the exchange."""

    __slots__ = (
        "_downstream",
        "_exchange",
        "_filtered",
        "_options",
        "_request",
        "_takes_trailers",
        "_trailers",
        "_watchdog",
        "pipe",
        "received",
    )

    def __init__(
        self,
        exchange: Uploading,
        downstream: Downstream,
        options: ProxyOptions,
        watchdog: Watchdog,
        length: int | None,
        trailers: bool,
    ) -> None:
        """``length`` is what was announced, ``trailers`` whether the client sends what may come behind."""
        # None once it is over; it refers to us too.
        self._exchange: Uploading | None = exchange
        self._downstream = downstream
        self._options = options
        self._watchdog = watchdog
        self._filtered = downstream.hooked("filter_request_body")
        # What the client reads.
        self.pipe = BodyPipe(options.buffer_size, None if self._filtered else length)
        # Bytes that came, before any filter.
        self.received = 0
        # Whether anybody wants what comes behind them; that; and the request behind whose body it is to go.
        self._takes_trailers = trailers and self.pipe.length is None
        self._trailers: HTTPHeaders | None = None
        self._request: UpstreamRequest | None = None

    def receive(self, chunk: bytes) -> Any:
        """Take a piece; return ``None`` or an awaitable that is done when there is room for more."""
        if self._exchange is None:
            return None
        self.received += len(chunk)
        limit = self._options.max_body_size
        if limit is not None and self.received > limit:
            self._exchange.stop(BodyTooLarge(f"request body exceeds {limit} bytes", phase=Phase.SEND))
            return None
        if self._filtered:
            return self._receive_filtered(chunk, self._exchange)
        room = self.pipe.write(chunk)
        if room is not None:
            self._watchdog.upload_blocked()
        return room

    async def _receive_filtered(self, chunk: bytes, exchange: Uploading) -> None:
        try:
            chunk = await awaited(self._downstream.hooks.filter_request_body(chunk))
            if self._downstream.answered and not exchange.committed:
                exchange.stop(HookError("filter_request_body has answered", phase=Phase.SEND))
                return
            room = self.pipe.write(chunk)
        except ProxyError as error:
            exchange.stop(error)
            return
        except Exception as exc:
            failure = HookError("filter_request_body raised", phase=Phase.SEND)
            failure.__cause__ = exc
            exchange.stop(failure)
            return
        if room is not None:
            self._watchdog.upload_blocked()
            await room

    def received_all(self, trailers: HTTPHeaders | None) -> None:
        """The body is complete, with ``trailers`` behind it."""
        if trailers is not None and self._takes_trailers and self._exchange is not None:
            try:
                self._trailers = check_trailers(self._options, trailers)
                self._pass_trailers()
            except HookError as error:
                self.pipe.fail(error)
                self._exchange.stop(error)
        self.pipe.close()
        self._watchdog.upload_ended()

    def goes_with(self, request: UpstreamRequest) -> None:
        """The head of ``request``, which streams the body, is final: announce trailers, and let them pass behind it."""
        if self._takes_trailers:
            self._request = request
            self._pass_trailers()

    def _pass_trailers(self) -> None:
        if self._request is not None:
            hooked = self._downstream.hooked("rewrite_request")
            pass_trailers(self._trailers, self._downstream.request, self._request, hooked)

    def end(self) -> None:
        """The exchange is over: what still arrives has nowhere to go."""
        if not self.pipe.exhausted and self.pipe.error is None:
            # The client may look once more before it learns that it is cancelled, and must not see a good end.
            self.pipe.error = ProxyError("the exchange is over", phase=Phase.SEND)
        self.pipe.discard()
        self._exchange = self._request = None
