"""The handshake of an upgrade: which requests ask for one, and what the upstream says to it (RFC 6455 section 4).

The upstream is asked first, on a connection of its own, and its answer is the answer: 101 becomes a tunnel, all else is
a response like any other. Until its 101 is there and valid, nothing but the handshake is sent to it; whatever the
client sends behind it stays where it is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest

from tornado_proxy.clients.dial import dial, tls_context
from tornado_proxy.errors import Phase, ProxyError, Retry, refusal
from tornado_proxy.flow import BodyPipe
from tornado_proxy.framing import NO_BODY, Framing, header_value_ok
from tornado_proxy.headers import lines_of
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.options import ProxyOptions
from tornado_proxy.responses import FAULTS, MAX_HEAD, MAX_INTERIM, Head, blamed, members, read_body, read_head
from tornado_proxy.tunnel import TransportSide, TunnelSide
from tornado_proxy.urls import normalized_origin, split_url

# RFC 6455 section 1.3.
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


# The request


def wants_upgrade(request: HTTPServerRequest, framing: Framing) -> bool:
    """Return whether ``request`` asks to become a websocket, in a way that leaves no doubt.

    RFC 9110 section 7.8 and RFC 6455 section 4.1: HTTP/1.1, GET, without a body, ``Upgrade`` nominated in
    ``Connection``, ``websocket`` offered. Anything else goes on as plain HTTP, without the offer: other protocols
    (h2c) would hide from us what is asked of the upstream.
    """
    return (
        "Upgrade" in lines_of(request.headers)
        and request.method == "GET"
        and request.version == "HTTP/1.1"
        and framing == NO_BODY
        and "websocket" in members(request.headers, "Upgrade")
        and "upgrade" in members(request.headers, "Connection")
    )


def check_upgrade(request: HTTPServerRequest, options: ProxyOptions) -> None:
    """Raise ``BadRequest`` with status 403 unless the options let ``request`` open a tunnel.

    A request without ``Origin`` passes: every browser sends one, and no other client can be tricked by a foreign page.
    """
    if not options.websocket:
        raise refusal(403, "websocket is switched off here", phase=Phase.UPGRADE)
    if options.origins is not None:
        for origin in request.headers.get_list("Origin"):
            if normalized_origin(origin) not in options.origins:
                raise refusal(403, "Origin is not one of allowed_origins", phase=Phase.UPGRADE)


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


# The answer


@dataclass(slots=True)
class Switched(UpstreamResponse):
    """A valid 101. Its body is empty; ``side`` is the connection, which :meth:`abort` closes."""

    side: TunnelSide | None = None


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
        if request.on_sending is not None:
            request.on_sending()
        room = side.write(head_bytes(f"{request.method} {target} HTTP/1.1", headers))
        if room is not None:
            await room
        head = await _read_head(side.reader)
        if head.status != 101:
            return _plain_answer(head, side, origin, request)
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
    except FAULTS as exc:
        side.close()
        raise _blamed(exc, origin, Phase.UPGRADE) from exc
    except BaseException:
        side.close()
        raise


def _check_switch(head: Head, keys: list[str]) -> None:
    """Raise ``ValueError`` unless the 101 is the answer to our handshake (RFC 6455 section 4.1, its numbers)."""
    if head.version != "HTTP/1.1":
        raise ValueError("switched protocols in HTTP/1.0")
    # 2 and 3.
    if members(head.headers, "Upgrade") != ["websocket"]:
        raise ValueError("switched to another protocol than websocket")
    if "upgrade" not in members(head.headers, "Connection"):
        raise ValueError("sent a 101 whose Connection does not name Upgrade")
    # 4. So that nothing which only looks like a 101 opens a tunnel.
    if len(keys) != 1 or head.headers.get_list("Sec-Websocket-Accept") != [accept_value(keys[0])]:
        raise ValueError("sent a Sec-WebSocket-Accept that does not answer the key")


async def _read_head(reader: asyncio.StreamReader) -> Head:
    """Return the final head, or that of a 101; raises ``ValueError`` for what is none."""
    for _ in range(MAX_INTERIM + 1):
        head = await read_head(reader)
        if head.status >= 200 or head.status == 101:
            return head
    raise ValueError("sent too many interim responses")


# An answer that is not 101


def _plain_answer(head: Head, side: TransportSide, origin: str, request: UpstreamRequest) -> UpstreamResponse:
    """Return an ordinary response; its body is read as it is taken, and the connection closed behind it."""
    stream = BodyPipe(request.buffer_size)
    reading = asyncio.ensure_future(_read_body(head, side, origin, stream))

    def abort() -> None:
        reading.cancel()
        side.close()

    # A copy: what is removed from it on its way downstream still says how the body is delimited.
    headers = head.headers.copy()
    return UpstreamResponse(head.status, head.reason, headers, stream, origin, version=head.version, on_abort=abort)


async def _read_body(head: Head, side: TransportSide, origin: str, stream: BodyPipe) -> None:
    try:
        async for chunk in read_body("GET", head, side.reader):
            room = stream.write(chunk)
            if room is not None:
                await room
        stream.close()
    except FAULTS as exc:
        stream.fail(_blamed(exc, origin, Phase.BODY))
    finally:
        side.close()


# The connection


async def _dial(origin: str, connect_timeout: float | None, client_options: Mapping[str, Any]) -> TransportSide:
    """Return a new connection to ``origin``, made and verified as the client would."""
    context = None
    if origin.startswith("https:"):
        named = (client_options.get(name) for name in ("ca_certs", "client_cert", "client_key"))
        context = tls_context(client_options.get("validate_cert", True), *named)
    path = client_options.get("unix_socket")
    reader, writer = await dial(origin, connect_timeout, context=context, unix_socket=path, limit=MAX_HEAD)
    return TransportSide(reader, writer)


def _blamed(exc: Exception, origin: str, phase: Phase) -> ProxyError:
    """Return what ``exc``, raised while we read an answer, says about the upstream."""
    error = blamed(exc, origin, phase)
    # Not a connection that was kept alive, so it was not stale: asking again would only ask twice.
    error.retry = Retry.NEVER
    return error
