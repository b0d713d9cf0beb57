"""What differs where many exchanges share a connection: HTTP/2 and HTTP/3. HTTP/1.1 knows nothing of this module.

libcurl (8.23) repeats, on a new connection, a request whose stream was refused (RFC 9113 section 8.7), one whose stream
was reset with HTTP_1_1_REQUIRED, even in the middle of the response, and one whose reused connection was reset before
an answer. `Transfer.on_prereq` allows none of it. Only the first is safe for every request, and libcurl tells the three
apart nowhere but in what it says to CURLOPT_DEBUGFUNCTION, so that is listened to.
"""

from __future__ import annotations

import re

import pycurl

from tornado_proxy.clients.curl.driver import CurlDriver
from tornado_proxy.clients.curl.options import CurlOptions
from tornado_proxy.clients.curl.transfer import CurlRequest, Driver, Transfer
from tornado_proxy.errors import InvalidResponse, Phase, ProxyError, Retry, UpstreamClosed
from tornado_proxy.messages import UpstreamRequest

# Also what GOAWAY says of the streams above its last one: nghttp2 closes those as refused.
_REFUSED = b" refused by server"
_RESET = b" reset by server"

# What libcurl, nghttp2 and nghttp3 say of frames and fields that are none.
_NONSENSE = re.compile(r"nghttp[23]|[Ii]nvalid|Too large")
# Errors that may be that, and may be a connection that broke: CURLE_HTTP2_STREAM and CURLE_HTTP3 have no names.
_AMBIGUOUS = frozenset({pycurl.E_HTTP2, pycurl.E_RECV_ERROR, 92, 95})


def _nobody(*_: object) -> None:
    """Stand for the transfer of a handle that has none."""


class MultiplexedTransfer(Transfer):
    """A transfer that may share its connection with others."""

    __slots__ = ("_refused", "_reset")

    def __init__(self, driver: Driver, request: UpstreamRequest, origin: str) -> None:
        super().__init__(driver, request, origin)
        # The upstream has said that it did not look at the request.
        self._refused = False
        # With what it reset the stream.
        self._reset = ""

    def on_debug(self, kind: int, text: bytes) -> None:
        """Take what libcurl says about this transfer, and copies of all that passes; called from inside it."""
        if kind == pycurl.INFOTYPE_TEXT:
            if _REFUSED in text:
                self._refused = True
            elif _RESET in text:
                self._reset = text.decode("latin-1").strip()

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
        return super()._map_error(errno, message)


class MultiplexedDriver(CurlDriver):
    """Drives libcurl with HTTP/2 or HTTP/3 upstream."""

    def initialize(self, options: CurlOptions) -> None:  # type: ignore[override]
        super().initialize(options)
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

    def _end(self, curl: pycurl.Curl, errno: int, message: str) -> None:
        if errno:
            transfer = self._active[curl]
            if "nghttp2 recv error" in message:
                # libcurl would keep it, and find out with the next request.
                self.sockets.condemn(*transfer.connection, transfer.origin)
            # libcurl does not tell the others on a connection that it is broken; the next event on it does, and there
            # may be none.
            for fd in self.sockets.carrying(*transfer.connection):
                self.loop.call_soon(self._wake, fd)
        super()._end(curl, errno, message)

    def _wake(self, fd: int) -> None:
        if not self._closed:
            self._on_ready(fd, True, False)

    def _release(self, curl: pycurl.Curl) -> None:
        # Not only for the memory: without a function libcurl would say it to stderr.
        curl.setopt(pycurl.VERBOSE, 0)
        curl.setopt(pycurl.DEBUGFUNCTION, _nobody)
        super()._release(curl)
