"""The handshake of an upgrade: which requests ask for one, and what the upstream says to it (RFC 6455 section 4).

The upstream is asked first, on a connection of its own, and its answer is the answer: 101 becomes a tunnel, all else is
a response like any other. Until its 101 is there and valid, nothing but the handshake is sent to it; whatever the
client sends behind it stays where it is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from tornado_proxy.errors import (
    BadRequest,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    Phase,
    ProxyError,
    Retry,
    UpstreamClosed,
)
from tornado_proxy.flow import BodyPipe
from tornado_proxy.framing import NO_BODY, Framing, header_value_ok, is_token, response_length, response_may_have_body
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.options import ProxyOptions
from tornado_proxy.tunnel import Side, TransportSide
from tornado_proxy.urls import normalized_origin, parse_upstream, split_url

# Bytes of a head. Also the most that a connection reads ahead of us.
_MAX_HEAD = 64 * 1024
# Interim responses before the final one, and lines of a trailer section.
_MAX_INTERIM = 20
_MAX_TRAILERS = 100
_READ_SIZE = 64 * 1024

# What an upstream can do to a reader of its answer; see _blamed.
_FAULTS = (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError, ProxyError)

# RFC 6455 section 1.3.
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_STATUS_LINE = re.compile(r"(HTTP/1\.[01]) ([1-5][0-9]{2})(?: ([^\r\n]*))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


# The request


def wants_upgrade(request: HTTPServerRequest, framing: Framing) -> bool:
    """Return whether ``request`` asks to become a websocket, in a way that leaves no doubt.

    RFC 9110 section 7.8 and RFC 6455 section 4.1: HTTP/1.1, GET, without a body, ``Upgrade`` nominated in
    ``Connection``, ``websocket`` offered. Anything else goes on as plain HTTP, without the offer: other protocols
    (h2c) would hide from us what is asked of the upstream.
    """
    return (
        "Upgrade" in request.headers
        and request.method == "GET"
        and request.version == "HTTP/1.1"
        and framing == NO_BODY
        and "websocket" in _members(request.headers, "Upgrade")
        and "upgrade" in _members(request.headers, "Connection")
    )


def check_upgrade(request: HTTPServerRequest, options: ProxyOptions) -> None:
    """Raise ``BadRequest`` with status 403 unless the options let ``request`` open a tunnel.

    A request without ``Origin`` passes: every browser sends one, and no other client can be tricked by a foreign page.
    """
    if not options.websocket:
        raise _forbidden("websocket is switched off here")
    if options.origins is not None:
        for origin in request.headers.get_list("Origin"):
            if normalized_origin(origin) not in options.origins:
                raise _forbidden("Origin is not one of allowed_origins")


def accept_value(key: str) -> str:
    """Return the ``Sec-WebSocket-Accept`` that answers ``key`` (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1((key + _GUID).encode("latin-1"), usedforsecurity=False).digest()).decode()


def head_bytes(start_line: str, headers: HTTPHeaders) -> bytes:
    """Return a head that switches protocols: these fields as they are, and the two that ask for it or grant it.

    Raises ``ValueError`` for what would not stay in its line, which a hook may have written.
    """
    if not all(header_value_ok(text) for text in (start_line, *headers.values())):
        raise ValueError("a field of the 101 has a control character")
    # Tornado's spelling of the names is as good for HTTP, but not for every program that reads them.
    fields = [f"{name.replace('Sec-Websocket-', 'Sec-WebSocket-')}: {value}" for name, value in headers.get_all()]
    return "\r\n".join([start_line, *fields, "Connection: Upgrade", "Upgrade: websocket", "", ""]).encode("latin-1")


def _members(headers: HTTPHeaders, name: str) -> list[str]:
    """Return the members of the list in ``name``, over all its lines, in lower case."""
    return [member.strip(" \t").lower() for member in ",".join(headers.get_list(name)).split(",")]


def _forbidden(message: str) -> BadRequest:
    error = BadRequest(message, phase=Phase.UPGRADE)
    error.status_code = 403
    return error


# The answer


@dataclass(slots=True)
class Switched(UpstreamResponse):
    """A valid 101. Its body is empty; ``side`` is the connection, which :meth:`abort` closes."""

    side: Side | None = None


@dataclass(frozen=True, slots=True)
class _Head:
    version: str
    status: int
    reason: str
    headers: HTTPHeaders


async def shake_hands(request: UpstreamRequest, client_options: Mapping[str, Any]) -> UpstreamResponse:
    """Ask the upstream to switch to websocket; return its answer, which is :class:`Switched` when it does.

    ``client_options`` are those of the curl client; of these count the ones about TLS and ``unix_socket``. Raises a
    ``ProxyError``; a handshake that was sent is never repeated.
    """
    origin, netloc, target = split_url(request.url)
    side = await _dial(origin, request.connect_timeout, client_options)
    try:
        headers = request.headers.copy()
        if "Host" not in headers:
            headers = HTTPHeaders({"Host": netloc})
            for name, value in request.headers.get_all():
                headers.add(name, value)
        room = side.write(head_bytes(f"{request.method} {target} HTTP/1.1", headers))
        if room is not None:
            await room
        head = await _read_head(side.reader)
        if head.status != 101:
            return _refusal(head, side, origin, request)
        _check_switch(head, headers.get_list("Sec-Websocket-Key"))
        # RFC 9110 section 8.6: there is no body that they could be about.
        for name in ("Content-Length", "Transfer-Encoding"):
            if name in head.headers:
                del head.headers[name]
        stream = BodyPipe(request.buffer_size)
        stream.close()
        return Switched(
            101, head.reason, head.headers, stream, origin, version=head.version, on_abort=side.close, side=side
        )
    except _FAULTS as exc:
        side.close()
        raise _blamed(exc, origin, Phase.UPGRADE) from exc
    except BaseException:
        side.close()
        raise


def _check_switch(head: _Head, keys: list[str]) -> None:
    """Raise ``ValueError`` unless the 101 is the answer to our handshake (RFC 6455 section 4.1, its numbers)."""
    if head.version != "HTTP/1.1":
        raise ValueError("switched protocols in HTTP/1.0")
    # 2 and 3.
    if _members(head.headers, "Upgrade") != ["websocket"]:
        raise ValueError("switched to another protocol than websocket")
    if "upgrade" not in _members(head.headers, "Connection"):
        raise ValueError("sent a 101 whose Connection does not name Upgrade")
    # 4. So that nothing which only looks like a 101 opens a tunnel.
    if len(keys) != 1 or head.headers.get_list("Sec-Websocket-Accept") != [accept_value(keys[0])]:
        raise ValueError("sent a Sec-WebSocket-Accept that does not answer the key")


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    """Return the final head, or that of a 101; raises ``ValueError`` for what is none."""
    for _ in range(_MAX_INTERIM + 1):
        head = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        if head.status >= 200 or head.status == 101:
            return head
    raise ValueError("sent too many interim responses")


def _parse_head(raw: bytes) -> _Head:
    """Return the parts of a head that ends with its empty line; raise ``ValueError`` for one that could be read twice.

    RFC 9112 sections 2.2, 4 and 5: no bare CR or LF, no folded line, no space around a name.
    """
    start_line, *lines = raw.decode("latin-1")[:-4].split("\r\n")
    match = _STATUS_LINE.fullmatch(start_line)
    if match is None:
        raise ValueError(f"sent an invalid status line: {start_line[:80]!r}")
    headers = HTTPHeaders()
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip(" \t")
        if not colon or not is_token(name) or not header_value_ok(value):
            raise ValueError(f"sent an invalid field: {name[:80]!r}")
        headers.add(name, value)
    return _Head(match[1], int(match[2]), match[3] or "", headers)


# An answer that is not 101


def _refusal(head: _Head, side: TransportSide, origin: str, request: UpstreamRequest) -> UpstreamResponse:
    """Return an ordinary response; its body is read as it is taken, and the connection closed behind it."""
    stream = BodyPipe(request.buffer_size)
    reading = asyncio.ensure_future(_read_body(head, side, origin, stream))

    def abort() -> None:
        reading.cancel()
        side.close()

    # A copy: what is removed from it on its way downstream still says how the body is delimited.
    headers = head.headers.copy()
    return UpstreamResponse(head.status, head.reason, headers, stream, origin, version=head.version, on_abort=abort)


async def _read_body(head: _Head, side: TransportSide, origin: str, stream: BodyPipe) -> None:
    try:
        async for chunk in _body(head, side.reader):
            room = stream.write(chunk)
            if room is not None:
                await room
        stream.close()
    except _FAULTS as exc:
        stream.fail(_blamed(exc, origin, Phase.BODY))
    finally:
        side.close()


async def _body(head: _Head, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the body, delimited as RFC 9112 section 6.3 says; raise ``ValueError`` where nobody could say how."""
    if not response_may_have_body("GET", head.status):
        return
    codings = _members(head.headers, "Transfer-Encoding")
    if codings != [""]:
        if codings != ["chunked"] or head.version != "HTTP/1.1":
            raise ValueError("sent a Transfer-Encoding other than chunked")
        while size := _chunk_size(await reader.readuntil(b"\n")):
            async for piece in _exactly(reader, size):
                yield piece
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError("sent a chunk that does not end where it should")
        for _ in range(_MAX_TRAILERS):
            if await reader.readuntil(b"\n") == b"\r\n":
                return
        raise ValueError("sent too many trailers")
    length = response_length(head.headers)
    if length is not None:
        async for piece in _exactly(reader, length):
            yield piece
        return
    while piece := await reader.read(_READ_SIZE):
        yield piece


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, _READ_SIZE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


def _chunk_size(line: bytes) -> int:
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise ValueError("sent an invalid chunk size")
    return int(match[1], 16)


# The connection


async def _dial(origin: str, connect_timeout: float | None, client_options: Mapping[str, Any]) -> TransportSide:
    """Return a new connection to ``origin``, made and verified as the curl client would."""
    upstream = parse_upstream(origin)
    path = client_options.get("unix_socket")
    tls: dict[str, Any] = {}
    try:
        async with asyncio.timeout(connect_timeout):
            if upstream.scheme == "https":
                named = (client_options.get(name) for name in ("ca_certs", "client_cert", "client_key"))
                tls["ssl"] = _tls_context(client_options.get("validate_cert", True), *named)
                # The name in the URL, whatever Host says: it is what the certificate must be for.
                tls["server_hostname"] = upstream.host
            if path is not None:
                reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_HEAD, **tls)
            else:
                reader, writer = await asyncio.open_connection(
                    upstream.host, upstream.effective_port, limit=_MAX_HEAD, **tls
                )
    except TimeoutError as exc:
        raise ConnectTimeout(f"upstream {origin}: no connection in time", phase=Phase.CONNECT, upstream=origin) from exc
    except OSError as exc:
        phases = {socket.gaierror: Phase.RESOLVE, ssl.SSLError: Phase.TLS}
        phase = next((phases[kind] for kind in phases if isinstance(exc, kind)), Phase.CONNECT)
        raise ConnectError(f"upstream {origin}: {exc}", phase=phase, upstream=origin) from exc
    return TransportSide(reader, writer)


@lru_cache(maxsize=32)
def _tls_context(validate: bool, ca_certs: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    # Kept, because reading a system's certificates takes tens of milliseconds.
    context = ssl.create_default_context(cafile=ca_certs)
    if not validate:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert is not None:
        context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _blamed(exc: Exception, origin: str, phase: Phase) -> ProxyError:
    """Return what ``exc``, raised while we read an answer, says about the upstream."""
    error: ProxyError
    if isinstance(exc, asyncio.IncompleteReadError | OSError):
        what = "before its answer was complete" if phase is Phase.UPGRADE else "in the middle of its body"
        error = UpstreamClosed(f"upstream {origin} closed {what}", phase=phase, upstream=origin)
    elif isinstance(exc, asyncio.LimitOverrunError):
        error = InvalidResponse(f"upstream {origin} sent too long a head or line", phase=phase, upstream=origin)
    elif isinstance(exc, ProxyError):
        error = exc
    else:
        error = InvalidResponse(f"upstream {origin} {exc}", phase=phase, upstream=origin)
    # Not a connection that was kept alive, so it was not stale: asking again would only ask twice.
    error.retry = Retry.NEVER
    return error
