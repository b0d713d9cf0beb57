"""A new connection to an upstream, over asyncio: resolved, connected and verified, or an error that says why not."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tornado_proxy.errors import ConnectError, ConnectTimeout, Phase
from tornado_proxy.kernel import seen
from tornado_proxy.urls import parse_upstream


class Reader(asyncio.StreamReader):
    """Gives what has arrived before it says that the connection broke, where asyncio's own drops it.

    An upstream that refuses an upload answers, closes, and so resets the connection: the answer shall be read.
    """

    broken: BaseException | None = None

    def set_exception(self, exc: BaseException) -> None:
        self.broken = exc
        self.feed_eof()


async def dial(
    origin: str,
    connect_timeout: float | None,
    *,
    context: ssl.SSLContext | None = None,
    unix_socket: str | None = None,
    limit: int = 64 * 1024,
    reader_class: type[asyncio.StreamReader] = asyncio.StreamReader,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to ``origin``, a ``scheme://host:port``, or to ``unix_socket`` in its place. Raises ``ConnectError``.

    ``context`` is used where the scheme is https. ``limit`` is about the bytes that are read ahead.
    """
    upstream = parse_upstream(origin)
    options: dict[str, Any] = {}
    if upstream.scheme == "https":
        # The name in the URL, whatever Host says: it is what the certificate must be for.
        options.update(ssl=context or tls_context(), server_hostname=upstream.host)
    loop = asyncio.get_running_loop()
    reader = reader_class(limit, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport: asyncio.Transport
    phase = Phase.CONNECT
    try:
        async with asyncio.timeout(connect_timeout):
            if unix_socket is not None:
                transport, _ = await loop.create_unix_connection(lambda: protocol, unix_socket, **options)
            else:
                # In steps of our own: a look-up that outlives its create_connection() is logged by uvloop as a fault of
                # the program's, whenever it fails in the end.
                phase = Phase.RESOLVE
                addresses = await _resolved(loop, upstream.host, upstream.effective_port)
                phase = Phase.CONNECT
                transport = await _connected(loop, lambda: protocol, addresses, options)
    except TimeoutError as exc:
        raise ConnectTimeout(f"upstream {origin}: no connection in time", phase=phase, upstream=origin) from exc
    except OSError as exc:
        raise ConnectError(f"upstream {origin}: {exc}", phase=connect_phase(exc), upstream=origin) from exc
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _resolved(loop: asyncio.AbstractEventLoop, host: str, port: int) -> list[Any]:
    """Return what getaddrinfo has for ``host``."""
    try:
        # An address needs none of the loop's threads, which may all wait for a resolver that does not answer.
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def _connected(
    loop: asyncio.AbstractEventLoop,
    make_protocol: Callable[[], asyncio.Protocol],
    addresses: list[Any],
    options: dict[str, Any],
) -> asyncio.Transport:
    """Return a connection to the first of ``addresses``, of getaddrinfo, that accepts."""
    error = OSError("the name has no address")
    for family, _, _, _, address in addresses:
        host, port, *rest = address
        if any(rest[1:]):
            # A link-local address of IPv6 is one of several of that name; see RFC 4007 section 11.
            host = f"{host}%{rest[1]}"
        try:
            transport, _ = await loop.create_connection(make_protocol, host, port, family=family, **options)
        except ssl.SSLError:
            raise
        except OSError as exc:
            error = exc
        else:
            return transport
    try:
        raise error
    finally:
        # The two would hold each other.
        del error


def ready(transport: asyncio.BaseTransport, events: int) -> bool:
    """Return whether the socket of ``transport`` has one of ``events`` (of ``select.poll``) now."""
    sock = transport.get_extra_info("socket")
    return sock is not None and sock.fileno() >= 0 and bool(seen(sock.fileno(), events))


def connect_phase(exc: BaseException) -> Phase:
    """Return how far a connection that ended with ``exc`` had come."""
    if isinstance(exc, socket.gaierror):
        return Phase.RESOLVE
    return Phase.TLS if isinstance(exc, ssl.SSLError) else Phase.CONNECT


def new_tls_context(
    validate: bool = True, ca_certs: str | None = None, cert: str | None = None, key: str | None = None
) -> ssl.SSLContext:
    """Return what verifies upstreams, and shows our certificate to them."""
    context = ssl.create_default_context(cafile=ca_certs)
    if not validate:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert is not None:
        context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])
    return context


# Kept, because reading a system's certificates takes tens of milliseconds. Not for libraries that change it.
tls_context = lru_cache(maxsize=32)(new_tls_context)
