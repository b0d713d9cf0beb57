"""A Tornado ``RequestHandler`` as the downstream of one exchange.

What depends on the inside of Tornado's ``RequestHandler`` stands here and says so; for the server's connection that is
`connections`. The handler may be anybody's: nothing of it is replaced, but for the time in which it must be.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable
from typing import Any

import tornado
from tornado.concurrent import Future
from tornado.httputil import HTTPHeaders, ResponseStartLine
from tornado.web import RequestHandler

from tornado_proxy.connections import ServerConnection
from tornado_proxy.downstream import CLIENT_CLOSED, OnConnection, as_it_came
from tornado_proxy.errors import BadRequest, NoUpstreamAvailable, ProxyError, TunnelClosed
from tornado_proxy.forwarder import Exchange, refuse
from tornado_proxy.framing import NO_BODY
from tornado_proxy.headers import lines_of
from tornado_proxy.inbound import Inbound, Split, judge
from tornado_proxy.messages import UpstreamResponse
from tornado_proxy.options import HeadersMode, ProxyOptions

# Tornado's default headers, which are about an answer of the handler's own; see _merged.
CONTENT_TYPE = "text/html; charset=UTF-8"
_CONTENT_TYPE = [CONTENT_TYPE]
_SERVER = [f"TornadoServer/{tornado.version}"]

# Seconds, for clients that heed Retry-After.
_RETRY_AFTER = "1"
_REASONS = {499: CLIENT_CLOSED[1], 508: "Loop Detected"}


class HandlerDownstream(OnConnection):
    """The downstream of one exchange; see `downstream.Downstream`. ``defaults`` is whose hooks are not the user's."""

    __slots__ = ("_aborted", "_connection", "_defaults", "_exchange", "_options", "handler", "hooks", "request")

    timed = True

    def __init__(self, handler: Any, options: ProxyOptions, connection: ServerConnection, defaults: type) -> None:
        # A RequestHandler. Most of what is asked of it here is private to it, and so to no type.
        self.handler = handler
        self.hooks = handler
        self.request = handler.request
        self._options = options
        self._connection = connection
        self._defaults = defaults
        # While it runs.
        self._exchange: Exchange | None = None
        # The connection was closed by us, or has gone; nothing can be sent.
        self._aborted = False

    async def run(self, split: Split) -> None:
        """Forward the handler's request; return when the exchange is over."""
        handler, options = self.handler, self._options
        try:
            inbound = self._judge(split)
            loop = asyncio.get_running_loop()
            client = options.client_for(handler.settings, loop)
            self._exchange = exchange = Exchange(self, options, client, inbound, loop)
            if self._connection.is_closed():
                # Before the handler began, and so before anyone could be told. Where clients cut requests by the
                # hundred (HTTP/2), none of these shall reach the upstream.
                exchange.downstream_closed()
            if self.streams:
                self._receive_body(exchange.upload is not None)
            await exchange.run()
        except BadRequest as error:
            # Of step (1); an exchange raises none.
            await refuse(self, error)
        finally:
            # The three would wait for the garbage collector together.
            self._exchange = handler._proxy_downstream = None
            if handler._finished:
                # RequestHandler.finish() does this too, but was not called if the end was another. Not before the hooks
                # are through, which may render templates for nobody.
                handler._break_cycles()

    @property
    def streams(self) -> bool:
        """Whether the body, if there is one, is still to come: in ``prepare`` of a ``@stream_request_body`` handler."""
        prepared = self.handler._prepared_future
        return prepared is not None and not prepared.done()

    def _judge(self, split: Split) -> Inbound:
        request = self.request
        inbound = judge(request, self._connection, self._options, split)
        if not self.streams:
            if inbound.framing.has_body and not request.body and getattr(self.handler, "_stream_request_body", False):
                raise RuntimeError(
                    "the body went to data_received; call proxy() in prepare(), or set self.request.body"
                )
            inbound.body = None if inbound.framing == NO_BODY else request.body
            inbound.expects_continue = False
        return inbound

    def _receive_body(self, has_body: bool) -> None:
        """Let the body come while the exchange runs.

        Tornado reads it only once ``prepare`` is done, which it knows by this future; so the future is resolved early,
        and then forgotten, because ``RequestHandler._execute`` would resolve it again. Without a body too: from then on
        the server notices when the downstream leaves.
        """
        self._connection.begin_body(has_body)
        if has_body:
            body: Future[None] = self.request._body_future
            body.add_done_callback(self._on_body_end)
        handler = self.handler
        prepared: Future[None] = handler._prepared_future
        handler._prepared_future = None
        if not prepared.done():
            prepared.set_result(None)
        # A small body has come with its head. Where it is there before the request is sent, both go in one piece.
        self._connection.proceed()

    def _on_body_end(self, body: Future[None]) -> None:
        if self._exchange is not None and not body.cancelled() and body.exception() is None:
            self._exchange.received_all(self._connection.request_trailers)
            if self._connection.is_closed():
                # Tornado listens for the end from now on, and never tells of one that it has seen before.
                self.handler.on_connection_close()

    # -- what Tornado tells the handler

    def receive(self, chunk: bytes) -> Awaitable[None] | None:
        """Take a piece of the body. What comes when the exchange is over is dropped."""
        if self._exchange is None:
            return None
        room: Awaitable[None] | None = self._exchange.receive(chunk)
        return room

    @property
    def breaks_off(self) -> bool:
        """Whether the body breaks off where the connection ends. One that does not exist cannot."""
        return self._exchange is None or self._exchange.upload is not None

    def left(self) -> None:
        """The connection has gone."""
        if self._exchange is not None and not self._aborted:
            if self.answered:
                self._cut_if_open()
            self._exchange.downstream_closed()

    def borrow(self) -> None:
        """Hear first what Tornado tells the handler, whose own methods may be anybody's. Ended by :meth:`give_back`."""
        handler = self.handler
        # On the instance, so that neither the order of its bases nor a missing super() matters.
        handler.on_connection_close = self._left_borrowed
        handler.request.connection.set_close_callback(self._left_borrowed)
        if self.streams:
            handler.data_received = self.receive

    def give_back(self) -> None:
        """Let the handler be as it was. Idempotent."""
        handler = self.handler
        handler.__dict__.pop("on_connection_close", None)
        if not handler._finished:
            handler.request.connection.set_close_callback(handler.on_connection_close)
        if "data_received" in handler.__dict__:
            handler.data_received = _drop

    def _left_borrowed(self) -> None:
        ends_body = self.breaks_off
        self.left()
        handler = self.handler
        if ends_body or not hasattr(self.request, "_body_future"):
            type(handler).on_connection_close(handler)
            return
        # RequestHandler's own would fail this future, which the server is about to resolve.
        body, self.request._body_future = self.request._body_future, Future()
        try:
            type(handler).on_connection_close(handler)
        finally:
            self.request._body_future = body

    # -- the forwarder calls these; see downstream.Downstream

    def hooked(self, name: str) -> bool:
        cls: Any = type(self.handler)
        return _overridden(cls, name, self._defaults) or getattr(self._options, name, None) is not None

    def get_status(self) -> int:
        status: int = self.handler.get_status()
        return status

    @property
    def answered(self) -> bool:
        return bool(self.handler._finished or self.handler._headers_written)

    @property
    def ended(self) -> bool:
        return bool(self.handler._finished)

    def send_own_answer(self) -> None:
        methods = set(self._options.methods)
        if self.request.method == "TRACE":
            # Not reflected: what a client cannot see of its own request, a script must not see either.
            methods.discard("TRACE")
            self.handler.set_status(405)
        # RFC 9110 section 15.5.6 asks for it in a 405.
        self.handler.set_header("Allow", ", ".join(sorted(methods)))
        self.handler.finish(b"")

    def send_head(self, response: UpstreamResponse, mode: HeadersMode, chunk: bytes) -> Future[None]:
        handler = self.handler
        handler._status_code = response.status
        # Not set_status: it puts "Unknown" for a reason with "<" in it. This one was checked, and is not HTML here.
        handler._reason = reason = as_it_came(response.reason)
        handler._headers = headers = self._merged(response.headers, mode)
        fields = lines_of(headers)
        self._let_end_be_seen(fields)
        if response.status in (204, 206, 304) or (
            "Cache-Control" in fields and "no-transform" in headers["Cache-Control"]
        ):
            # compress_response would make nonsense of a range, and a body of nothing.
            handler._transforms = []
        handler._write_buffer = [chunk] if chunk else []
        flushed: Future[None]
        if (
            handler._transforms
            or self.request.method == "HEAD"
            or hasattr(handler, "_new_cookie")
            or _overridden(handler.__class__, "flush", RequestHandler)
        ):
            flushed = handler.flush()
            return flushed
        # What is left of flush() without these.
        handler._write_buffer = []
        handler._headers_written = True
        start_line = ResponseStartLine("", response.status, reason)
        flushed = handler.request.connection.write_headers(start_line, headers, chunk)
        return flushed

    def send_chunk(self, chunk: bytes) -> Future[None]:
        handler: RequestHandler = self.handler
        handler._write_buffer.append(chunk)
        return handler.flush()

    def send_end(self, response: UpstreamResponse | None = None) -> Future[None]:
        handler: RequestHandler = self.handler
        if response is not None:
            self._send_trailers(response)
        return handler.finish()

    def fields_of(self, response: UpstreamResponse, mode: HeadersMode) -> HTTPHeaders:
        headers = self._merged(response.headers, mode)
        # Where Tornado keeps what set_cookie was given, until a head is flushed.
        for cookie in getattr(self.handler, "_new_cookie", {}).values():
            headers.add("Set-Cookie", cookie.OutputString(None))
        return headers

    def detach(self) -> Any:
        return self.handler.detach()

    def tunnel_ended(self, status: int) -> None:
        self.handler._status_code = status
        self._ended()

    def send_error_page(self, error: ProxyError) -> None:
        handler = self.handler
        if isinstance(error, BadRequest):
            # Where the framing is in doubt nobody knows where the next request begins.
            self._connection.close_after_response()
        if isinstance(error, NoUpstreamAvailable | TunnelClosed):
            # send_error clears the headers, and then calls this.
            handler.write_error = functools.partial(_write_error_with_retry_after, handler)
        handler.send_error(error.status_code, reason=_REASONS.get(error.status_code))
        handler.__dict__.pop("write_error", None)

    def abort(self) -> None:
        if not self.handler._finished:
            self._cut()

    def gone(self) -> None:
        handler = self.handler
        if not handler._finished:
            if not handler._headers_written:
                handler._status_code, handler._reason = CLIENT_CLOSED
            self._cut()

    def _cut(self) -> None:
        handler = self.handler
        handler._finished = self._aborted = True
        # For hooks that answer all the same.
        handler.finish = _finish_nothing
        self._connection.abort()
        self._ended()

    def _ended(self) -> None:
        """Do what else ``RequestHandler.finish`` does."""
        self.handler._log()
        self.handler.on_finish()

    def _merged(self, upstream: HTTPHeaders, mode: HeadersMode) -> HTTPHeaders:
        """Return the upstream's headers joined with those set on the handler before, Tornado's defaults left out."""
        own = self.handler._headers
        fields = lines_of(own)
        # RFC 9110 section 6.6.1: a Date is added where the upstream sent none.
        if "Date" in fields:
            if "Date" not in lines_of(upstream):
                upstream["Date"] = own["Date"]
            del own["Date"]
        if fields.get("Content-Type") == _CONTENT_TYPE:
            del own["Content-Type"]
        if fields.get("Server") == _SERVER:
            del own["Server"]
        if not fields:
            return upstream
        merged = HTTPHeaders()
        for name, value in upstream.get_all():
            merged.add(name, value)
        for name, value in own.get_all():
            if mode is HeadersMode.PREPEND or name not in upstream:
                if name in ("Content-Length", "Content-Type") and name in upstream:
                    # Of these there can be only one, and the upstream's stands first.
                    continue
                merged.add(name, value)
        return merged


@functools.cache
def _overridden(cls: Any, name: str, defaults: Any) -> bool:
    return getattr(cls, name) is not getattr(defaults, name)


# What stands on a handler in place of its methods. No bound methods: those would be circles.


def _drop(chunk: bytes) -> None:
    """Take the rest of a body whose exchange is over."""


def _finish_nothing(chunk: Any = None) -> Future[None]:
    """End a response that was cut off, or whose downstream has gone: there is nothing to do."""
    done: Future[None] = Future()
    done.set_result(None)
    return done


def _write_error_with_retry_after(handler: RequestHandler, status_code: int, **kwargs: Any) -> None:
    handler.set_header("Retry-After", _RETRY_AFTER)
    type(handler).write_error(handler, status_code, **kwargs)
