"""ProxyHandler: `ProxyMixin` with a route of its own, which forwards whatever it gets."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from operator import attrgetter, is_
from time import time
from typing import Any, Self

from tornado.routing import PathMatches, RuleRouter
from tornado.web import RequestHandler, stream_request_body

from tornado_proxy.connections import server_connection
from tornado_proxy.downstream.direct import DirectDownstream, nobody_asks
from tornado_proxy.downstream.handler import CONTENT_TYPE, HandlerDownstream
from tornado_proxy.headers import made_of
from tornado_proxy.heads import http_date
from tornado_proxy.inbound import Mounted
from tornado_proxy.mixin import HOOKS, ProxyMixin
from tornado_proxy.options import OptionError, ProxyOptions
from tornado_proxy.urls import RequestTarget


class _AnyMethod:
    """In place of SUPPORTED_METHODS: the exchange decides, by the options, and answers 501."""

    def __contains__(self, method: object) -> bool:
        return True


@stream_request_body
class ProxyHandler(ProxyMixin, RequestHandler):
    """Forwards each request to an upstream and relays its response.

    Register it with :func:`~tornado_proxy.mount`, or in Tornado's own spelling with the options as the third element.
    The whole exchange happens in :meth:`prepare`: an override awaits ``super().prepare()`` when the request may go on,
    and does not when it has answered.

    Subclassing notes. Override the nine hooks of :class:`~tornado_proxy.ProxyMixin`; each is also an option of the same
    name, which the method there calls.
    """

    SUPPORTED_METHODS = _AnyMethod()  # type: ignore[assignment]

    def __new__(cls, application: Any = None, request: Any = None, *more: Any, **arguments: Any) -> Self:
        """Return what forwards ``request`` without a handler, where nobody could notice that there is none.

        Both servers make a handler here, and nowhere else is it known which it would be, and what for. A subclass has
        whatever arguments it likes.
        """
        mounted: Mounted | None = arguments.get("mounted")
        if (
            mounted is None
            or cls is not ProxyHandler
            or not nobody_asks(cls, application, mounted.options)
            or not all(map(is_, _ASKED(cls), _OURS))
        ):
            return super().__new__(cls)
        # For those who make handlers themselves it is one.
        return DirectDownstream(cls, application, request, mounted)  # type: ignore[return-value]

    def initialize(self, *, mounted: Mounted | None = None, **options: Any) -> None:
        """Take the options: checked by ``mount()``, or as they stand in a URL spec."""
        # An error raised here would leave the client without any answer.
        self._option_error: OptionError | None = None
        self._mounted = mounted
        if mounted is not None:
            self.proxy_options = mounted.options
        else:
            try:
                self.proxy_options = _parsed(type(self), options)
            except OptionError as exc:
                self._option_error = exc
        if self._proxy_connection is None:
            self._proxy_connection = server_connection(self.request.connection)

    # -- Tornado calls these

    def prepare(self) -> Coroutine[Any, Any, None]:
        """Forward this request; what is returned must be awaited, and is done when the exchange is over."""
        if self._option_error is not None:
            raise self._option_error
        assert self._proxy_connection is not None
        downstream = HandlerDownstream(self, self.proxy_options, self._proxy_connection, ProxyMixin)
        self._proxy_downstream = downstream
        # Not awaited here: one coroutine less for each request.
        return downstream.run(self._split_path)

    def _split_path(self, target: RequestTarget) -> tuple[str | None, str]:
        """Return the mount's prefix and the raw tail below it."""
        mounted = self._mounted
        return _matched_tail(self, target.path) if mounted is None else mounted.split(target)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._proxy_downstream.receive(chunk) if self._proxy_downstream is not None else None

    def on_connection_close(self) -> None:
        downstream = self._proxy_downstream
        if downstream is None or downstream.breaks_off:
            super().on_connection_close()
        if downstream is not None:
            downstream.left()

    def clear(self) -> None:
        """Reset headers and content, as Tornado does. Which software stands here is nobody's business."""
        self._headers = made_of({"Content-Type": [CONTENT_TYPE], "Date": [http_date(int(time()))]})
        self.set_default_headers()
        self._write_buffer = []
        self._status_code = 200
        self._reason = "OK"

    # The upstream decides about these; Tornado's own answers would be about a resource that is not here.

    def check_xsrf_cookie(self) -> None:
        """Leave XSRF protection to the upstream."""

    def check_trusted_origin(self, origin: str) -> bool:
        """Leave cross-origin protection to the upstream."""
        return True

    def compute_etag(self) -> str | None:
        return None

    def decode_argument(self, value: bytes | None, name: str | None = None) -> str:
        """Decode as Tornado does, but let a path pass that is not UTF-8: its raw bytes are what is forwarded."""
        if value is None:
            # A group of the URL pattern that took no part in the match.
            return ""
        if name is None:
            return value.decode("utf-8", "surrogateescape")
        return super().decode_argument(value, name)


# What is asked of a handler before its response is out, and who answers here. Whoever has put something else there
# (a test's other upstream, a check before all that is forwarded) would not see it asked where there is no handler.
_ASKED = attrgetter("prepare", *HOOKS)
_OURS = _ASKED(ProxyHandler)


# Options in Tornado's spelling come unchecked with each request. The values are kept, so that no id is used twice.
_known: dict[tuple[object, ...], tuple[dict[str, Any], ProxyOptions]] = {}


def _parsed(cls: type, options: dict[str, Any]) -> ProxyOptions:
    key = (cls, *((name, id(value)) for name, value in options.items()))
    found = _known.get(key)
    if found is None:
        if len(_known) > 1000:
            _known.clear()
        found = _known[key] = (options, ProxyOptions.parse(cls.__name__, options))
    return found[1]


def _matched_tail(handler: ProxyHandler, path: str) -> tuple[str | None, str]:
    """Return prefix and raw tail from the URL spec's own pattern: its first group, or the whole path.

    The handler is not told which rule matched, and its path arguments are decoded; so the pattern is matched again.
    """
    regex = _find_pattern(handler.application.default_router, handler)
    match = regex.match(handler.request.path) if regex is not None else None
    if match is None or match.re.groups == 0:
        return "", path
    start, end = match.span(1)
    if start < 0:
        # The group took no part in the match.
        return path.rstrip("/"), ""
    # Scheme and host of an absolute-form target stand before its path, and are no part of it.
    offset = max(len(handler.request.path) - len(path), 0)
    start, end = max(start - offset, 0), max(end - offset, 0)
    return (path[:start].rstrip("/") if end == len(path) else None), path[start:end]


def _find_pattern(router: RuleRouter, handler: ProxyHandler) -> Any:
    for rule in router.rules:
        if rule.matcher.match(handler.request) is None:
            continue
        if isinstance(rule.target, RuleRouter):
            found = _find_pattern(rule.target, handler)
            if found is not None:
                return found
        elif rule.target is type(handler):
            return rule.matcher.regex if isinstance(rule.matcher, PathMatches) else None
    return None
