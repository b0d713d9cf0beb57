"""Where a request goes: which upstream URLs and request-targets we accept, and how base, tail and query are joined.

Paths and queries stay as they were received. Nothing here decodes what is sent: ``escapes_base`` decodes only to
judge, and its result is a bool. Pure functions; whatever could be read as another host is refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from tornado_proxy.errors import BadRequest

# A websocket handshake is an HTTP request, so ws and wss only choose between plain and TLS.
_HTTP_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::(.*))?", re.DOTALL)
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._\-]*)")

# What may be sent as a request-target (RFC 9112 section 3.2): no whitespace, no control character, no "#", which
# libcurl would cut. Bytes from 0x80 are not URI characters, but they are common and harmless; Tornado decodes latin1.
_TARGET = re.compile(r"[\x21\x22\x24-\x7e\x80-\xff]+")
# The same without a question mark.
_TAIL = re.compile(r"[\x21\x22\x24-\x3e\x40-\x7e\x80-\xff]*")
_ABSOLUTE_FORM = re.compile(r"(https?)://([^/?\\]*)([^?]*)(?:\?(.*))?", re.IGNORECASE | re.DOTALL)
_HTTP_URL = re.compile(r"(https?://[^/?#\\]*)([\x21\x22\x24-\x7e\x80-\xff]*)", re.IGNORECASE)

_ORIGIN = re.compile(r"(([a-z][a-z0-9+.\-]*)://[^/?#@\s]+):([0-9]{1,5})")

# "%25" before the two digits is one more layer of encoding; the star takes all layers in a single linear pass.
_ENCODED_DOT = re.compile(r"%(?:25)*2e", re.IGNORECASE)
_ENCODED_SLASH = re.compile(r"%(?:25)*(?:2f|5c)|\\", re.IGNORECASE)
_ENCODED_SEMICOLON = re.compile(r"%(?:25)*3b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UpstreamURL:
    """An upstream, validated: ``scheme`` is http or https, ``host`` is lower-case and without brackets.

    ``port`` is ``None`` when the URL names none. ``path`` is the raw base path and ``query`` the raw query, both
    ``""`` when there is none. The rest is derived once, because it is read for each request: ``netloc`` is the value
    for Host and ``origin`` is ``scheme://netloc``, both without a default port and with brackets around IPv6.
    """

    scheme: str
    host: str
    port: int | None
    path: str
    query: str
    netloc: str = field(init=False, repr=False, compare=False)
    origin: str = field(init=False, repr=False, compare=False)
    effective_port: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        default = DEFAULT_PORTS[self.scheme]
        port = default if self.port is None else self.port
        host = f"[{self.host}]" if ":" in self.host else self.host
        netloc = host if port == default else f"{host}:{port}"
        object.__setattr__(self, "netloc", netloc)
        object.__setattr__(self, "origin", f"{self.scheme}://{netloc}")
        object.__setattr__(self, "effective_port", port)


# An upstream function may build URLs for each request, so the cache is bounded.
@lru_cache(maxsize=1024)
def parse_upstream(url: str, inbound_scheme: str | None = None) -> UpstreamURL:
    """Return the upstream that ``url`` names.

    ``ws`` and ``wss`` are taken as ``http`` and ``https``. ``//host/path`` takes ``inbound_scheme`` and its default
    port; ``None`` stands for ``"http"`` and is for the check at start-up, when no request is there yet. Raises
    ``ValueError`` whose message says what is wrong and what to write instead; it never shows a password.
    """
    _refuse_characters(url)
    if url.startswith("//"):
        scheme, rest = (inbound_scheme or "http").lower(), url[2:]
    else:
        scheme, rest = _split_scheme(url)
    if scheme not in _HTTP_SCHEMES:
        raise ValueError(f"upstream '{_redacted(url)}' has the scheme '{scheme}'; use http, https, ws or wss")

    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise ValueError(f"upstream '{_redacted(url)}' has a user name in it; put credentials in rewrite_request")
    host, port = _split_authority(authority, url)
    return UpstreamURL(_HTTP_SCHEMES[scheme], host, port, slash + path, query)


class RequestTarget(NamedTuple):
    """The request-target of an inbound request, in parts.

    ``authority`` is what absolute-form names, which then overrides Host (RFC 9112 section 3.2.2), else ``None``.
    ``path`` is raw and starts with ``/``, but is ``"*"`` for the server as a whole: asterisk-form, and OPTIONS of a URL
    without path and query (section 3.2.4). ``query`` is raw; ``None`` is no ``?`` at all, ``""`` a ``?`` with nothing
    behind.
    """

    authority: str | None
    path: str
    query: str | None


def parse_target(method: str, target: str) -> RequestTarget:
    """Return the parts of a request-target that we accept; raise ``BadRequest`` for all others.

    RFC 9112 section 3.2: origin-form, absolute-form with http or https, and ``*`` for OPTIONS. Authority-form belongs
    to CONNECT, which a gateway has no use for. The message names no part of the target, because it is logged.
    """
    if not _TARGET.fullmatch(target):
        raise BadRequest("request target is empty or has whitespace, a control character or a fragment")
    if method == "CONNECT":
        raise BadRequest("CONNECT is not accepted")
    if target[0] == "/":
        path, mark, query = target.partition("?")
        return RequestTarget(None, path, query if mark else None)
    if target == "*":
        if method != "OPTIONS":
            raise BadRequest("request target '*' is for OPTIONS only")
        return RequestTarget(None, "*", None)
    return _parse_absolute_form(method, target)


def whole_server(upstream: UpstreamURL) -> str:
    """Return the URL to request for ``*``: the upstream's without a path, which says so (RFC 9112 section 3.2.4).

    Behind a base path the upstream is not the whole of its server; then it is the base.
    """
    return join_url(upstream, "", None) if upstream.path.strip("/") or upstream.query else upstream.origin


def join_url(upstream: UpstreamURL, tail: str, query: str | None) -> str:
    """Return the URL to request for ``tail`` below this upstream.

    Base path and tail are joined with exactly one slash; an empty tail leaves the base as it is. Not a byte of the
    tail is changed. The upstream's own query comes first; a bare ``?`` of the inbound request is kept.
    """
    path = upstream.path
    if not tail:
        path = path or "/"
    elif tail[0] == "/":
        path = path.rstrip("/") + tail
    else:
        path = path.rstrip("/") + "/" + tail
    if query is None:
        return f"{upstream.origin}{path}?{upstream.query}" if upstream.query else upstream.origin + path
    both = "&" if upstream.query and query else ""
    return f"{upstream.origin}{path}?{upstream.query}{both}{query}"


def escapes_base(base: str, tail: str) -> bool:
    """True when ``tail`` would leave ``base`` in the eyes of some upstream.

    The tail is read as the most permissive servers read it (RFC 3986 section 5.2.4, and beyond): percent-encoded dots
    and slashes are decoded through any number of layers, a backslash is a slash, ``;params`` are cut off each segment
    and empty segments are merged. One that climbs above the base and comes back counts as well. Nothing is above an
    empty base.
    """
    if ".." not in tail and ("%" not in tail or not _ENCODED_DOT.search(tail)):
        return False
    if not base.strip("/"):
        return False
    decoded = _ENCODED_SLASH.sub("/", _ENCODED_DOT.sub(".", _ENCODED_SEMICOLON.sub(";", tail)))
    depth = 0
    for segment in decoded.split("/"):
        name = segment.partition(";")[0]
        if name == "..":
            depth -= 1
            if depth < 0:
                return True
        elif name not in ("", "."):
            depth += 1
    return False


def split_url(url: str, method: str = "GET") -> tuple[str, str, str]:
    """Return origin, value for Host, and request-target of a full URL, such as a hook may have written.

    The target is byte for byte what ``url`` says, with ``/`` for an empty path, or with ``*`` where ``method`` is
    OPTIONS (RFC 9112 section 3.2.4). Raises ``ValueError`` unless ``url`` is an absolute http or https URL without
    userinfo, fragment, whitespace or control characters.
    """
    match = _HTTP_URL.fullmatch(url)
    if match is None:
        raise ValueError(f"url {_redacted(url.partition('?')[0])!r} is not sendable; write 'http://host/path'")
    origin, target = match.groups()
    # Origins are few and so worth caching; targets are not.
    upstream = parse_upstream(origin)
    if target[:1] != "/":
        # A backslash ends the authority for some parsers and not for others.
        if target[:1] == "\\":
            raise ValueError(f"url {origin!r} has a backslash behind its host; write '/'")
        target = "*" if method == "OPTIONS" and not target else "/" + target
    return upstream.origin, upstream.netloc, target


def normalized_origin(origin: str) -> str:
    """Return an ``Origin`` in the one form in which it can be compared: lower case, without a default port.

    RFC 6454 sections 4 and 6. What is no ``scheme://host:port``, such as ``null``, only becomes lower-case.
    """
    origin = origin.strip(" \t").lower()
    match = _ORIGIN.fullmatch(origin)
    if match is None or DEFAULT_PORTS.get(match[2]) != int(match[3]):
        return origin
    return match[1]


def tail_below(prefix: str, path: str) -> str | None:
    """Return the raw path below a literal prefix, ``None`` when it is not below.

    ``/foo`` takes ``/foo`` (``""``) and ``/foo/x`` (``"/x"``), not ``/foobar``. ``""`` and ``/`` take every path, and
    return it whole. A slash at the end of the prefix is of no meaning.
    """
    prefix = prefix.rstrip("/")
    if not prefix:
        return path
    if not path.startswith(prefix):
        return None
    tail = path[len(prefix) :]
    return tail if not tail or tail[0] == "/" else None


def check_tail(path: str) -> None:
    """Raise ``ValueError`` unless ``path`` can stand, as it is, in a request-target before its query."""
    if not isinstance(path, str) or not _TAIL.fullmatch(path):
        raise ValueError(f"path {path!r} is not raw; percent-encode it, or take it from self.request.path")


def prefix_above(tail: str, path: str) -> str | None:
    """Return what stands before ``tail`` in ``path``, ``None`` unless ``path`` ends in it at a segment's boundary.

    Without a slash at its end. An empty ``tail``, or only a slash, has the whole of ``path`` above it.
    """
    if tail in ("", "/"):
        return path.rstrip("/")
    below = tail if tail[0] == "/" else "/" + tail
    return path[: -len(below)].rstrip("/") if path.endswith(below) else None


def _parse_absolute_form(method: str, target: str) -> RequestTarget:
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        raise BadRequest("request target is neither a path nor an http URL")
    _, authority, path, query = match.groups()
    # "http://a\b" : a browser sees host "a" and path "/b", a strict parser one strange host.
    if path and path[0] != "/":
        raise BadRequest("request target has a backslash behind its host")
    try:
        _split_authority(authority, "request target")
    except ValueError as exc:
        raise BadRequest("request target has an invalid authority") from exc
    if not path:
        path = "*" if method == "OPTIONS" and query is None else "/"
    return RequestTarget(authority, path, query)


def _split_scheme(url: str) -> tuple[str, str]:
    """Return the lower-case scheme, and what stands behind ``://``."""
    match = _SCHEME.match(url)
    if match is not None:
        return match[1].lower(), url[match.end() :]
    scheme, colon, rest = url.partition(":")
    rest = rest.lstrip("/")
    if colon and scheme.lower() in _HTTP_SCHEMES and not rest[:1].isdigit():
        raise ValueError(f"upstream '{_redacted(url)}' lacks '//'; write '{_redacted(f'{scheme}://{rest}')}'")
    if url.startswith("/") or not url.lstrip(":"):
        raise ValueError(f"upstream '{url}' has no host; write 'http://host{url.lstrip(':')}'")
    raise ValueError(f"upstream '{_redacted(url)}' has no scheme; write 'http://{_redacted(url.lstrip(':/'))}'")


def _split_authority(authority: str, url: str) -> tuple[str, int | None]:
    """Return host and port of ``host[:port]``; ``url`` is what an error shows."""
    shown = _redacted(url)
    match = _AUTHORITY.fullmatch(authority)
    if match is None or _is_ipv6(authority):
        cure = f"; write '[{authority}]'" if _is_ipv6(authority) else "; write host or host:port"
        raise ValueError(f"upstream '{shown}' has the invalid host '{authority}'{cure}")
    host, port = match.groups()
    if not host:
        raise ValueError(f"upstream '{shown}' has no host; write 'http://host:port/path'")
    if host[0] == "[":
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ValueError(f"upstream '{shown}' has an invalid IPv6 address; write it like '[::1]', without a zone")
    elif not _HOST.fullmatch(host):
        raise ValueError(f"upstream '{shown}' has the invalid host '{host}'; write a DNS name or an address")
    return host.lower(), None if port is None else _parse_port(port, shown)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def _parse_port(port: str, shown: str) -> int:
    if port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536:
        return int(port)
    raise ValueError(f"upstream '{shown}' has the invalid port '{port}'; write a number from 1 to 65535, or none")


def _refuse_characters(url: str) -> None:
    """Raise for what cannot stand anywhere in an upstream URL."""
    shown = _redacted(url)
    if not url:
        raise ValueError("upstream is empty; write 'http://host:port/path'")
    if not url.isascii():
        # Python's codec is IDNA 2003, which sends some names to another host than a browser would.
        raise ValueError(f"upstream {shown!r} is not ASCII; write the host's xn-- form and percent-encode the path")
    if not url.isprintable() or " " in url:
        raise ValueError(f"upstream {shown!r} has whitespace or a control character; percent-encode it")
    if "\\" in url:
        raise ValueError(f"upstream '{shown}' has a backslash; write '/'")
    if "#" in url:
        raise ValueError(f"upstream '{shown}' has a fragment, which is never sent; remove '#' and what follows")


def _redacted(url: str) -> str:
    """Return ``url`` without the credentials that it may carry, for an error message."""
    at = url.rfind("@")
    if at < 0:
        return url
    match = _SCHEME.match(url)
    start = match.end() if match else 2 if url.startswith("//") else 0
    return f"{url[:start]}***{url[at:]}"
