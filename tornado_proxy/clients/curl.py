"""libcurl as the upstream client: a lean, streaming, cancellable driver on Tornado's ``CurlAsyncHTTPClient``.

Theory of operation. One *transfer* is one libcurl easy handle doing one request. libcurl calls us back for each header
line and each piece of body; those callbacks only fill the head and the response's pipe, and set futures, so what they
cause happens in the next turn of the loop. Back-pressure is libcurl's own pause: a callback that finds its pipe full
(or empty, when sending) returns PAUSE, and the pipe calls us when that has changed.

Rules for editors:

1. Never call into libcurl from a callback that libcurl makes: add_handle, remove_handle, pause and socket_action are
   called from the loop only (curl_multi_socket_action(3)).
2. No code of users runs inside a callback: set a future, fill a pipe, record an error. Nothing else.
3. Every option that differs between requests is set for each request; handles keep everything else (`_new_handle`).
   There is no ``reset()`` in between: it would cost about 25 calls for each request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pycurl
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import HTTPRequest
from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.clients.curl_options import CurlOptions
from tornado_proxy.clients.sockets import SocketWatch
from tornado_proxy.errors import (
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    NoUpstreamAvailable,
    Phase,
    ProxyError,
    Retry,
    UpstreamClosed,
    UpstreamError,
)
from tornado_proxy.flow import BodyPipe
from tornado_proxy.headers import parse_fields
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.urls import split_url

log = logging.getLogger(__name__)

_HTTP_VERSIONS = {
    "1.1": pycurl.CURL_HTTP_VERSION_1_1,
    "2": pycurl.CURL_HTTP_VERSION_2TLS,
    "2-prior-knowledge": pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE,
    "3": pycurl.CURL_HTTP_VERSION_3,
}

# Seconds; libcurl takes 0 for "five minutes".
_FOREVER = 1_000_000

# Milliseconds that an upstream which knows nothing of expectations holds the body up. RFC 9110 section 10.1.1 asks for
# such a limit, and this is libcurl's own.
_CONTINUE_TIMEOUT = 1000

# Interim responses that one answer may have; libcurl itself takes thousands.
_MAX_INTERIM = 20

# libcurl's errors in our words: class and phase. A phase of None follows from how far the transfer had come.
_ERRORS: dict[int, tuple[type[ProxyError], Phase | None]] = {
    pycurl.E_COULDNT_RESOLVE_HOST: (ConnectError, Phase.RESOLVE),
    pycurl.E_COULDNT_CONNECT: (ConnectError, Phase.CONNECT),
    # The only time limit that libcurl keeps for us is CONNECTTIMEOUT.
    pycurl.E_OPERATION_TIMEDOUT: (ConnectTimeout, Phase.CONNECT),
    pycurl.E_SSL_CONNECT_ERROR: (ConnectError, Phase.TLS),
    pycurl.E_PEER_FAILED_VERIFICATION: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CERTPROBLEM: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CIPHER: (ConnectError, Phase.TLS),
    pycurl.E_SSL_CACERT_BADFILE: (ConnectError, Phase.TLS),
    pycurl.E_SSL_ISSUER_ERROR: (ConnectError, Phase.TLS),
    pycurl.E_SEND_ERROR: (UpstreamClosed, Phase.SEND),
    pycurl.E_SEND_FAIL_REWIND: (UpstreamClosed, Phase.SEND),
    pycurl.E_GOT_NOTHING: (UpstreamClosed, Phase.HEAD),
    pycurl.E_RECV_ERROR: (UpstreamClosed, None),
    pycurl.E_PARTIAL_FILE: (UpstreamClosed, Phase.BODY),
    # Returned by our own PREREQFUNCTION: the connection died and a second try is not safe.
    pycurl.E_ABORTED_BY_CALLBACK: (UpstreamClosed, Phase.SEND),
    pycurl.E_UNSUPPORTED_PROTOCOL: (InvalidResponse, Phase.HEAD),
    pycurl.E_FTP_WEIRD_SERVER_REPLY: (InvalidResponse, None),
    pycurl.E_BAD_CONTENT_ENCODING: (InvalidResponse, None),
    pycurl.E_WRITE_ERROR: (InvalidResponse, None),
    pycurl.E_HTTP2: (UpstreamClosed, None),
    92: (UpstreamClosed, None),  # CURLE_HTTP2_STREAM, which pycurl does not name
}


class CurlRequest(HTTPRequest):
    """Tornado's request, with what it cannot say: a raw target, a streamed upload, a transfer in progress.

    ``header_callback`` and ``streaming_callback`` are handed to libcurl as they are and called from inside it (rule 2):
    both get ``bytes``, one header line or one piece of body; the latter may return ``WRITEFUNC_PAUSE``.
    """

    def __init__(self, transfer: _Transfer, request: UpstreamRequest, origin: str, target: str) -> None:
        super().__init__(
            origin + "/",
            method=request.method,
            headers=request.headers,
            connect_timeout=request.connect_timeout or _FOREVER,
            request_timeout=0,
            follow_redirects=False,
            decompress_response=False,
            allow_nonstandard_methods=True,
            header_callback=transfer.on_header,  # type: ignore[arg-type]
            streaming_callback=transfer.on_chunk,  # type: ignore[arg-type]
        )
        self.target = target
        self.header_lines = _header_lines(request)
        self.upload = request.body
        self.fresh = request.fresh_connection
        self.transfer = transfer


def _header_lines(request: UpstreamRequest) -> list[bytes]:
    """Return HTTPHEADER: the request's fields as they are, and those that libcurl would invent, suppressed."""
    headers = request.headers
    # "Name;" sends an empty field, "Name:" none at all (CURLOPT_HTTPHEADER).
    lines = [f"{name}: {value}" if value else f"{name};" for name, value in headers.get_all()]
    # A callback-driven upload makes libcurl wait for "100 Continue" unless Expect is suppressed.
    lines.append("Expect: 100-continue" if request.expect_continue else "Expect:")
    if "User-Agent" not in headers:
        lines.append("User-Agent:")
    if "Accept" not in headers:
        lines.append("Accept:")
    if isinstance(request.body, BodyPipe) and request.body.length is None:
        lines.append("Transfer-Encoding: chunked")
    return "\n".join(lines).encode("latin-1").split(b"\n")


class _Transfer:
    """One request in libcurl's hands, and what came back so far.

    Ends exactly once, in `finish` (libcurl says so) or `cancel` (we do).
    """

    __slots__ = (
        "_answered_417",
        "_driver",
        "_ends_at_head",
        "_expecting",
        "_interim",
        "_lines",
        "_on_interim",
        "_recv_paused",
        "_send_paused",
        "_sends",
        "curl",
        "error",
        "head",
        "origin",
        "queue_timer",
        "response",
        "stream",
        "trailers",
        "upload",
    )

    def __init__(self, driver: CurlDriver, request: UpstreamRequest, origin: str) -> None:
        self.origin = origin
        # Resolved with the response at the end of its head, or failed.
        self.head: asyncio.Future[UpstreamResponse] = driver.loop.create_future()
        self.stream = BodyPipe(request.buffer_size)
        self.upload = request.body if isinstance(request.body, BodyPipe) else None
        # Set once the final head is complete; header lines after that are trailers.
        self.response: UpstreamResponse | None = None
        self.trailers: list[bytes] = []
        # What a callback found wrong; it outranks the error that libcurl then reports.
        self.error: ProxyError | None = None
        # Set while libcurl has the request; None before (queued) and after.
        self.curl: pycurl.Curl | None = None
        self.queue_timer: asyncio.TimerHandle | None = None
        # libcurl would wait for the body of an answer to HEAD when the request has one; see _take_head.
        self._ends_at_head = request.method == "HEAD" and request.body is not None
        # Times that libcurl was about to send the request; see on_prereq.
        self._sends = 0
        # The upstream has been asked whether it wants the body, and has not said so yet.
        self._expecting = request.expect_continue
        self._answered_417 = False
        self._on_interim = request.on_interim
        self._driver = driver
        self._lines: list[bytes] = []
        self._interim = 0
        self._send_paused = False
        self._recv_paused = False

    # -- called by libcurl (rules 1 and 2)

    def on_prereq(self, _ip: str, _local_ip: str, _port: int, local_port: int) -> int:
        """Allow the request to be sent once, on a quiet connection; called when libcurl is about to use one.

        libcurl takes a connection that it looked at less than a second ago for healthy, and repeats a request, whatever
        its method, when a reused connection dies before the first byte of an answer (``Curl_retry_request``). Both are
        refused here, which it reports as E_ABORTED_BY_CALLBACK: bytes that wait on an idle connection belong to no
        request of ours, and whether a second try is safe (RFC 9110 section 9.2.2) only the forwarder knows.
        """
        self._sends += 1
        if self._sends > 1:
            return int(pycurl.PREREQFUNC_ABORT)
        if self._driver.sockets.is_quiet(local_port):
            return int(pycurl.PREREQFUNC_OK)
        self.error = UpstreamClosed(
            f"upstream {self.origin} closed a kept-alive connection", phase=Phase.CONNECT, upstream=self.origin
        )
        # Not a byte has left.
        self.error.retry = Retry.ALWAYS
        return int(pycurl.PREREQFUNC_ABORT)

    def on_header(self, line: bytes) -> int | None:
        """Take one line: status line, fields, blank; again after an interim response; then trailers."""
        if self.response is not None:
            if len(self.trailers) < 100:
                self.trailers.append(line)
            return None
        if line not in (b"\r\n", b"\n"):
            self._lines.append(line)
            return None
        lines, self._lines = self._lines, []
        try:
            return self._take_head(lines)
        except ValueError as exc:
            return self._refuse(f"sent an invalid head: {exc}")

    def on_chunk(self, chunk: bytes) -> int | None:
        """Take one piece of body, or none of it: libcurl keeps it until the transfer is resumed."""
        stream = self.stream
        if stream.full:
            self._recv_paused = True
            return int(pycurl.WRITEFUNC_PAUSE)
        stream.write(chunk)
        return None

    def on_read(self, limit: int) -> bytes | int:
        """Give up to ``limit`` bytes of the upload; ``b""`` is its end."""
        assert self.upload is not None
        if self._expecting:
            # The upstream said 100, or nothing for as long as libcurl waits (`_CONTINUE_TIMEOUT`).
            self._expecting = False
            self._tell_interim(100, "Continue", HTTPHeaders())
        try:
            chunk = self.upload.take(limit)
        except ProxyError as exc:
            self.error = exc
            return int(pycurl.READFUNC_ABORT)
        if chunk is None:
            self._send_paused = True
            return int(pycurl.READFUNC_PAUSE)
        return chunk

    def _take_head(self, lines: list[bytes]) -> int | None:
        version, _, rest = lines[0].rstrip().decode("latin-1").partition(" ")
        code, _, reason = rest.partition(" ")
        if len(code) != 3 or not code.isdecimal():
            return self._refuse(f"sent an invalid status line: {rest!r}")
        status = int(code)
        if 100 <= status < 200 and status != 101:
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                return self._refuse("sent too many interim responses")
            if status != 100:
                self._tell_interim(status, reason, parse_fields(lines[1:]))
            return None
        if not 200 <= status < 600:
            # libcurl takes an unasked 101 for a final response and what follows for its body.
            return self._refuse(f"answered with status {status}")
        self.response = UpstreamResponse(
            status, reason, parse_fields(lines[1:]), self.stream, self.origin, version=version, on_abort=self.cancel
        )
        if status == 417 and self._expecting:
            # libcurl drops this body and is about to send the request again, without the expectation, which on_prereq
            # refuses.
            self.response.headers["Content-Length"] = "0"
            self._answered_417 = self._ends_at_head = True
        if not self.head.done():
            self.head.set_result(self.response)
        if self._ends_at_head:
            self._driver.loop.call_soon(self._end_at_head)
        return None

    def _tell_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        if self._on_interim is not None:
            self._driver.loop.call_soon(self._on_interim, status, reason, headers)

    def _refuse(self, what: str) -> int:
        self.error = InvalidResponse(f"upstream {self.origin} {what}", phase=Phase.HEAD, upstream=self.origin)
        return -1

    # -- called from the loop

    def resume_receiving(self) -> None:
        """The response's pipe has room again."""
        if self._recv_paused:
            self._recv_paused = False
            self._unpause()

    def resume_sending(self) -> None:
        """The upload's pipe has bytes again, or its end."""
        if self._send_paused:
            self._send_paused = False
            self._unpause()

    def _unpause(self) -> None:
        if self.curl is None:
            return
        # pause() sets both directions at once (curl_easy_pause(3)).
        still = (pycurl.PAUSE_RECV if self._recv_paused else 0) | (pycurl.PAUSE_SEND if self._send_paused else 0)
        try:
            self.curl.pause(still)
        except pycurl.error:
            # The transfer broke while it was paused; libcurl reports that error when it is next driven.
            log.debug("transfer to %s broke while paused", self.origin)
        self._driver.drive_soon()

    def finish(self, errno: int = 0, message: str = "") -> None:
        """libcurl is done with the request. The handle is returned by the driver after this."""
        error = self.error
        if errno and error is None and not self._answered_417:
            error = self._map_error(errno, message)
        if self.response is not None:
            self.response.timings.update(self._timings())
        if error is None and self.response is None:
            error = UpstreamClosed(
                f"upstream {self.origin} closed without an answer", phase=Phase.HEAD, upstream=self.origin
            )
        self.curl = None
        if error is None:
            self.stream.close()
        else:
            self.fail(error)

    def fail(self, error: ProxyError) -> None:
        if self.response is None:
            if not self.head.done():
                self.head.set_exception(error)
        else:
            self.stream.fail(error)

    def _end_at_head(self) -> None:
        self.cancel()
        self.stream.close()

    def cancel(self) -> None:
        """End at once: the connection is closed, the handle free. Idempotent."""
        self._driver.cancel(self)

    def _map_error(self, errno: int, message: str) -> ProxyError:
        kind, phase = _ERRORS.get(errno, (UpstreamError, None))
        if phase is None:
            phase = Phase.HEAD if self.response is None else Phase.BODY
        return kind(
            f"upstream {self.origin}: {message or 'failed'} (libcurl {errno})", phase=phase, upstream=self.origin
        )

    def _timings(self) -> dict[str, float]:
        assert self.curl is not None
        getinfo = self.curl.getinfo
        return {
            "resolve": getinfo(pycurl.NAMELOOKUP_TIME),
            "connect": getinfo(pycurl.CONNECT_TIME),
            "tls": getinfo(pycurl.APPCONNECT_TIME),
            "head": getinfo(pycurl.STARTTRANSFER_TIME),
            "upstream": getinfo(pycurl.TOTAL_TIME),
        }


class CurlDriver(CurlAsyncHTTPClient):
    """Drives libcurl's multi handle from the asyncio loop.

    Of Tornado's client it keeps the multi handle and its life; set-up, events, timers, queue and completion are its
    own, because Tornado's sets up each handle anew, re-registers a socket for each event, holds bodies back in a queue,
    has ten slots, and cannot cancel.
    """

    def initialize(self, options: CurlOptions) -> None:  # type: ignore[override]
        self.options = options
        self.loop = asyncio.get_running_loop()
        # Handles that are free, the most recently used last; transfers under way; transfers that wait for a handle.
        self._idle: list[pycurl.Curl] = []
        # What _set_up last told each handle.
        self._basics: dict[pycurl.Curl, tuple[object, ...]] = {}
        self._active: dict[pycurl.Curl, _Transfer] = {}
        self._queue: deque[CurlRequest] = deque()
        self.sockets = SocketWatch(self.loop, self._on_ready)
        # When libcurl wants to be driven, in loop time, and the timer that will do it (at that time or before).
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        # Tornado's own adds a handle and removes it, so our callbacks run from here on.
        self._closed = False
        super().initialize(max_clients=0)
        self._multi.setopt(pycurl.M_MAXCONNECTS, options.max_idle_connections)

    def close(self) -> None:
        """End every transfer and connection. Idempotent."""
        if self._closed:
            return
        for transfer in [request.transfer for request in self._queue] + list(self._active.values()):
            self.cancel(transfer)
            transfer.fail(UpstreamError(f"client closed with {transfer.origin} in progress", upstream=transfer.origin))
        if self._timer is not None:
            self._timer.cancel()
        if self._soon is not None:
            self._soon.cancel()
        for curl in self._idle:
            curl.close()
        self._idle.clear()
        super().close()
        self.sockets.close()

    def fetch_impl(self, request: HTTPRequest, callback: Callable[..., None]) -> None:
        """Refuse Tornado's buffering ``fetch()``; this client streams, see :class:`CurlClient`."""
        raise NotImplementedError("CurlDriver has no fetch(); use CurlClient.send()")

    def start(self, request: CurlRequest) -> None:
        """Send ``request`` now, or when a handle is free. What happens to it, its transfer is told."""
        limit = self.options.max_clients
        if limit is None or len(self._active) < limit:
            self._begin(request)
            return
        transfer = request.transfer
        if request.connect_timeout:
            transfer.queue_timer = self.loop.call_later(request.connect_timeout, self._queue_timed_out, request)
        self._queue.append(request)

    def cancel(self, transfer: _Transfer) -> None:
        """End ``transfer`` at once, whether it is queued, paused or under way."""
        if transfer.curl is not None:
            # Removing an unfinished transfer closes its connection (curl_multi_remove_handle(3)).
            self._release(transfer.curl)
            transfer.curl = None
            self._begin_queued()
        elif transfer.queue_timer is not None:
            self._leave_queue(transfer)

    def _queue_timed_out(self, request: CurlRequest) -> None:
        transfer = request.transfer
        self._leave_queue(transfer)
        transfer.fail(NoUpstreamAvailable(f"all {self.options.max_clients} clients are busy", upstream=transfer.origin))

    def _leave_queue(self, transfer: _Transfer) -> None:
        if transfer.queue_timer is not None:
            transfer.queue_timer.cancel()
            transfer.queue_timer = None
        self._queue = deque(waiting for waiting in self._queue if waiting.transfer is not transfer)

    def _begin_queued(self) -> None:
        limit = self.options.max_clients
        while self._queue and (limit is None or len(self._active) < limit):
            request = self._queue.popleft()
            if request.transfer.queue_timer is not None:
                request.transfer.queue_timer.cancel()
                request.transfer.queue_timer = None
            self._begin(request)

    def _begin(self, request: CurlRequest) -> None:
        curl = self._idle.pop() if self._idle else self._new_handle()
        self._set_up(curl, request)
        request.transfer.curl = curl
        self._active[curl] = request.transfer
        # libcurl asks to be driven at once, which then starts all that came in this turn of the loop.
        self._multi.add_handle(curl)

    def _release(self, curl: pycurl.Curl) -> None:
        self._multi.remove_handle(curl)
        del self._active[curl]
        if len(self._idle) < self.options.max_idle_connections:
            self._idle.append(curl)
        else:
            del self._basics[curl]
            curl.close()

    # -- sockets and timers

    def _handle_socket(self, event: int, fd: int, multi: pycurl.CurlMulti, data: object) -> None:
        """libcurl wants to know when ``fd`` is ready (CURLMOPT_SOCKETFUNCTION)."""
        if event == pycurl.POLL_REMOVE:
            self.sockets.unwatch(fd)
        else:
            self.sockets.watch(fd, bool(event & pycurl.POLL_IN), bool(event & pycurl.POLL_OUT))

    def _on_ready(self, fd: int, readable: bool, writable: bool) -> None:
        self._drive(fd, (pycurl.CSELECT_IN if readable else 0) | (pycurl.CSELECT_OUT if writable else 0))

    def _set_timeout(self, msecs: int) -> None:
        """libcurl wants to be driven in ``msecs`` (CURLMOPT_TIMERFUNCTION); -1 is never.

        A timer that is already due earlier stays: it finds nothing to do and is set again, which is cheaper than
        replacing it several times for each request.
        """
        if msecs < 0:
            self._deadline = None
        elif msecs == 0:
            self._deadline = None
            self.drive_soon()
        else:
            self._deadline = deadline = self.loop.time() + msecs / 1000
            if self._timer is None or self._timer.when() > deadline:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self.loop.call_at(deadline, self._on_timer)

    def drive_soon(self) -> None:
        """Drive libcurl in the next turn of the loop."""
        if self._soon is None and not self._closed:
            self._soon = self.loop.call_soon(self._drive_timeouts)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._deadline > self.loop.time():
            self._timer = self.loop.call_at(self._deadline, self._on_timer)
            return
        self._deadline = None
        self._drive_timeouts()

    def _drive_timeouts(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._drive(pycurl.SOCKET_TIMEOUT, 0)

    def _drive(self, fd: int, action: int) -> None:
        try:
            _, running = self._multi.socket_action(fd, action)
        except pycurl.error:
            log.exception("libcurl refused to be driven")
            running = -1
        if running != len(self._active):
            self._complete()

    def _complete(self) -> None:
        """Hand the transfers that libcurl has ended to their owners."""
        left = 1
        while left:
            left, done, failed = self._multi.info_read()
            for curl in done:
                self._end(curl, 0, "")
            for curl, errno, message in failed:
                self._end(curl, errno, message)
        self._begin_queued()

    def _end(self, curl: pycurl.Curl, errno: int, message: str) -> None:
        transfer = self._active[curl]
        transfer.finish(errno, message)
        self._release(curl)

    # -- options

    def _new_handle(self) -> pycurl.Curl:
        """Return a handle with every option that never changes; the reasons stand beside them."""
        curl = pycurl.Curl()
        set_ = curl.setopt
        options = self.options
        # Signals would interrupt the loop; libcurl uses them for name look-ups without a threaded resolver.
        set_(pycurl.NOSIGNAL, 1)
        # "" and "*", not unset: unset means "take http_proxy and NO_PROXY from the environment".
        set_(pycurl.PROXY, "")
        set_(pycurl.NOPROXY, "*")
        # No credentials from ~/.netrc. Cookies, HTTP authentication, Alt-Svc and HSTS are off unless asked for.
        set_(pycurl.NETRC, pycurl.NETRC_IGNORED)
        set_(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        # Redirects, encodings and error statuses are the downstream's to see.
        set_(pycurl.FOLLOWLOCATION, 0)
        set_(pycurl.HTTP_CONTENT_DECODING, 0)
        set_(pycurl.TRANSFER_ENCODING, 0)
        set_(pycurl.FAILONERROR, 0)
        # An answer without a status line is no answer.
        set_(pycurl.HTTP09_ALLOWED, 0)
        set_(pycurl.PATH_AS_IS, 1)
        set_(pycurl.HTTP_VERSION, _HTTP_VERSIONS[options.http_version])
        set_(pycurl.EXPECT_100_TIMEOUT_MS, _CONTINUE_TIMEOUT)
        # Seconds; a stream may last for days. What is silent is ended by the forwarder.
        set_(pycurl.TIMEOUT_MS, 0)
        # Bytes for each callback. libcurl's own is 16 KiB; fewer and larger ones carry more a second, and this is still
        # well below what a pipe holds.
        set_(pycurl.BUFFERSIZE, 64 * 1024)
        set_(pycurl.TCP_NODELAY, 1)
        set_(pycurl.TCP_KEEPALIVE, 1)
        set_(pycurl.MAXAGE_CONN, options.max_idle_seconds)
        set_(pycurl.DNS_CACHE_TIMEOUT, options.dns_cache_seconds)
        set_(pycurl.SSL_VERIFYPEER, 1 if options.validate_cert else 0)
        set_(pycurl.SSL_VERIFYHOST, 2 if options.validate_cert else 0)
        if options.ca_certs is not None:
            set_(pycurl.CAINFO, options.ca_certs)
        if options.client_cert is not None:
            set_(pycurl.SSLCERT, options.client_cert)
        if options.client_key is not None:
            set_(pycurl.SSLKEY, options.client_key)
        if options.unix_socket is not None:
            set_(pycurl.UNIX_SOCKET_PATH, options.unix_socket)
        return curl

    def _set_up(self, curl: pycurl.Curl, request: CurlRequest) -> None:
        """Set every option that differs between requests."""
        set_ = curl.setopt
        upload, transfer = request.upload, request.transfer
        basics = (request.url, request.method, upload is None, request.fresh, request.connect_timeout)
        if self._basics.get(curl) != basics:
            # Requests of one mount are mostly alike in these.
            self._basics[curl] = basics
            set_(pycurl.URL, request.url)
            set_(pycurl.CONNECTTIMEOUT_MS, int(1000 * (request.connect_timeout or _FOREVER)))
            set_(pycurl.FRESH_CONNECT, request.fresh)
            # libcurl's method options switch each other (NOBODY, UPLOAD and HTTPGET share one field), so exactly one of
            # the three is set, then the method's name. Not POST: that would add a Content-Type of its own.
            if upload is not None:
                set_(pycurl.UPLOAD, 1)
            else:
                set_(pycurl.NOBODY if request.method == "HEAD" else pycurl.HTTPGET, 1)
            set_(pycurl.CUSTOMREQUEST, request.method)
        # The bytes of the target; libcurl would cut fragments and resolve dots in the URL's own path.
        set_(pycurl.REQUEST_TARGET, request.target.encode("latin-1"))
        set_(pycurl.HTTPHEADER, request.header_lines)
        set_(pycurl.PREREQFUNCTION, transfer.on_prereq)
        set_(pycurl.HEADERFUNCTION, request.header_callback)
        set_(pycurl.WRITEFUNCTION, request.streaming_callback)
        if upload is not None:
            length = len(upload) if isinstance(upload, bytes) else upload.length
            set_(pycurl.INFILESIZE_LARGE, -1 if length is None else length)
            set_(pycurl.READFUNCTION, _bytes_reader(upload) if isinstance(upload, bytes) else transfer.on_read)


def _bytes_reader(body: bytes) -> Callable[[int], bytes]:
    view = memoryview(body)
    position = 0

    def read(limit: int) -> bytes:
        nonlocal position
        chunk = bytes(view[position : position + limit])
        position += len(chunk)
        return chunk

    return read


class CurlClient(HTTPClient):
    """The default client. Constructed inside a running event loop, to which it then belongs."""

    def __init__(self, **options: Any) -> None:
        self._driver: CurlDriver = CurlDriver(force_instance=True, options=CurlOptions.parse(options))

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        CurlOptions.parse(options)

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        origin, _, target = split_url(request.url)
        transfer = _Transfer(self._driver, request, origin)
        transfer.stream.on_drain = transfer.resume_receiving
        if transfer.upload is not None:
            transfer.upload.on_data = transfer.resume_sending
        self._driver.start(CurlRequest(transfer, request, origin, target))
        try:
            return await transfer.head
        except asyncio.CancelledError:
            transfer.cancel()
            raise

    def close(self) -> None:
        self._driver.close()
