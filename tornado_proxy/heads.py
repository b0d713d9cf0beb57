"""What is done to the heads that pass: built for the upstream, steps (3) and (4); for the downstream cleaned, step (6),
and made true of the body, step (7).

The rules themselves are in `headers`, `references`, `trailers`, `framing` and `urls`; here they meet a mount's options.
"""

from __future__ import annotations

from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from time import time
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from tornado_proxy.downstream import awaited
from tornado_proxy.errors import BodyTooLarge, HookError, InvalidResponse, LoopDetected, Phase
from tornado_proxy.flow import BodyPipe
from tornado_proxy.forwarding import Forwarding, add_forwarded, add_via, add_x_forwarded, via_count
from tornado_proxy.framing import header_value_ok, is_token, response_length
from tornado_proxy.headers import body_changed, lines_of, remove_hop_by_hop, request_headers
from tornado_proxy.inbound import Inbound
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.options import Forwarded, ProxyOptions
from tornado_proxy.references import rewrite_location, rewrite_refresh, rewrite_set_cookie
from tornado_proxy.trailers import announced, names_listed, upstream_trailers
from tornado_proxy.urls import UpstreamURL, split_url

# Times that our own pseudonym may stand in Via. A chain of several of our kind is no loop; this many are.
_MAX_PASSES = 5

_CONTENT_LENGTH = frozenset({"Content-Length"})
_NOTHING: frozenset[str] = frozenset()
_CREDENTIALS = ("Authorization", "Cookie")
# The fields of a response that point at the upstream, and what makes those point at us that hold a single reference.
_REFERENCES = frozenset({"Location", "Content-Location", "Refresh", "Set-Cookie"})
_REWRITERS = (
    ("Location", rewrite_location),
    ("Content-Location", rewrite_location),
    ("Refresh", rewrite_refresh),
)


def refuse_early(options: ProxyOptions, inbound: Inbound, source: HTTPServerRequest) -> None:
    """Raise for a request that is too large, or has come through us too often, before anything is sent upstream."""
    length = inbound.framing.length
    if options.max_body_size is not None and length is not None and length > options.max_body_size:
        raise BodyTooLarge(f"request body of {length} bytes exceeds {options.max_body_size}", phase=Phase.SEND)
    if options.via is not None and via_count(source.headers, options.via) >= _MAX_PASSES:
        raise LoopDetected(f"request came through {options.via} {_MAX_PASSES} times")


def upstream_headers(options: ProxyOptions, inbound: Inbound, source: HTTPServerRequest) -> HTTPHeaders:
    """Step (3): return the fields to send upstream, cleaned first, our own added last."""
    trusted = options.trusts(source.remote_ip)
    headers = request_headers(source.headers, trusted=trusted)
    if options.normalize_headers is not None:
        headers = _normalized(options.normalize_headers, headers)
        if "Host" in headers:
            # The client writes the URL's, unless the next lines say otherwise.
            del headers["Host"]
    if options.preserve_host_header and "Host" in lines_of(source.headers):
        headers["Host"] = inbound.target.authority or source.headers["Host"]
    if options.forwarded is not None:
        _add_forwarding(headers, options, inbound, source, trusted)
    if options.via is not None:
        add_via(headers, source.version, options.via)
    if inbound.max_forwards is not None:
        headers["Max-Forwards"] = str(inbound.max_forwards - 1)
    if source.method == "TRACE":
        # Whoever answers repeats what it was sent, where a page's script may read it (RFC 9110 section 9.3.8).
        for name in _CREDENTIALS:
            if name in headers:
                del headers[name]
    return headers


def takes_trailers(source: HTTPServerRequest) -> bool:
    """Return whether trailers reach the downstream and are welcome there, so that the upstream may be asked for them.

    RFC 9110 section 10.1.4: whoever passes TE on speaks for all behind it. Over HTTP/1.1 it depends on the server, and
    on the response, whether they do.
    """
    if source.version.startswith("HTTP/1") or "Te" not in source.headers:
        return False
    return any(member.strip(" \t").lower() == "trailers" for member in source.headers["Te"].split(","))


def _add_forwarding(
    headers: HTTPHeaders, options: ProxyOptions, inbound: Inbound, source: HTTPServerRequest, trusted: bool
) -> None:
    host = _public_host(inbound, source)
    # Remembered, because the same client asks again; but a flood of long Hosts shall not fill the memory.
    forwarding_of = _known_forwarding if host is None or len(host) <= 255 else _forwarding
    forwarding = forwarding_of(source.remote_ip, source.protocol, host, inbound.prefix)
    if options.forwarded is not Forwarded.RFC7239:
        add_x_forwarded(headers, forwarding, trusted)
    if options.forwarded is not Forwarded.X_FORWARDED:
        add_forwarded(headers, forwarding, trusted)


def _forwarding(client: str | None, scheme: str, host: str | None, prefix: str | None) -> Forwarding:
    if client is None or client == "0.0.0.0":
        # Tornado's, for a unix-domain socket.
        client = "unknown"
    return Forwarding(client, scheme, host, _port(host, scheme), prefix or None)


_known_forwarding = lru_cache(maxsize=512)(_forwarding)


def check_rewritten(request: UpstreamRequest) -> None:
    """Step (4): refuse what a hook may have written that would break out of the request's head.

    The framing is the client's to write, from the body, so what a hook said about it is removed.
    """
    for name in ("Content-Length", "Transfer-Encoding"):
        if name in request.headers:
            del request.headers[name]
    if not is_token(request.method):
        raise HookError(f"rewrite_request set the method to {request.method!r}, which is not a token")
    for name, value in request.headers.get_all():
        if not is_token(name) or not header_value_ok(value):
            raise HookError(f"rewrite_request set the header {name!r} to a value that cannot be sent")
    try:
        split_url(request.url)
    except ValueError as exc:
        raise HookError(f"rewrite_request set an invalid url: {exc}") from exc


def check_trailers(options: ProxyOptions, trailers: HTTPHeaders) -> HTTPHeaders:
    """Return the fields that came behind an inbound body as ``normalize_headers`` wants them.

    Raises ``HookError`` where it raised, or made of them what cannot be sent.
    """
    if options.normalize_headers is None:
        return trailers
    try:
        trailers = _normalized(options.normalize_headers, trailers)
    except Exception as exc:
        raise HookError("normalize_headers raised", phase=Phase.SEND) from exc
    for name, value in trailers.get_all():
        if not is_token(name) or not header_value_ok(value):
            raise HookError(f"normalize_headers set the trailer {name!r} to a value that cannot be sent")
    return trailers


def pass_trailers(
    trailers: HTTPHeaders | None, source: HTTPServerRequest, request: UpstreamRequest, hooked: bool
) -> None:
    """Let pass what may of the fields behind the inbound body, behind the head as it now stands, and announce it.

    ``request`` streams that body. Called when its head is final, and when ``trailers`` are there, ``None`` before.
    ``hooked`` is whether ``rewrite_request`` is the user's. Which fields it does not want upstream, it has shown in the
    head only, and only by what was there; so it says there which it wants, and all others stay here.
    """
    assert isinstance(request.body, BodyPipe)
    inbound, headers = source.headers, request.headers
    if not hooked and "Trailer" in lines_of(inbound) and (names := announced(inbound)):
        headers["Trailer"] = names
    if trailers is not None:
        listed = frozenset(names_listed(headers)) if hooked else None
        request.body.trailers = upstream_trailers(trailers, inbound, headers, listed)


def interim_headers(headers: HTTPHeaders) -> HTTPHeaders:
    """Return the fields of an interim response that are for the downstream; it has no length (RFC 9110 section 8.6)."""
    remove_hop_by_hop(headers, _CONTENT_LENGTH)
    return headers


def clean_response(
    response: UpstreamResponse,
    options: ProxyOptions,
    inbound: Inbound,
    source: HTTPServerRequest,
    upstream: UpstreamURL,
) -> None:
    """Step (6): leave in ``response`` what is for the downstream. Raises ``InvalidResponse``."""
    if not header_value_ok(response.reason):
        raise InvalidResponse("upstream sent an invalid reason phrase", phase=Phase.HEAD, upstream=response.upstream)
    length = response_length(response.headers)
    drop_length = response.status == 204 or length is None
    headers = response.headers
    remove_hop_by_hop(headers, _CONTENT_LENGTH if drop_length else _NOTHING)
    if length is not None and not drop_length and lines_of(headers)["Content-Length"] != [str(length)]:
        # It was repeated, in one line or in several; one stays.
        headers["Content-Length"] = str(length)
    if options.normalize_headers is not None:
        response.headers = headers = _normalized(options.normalize_headers, headers)
    if (options.rewrite_location or options.cookie_domain or options.cookie_path) and not _REFERENCES.isdisjoint(
        lines_of(headers)
    ):
        _rewrite_references(headers, options, inbound, source, upstream)
    if options.via is not None:
        add_via(headers, response.version, options.via)


def add_date(headers: HTTPHeaders) -> None:
    """Say when the response was received, where the upstream did not (RFC 9110 section 6.6.1)."""
    if "Date" not in lines_of(headers):
        headers["Date"] = http_date(int(time()))


@lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """Return a time, in seconds since the epoch, in the form of RFC 9110 section 5.6.7."""
    return formatdate(second, usegmt=True)


def _refuse_changed_part(response: UpstreamResponse) -> None:
    """Raise where a hook changed a part of a body: Content-Range would say what is not so (RFC 9110 section 14.4)."""
    if response.status == 206:
        raise HookError("a hook changed the body of a partial response (206); remove Range in rewrite_request")


async def beginning(
    response: UpstreamResponse, may_have_body: bool, filter_body: Callable[[bytes], Any] | None
) -> tuple[bytes, bool]:
    """Step (7): return the bytes to send with the head, and whether there are no others; make the head true of them.

    They are none where there is no body (HEAD, 204, 304), all where it was read before or is a hook's, else those
    that have come. ``filter_body`` is ``filter_response_body`` where that is asked.
    """
    filtered = filter_body is not None
    if not may_have_body:
        if filtered or response.body is not None:
            # HEAD and 304 speak of the body that a GET would bring.
            body_changed(response.headers, None)
        if response.status == 204 and "Content-Length" in response.headers:
            # A hook has made it a 204 (RFC 9110 section 8.6).
            del response.headers["Content-Length"]
        return b"", True
    if response.body is not None:
        chunk = response.body
        if filter_body is not None:
            chunk = await awaited(filter_body(chunk))
        if filtered or response.body_replaced:
            _refuse_changed_part(response)
            body_changed(response.headers, len(chunk))
        else:
            response.headers["Content-Length"] = str(len(chunk))
        return chunk, True
    if filtered or response.stream.consumed:
        _refuse_changed_part(response)
        body_changed(response.headers, None)
    chunk = response.stream.read_nowait()
    if filter_body is not None and chunk:
        chunk = await awaited(filter_body(chunk))
    return chunk, False


def _rewrite_references(
    headers: HTTPHeaders, options: ProxyOptions, inbound: Inbound, source: HTTPServerRequest, upstream: UpstreamURL
) -> None:
    prefix = inbound.prefix
    if options.rewrite_location:
        host = _public_host(inbound, source)
        for name, rewrite in _REWRITERS:
            if name in headers:
                headers[name] = rewrite(
                    headers[name], upstream=upstream, mount=prefix, scheme=source.protocol, host=host
                )
    if "Set-Cookie" in headers:
        cookies = headers.get_list("Set-Cookie")
        del headers["Set-Cookie"]
        for cookie in cookies:
            rewritten = rewrite_set_cookie(
                cookie,
                base=upstream.path,
                mount=prefix if options.rewrite_location else None,
                domain=options.cookie_domain,
                path=options.cookie_path,
            )
            headers.add("Set-Cookie", rewritten)


def _normalized(function: Any, headers: HTTPHeaders) -> HTTPHeaders:
    normalized = HTTPHeaders()
    for name, value in function(list(headers.get_all())):
        normalized.add(name, value)
    return normalized


def _public_host(inbound: Inbound, source: HTTPServerRequest) -> str | None:
    """Return the host that the downstream asked for, ``None`` where it named none.

    RFC 9112 section 3.2.2: that in the target counts, whatever Host says. Not ``source.host``, which is Host, or an
    invention of Tornado's where HTTP/1.0 sent none.
    """
    if inbound.target.authority:
        return inbound.target.authority
    hosts = lines_of(source.headers).get("Host")
    return (",".join(hosts) or None) if hosts else None


def _port(host: str | None, scheme: str) -> int | None:
    """Return the port that the downstream asked for: in its Host, or its scheme's own."""
    if host is None:
        return None
    _, colon, port = host.rpartition(":")
    if colon and port.isdecimal():
        return int(port)
    return 443 if scheme == "https" else 80
