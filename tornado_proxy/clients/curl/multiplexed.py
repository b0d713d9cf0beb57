"""What differs where many exchanges share a connection: HTTP/2 and HTTP/3. HTTP/1.1 knows nothing of this module.

libcurl (8.23) repeats, on a new connection, a request whose stream was refused (RFC 9113 section 8.7), one whose stream
was reset with HTTP_1_1_REQUIRED, even in the middle of the response, and one whose reused connection was reset before
an answer. `CurlTransfer.on_prereq` allows none of it. Only the first is safe for every request, and libcurl tells the
three apart nowhere but in what it says to CURLOPT_DEBUGFUNCTION, so that is listened to.
"""

from __future__ import annotations

import re
from typing import Protocol

import pycurl

from tornado_proxy.clients.curl.driver import CurlDriver, nobody
from tornado_proxy.clients.curl.errors import E_HTTP2_STREAM, E_HTTP3, E_QUIC_CONNECT
from tornado_proxy.clients.curl.options import CurlOptions
from tornado_proxy.clients.curl.request import CurlRequest
from tornado_proxy.clients.curl.transfer import CurlTransfer, Driver
from tornado_proxy.errors import ConnectError, InvalidResponse, Phase, ProxyError, Retry, UpstreamClosed
from tornado_proxy.messages import UpstreamRequest

# Also what GOAWAY says of the streams above its last one: nghttp2 closes those as refused.
_REFUSED = b" refused by server"
_RESET = b" reset by server"
# nghttp2 has given the connection up; libcurl finds that out with the next event on it.
_GIVEN_UP = b"nghttp2 shuts down connection"

# What libcurl, nghttp2 and nghttp3 say of frames and fields that are none.
_NONSENSE = re.compile(r"nghttp[23]|[Ii]nvalid|Too large|unexpected data")
# Errors that may be that, and may be a connection that broke.
_AMBIGUOUS = frozenset({pycurl.E_HTTP2, pycurl.E_RECV_ERROR, E_HTTP2_STREAM, E_HTTP3})
# What QUIC calls the failure to connect.
_UNCONNECTED = frozenset({pycurl.E_SEND_ERROR, pycurl.E_RECV_ERROR, E_HTTP3, E_QUIC_CONNECT})

# Seconds that QUIC may put between two packets of ours. libcurl says that a transfer is called off in a packet of its
# own, and not at all if it must not send one at that moment.
_PACED = 0.02


def _broken_off(_: int) -> int:
    """Stand for the rest of an upload that is called off."""
    return int(pycurl.READFUNC_ABORT)


class SharingDriver(Driver, Protocol):
    """What a transfer that may share its connection needs of whoever drives libcurl."""

    quic: bool

    def nudge(self, local_port: int, address: tuple[str, int]) -> None: ...


class MultiplexedTransfer(CurlTransfer):
    """A transfer that may share its connection with others."""

    pauses_ahead = False

    __slots__ = ("_refused", "_reset", "_sharing")

    def __init__(self, driver: SharingDriver, request: UpstreamRequest, origin: str) -> None:
        super().__init__(driver, request, origin)
        self._sharing = driver
        # The upstream has said that it did not look at the request.
        self._refused = False
        # With what it reset the stream.
        self._reset = ""

    @property
    def was_sent(self) -> bool:
        """Whether libcurl was about to send the request, so that the upstream may know of it."""
        return self._sends > 0

    def on_debug(self, kind: int, text: bytes) -> None:
        """Take what libcurl says about this transfer, and copies of all that passes; called from inside it."""
        if kind == pycurl.INFOTYPE_TEXT:
            if _REFUSED in text:
                self._refused = True
            elif _RESET in text:
                self._reset = text.decode("latin-1").strip()
            elif _GIVEN_UP in text:
                self._sharing.loop.call_soon(self._sharing.nudge, *self.connection)

    def on_read(self, limit: int) -> bytes | int:
        chunk = super().on_read(limit)
        if chunk == b"" and self._sharing.quic:
            # libcurl notes the end, and sends it with whatever else there is to send: mostly nothing.
            self._sharing.loop.call_soon(self._sharing.nudge, *self.connection)
        return chunk

    def _map_error(self, errno: int, message: str) -> ProxyError:
        origin = self.origin
        phase = Phase.HEAD if self.response is None else Phase.BODY
        if self._refused:
            error = UpstreamClosed(f"upstream {origin} refused the stream", phase=phase, upstream=origin)
            if self.response is None:
                error.retry = Retry.ALWAYS
            return error
        if self._reset:
            return UpstreamClosed(f"upstream {origin}: {self._reset}", phase=phase, upstream=origin)
        if errno in _AMBIGUOUS and _NONSENSE.search(message):
            # It names the field that is none. Its value may be a secret, and anything may be in either.
            what = ascii(message.partition(", value: [")[0])[1:-1]
            return InvalidResponse(f"upstream {origin}: {what} (libcurl {errno})", phase=phase, upstream=origin)
        if errno in _UNCONNECTED and not self.was_sent:
            # libcurl was not yet about to send.
            what = f"upstream {origin}: {message or 'no connection'} (libcurl {errno})"
            return ConnectError(what, phase=Phase.CONNECT, upstream=origin)
        return super()._map_error(errno, message)


class MultiplexedDriver(CurlDriver):
    """Drives libcurl with HTTP/2 or HTTP/3 upstream."""

    def initialize(self, options: CurlOptions) -> None:  # type: ignore[override]
        super().initialize(options)
        self.quic = options.http_version == "3"
        if not options.multiplex:
            self._multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_NOTHING)

    def start(self, request: CurlRequest) -> None:
        if "Te" in request.headers:
            # Where it becomes HTTP/1.1 after all, TE is for the next hop only (RFC 9110 section 10.1.4). Later versions
            # know no Connection, and libcurl leaves it out.
            request.header_lines.append(b"Connection: TE")
        super().start(request)

    def _new_handle(self) -> pycurl.Curl:
        curl = super()._new_handle()
        # Those that come while the first connection is made wait for it, in place of making one each.
        curl.setopt(pycurl.PIPEWAIT, int(self.options.multiplex))
        return curl

    def _set_up(self, curl: pycurl.Curl, request: CurlRequest) -> None:
        super()._set_up(curl, request)
        transfer = request.transfer
        assert isinstance(transfer, MultiplexedTransfer)
        curl.setopt(pycurl.DEBUGFUNCTION, transfer.on_debug)
        curl.setopt(pycurl.VERBOSE, 1)
        # Whoever is given a connection that died while it was idle (`SocketWatch.is_quiet`) shall have it closed: where
        # a connection can be shared, libcurl keeps it although the request was called off.
        curl.setopt(pycurl.FORBID_REUSE, int(self.sockets.has_dead(transfer.origin)))

    def cancel(self, transfer: CurlTransfer) -> None:
        assert isinstance(transfer, MultiplexedTransfer)
        if self.quic and transfer.curl is not None and transfer.was_sent and not self._closed:
            # Until then it may be called back, but gives nothing more to the upstream.
            if transfer.upload is not None:
                transfer.curl.setopt(pycurl.READFUNCTION, _broken_off)
            self.loop.call_later(_PACED, super().cancel, transfer)
        else:
            super().cancel(transfer)

    def _end(self, curl: pycurl.Curl, errno: int, message: str) -> None:
        if errno:
            transfer = self._active[curl]
            if "nghttp2 recv error" in message:
                # libcurl would keep it, and find out with the next request.
                self.sockets.condemn(*transfer.connection, transfer.origin)
            # libcurl does not tell the others on a connection that it is broken; the next event on it does, and there
            # may be none.
            self.loop.call_soon(self.nudge, *transfer.connection)
        super()._end(curl, errno, message)

    def nudge(self, local_port: int, address: tuple[str, int]) -> None:
        """Have libcurl look after the connection between this port and ``address``, and after all transfers on it."""
        if not self._closed:
            self._drive([(fd, pycurl.CSELECT_IN) for fd in self.sockets.carrying(local_port, address)])

    def _release(self, curl: pycurl.Curl) -> None:
        # Not only for the memory: without a function libcurl would say it to stderr.
        curl.setopt(pycurl.VERBOSE, 0)
        curl.setopt(pycurl.DEBUGFUNCTION, nobody)
        super()._release(curl)
