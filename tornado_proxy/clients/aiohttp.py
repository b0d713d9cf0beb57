"""Any ``aiohttp.ClientSession`` as the upstream client.

Of a session that is given, its connector, auth, middlewares and tracing take part; its default headers and cookies do
not. A middleware of ours, before those, sees to it that each request goes out once and exactly as it shall.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import yarl
from aiohttp import http_exceptions
from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.dial import connect_phase, ready
from tornado_proxy.clients.settings import Settings
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import (
    BadRequest,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    Phase,
    ProxyError,
    Retry,
    UpstreamClosed,
    UpstreamError,
)
from tornado_proxy.flow import BodyPipe
from tornado_proxy.urls import parse_upstream

# What aiohttp would add by itself.
_INVENTED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
# Bytes of a line of a head, and lines; aiohttp's own limits are lower than what passes elsewhere here.
_MAX_LINE = 64 * 1024
_MAX_LINES = 1000
# Seconds between looks at whether the connection of a silent response is still there.
_LOOK = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AiohttpSettings(Settings):
    """What ``client_options`` may say to the aiohttp client that we make."""

    # Seconds that an idle connection is kept. Keep this below the upstream's own keep-alive time.
    max_idle_seconds: int = 60


class AiohttpClient(TaskClient):
    """Sends through ``session``, which stays its maker's to close, or through one of its own, made from options.

    A session is bound to the loop in which it is made, which at the time of ``mount()`` seldom runs; so ``session`` may
    also be a function that makes one. It is called once, at the first request, and what it makes is ours to close.
    """

    capabilities = Capabilities(
        eight_bit_target=False,
        eight_bit_fields=False,
        interim=False,
        expect_continue=False,
        sees_tls_cut=False,
        fresh_connection=False,
    )

    def __init__(
        self, session: aiohttp.ClientSession | Callable[[], aiohttp.ClientSession] | None = None, **options: Any
    ) -> None:
        if session is not None and options:
            raise ValueError("options are for the session that we make; configure the one that is given yourself")
        settings = AiohttpSettings.parse("aiohttp", options)
        super().__init__(settings.max_clients)
        self._settings = settings
        given = isinstance(session, aiohttp.ClientSession)
        self._session: aiohttp.ClientSession | None = session if given else None  # type: ignore[assignment]
        self._make = session if callable(session) else self._make_session
        self._ours = not given
        if session is not None:
            self.capabilities = replace(self.capabilities, unix_socket=False)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        AiohttpSettings.parse("aiohttp", options)

    async def transfer(self, transfer: Transfer) -> None:
        if self._session is None:
            self._session = self._make()
        request = transfer.request
        gate = _Gate(transfer)
        response = await self._session.request(
            request.method,
            _exact_url(transfer),
            # So that aiohttp does not chunk; the rest is said by the gate.
            headers=[field for field in gate.fields if field[0] == "Content-Length"],
            skip_auto_headers=_INVENTED,
            data=None if request.body is None else _upload(transfer),
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=transfer.connect_timeout),
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_LINES,
            # Ours first: what those of a session add, an Authorization perhaps, is meant.
            middlewares=(gate, *self._session._middlewares),
        )
        try:
            headers = HTTPHeaders()
            for name, value in response.raw_headers:
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
            if not 200 <= response.status < 600:
                gate.cut()
                raise ValueError(f"answered with status {response.status}")
            version = response.version
            spelled = "HTTP/1.1" if version is None else f"HTTP/{version.major}.{version.minor}"
            # Of bytes that are no UTF-8 aiohttp makes surrogates.
            reason = (response.reason or "").encode("utf-8", "surrogateescape").decode("latin-1")
            transfer.begin(response.status, reason, headers, spelled)
            while chunk := await gate.read(response.content):
                await transfer.write(chunk)
            # A body that the connection ends is complete to aiohttp however it ended.
            if isinstance(broken := gate.broken(), OSError):
                raise broken
        finally:
            # Where both messages are complete, the connection was given back before this.
            response.close()

    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        origin, phase = transfer.origin, transfer.phase
        message = f"upstream {origin}: {exc}"
        match exc:
            case aiohttp.ConnectionTimeoutError():
                return ConnectTimeout(message, phase=Phase.CONNECT, upstream=origin)
            case aiohttp.ClientConnectorDNSError():
                return ConnectError(message, phase=Phase.RESOLVE, upstream=origin)
            case (
                aiohttp.ClientConnectorCertificateError()
                | aiohttp.ClientSSLError()
                | aiohttp.ServerFingerprintMismatch()
            ):
                return ConnectError(message, phase=Phase.TLS, upstream=origin)
            case aiohttp.ClientConnectorError():
                return ConnectError(message, phase=connect_phase(exc.os_error), upstream=origin)
            case aiohttp.ClientPayloadError() if "not completed" not in str(exc):
                return InvalidResponse(message, phase=phase, upstream=origin)
            case aiohttp.ClientResponseError() | http_exceptions.HttpProcessingError() | ValueError():
                return InvalidResponse(message, phase=phase, upstream=origin)
            case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
                return UpstreamClosed(f"upstream {origin} closed: {exc}", phase=phase, upstream=origin)
        return UpstreamError(f"upstream {origin}: {exc!r}", phase=phase, upstream=origin)

    async def release(self) -> None:
        if self._session is not None and self._ours:
            await self._session.close()

    def _make_session(self) -> aiohttp.ClientSession:
        settings = self._settings
        connector: aiohttp.BaseConnector
        if settings.unix_socket is not None:
            connector = aiohttp.UnixConnector(
                settings.unix_socket, limit=0, keepalive_timeout=settings.max_idle_seconds
            )
        else:
            connector = aiohttp.TCPConnector(
                limit=0, ssl=settings.context(), ttl_dns_cache=60, keepalive_timeout=settings.max_idle_seconds
            )
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)


class _Gate:
    """A middleware that every request passes, so that it goes out once, exactly as it shall, on a sound connection."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self.fields = [(name, _utf8(value)) for name, value in transfer.fields]
        self._connection: Any = None
        self._protocol: Any = None

    async def __call__(
        self, message: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Any]
    ) -> aiohttp.ClientResponse:
        if self._connection is not None:
            # aiohttp repeats idempotent requests, PUT and DELETE among them, when a kept-alive connection dies.
            raise UpstreamClosed(
                f"upstream {self._transfer.origin} closed without an answer",
                phase=Phase.HEAD,
                upstream=self._transfer.origin,
            )
        headers = message.headers
        authorization = headers.get("Authorization")
        headers.clear()
        headers.extend(self.fields)
        if authorization is not None and "Authorization" not in headers:
            headers["Authorization"] = authorization
        # aiohttp's own is upper case.
        message.method = self._transfer.request.method
        write_to = message.send

        async def send_if_quiet(connection: Any) -> aiohttp.ClientResponse:
            """Refuse a connection on which something waits: it would be taken for the answer."""
            self._connection = connection
            transport = connection.transport
            # Under TLS there are records that are nobody's answer, session tickets above all.
            plain = transport.get_extra_info("sslcontext") is None
            if connection.protocol.should_close or (plain and ready(transport, select.POLLIN)):
                error = UpstreamClosed(
                    f"upstream {self._transfer.origin} closed a kept-alive connection",
                    phase=Phase.CONNECT,
                    upstream=self._transfer.origin,
                )
                # Not a byte has left.
                error.retry = Retry.ALWAYS
                raise error
            self._protocol = connection.protocol
            return await write_to(connection)

        setattr(message, "send", send_if_quiet)  # noqa: B010
        response: aiohttp.ClientResponse = await send(message)
        return response

    async def read(self, content: aiohttp.StreamReader) -> bytes:
        """Return the next piece of the body. aiohttp tells nobody of a chunk that is none: it only closes."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    return await content.readany()
            if self._connection.closed and not content.is_eof() and content.exception() is None:
                raise ValueError("sent a body that cannot be read")

    def broken(self) -> BaseException | None:
        """Return what the connection ended with."""
        error: BaseException | None = self._protocol.exception()
        return error

    def cut(self) -> None:
        """Close the connection, also where aiohttp has taken it back already."""
        if self._protocol.transport is not None:
            self._protocol.transport.abort()


def _exact_url(transfer: Transfer) -> yarl.URL:
    """Return a URL that aiohttp sends byte for byte: path and query together stand where the path does."""
    upstream = parse_upstream(transfer.origin)
    return yarl.URL.build(scheme=upstream.scheme, authority=upstream.netloc, path=_utf8(transfer.target), encoded=True)


def _utf8(text: str) -> str:
    """Return what aiohttp, which sends UTF-8, must be given to send the bytes of ``text``, which is latin-1."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError as exc:
        raise BadRequest("aiohttp cannot send bytes that are not UTF-8", phase=Phase.SEND) from exc


async def _upload(transfer: Transfer) -> AsyncIterator[bytes]:
    if isinstance(transfer.request.body, BodyPipe):
        # Makes aiohttp send the head, which it would keep until there is a body to go with it.
        yield b""
    async for piece in transfer.upload():
        yield piece
