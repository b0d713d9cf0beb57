"""From a request to Tornado's ``RequestHandler``, as ``_RoutingDelegate`` and ``_HandlerDelegate`` get there.

The same handlers live the same life, by a third of the calls. What is private to Tornado 6.6 stands in this module.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import cached_property
from typing import Any

from tornado.concurrent import Future
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
    parse_body_arguments,
    split_host_and_port,
)
from tornado.routing import Router, _DefaultMessageDelegate
from tornado.web import HTTPError, _HandlerDelegate

from tornado_proxy.headers import lines_of


def routes_itself(app: object) -> bool:
    """Return whether ``app`` is one of Tornado's applications, or routers, that leaves each request to Tornado."""
    return isinstance(app, Router) and type(app).start_request is Router.start_request


class _InvalidQuery(HTTPError, HTTPInputError):
    """A 400 wherever it is raised: the handler answers it, or the server where there is none yet (a matcher asked)."""


class ServerRequest(HTTPServerRequest):
    """Tornado's request, of a head that the server has judged. Arguments are parsed when they are first asked for.

    So a query that Tornado does not take, for its number of fields, is refused where somebody wants it, with the same
    400.
    """

    def __init__(
        self,
        connection: HTTPConnection,
        server_connection: object,
        start_line: RequestStartLine,
        headers: HTTPHeaders,
    ) -> None:
        # Not super().__init__(), which parses the query, copies the result deeply, and judges the Host once more.
        self.method, self.uri, self.version = start_line
        self.headers = headers
        self.body = b""
        context: Any = connection.context  # type: ignore[attr-defined]
        self.remote_ip = context.remote_ip
        self.protocol = context.protocol
        # HTTP/1.0 need not send one; this is what Tornado puts there.
        hosts = lines_of(headers).get("Host")
        self.host = hosts[0] if hosts else "127.0.0.1"
        self.files = {}
        self.connection = connection
        self.server_connection = server_connection
        self._start_time = time.time()
        self._finish_time = None
        self.path, _, self.query = start_line.path.partition("?")
        self.body_arguments = {}

    @cached_property
    def host_name(self) -> str:  # type: ignore[override]
        return split_host_and_port(self.host.lower())[0]

    @cached_property
    def query_arguments(self) -> dict[str, list[bytes]]:  # type: ignore[override]
        fields: dict[str, list[bytes]] = {}
        try:
            # The same parser, with the same limit (set_parse_body_config), as for a query in Tornado's constructor.
            parse_body_arguments("application/x-www-form-urlencoded", self.query.encode("latin-1"), fields, {})
        except Exception as exc:
            raise _InvalidQuery(400, f"invalid query: {exc}") from exc
        return fields

    @cached_property
    def arguments(self) -> dict[str, list[bytes]]:  # type: ignore[override]
        return {name: values.copy() for name, values in self.query_arguments.items()}


class RoutedRequest(HTTPMessageDelegate):
    """One request of an application that :func:`routes_itself`."""

    __slots__ = ("_app", "_connection", "_delegate", "_has_body", "_lean", "_server_connection")

    def __init__(self, app: Router, server_connection: object, connection: HTTPConnection, has_body: bool) -> None:
        self._app = app
        self._server_connection = server_connection
        self._connection = connection
        self._has_body = has_body
        self._delegate: HTTPMessageDelegate | None = None
        # The delegate is Tornado's own, whose work is done here.
        self._lean = False

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, RequestStartLine)
        request = ServerRequest(self._connection, self._server_connection, start_line, headers)
        delegate = self._app.find_handler(request) or _DefaultMessageDelegate(self._connection)
        self._delegate = delegate
        if type(delegate) is not _HandlerDelegate:
            return delegate.headers_received(start_line, headers)
        self._lean = not delegate.stream_request_body
        if self._lean:
            return None
        if _debugs(delegate):
            return delegate.headers_received(start_line, headers)
        handler: Any = delegate.handler_class(delegate.application, request, **delegate.handler_kwargs)
        if isinstance(handler, HTTPMessageDelegate) and not (delegate.path_args or delegate.path_kwargs):
            # The class does without a handler, and takes the request from the server; but what a pattern's groups have
            # matched it is told only as handlers are.
            self._delegate = handler
            return handler.headers_received(start_line, headers)
        request._body_future = Future()
        return _begin(delegate, handler, self._has_body)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        assert self._delegate is not None
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        delegate = self._delegate
        assert delegate is not None
        if not self._lean:
            delegate.finish()
            return
        assert isinstance(delegate, _HandlerDelegate)
        delegate.request.body = bytes(delegate.chunks)
        if _debugs(delegate):
            delegate.execute()
        else:
            handler = delegate.handler_class(delegate.application, delegate.request, **delegate.handler_kwargs)
            _begin(delegate, handler, False)

    def on_connection_close(self) -> None:
        if self._delegate is not None:
            self._delegate.on_connection_close()


def _debugs(delegate: _HandlerDelegate) -> bool:
    """Return whether the application has settings of debug mode, which only Tornado's own way heeds."""
    settings = delegate.application.settings
    return "compiled_template_cache" in settings or "static_hash_cache" in settings


def _begin(delegate: _HandlerDelegate, handler: Any, has_body: bool) -> Awaitable[None] | None:
    """Let the handler run; return what to wait for before its body is delivered."""
    delegate.handler = handler
    transforms = [transform(delegate.request) for transform in delegate.application.transforms]
    if has_body:
        # Else there is nothing that would have to wait until the handler is prepared for it.
        handler._prepared_future = Future()
    # A task at once. Tornado asks six functions what to do with a coroutine, and calls one more when it is done; what
    # escapes it (nothing should) the task itself logs.
    asyncio.get_running_loop().create_task(handler._execute(transforms, *delegate.path_args, **delegate.path_kwargs))
    prepared: Future[None] | None = handler._prepared_future
    return prepared
