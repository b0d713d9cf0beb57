"""Every option of the proxy, once: name, type, default, meaning and check.

Options are checked when the application is built. What is wrong raises :class:`OptionError`, a ``ValueError`` whose
sentence names the mount, the option and the cure. Nothing here touches a socket or a handler.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from tornado_proxy.clients import NAMES, check_client, default_client, shared_client
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.framing import is_token
from tornado_proxy.urls import normalized_origin, parse_upstream

Hook = Callable[..., Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

STANDARD_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"})


class OptionError(ValueError):
    """An option that cannot work; the message names it and the cure."""


class ResponseMode(StrEnum):
    """``stream`` forwards chunks as they come; ``buffer`` holds the whole response until hooks have seen it."""

    STREAM = "stream"
    BUFFER = "buffer"


class HeadersMode(StrEnum):
    """How upstream headers join those that were set on the handler before."""

    REPLACE = "replace"
    PREPEND = "prepend"


class Forwarded(StrEnum):
    """Which forwarding fields are sent upstream."""

    X_FORWARDED = "x-forwarded"
    RFC7239 = "rfc7239"
    BOTH = "both"


# -- what a string says, for the command line


def _seconds(text: str) -> float | None:
    return None if text.lower() in ("none", "off") else float(text)


def _bytes(text: str) -> int | None:
    return None if text.lower() in ("none", "off") else int(text)


def _string(text: str) -> str | None:
    return None if text.lower() in ("none", "off") else text


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _pairs(text: str) -> dict[str, Any]:
    """``name=value,name=value``; a value is a whole number, true, false, or text."""
    pairs = {}
    for item in _list(text):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} has no value; write {item}=VALUE")
        pairs[name] = int(value) if value.isdecimal() else _WORDS.get(value.lower(), value)
    return pairs


_WORDS: dict[str, Any] = {"true": True, "false": False}


def _option(default: Any, help: str, cli: Callable[[str], Any] | None = None) -> Any:
    metadata = {"help": help, "cli": cli}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """The options of one mount, checked. Build it with :meth:`parse`.

    ``metadata["cli"]`` of a field turns a command-line string into its value; ``None`` where a string cannot say it. Of
    a bool it says only that there is a flag, which takes no string.
    Times are seconds and sizes bytes; ``None`` is off.
    """

    upstream: Any = field(metadata={"help": "URL, or a function of zero or one argument (the handler)", "cli": None})
    client: Any = _option(None, f"HTTP client: {', '.join(NAMES)}", str)
    client_options: dict[str, Any] = _option({}, "options of the client, as name=value,name=value", _pairs)
    response_mode: ResponseMode = _option(ResponseMode.STREAM, "stream or buffer", str)
    stream_headers_mode: HeadersMode = _option(HeadersMode.REPLACE, "replace or prepend, when streaming", str)
    buffer_headers_mode: HeadersMode = _option(HeadersMode.PREPEND, "replace or prepend, when buffering", str)
    normalize_headers: Hook | None = _option(None, "function of a list of (name, value) pairs")
    preserve_host_header: bool = _option(False, "send the inbound Host upstream", str)
    custom_http_methods: tuple[str, ...] = _option((), "methods beside the standard ones, comma-separated", _list)
    status_callbacks: Mapping[Any, Hook] = _option({}, "functions by status of the upstream response")
    error_callback: Any = _option(None, "function that sees, and may answer, errors")
    rewrite_request: Hook | None = _option(None, "f(handler, request)")
    rewrite_response: Hook | None = _option(None, "f(handler, response)")
    filter_request_body: Hook | None = _option(None, "f(handler, chunk) -> bytes")
    filter_response_body: Hook | None = _option(None, "f(handler, chunk) -> bytes")
    on_done: Hook | None = _option(None, "f(handler, outcome)")
    retries: int = _option(1, "attempts after the first, where that is safe", int)
    should_retry: Hook | None = _option(None, "f(handler, error) -> bool")
    connect_timeout: float | None = _option(10.0, "seconds to connect", _seconds)
    response_timeout: float | None = _option(60.0, "seconds from the request sent to the response's head", _seconds)
    idle_timeout: float | None = _option(300.0, "seconds without a byte either way", _seconds)
    total_timeout: float | None = _option(None, "seconds for the whole exchange", _seconds)
    write_timeout: float | None = _option(60.0, "seconds without progress writing to the client", _seconds)
    max_body_size: int | None = _option(None, "bytes of request body; larger gets 413", _bytes)
    max_buffered_response: int | None = _option(64 * 1024 * 1024, "bytes of a buffered response", _bytes)
    buffer_size: int = _option(256 * 1024, "bytes held at most in each direction", int)
    forwarded: Forwarded | None = _option(Forwarded.X_FORWARDED, "x-forwarded, rfc7239, both or none", _string)
    trusted_proxies: Any = _option((), "networks whose forwarding headers are believed, comma-separated, or *", _list)
    via: str | None = _option("tornado_proxy", "pseudonym in Via, or none", _string)
    rewrite_location: bool = _option(True, "bring redirects and cookie paths back under the mount", str)
    cookie_domain: str | None = _option(None, "replaces Domain in Set-Cookie", _string)
    cookie_path: str | None = _option(None, "replaces Path in Set-Cookie", _string)
    websocket: bool = _option(True, "tunnel upgrades to websocket", str)
    allowed_origins: Sequence[str] | None = _option(None, "Origins that may open a tunnel, comma-separated", _list)
    tunnel_idle_timeout: float | None = _option(None, "seconds without a byte either way in a tunnel", _seconds)

    # Settled from the above by __post_init__, so that nothing is found out for each request.
    # Whether any function but normalize_headers and on_done is given.
    hooked: bool = field(init=False, repr=False, default=False)
    upstream_takes_handler: bool = field(init=False, repr=False, default=False)
    networks: tuple[Network, ...] = field(init=False, repr=False, default=())
    trust_all: bool = field(init=False, repr=False, default=False)
    methods: frozenset[str] = field(init=False, repr=False, default=STANDARD_METHODS)
    origins: frozenset[str] | None = field(init=False, repr=False, default=None)
    _statuses: tuple[tuple[range, Hook], ...] = field(init=False, repr=False, default=())
    _error_call: tuple[Hook, tuple[Any, ...], bool] | None = field(init=False, repr=False, default=None)

    @classmethod
    def parse(cls, where: str, given: Mapping[str, Any]) -> ProxyOptions:
        """Return checked options. ``where`` begins the message of the :class:`OptionError` that this may raise."""
        known = [f.name for f in fields(cls) if f.init]
        try:
            for name in given:
                if name not in known:
                    raise OptionError(f"{name!r} is not an option; the options are {', '.join(known)}")
            if given.get("upstream") is None:
                raise OptionError("upstream is missing; write upstream='http://127.0.0.1:9000'")
            return cls(**given)
        except ValueError as exc:
            raise OptionError(f"{where}: {exc}") from None

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        settle("upstream_takes_handler", _check_upstream(self.upstream))
        for name, kind in (
            ("response_mode", ResponseMode),
            ("stream_headers_mode", HeadersMode),
            ("buffer_headers_mode", HeadersMode),
        ):
            settle(name, _choice(name, getattr(self, name), kind))
        if self.forwarded is not None:
            settle("forwarded", _choice("forwarded", self.forwarded, Forwarded))
        for name in _FUNCTIONS:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"{name} {value!r} is not a function; pass a function or None")
        for name in _SECONDS:
            _check_number(name, getattr(self, name), "seconds")
        for name in _SIZES:
            _check_number(name, getattr(self, name), "bytes")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} {getattr(self, name)!r} is not a bool; write True or False")
        for name in _TEXTS:
            _check_text(name, getattr(self, name))
        if self.via is not None and not is_token(self.via):
            raise OptionError(f"via {self.via!r} is not a token; write letters, digits and -_. or None")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise OptionError(f"retries {self.retries!r} is not a count; write 0 or more")
        settle("methods", _check_methods(self.custom_http_methods))
        networks, trust_all = _check_networks(self.trusted_proxies)
        settle("networks", networks)
        settle("trust_all", trust_all)
        settle("origins", _check_origins(self.allowed_origins))
        settle("_statuses", _check_statuses(self.status_callbacks))
        settle("_error_call", _check_error_callback(self.error_callback))
        _check_client(self.client, self.client_options)
        hooks = [getattr(self, name) for name in _FUNCTIONS if name not in ("normalize_headers", "on_done")]
        hooked = callable(self.upstream) or self.status_callbacks or self.error_callback is not None
        settle("hooked", bool(hooked) or any(hook is not None for hook in hooks))

    def client_for(self, settings: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> HTTPClient:
        """Return the client of ``loop``, which runs: that of the option, else of the application's ``settings``."""
        client = self.client or settings.get("proxy_client") or default_client()
        return shared_client(client, self.client_options, loop)

    def trusts(self, address: str | None) -> bool:
        """Return whether forwarding headers that came from ``address`` are believed."""
        if self.trust_all or not self.networks:
            return self.trust_all
        try:
            ip = ipaddress.ip_address(address or "")
        except ValueError:
            # A unix-domain socket has no address; only "*" trusts it.
            return False
        return any(ip in network for network in self.networks)

    def status_callback(self, status: int) -> Hook | None:
        """Return the callback for ``status``: the narrowest key that holds it, of equals the first given."""
        for statuses, callback in self._statuses:
            if status in statuses:
                return callback
        return None

    def call_error_callback(self, error: Exception, handler: object) -> Awaitable[None] | None:
        """Call ``error_callback`` in the form that was settled at start-up."""
        if self._error_call is None:
            return None
        function, args, takes_handler = self._error_call
        result: Awaitable[None] | None
        result = function(*args, error, handler) if takes_handler else function(*args, error)
        return result


_FUNCTIONS = (
    "normalize_headers",
    "rewrite_request",
    "rewrite_response",
    "filter_request_body",
    "filter_response_body",
    "on_done",
    "should_retry",
)
_SECONDS = (
    "connect_timeout",
    "response_timeout",
    "idle_timeout",
    "total_timeout",
    "write_timeout",
    "tunnel_idle_timeout",
)
_SIZES = ("max_body_size", "max_buffered_response", "buffer_size")
_FLAGS = ("preserve_host_header", "rewrite_location", "websocket")
_TEXTS = ("via", "cookie_domain", "cookie_path")


def _accepts(function: Hook, *args: object) -> bool:
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        # Some functions written in C have no signature; only calling tells.
        return True
    return True


def _check_upstream(upstream: Any) -> bool:
    if isinstance(upstream, str):
        parse_upstream(upstream)
        return False
    if not callable(upstream):
        raise OptionError(f"upstream {upstream!r} is neither a URL nor a function; write 'http://127.0.0.1:9000'")
    if _accepts(upstream):
        return False
    if _accepts(upstream, None):
        return True
    raise OptionError(
        f"upstream {upstream!r} takes more than one argument; write a function of none, or of the handler"
    )


def _choice(name: str, value: object, kind: type[StrEnum]) -> StrEnum:
    try:
        return kind(value)  # type: ignore[arg-type]
    except ValueError:
        raise OptionError(f"{name} {value!r} is unknown; write one of {', '.join(map(repr, map(str, kind)))}") from None


def _check_number(name: str, value: object, unit: str) -> None:
    if value is None and name != "buffer_size":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{name} {value!r} is not a number of {unit}; write one above 0, or None for no limit")


def _check_text(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value or any(ord(c) <= 32 or c in ";,\x7f" for c in value):
        raise OptionError(f"{name} {value!r} cannot stand in a header; write a word, or None")


def _check_methods(methods: Iterable[str]) -> frozenset[str]:
    if isinstance(methods, str | bytes) or not isinstance(methods, Iterable):
        raise OptionError(f"custom_http_methods {methods!r} is not a list; write a tuple such as ('PROPFIND',)")
    methods = tuple(methods)
    for method in methods:
        if not isinstance(method, str) or not is_token(method):
            raise OptionError(f"custom_http_methods: {method!r} is not a method name; write a name such as 'PROPFIND'")
        if method == "CONNECT":
            raise OptionError("custom_http_methods: 'CONNECT' makes tunnels to anywhere; leave it out")
    return STANDARD_METHODS | frozenset(methods)


def _check_origins(origins: Any) -> frozenset[str] | None:
    if origins is None:
        return None
    if isinstance(origins, str | bytes) or not isinstance(origins, Sequence):
        raise OptionError(f"allowed_origins {origins!r} is not a list; write ('https://app.example.com',) or None")
    for origin in origins:
        # A slash at the end would match nothing, and nobody would know why.
        scheme, separator, host = origin.partition("://") if isinstance(origin, str) else ("", "", "")
        if origin != "null" and (not scheme or not separator or not host or any(c in host for c in "/?#@* ")):
            raise OptionError(
                f"allowed_origins: {origin!r} is not an origin; write one such as 'https://app.example.com'"
            )
    return frozenset(map(normalized_origin, origins))


def _check_networks(given: Any) -> tuple[tuple[Network, ...], bool]:
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise OptionError(f"trusted_proxies {given!r} is not a list; write networks such as ('10.0.0.0/8',), or '*'")
    names = (given,) if isinstance(given, str) else tuple(given)
    if "*" in names:
        return (), True
    networks = []
    for name in names:
        try:
            networks.append(ipaddress.ip_network(name))
        except ValueError as exc:
            raise OptionError(f"trusted_proxies: {exc}; write networks such as '10.0.0.0/8', or '*' for all") from None
    return tuple(networks), False


def _check_statuses(callbacks: Mapping[Any, Hook]) -> tuple[tuple[range, Hook], ...]:
    if not isinstance(callbacks, Mapping):
        raise OptionError(f"status_callbacks {callbacks!r} is not a dict; write {{404: f, '5xx': g}}")
    found = []
    for key, callback in callbacks.items():
        if not callable(callback):
            raise OptionError(f"status_callbacks[{key!r}] {callback!r} is not a function; pass f(handler, response)")
        found.append((_statuses_of(key), callback))
    return tuple(sorted(found, key=lambda entry: len(entry[0])))


def _statuses_of(key: Any) -> range:
    if isinstance(key, int) and not isinstance(key, bool) and 200 <= key <= 599:
        return range(key, key + 1)
    if isinstance(key, range) and len(key):
        return key
    if key == "*":
        return range(100, 600)
    if isinstance(key, str) and len(key) == 3 and key[0] in "2345" and key[1:].lower() == "xx":
        return range(int(key[0]) * 100, int(key[0]) * 100 + 100)
    raise OptionError(f"status_callbacks: {key!r} is not a status; write 404, '5xx', range(500, 505) or '*'")


def _check_error_callback(given: Any) -> tuple[Hook, tuple[Any, ...], bool] | None:
    if given is None:
        return None
    function, args = given if isinstance(given, tuple) and len(given) == 2 else (given, ())
    args = tuple(args) if isinstance(args, Iterable) else None
    if not callable(function) or args is None:
        raise OptionError(f"error_callback {given!r} is not a function; pass f(error), f(error, handler) or (f, args)")
    # Where both fit the longer form wins, as in reverse_proxy_plug.
    for takes_handler, extra in ((True, (None, None)), (False, (None,))):
        if _accepts(function, *args, *extra):
            return function, args, takes_handler
    raise OptionError(
        f"error_callback {given!r} takes neither (error) nor (error, handler) after its {len(args)} fixed arguments; "
        "change its parameters"
    )


def _check_client(client: Any, client_options: Any) -> None:
    if not isinstance(client_options, dict):
        raise OptionError(
            f"client_options {client_options!r} is not a dict; write {{'validate_cert': False}} or the like"
        )
    if isinstance(client, HTTPClient) and client_options:
        raise OptionError("client_options cannot be applied to a client that exists already; pass them to its class")
    if not isinstance(client, str | HTTPClient | None) and not (
        isinstance(client, type) and issubclass(client, HTTPClient)
    ):
        raise OptionError(
            f"client {client!r} is not a client; write a name such as 'curl', an HTTPClient, or a class of one"
        )
    check_client(default_client() if client is None else client, client_options)
