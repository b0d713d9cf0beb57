"""Any ``httpx.AsyncClient`` as the upstream client: its auth, mounts and transports, an in-process ASGI app among them.

Requests are made here and not by the client's ``build_request``, so that nothing is added: the client's own headers,
cookies and base URL do not take part. What happens from ``send`` on does: auth, event hooks, mounts, transports.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import unquote

import httpx
from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.dial import connect_phase, new_tls_context
from tornado_proxy.clients.settings import PoolSettings
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import (
    BadRequest,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    NoUpstreamAvailable,
    Phase,
    ProxyError,
    UpstreamClosed,
    UpstreamError,
)

# What httpx says in one class, RemoteProtocolError, of both an upstream that breaks off and one that talks nonsense.
_BROKEN_OFF = ("disconnected", "peer closed", "peer unexpectedly closed", "ConnectionTerminated", "StreamReset")


class HttpxClient(TaskClient):
    """Sends through ``client``, which stays its maker's to close, or through one of its own, made from options.

    httpx reads the response only when the request is sent, or cannot be sent any more. It can speak HTTP/2, but is not
    asked to: httpcore (1.0) resets no stream that is abandoned, and acknowledges nothing of what still comes on it, so
    that a few dozen downstreams that leave bring its connection to a halt.
    """

    capabilities = Capabilities(
        early_response=False,
        eight_bit_target=False,
        interim=False,
        expect_continue=False,
        sees_tls_cut=False,
    )

    def __init__(self, client: httpx.AsyncClient | None = None, **options: Any) -> None:
        if client is not None and options:
            raise ValueError("options are for the client that we make; configure the one that is given yourself")
        settings = PoolSettings.parse("httpx", options)
        super().__init__(settings.max_clients)
        self._settings = settings
        self._given = client
        # Ours, made on first use: the one that keeps its connections, and the one for fresh_connection.
        self._own: dict[bool, httpx.AsyncClient] = {}
        if client is not None:
            streams = not isinstance(client._transport, httpx.ASGITransport)
            self.capabilities = replace(
                self.capabilities, streams_response=streams, fresh_connection=False, unix_socket=False
            )

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        PoolSettings.parse("httpx", options)

    async def transfer(self, transfer: Transfer) -> None:
        client = self._given or self._own_client(transfer.request.fresh_connection)
        response = await client.send(_message(transfer), stream=True, follow_redirects=False)
        try:
            headers = HTTPHeaders()
            for name, value in response.headers.raw:
                headers.add(name.decode("latin-1"), value.decode("latin-1").strip(" \t"))
            extensions = response.extensions
            reason = extensions.get("reason_phrase", b"").decode("latin-1")
            version = extensions.get("http_version", b"HTTP/1.1").decode("latin-1")
            if response.status_code < 200:
                raise InvalidResponse(
                    f"upstream {transfer.origin} answered with status {response.status_code}",
                    phase=Phase.HEAD,
                    upstream=transfer.origin,
                )
            transfer.begin(
                response.status_code, reason, headers, version.removesuffix(".0") if "2" in version else version
            )
            # Not aiter_raw(), which gives the connection back before it says that the body has ended.
            stream = response.stream
            assert isinstance(stream, httpx.AsyncByteStream)
            async for chunk in stream:
                await transfer.write(chunk)
            # From here on nobody interrupts: the connection is given back.
            transfer.end()
        finally:
            await response.aclose()

    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        origin, phase = transfer.origin, transfer.phase
        message = f"upstream {origin}: {exc}"
        match exc:
            case httpx.PoolTimeout():
                return NoUpstreamAvailable(f"no free connection to {origin}", upstream=origin)
            case httpx.ConnectTimeout():
                return ConnectTimeout(f"{message or 'no connection in time'}", phase=Phase.CONNECT, upstream=origin)
            case httpx.ConnectError():
                return ConnectError(message, phase=_connect_phase(exc), upstream=origin)
            case httpx.LocalProtocolError():
                return BadRequest(f"httpx cannot send this request: {exc}", phase=Phase.SEND, upstream=origin)
            case httpx.RemoteProtocolError() if not any(word in str(exc) for word in _BROKEN_OFF):
                return InvalidResponse(message, phase=phase, upstream=origin)
            case httpx.NetworkError() | httpx.RemoteProtocolError():
                return UpstreamClosed(f"upstream {origin} closed: {exc}", phase=phase, upstream=origin)
        return UpstreamError(f"upstream {origin}: {exc!r}", phase=phase, upstream=origin)

    async def release(self) -> None:
        for client in self._own.values():
            await client.aclose()

    def _own_client(self, fresh: bool) -> httpx.AsyncClient:
        client = self._own.get(fresh)
        if client is None:
            settings = self._settings
            transport = httpx.AsyncHTTPTransport(
                # Not shared with anyone: httpx writes into it.
                verify=new_tls_context(
                    settings.validate_cert, settings.ca_certs, settings.client_cert, settings.client_key
                ),
                trust_env=False,
                limits=httpx.Limits(
                    max_connections=None,
                    max_keepalive_connections=0 if fresh else settings.max_idle_connections,
                    keepalive_expiry=settings.max_idle_seconds,
                ),
                uds=settings.unix_socket,
            )
            # httpx collects the cookies of responses; this jar takes none.
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
            client = httpx.AsyncClient(transport=transport, trust_env=False, cookies=no_cookies)
            self._own[fresh] = client
        return client


class _ExactURL(httpx.URL):
    """A URL whose path and query stay as they are; httpx's own would resolve dots and quote what it thinks needs it."""

    def __init__(self, origin: str, target: str) -> None:
        super().__init__(origin)
        self._target = target.encode("latin-1")

    @property
    def raw_path(self) -> bytes:
        return self._target

    @property
    def path(self) -> str:
        return unquote(self._target.partition(b"?")[0].decode("latin-1")) or "/"

    @property
    def query(self) -> bytes:
        return self._target.partition(b"?")[2]


class _Upload(httpx.AsyncByteStream):
    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._transfer.upload()


def _message(transfer: Transfer) -> httpx.Request:
    request = transfer.request
    seconds = transfer.connect_timeout
    message = httpx.Request(
        request.method,
        transfer.origin,
        headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in transfer.fields],
        stream=httpx.ByteStream(b"") if request.body is None else _Upload(transfer),
        extensions={"timeout": {"connect": seconds, "pool": seconds, "read": None, "write": None}},
    )
    # httpx's own are upper case, and normalized.
    message.method = request.method
    message.url = _ExactURL(transfer.origin, transfer.target)
    return message


def _connect_phase(exc: BaseException) -> Phase:
    """Return the phase that the first telling exception behind ``exc`` says."""
    cause: BaseException | None = exc
    while cause is not None:
        if (phase := connect_phase(cause)) is not Phase.CONNECT:
            return phase
        cause = cause.__cause__ or cause.__context__
    return Phase.CONNECT
