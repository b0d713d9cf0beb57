"""The downstream of a request whose handler would have nothing of its own to say: a mount as it is.

Tornado makes a ``RequestHandler`` for each request and leads it through its life, which takes longer than most of what
else is done here for a small request. `handler.HandlerDownstream` needs it, because hooks, transforms and overridden
methods may ask it for anything. Where there are none of these, nobody sees whether it is there, and
:class:`DirectDownstream` writes to the connection itself. What is rare or wants a handler to look at (an error page, a
log line, ``on_done``) gets one after all, made as late as that.

Our own server gives the request to it (an ``HTTPMessageDelegate``); Tornado's takes it for the handler that it stands
for, and asks it what ``_HandlerDelegate`` of Tornado 6.6 asks a handler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any

import tornado.web
from tornado.concurrent import Future, future_set_result_unless_cancelled
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerRequest, RequestStartLine, ResponseStartLine
from tornado.iostream import StreamClosedError
from tornado.log import access_log, app_log
from tornado.web import Application, RequestHandler

from tornado_proxy.connections import server_connection
from tornado_proxy.downstream import CLIENT_CLOSED, Hooks, NoHooks, OnConnection, as_it_came
from tornado_proxy.downstream.handler import HandlerDownstream
from tornado_proxy.errors import BadRequest, ProxyError
from tornado_proxy.forwarder import Exchange, refuse
from tornado_proxy.headers import lines_of
from tornado_proxy.heads import add_date
from tornado_proxy.inbound import Mounted, judge
from tornado_proxy.messages import Outcome, UpstreamResponse
from tornado_proxy.mixin import ProxyMixin
from tornado_proxy.options import HeadersMode, ProxyOptions


def _tornados(method: Any) -> Any:
    """Return ``method`` if it is Tornado's own, ``None`` if somebody has put another in its place.

    What wrapt makes has all that the method has, and is equal to it, so that only its type, and later "is", tell.
    """
    return method if type(method) is FunctionType and method.__globals__ is vars(tornado.web) else None


# What traces requests (OpenTelemetry, Sentry, ...) puts its own in place of one of these, before or after us, and would
# see nothing of a request without a handler; nor would the response have the fields that somebody gives to all.
_INIT = _tornados(RequestHandler.__init__)
_EXECUTE = _tornados(RequestHandler._execute)
_ON_FINISH = _tornados(RequestHandler.on_finish)
_SET_DEFAULT_HEADERS = _tornados(RequestHandler.set_default_headers)
_LOG_REQUEST = _tornados(Application.log_request)


def nobody_asks(handler_class: type[RequestHandler], application: Application, options: ProxyOptions) -> bool:
    """Return whether a handler, of a class that is ours, would be asked nothing before the response is out."""
    return (
        not (options.hooked or application.transforms)
        and handler_class.__init__ is _INIT
        and handler_class._execute is _EXECUTE
        and handler_class.on_finish is _ON_FINISH
        and handler_class.set_default_headers is _SET_DEFAULT_HEADERS
    )


class DirectDownstream(OnConnection, NoHooks, HTTPMessageDelegate):
    """The downstream of one exchange; see `downstream.Downstream`. To the server it is what takes the request.

    It is its own hooks too: all it has is the upstream and ``on_done``.
    """

    # A head has been sent, or none can be any more; the response is complete, or was cut off.
    answered = ended = False
    _status = 200
    _reason = "OK"
    _headers: HTTPHeaders | None = None
    # What the groups of a URL pattern matched: not of a mount's own rule, but of one of the user's around its target.
    _path: tuple[tuple[bytes, ...], Mapping[str, bytes]] = (), MappingProxyType({})
    # Done when the last write is through.
    _written: Future[None]
    # The handler that was made for it after all.
    _late: Any = None
    # While it runs.
    _exchange: Exchange | None = None
    # Why there is none.
    _refusal: Exception | None = None
    # What Tornado's server waits for before it delivers the body, and what tells that all of it has come.
    _prepared_future: Future[None] | None = None
    _body: Future[None] | None = None

    def __init__(
        self,
        handler_class: type[RequestHandler],
        application: Application,
        request: HTTPServerRequest,
        mounted: Mounted,
    ) -> None:
        self.request = request
        self._application = application
        self._mounted = mounted
        self._options = mounted.options
        # Of the handler that there would have been.
        self._handler_class = handler_class
        assert request.connection is not None
        self._connection = server_connection(request.connection)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Judge the request and take its body; :meth:`run` is to follow."""
        request, connection, options = self.request, self._connection, self._options
        try:
            inbound = judge(request, connection, options, self._mounted.split)
            client = options.client_for(self._application.settings, loop)
            self._exchange = exchange = Exchange(self, options, client, inbound, loop)
        except Exception as error:
            self._refusal = error
            return
        # In this order: Tornado's connection may have ended already, and is asked now.
        request.connection.set_close_callback(self.on_connection_close)  # type: ignore[union-attr]
        connection.begin_body(exchange.upload is not None)

    async def run(self) -> None:
        """Forward the request; return when the exchange is over."""
        try:
            if self._exchange is not None:
                if self._connection.is_closed():
                    # Where clients cut requests by the hundred (HTTP/2), none of these shall reach the upstream.
                    self._exchange.downstream_closed()
                await self._exchange.run()
            elif isinstance(self._refusal, BadRequest):
                await refuse(self, self._refusal)
            elif self._refusal is not None:
                raise self._refusal
        except (Exception, asyncio.CancelledError) as exc:
            # Nobody's hook, so ours or a client's, or somebody has cancelled all tasks.
            if self._answer_for(exc):
                raise
        finally:
            # They would wait for the garbage collector together.
            self._exchange = self._refusal = None
            self._drop_late()
            if self._body is not None:
                # Of a body that breaks off, or is not wanted any more, nothing tells.
                self._body.remove_done_callback(self._on_body_end)
            if self._prepared_future is not None:
                # It is cancelled where the server's task is, as all are at the end of asyncio.run().
                future_set_result_unless_cancelled(self._prepared_future, None)

    # -- Tornado's server calls these, and data_received and on_connection_close

    def _execute(self, transforms: object, *args: bytes, **kwargs: bytes) -> Coroutine[Any, Any, None]:
        """Begin; return what is to be run."""
        if args or kwargs:
            self._path = args, kwargs
        self._begin(asyncio.get_running_loop())
        if self._exchange is not None:
            # The body may come at once.
            self._prepared_future = None
            if self._exchange.upload is not None:
                self._body = self.request._body_future
                self._body.add_done_callback(self._on_body_end)
        return self.run()

    def _on_body_end(self, body: Future[None]) -> None:
        if self._exchange is not None and not body.cancelled():
            self.finish()
            if self._connection.is_closed():
                # Tornado listens for the end from now on, and never tells of one that it has seen before.
                self.on_connection_close()

    # -- our server calls these

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        # Once, for all: each look takes a system call in Python 3.11.
        loop = asyncio.get_running_loop()
        self._begin(loop)
        task = loop.create_task(self.run())
        connection: Any = self.request.connection
        # The answer of a request that is refused is not to be anticipated by a 100, or by a refusal of its body.
        return task if self._refusal is not None and connection.has_body else None

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        room: Awaitable[None] | None = self._exchange.receive(chunk) if self._exchange is not None else None
        return room

    def finish(self) -> None:
        if self._exchange is not None:
            self._exchange.received_all(self._connection.request_trailers)

    def on_connection_close(self) -> None:
        if self._exchange is not None and not self.ended:
            if self.answered:
                self._cut_if_open()
            self._exchange.downstream_closed()

    # -- the forwarder calls these; see downstream.Downstream

    @property
    def timed(self) -> bool:
        return self._options.on_done is not None

    @property
    def hooks(self) -> Hooks:
        return self

    def choose_upstream(self) -> Any:
        return self._options.upstream

    def on_done(self, outcome: Outcome) -> Any:
        hook = self._options.on_done
        return hook(self._handler(), outcome) if hook is not None else None

    def hooked(self, name: str) -> bool:
        return False

    def get_status(self) -> int:
        return self._status

    def send_own_answer(self) -> None:
        self._with_handler(HandlerDownstream.send_own_answer)

    def send_error_page(self, error: ProxyError) -> None:
        self._with_handler(partial(HandlerDownstream.send_error_page, error=error))

    def send_head(self, response: UpstreamResponse, mode: HeadersMode, chunk: bytes) -> Future[None]:
        headers = self.fields_of(response, mode)
        self._let_end_be_seen(lines_of(headers))
        self.answered = True
        self._status, self._reason, self._headers = response.status, as_it_came(response.reason), headers
        start_line = ResponseStartLine("", self._status, self._reason)
        connection: Any = self.request.connection
        self._written = connection.write_headers(start_line, headers, chunk)
        return self._written

    def send_chunk(self, chunk: bytes) -> Future[None]:
        connection: Any = self.request.connection
        self._written = connection.write(chunk)
        return self._written

    def send_end(self, response: UpstreamResponse | None = None) -> Future[None]:
        connection: Any = self.request.connection
        if self._connection.is_closed():
            raise StreamClosedError
        if response is not None:
            self._send_trailers(response)
        self._forget_close()
        connection.finish()
        self._end()
        # Of the end itself there is nothing to wait for.
        return self._written

    def fields_of(self, response: UpstreamResponse, mode: HeadersMode) -> HTTPHeaders:
        add_date(response.headers)
        return response.headers

    def detach(self) -> Any:
        self.ended = True
        return self.request.connection.detach()  # type: ignore[union-attr]

    def tunnel_ended(self, status: int) -> None:
        self._status = status
        self._forget_close()
        self._end()

    def abort(self) -> None:
        if not self.ended:
            self._connection.abort()
            self._forget_close()
            self._end()

    def gone(self) -> None:
        if not self.answered:
            self._status, self._reason = CLIENT_CLOSED
        self.abort()

    # -- inside

    def _forget_close(self) -> None:
        # It refers to us, and we to it.
        self.request.connection.set_close_callback(None)  # type: ignore[union-attr]

    def _end(self) -> None:
        # Nothing is to be answered any more, be it that nothing was.
        self.answered = self.ended = True
        application = self._application
        if _logs(application, self._status):
            application.log_request(self._handler())

    def _handler(self) -> RequestHandler:
        """Return the handler, as it would be at the end of its life."""
        if self._late is None:
            self._late = handler = self._made()
            handler._finished = True
            handler._status_code, handler._reason = self._status, self._reason
            if self._headers is not None:
                handler._headers_written = True
                handler._headers = self._headers
        return self._late  # type: ignore[no-any-return]

    def _made(self) -> Any:
        # Not by calling the class, which would make another of us.
        handler: Any = object.__new__(self._handler_class)
        handler._proxy_connection = self._connection
        handler.__init__(self._application, self.request, mounted=self._mounted)
        # It wants to be told.
        self._forget_close()
        # As RequestHandler._execute() sets them. Nothing is answered for their sake any more, so that all are decoded.
        args, kwargs = self._path
        handler.path_args = [handler.decode_argument(value) for value in args]
        handler.path_kwargs = {name: handler.decode_argument(value) for name, value in kwargs.items()}
        return handler

    def _answer_for(self, exc: BaseException) -> bool:
        """Answer and log as ``RequestHandler._execute()`` does; return whether ``exc`` is for the task itself."""
        task = asyncio.current_task()
        cancelled = isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling() > 0
        try:
            if not cancelled:
                self._with_handler(partial(_handle_exception, exc=exc))
            elif not self.ended:
                self._with_handler(_handle_cancellation)
        except Exception:
            app_log.error("Exception in exception handler", exc_info=True)
        return cancelled

    def _drop_late(self) -> None:
        if self._late is not None:
            self._late._break_cycles()
            self._late = None

    def _with_handler(self, answer: Any) -> None:
        """Let a handler answer, which ends and logs it too."""
        self._drop_late()
        self._late = handler = self._made()
        handler._transforms = []
        # A log_function that raises makes of an answer that is out one that is not finished: there must be no second.
        handler._headers_written, handler._finished = self.answered, self.ended
        try:
            answer(HandlerDownstream(handler, self._options, self._connection, ProxyMixin))
        finally:
            self._status, self._reason, self._headers = handler._status_code, handler._reason, handler._headers
            self.ended = handler._finished
            self.answered = self.ended or handler._headers_written


def _handle_exception(downstream: HandlerDownstream, exc: BaseException) -> None:
    downstream.handler._handle_request_exception(exc)


def _handle_cancellation(downstream: HandlerDownstream) -> None:
    downstream.handler.send_error(500)


def _logs(application: Application, status: int) -> bool:
    """Return whether ``Application.log_request`` would do something with a request that was forwarded."""
    # Of the instance: it may have been set there, or on its class.
    if _LOG_REQUEST is None or getattr(application.log_request, "__func__", None) is not _LOG_REQUEST:
        return True
    function = application.settings.get("log_function")
    if function is not None:
        return getattr(function, "of_exchanges", True)
    level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
    return access_log.isEnabledFor(level)
