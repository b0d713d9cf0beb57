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
from tornado.routing import Router, RuleRouter, _DefaultMessageDelegate
from tornado.web import Application, ErrorHandler, HTTPError, _ApplicationRouter, _HandlerDelegate

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
        self._delegate = delegate = _find(self._app, request, {}) or _DefaultMessageDelegate(self._connection)
        if type(delegate) is not _HandlerDelegate:
            return delegate.headers_received(start_line, headers)
        self._lean = True
        if not delegate.stream_request_body:
            return None
        request._body_future = Future()
        return _execute(delegate, self._has_body)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        assert self._delegate is not None
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        delegate = self._delegate
        assert delegate is not None
        if self._lean and not delegate.stream_request_body:  # type: ignore[attr-defined]
            assert isinstance(delegate, _HandlerDelegate)
            delegate.request.body = bytes(delegate.chunks)
            _execute(delegate, False)
        else:
            delegate.finish()

    def on_connection_close(self) -> None:
        if self._delegate is not None:
            self._delegate.on_connection_close()


# Tornado's own. What somebody puts in place of one is asked instead, be it on a class or on the object. Compared by
# "is", because some wrappers are equal to what they wrap.
_BY_RULES = RuleRouter.find_handler
_BY_APPLICATION = Application.find_handler
_OF_RULES = RuleRouter.get_target_delegate
_OF_APPLICATION = _ApplicationRouter.get_target_delegate
_DELEGATE = Application.get_handler_delegate


def _find(router: Router, request: HTTPServerRequest, parameters: dict[str, Any]) -> HTTPMessageDelegate | None:
    """Return what ``router.find_handler`` finds, or what does its work directly; ``None`` where it finds nothing.

    ``parameters`` are what the rule that led here has for it.
    """
    find = type(router).find_handler
    if "find_handler" not in router.__dict__:
        if find is _BY_RULES:
            return _first_match(router, request)  # type: ignore[arg-type]
        if find is _BY_APPLICATION:
            found = _find(router.default_router, request, {})  # type: ignore[attr-defined]
            return _unmatched(router, request) if found is None else found  # type: ignore[arg-type]
    return router.find_handler(request, **parameters)


def _unmatched(application: Application, request: HTTPServerRequest) -> HTTPMessageDelegate:
    """Return the application's answer to what no rule takes, without asking the rules again."""
    settings = application.settings
    if settings.get("default_handler_class"):
        arguments = settings.get("default_handler_args", {})
        return application.get_handler_delegate(request, settings["default_handler_class"], arguments)
    return application.get_handler_delegate(request, ErrorHandler, {"status_code": 404})


def _first_match(router: RuleRouter, request: HTTPServerRequest) -> HTTPMessageDelegate | None:
    """Walk the rules as ``RuleRouter.find_handler`` does, but ask the class of a handler for an offer first.

    Tornado goes through ten functions to make the delegate of a handler, and no handler may be needed.
    """
    make = None if "get_target_delegate" in router.__dict__ else type(router).get_target_delegate
    for rule in router.rules:
        parameters = rule.matcher.match(request)
        if parameters is None:
            continue
        if rule.target_kwargs:
            parameters["target_kwargs"] = rule.target_kwargs
        target = rule.target
        found: HTTPMessageDelegate | None = None
        if isinstance(target, type):
            if make is _OF_APPLICATION and (offer := getattr(target, "_proxy_directly", None)) is not None:
                application = router.application  # type: ignore[attr-defined]
                if _makes_handlers(application):
                    found = offer(application, request, parameters.get("target_kwargs") or {})
        elif (make is _OF_APPLICATION or make is _OF_RULES) and isinstance(target, RuleRouter | Application):
            found = _find(target, request, parameters)
            if found is None:
                continue
        if found is None:
            found = router.get_target_delegate(target, request, **parameters)
        if found is not None:
            return found
    return None


def _makes_handlers(application: Application) -> bool:
    """Return whether the handler is what its rule says: an application may want another, or give it other arguments."""
    return type(application).get_handler_delegate is _DELEGATE and "get_handler_delegate" not in application.__dict__


def _execute(delegate: _HandlerDelegate, has_body: bool) -> Awaitable[None] | None:
    """Make the handler and let it run; return what to wait for before its body is delivered."""
    application = delegate.application
    settings = application.settings
    if "compiled_template_cache" in settings or "static_hash_cache" in settings:
        # Those of debug mode, which only Tornado's own way heeds.
        return delegate.execute()
    handler: Any = delegate.handler_class(application, delegate.request, **delegate.handler_kwargs)
    delegate.handler = handler
    transforms = [transform(delegate.request) for transform in application.transforms]
    if has_body:
        # Else there is nothing that would have to wait until the handler is prepared for it.
        handler._prepared_future = Future()
    # A task at once. Tornado asks six functions what to do with a coroutine, and calls one more when it is done; what
    # escapes it (nothing should) the task itself logs.
    asyncio.get_running_loop().create_task(handler._execute(transforms, *delegate.path_args, **delegate.path_kwargs))
    prepared: Future[None] | None = handler._prepared_future
    return prepared
