"""ProxyMixin: ``await self.proxy(upstream, ...)`` in any handler, and the nine hooks with their default bodies."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from tornado_proxy.connections import ServerConnection, server_connection
from tornado_proxy.downstream.handler import HandlerDownstream
from tornado_proxy.errors import ProxyError
from tornado_proxy.messages import Outcome, UpstreamRequest, UpstreamResponse
from tornado_proxy.options import OptionError, ProxyOptions
from tornado_proxy.urls import RequestTarget, check_tail, prefix_above

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


class ProxyMixin:
    """Lets any ``RequestHandler`` forward its request: ``class Mine(ProxyMixin, Base)``.

    Nothing of Tornado's is overridden, so a base keeps its ``prepare``, ``initialize``, ``get_current_user``,
    ``data_received`` and so on, in whichever order the bases stand. XSRF protection and the methods that are answered
    stay the handler's own too.

    The nine hooks may be methods of the handler or options of :meth:`proxy`, and may be async: :meth:`choose_upstream`,
    :meth:`rewrite_request`, :meth:`filter_request_body`, :meth:`should_retry`, :meth:`handle_status`,
    :meth:`rewrite_response`, :meth:`filter_response_body`, :meth:`handle_error`, :meth:`on_done`. A hook stops the
    proxying by answering (``finish``, ``send_error``, ``redirect``) or raising; what it raises before the head is sent
    is answered as Tornado answers it in any handler, after that the connection is closed short.
    """

    # Those of the exchange, once there is one.
    proxy_options: ProxyOptions
    # proxy() was called; a request is forwarded once.
    _proxy_called = False
    # The server's side of this request; made when it is first needed.
    _proxy_connection: ServerConnection | None = None
    # While it runs.
    _proxy_downstream: HandlerDownstream | None = None

    async def proxy(self, upstream: Any, *, path: str | None = None, **options: Any) -> None:
        """Forward this request to ``upstream`` and relay the response; return when the exchange is over.

        ``upstream`` and ``options`` are those of :class:`~tornado_proxy.options.ProxyOptions`. They are checked when
        they are first seen, and the result is kept, except where a function was made for this call: give hooks as
        methods. What goes behind the upstream's own path is the request's whole path, or ``path``; both are raw bytes,
        never decoded, and the request's query follows. Where the request's path ends in ``path``, what stands before it
        is taken for the prefix of a mount: redirects and cookies come back under it.

        Called in ``get``, ``post`` and so on, it sends ``self.request.body``. To stream the body, decorate the class
        with Tornado's ``@stream_request_body`` and call it in ``prepare``; ``data_received`` then is not asked. An
        upgrade to websocket becomes a tunnel, and this returns when it has ended.

        The handler is finished afterwards. Raises :class:`~tornado_proxy.options.OptionError`, what a hook raised
        before anything was sent, and ``RuntimeError`` for a request that was forwarded or answered before.
        """
        handler: Any = self
        where = f"{type(self).__name__}.proxy()"
        if self._proxy_called:
            raise RuntimeError(f"{where} was called twice for one request, which can be forwarded only once")
        if handler._finished or handler._headers_written:
            raise RuntimeError(f"{where} was called for a request that is answered already")
        self.proxy_options = _checked(where, upstream, options)
        if path is not None:
            try:
                check_tail(path)
            except ValueError as exc:
                raise OptionError(f"{where}: {exc}") from None
        self._proxy_called = True
        if self._proxy_connection is None:
            self._proxy_connection = server_connection(handler.request.connection)
        downstream = HandlerDownstream(self, self.proxy_options, self._proxy_connection, ProxyMixin)
        downstream.borrow()
        try:
            await downstream.run(functools.partial(_split, path))
        finally:
            downstream.give_back()

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
        """Change status, reason, headers, or (buffered, or after ``await response.read()``) body before they go.

        ``response.decode()`` undoes a Content-Encoding, for this and for :meth:`filter_response_body`.
        """
        hook = self.proxy_options.rewrite_response
        return hook(self, response) if hook is not None else None

    def filter_response_body(self, chunk: bytes) -> Any:
        """Return what to send for ``chunk`` of the response.

        Where this is given the upstream is asked for no ranges, and Content-Length, digests and a strong ETag are
        dropped.
        """
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


def _split(path: str | None, target: RequestTarget) -> tuple[str | None, str]:
    if path is None:
        return "", target.path
    return prefix_above(path, target.path), path


# Options that were checked, by their values. Bounded, because upstreams may be told apart by request.
_known: dict[object, ProxyOptions] = {}
_MOST_KNOWN = 1000


def _checked(where: str, upstream: Any, options: dict[str, Any]) -> ProxyOptions:
    """Return checked options, from an earlier call where these are the same."""
    try:
        key = (where, _frozen(upstream), _frozen(options))
        found = _known.get(key)
    except TypeError:
        return ProxyOptions.parse(where, {"upstream": upstream, **options})
    if found is None:
        # Copies: what the caller changes later must not change what this key stands for.
        given = {name: value.copy() if isinstance(value, dict | list) else value for name, value in options.items()}
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = ProxyOptions.parse(where, {"upstream": upstream, **given})
    return found


def _frozen(value: Any) -> object:
    """Return what stands for ``value`` in a key. Raises ``TypeError`` for what must not be kept."""
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if callable(value) and not isinstance(value, type) and not _lasts(value):
        # A closure or a bound method may hold the handler, with the whole request.
        raise TypeError
    hash(value)
    # 1 and True are equal, and not the same option.
    return type(value), value


def _lasts(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__closure__ is None and not function.__defaults__
