"""Any ``aiohttp.ClientSession`` as the upstream client.

Of a session that is given, its connector, auth, middlewares and tracing take part; its default headers and cookies do
not. A middleware of ours, before those, gives each request exactly the fields that it shall have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import yarl
from aiohttp import http_exceptions
from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.dial import connect_phase
from tornado_proxy.clients.settings import Settings
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import (
    BadRequest,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    Phase,
    ProxyError,
    UpstreamClosed,
    UpstreamError,
)
from tornado_proxy.urls import parse_upstream

# What aiohttp would add by itself.
_INVENTED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
# Bytes of a line of a head, and lines; aiohttp's own limits are lower than what passes elsewhere here.
_MAX_LINE = 64 * 1024
_MAX_LINES = 1000


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
            # aiohttp repeats idempotent requests (PUT and DELETE among them) when a kept-alive connection dies.
            self.capabilities = replace(self.capabilities, sends_once=False, unix_socket=False)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        AiohttpSettings.parse("aiohttp", options)

    async def transfer(self, transfer: Transfer) -> None:
        if self._session is None:
            self._session = self._make()
        session, request = self._session, transfer.request
        fields = [(name, _utf8(value)) for name, value in transfer.fields]

        async def exact(
            message: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Any]
        ) -> aiohttp.ClientResponse:
            headers = message.headers
            authorization = headers.get("Authorization")
            headers.clear()
            headers.extend(fields)
            if authorization is not None and "Authorization" not in headers:
                headers["Authorization"] = authorization
            # aiohttp's own is upper case.
            message.method = request.method
            response: aiohttp.ClientResponse = await send(message)
            return response

        response = await session.request(
            request.method,
            _exact_url(transfer),
            # So that aiohttp does not chunk; the rest is said by the middleware.
            headers=[field for field in fields if field[0] == "Content-Length"],
            skip_auto_headers=_INVENTED,
            data=None if request.body is None else _upload(transfer),
            allow_redirects=False,
            raise_for_status=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=transfer.connect_timeout),
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_LINES,
            middlewares=(exact, *session._middlewares),
        )
        try:
            headers = HTTPHeaders()
            for name, value in response.raw_headers:
                headers.add(name.decode("latin-1"), value.decode("latin-1"))
            if not 200 <= response.status < 600:
                raise ValueError(f"answered with status {response.status}")
            version = response.version
            spelled = "HTTP/1.1" if version is None else f"HTTP/{version.major}.{version.minor}"
            transfer.begin(response.status, response.reason or "", headers, spelled)
            async for chunk in response.content.iter_any():
                await transfer.write(chunk)
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
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        # No argument says this: see sends_once.
        session._retry_connection = False
        return session


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
    async for piece in transfer.upload():
        yield piece
