"""ProxyHandler: Tornado's side of an exchange, and the nine hooks.

What depends on the inside of Tornado's ``RequestHandler`` stands here and says so; for the server's connection that is
`connections`.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable
from email.utils import formatdate
from time import time
from typing import Any

from tornado.concurrent import Future
from tornado.httputil import HTTPHeaders
from tornado.routing import PathMatches, RuleRouter
from tornado.web import RequestHandler, stream_request_body

from tornado_proxy.clients import default_client, shared_client
from tornado_proxy.connections import server_connection
from tornado_proxy.errors import BadRequest, NoUpstreamAvailable, ProxyError, TunnelClosed
from tornado_proxy.forwarder import Exchange, refuse
from tornado_proxy.framing import expects_continue, request_framing
from tornado_proxy.handshake import wants_upgrade
from tornado_proxy.heads import Inbound
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.options import HeadersMode, OptionError, ProxyOptions
from tornado_proxy.urls import RequestTarget, mount_tail, parse_target

HOOKS = (
    "choose_upstream",
    "rewrite_request",
    "filter_request_body",
    "should_retry",
    "handle_status",
    "rewrite_response",
    "filter_response_body",
    "handle_error",
    "on_done",
)

# Seconds, for clients that heed Retry-After.
_RETRY_AFTER = "1"

# Of Tornado's default headers, those that an answer of our own needs; see _merged.
_CONTENT_TYPE = "text/html; charset=UTF-8"


class _AnyMethod:
    """In place of SUPPORTED_METHODS: `ProxyHandler.prepare` decides, by the options, and answers 501."""

    def __contains__(self, method: object) -> bool:
        return True


@stream_request_body
class ProxyHandler(RequestHandler):
    """Forwards each request to an upstream and relays its response.

    Register it with :func:`~tornado_proxy.mount`, or in Tornado's own spelling with the options as the third element.
    The whole exchange happens in :meth:`prepare`: an override awaits ``super().prepare()`` when the request may go on,
    and does not when it has answered.

    Subclassing notes. Override these, in the order in which they are called; each may be async and is also an option of
    the same name, which the method here calls: :meth:`choose_upstream`, :meth:`rewrite_request`,
    :meth:`filter_request_body`, :meth:`should_retry`, :meth:`handle_status`, :meth:`rewrite_response`,
    :meth:`filter_response_body`, :meth:`handle_error`, :meth:`on_done`. A hook stops the proxying by answering
    (``finish``, ``send_error``, ``redirect``) or raising; what it raises before the head is sent is answered as Tornado
    answers it in any handler, after that the connection is closed short.
    """

    SUPPORTED_METHODS = _AnyMethod()  # type: ignore[assignment]

    proxy_options: ProxyOptions

    def initialize(self, *, mounted: ProxyOptions | None = None, prefix: str | None = None, **options: Any) -> None:
        """Take the options: checked by ``mount()``, or as they stand in a URL spec."""
        # An error raised here would leave the client without any answer.
        self._option_error: OptionError | None = None
        if mounted is not None:
            self.proxy_options = mounted
        else:
            try:
                self.proxy_options = _parsed(type(self), options)
            except OptionError as exc:
                self._option_error = exc
        self.mount_prefix = prefix
        self._exchange: Exchange | None = None
        self._connection = server_connection(self.request.connection)
        # The connection was closed by us, or has gone; nothing can be sent.
        self._aborted = False

    # -- the hooks, in call order

    def choose_upstream(self) -> Any:
        """Return the upstream's URL for this request. Called for each attempt. Default: the ``upstream`` option."""
        upstream = self.proxy_options.upstream
        if isinstance(upstream, str):
            return upstream
        return upstream(self) if self.proxy_options.upstream_takes_handler else upstream()

    def rewrite_request(self, request: UpstreamRequest) -> Any:
        """Change ``request`` before it is sent. Nothing is removed after this; CR, LF and their like are refused."""
        hook = self.proxy_options.rewrite_request
        return hook(self, request) if hook is not None else None

    def filter_request_body(self, chunk: bytes) -> Any:
        """Return what to send for ``chunk`` of the inbound body. Where this is given the length is not announced."""
        hook = self.proxy_options.filter_request_body
        return hook(self, chunk) if hook is not None else chunk

    def should_retry(self, error: ProxyError) -> Any:
        """Return ``False`` to let ``error`` stand. Called only where another attempt is safe."""
        hook = self.proxy_options.should_retry
        return hook(self, error) if hook is not None else True

    def handle_status(self, response: UpstreamResponse) -> Any:
        """See the head as soon as it is there; answer, or return to let it pass. Default: ``status_callbacks``."""
        callback = self.proxy_options.status_callback(response.status)
        return callback(self, response) if callback is not None else None

    def rewrite_response(self, response: UpstreamResponse) -> Any:
        """Change status, reason, headers, or (buffered, or after ``await response.read()``) body before they go."""
        hook = self.proxy_options.rewrite_response
        return hook(self, response) if hook is not None else None

    def filter_response_body(self, chunk: bytes) -> Any:
        """Return what to send for ``chunk`` of the response. Where this is given Content-Length is dropped."""
        hook = self.proxy_options.filter_response_body
        return hook(self, chunk) if hook is not None else chunk

    def handle_error(self, error: ProxyError) -> Any:
        """See why an exchange failed, and answer unless something was sent. Default: ``error_callback``.

        Without an answer from here the downstream gets ``error.status_code`` in the style of ``write_error``.
        """
        return self.proxy_options.call_error_callback(error, self)

    def on_done(self, outcome: Outcome) -> Any:
        """See how the exchange ended: exactly once, whatever happened. Nothing can be sent any more."""
        hook = self.proxy_options.on_done
        return hook(self, outcome) if hook is not None else None

    # -- Tornado calls these

    async def prepare(self) -> None:
        """Forward this request; return when the exchange is over."""
        if self._option_error is not None:
            raise self._option_error
        options = self.proxy_options
        try:
            inbound = self._judge()
        except BadRequest as error:
            await refuse(self, error)
            return
        settings_client = self.settings.get("proxy_client")
        client = shared_client(options.client or settings_client or default_client(), options.client_options)
        self._exchange = exchange = Exchange(self, options, client, inbound)
        if self._stream_request_body:
            self._receive_body(exchange.upload is not None)
        try:
            await exchange.run()
        finally:
            self._exchange = None

    def _judge(self) -> Inbound:
        """Step (1): refuse what is ambiguous before anything is sent upstream."""
        request = self.request
        assert request.method is not None
        assert request.uri is not None
        framing = request_framing(request.version, request.headers)
        if request.method not in self.proxy_options.methods:
            error = BadRequest(f"method {request.method} is not forwarded; custom_http_methods can name it")
            error.status_code = 501
            raise error
        target = parse_target(request.method, request.uri)
        prefix, tail = self._split_path(target)
        upgrade = wants_upgrade(request, framing)
        if not self._stream_request_body:
            return Inbound(target, framing, tail, prefix, request.body if framing.has_body else None, upgrade=upgrade)
        expects = expects_continue(request.version, request.headers, framing)
        return Inbound(target, framing, tail, prefix, expects_continue=expects, upgrade=upgrade)

    def _split_path(self, target: RequestTarget) -> tuple[str | None, str]:
        """Return the mount's prefix and the raw tail below it."""
        prefix = self.mount_prefix
        if prefix is not None:
            tail = mount_tail(prefix, target.path)
            return prefix, target.path if tail is None else tail
        return _matched_tail(self, target.path)

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
        prepared: Future[None] = self._prepared_future  # type: ignore[assignment]
        self._prepared_future = None
        if not prepared.done():
            prepared.set_result(None)

    def _on_body_end(self, body: Future[None]) -> None:
        if self._exchange is not None and not body.cancelled() and body.exception() is None:
            self._exchange.received_all()
            if self._connection.is_closed():
                # Tornado listens for the end from now on, and never tells of one that it has seen before.
                self.on_connection_close()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if self._exchange is None:
            return None
        room: Awaitable[None] | None = self._exchange.receive(chunk)
        return room

    def on_connection_close(self) -> None:
        exchange = self._exchange
        if exchange is None or exchange.upload is not None:
            # Says that the body has broken off, which one that does not exist cannot.
            super().on_connection_close()
        if exchange is not None and not self._aborted:
            exchange.downstream_closed()

    def clear(self) -> None:
        """Reset headers and content, as Tornado does. Which software stands here is nobody's business."""
        self._headers = HTTPHeaders()
        self._headers["Content-Type"] = _CONTENT_TYPE
        self._headers["Date"] = self._date = _http_date(int(time()))
        self.set_default_headers()
        self._write_buffer = []
        self._status_code = 200
        self._reason = "OK"

    def finish(self, chunk: Any = None) -> Future[None]:
        """End the response; does nothing when it was cut off or the downstream has gone."""
        if self._aborted:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return super().finish(chunk)

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

    # -- the forwarder calls these; see downstream.Downstream

    def hooked(self, name: str) -> bool:
        cls: Any = type(self)
        return _overridden(cls, name) or getattr(self.proxy_options, name, None) is not None

    @property
    def answered(self) -> bool:
        return self._finished or self._headers_written

    @property
    def ended(self) -> bool:
        return self._finished

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        # RFC 9110 section 15.2: never to a client of HTTP/1.0.
        if self.request.version != "HTTP/1.0":
            self._connection.send_interim(status, reason, headers)

    def send_own_answer(self) -> None:
        methods = ", ".join(sorted(self.proxy_options.methods))
        if self.request.method == "TRACE":
            # Not reflected: what a client cannot see of its own request, a script must not see either.
            self.send_error(405)
        else:
            self.set_header("Allow", methods)
            self.finish(b"")

    def send_head(self, response: UpstreamResponse, mode: HeadersMode, chunk: bytes) -> Future[None]:
        self._status_code = response.status
        # Not set_status: it puts "Unknown" for a reason with "<" in it. This one was checked, and is not HTML here.
        self._reason = response.reason
        self._headers = self._merged(response.headers, mode)
        if "Content-Length" not in self._headers and self.request.version != "HTTP/1.1":
            # Tornado would keep the connection and the client wait for an end that never comes.
            self._connection.close_after_response()
        if response.status in (204, 206, 304) or "no-transform" in self._headers.get("Cache-Control", ""):
            # compress_response would make nonsense of a range, and a body of nothing.
            self._transforms = []
        self._write_buffer = [chunk] if chunk else []
        return self.flush()

    def send_chunk(self, chunk: bytes) -> Future[None]:
        self._write_buffer.append(chunk)
        return self.flush()

    def send_end(self) -> Future[None]:
        return self.finish()

    def fields_of(self, response: UpstreamResponse, mode: HeadersMode) -> HTTPHeaders:
        return self._merged(response.headers, mode)

    def tunnel_ended(self, status: int) -> None:
        self._status_code = status
        self._log()

    def send_error_page(self, error: ProxyError) -> None:
        if isinstance(error, NoUpstreamAvailable | TunnelClosed):
            self._retry_after = True
        if isinstance(error, BadRequest):
            # Where the framing is in doubt nobody knows where the next request begins.
            self._connection.close_after_response()
        self.send_error(error.status_code, reason=_REASONS.get(error.status_code))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if getattr(self, "_retry_after", False):
            self.set_header("Retry-After", _RETRY_AFTER)
        super().write_error(status_code, **kwargs)

    def close_after_response(self) -> None:
        self._connection.close_after_response()

    def abort(self) -> None:
        if not self._finished:
            self._finished = self._aborted = True
            self._connection.abort()
            self._log()

    def gone(self) -> None:
        if not self._finished:
            self._finished = self._aborted = True
            if not self._headers_written:
                self._status_code, self._reason = 499, _REASONS[499]
            self._connection.abort()
            self._log()

    def unsent(self) -> int:
        return self._connection.unsent()

    def has_left(self) -> bool:
        return self._connection.has_left()

    def _merged(self, upstream: HTTPHeaders, mode: HeadersMode) -> HTTPHeaders:
        """Return the upstream's headers joined with those set on the handler before, the defaults left out."""
        own = self._headers
        # RFC 9110 section 6.6.1: a Date is added where the upstream sent none.
        if own.get("Date") == self._date:
            del own["Date"]
            if "Date" not in upstream:
                upstream["Date"] = self._date
        if own.get("Content-Type") == _CONTENT_TYPE:
            del own["Content-Type"]
        if not own:
            return upstream
        merged = HTTPHeaders()
        for name, value in upstream.get_all():
            merged.add(name, value)
        for name, value in own.get_all():
            if mode is HeadersMode.PREPEND or name not in upstream:
                if name in ("Content-Length", "Date", "Content-Type") and name in upstream:
                    # Of these there can be only one, and the upstream's stands first.
                    continue
                merged.add(name, value)
        return merged


@functools.lru_cache(maxsize=2)
def _http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


_REASONS = {499: "Client Closed Request", 508: "Loop Detected"}


@functools.cache
def _overridden(cls: Any, name: str) -> bool:
    return getattr(cls, name) is not getattr(ProxyHandler, name)


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
