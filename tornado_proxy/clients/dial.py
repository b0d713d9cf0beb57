"""A new connection to an upstream, over asyncio: resolved, connected and verified, or an error that says why not."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from functools import lru_cache
from typing import Any

from tornado_proxy.errors import ConnectError, ConnectTimeout, Phase
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
    try:
        async with asyncio.timeout(connect_timeout):
            if unix_socket is not None:
                transport, _ = await loop.create_unix_connection(lambda: protocol, unix_socket, **options)
            else:
                transport, _ = await loop.create_connection(
                    lambda: protocol, upstream.host, upstream.effective_port, **options
                )
    except TimeoutError as exc:
        raise ConnectTimeout(f"upstream {origin}: no connection in time", phase=Phase.CONNECT, upstream=origin) from exc
    except OSError as exc:
        raise ConnectError(f"upstream {origin}: {exc}", phase=connect_phase(exc), upstream=origin) from exc
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def ready(transport: asyncio.BaseTransport, events: int) -> bool:
    """Return whether the socket of ``transport`` has one of ``events`` (of ``select.poll``) now."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), events)
    return bool(poll.poll(0))


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
