"""libcurl's multi handle, driven from the asyncio loop: handles, queue, sockets, timers and options."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

import pycurl
from tornado.curl_httpclient import CurlAsyncHTTPClient
from tornado.httpclient import HTTPRequest

from tornado_proxy.clients.curl.options import CurlOptions
from tornado_proxy.clients.curl.request import FOREVER, CurlRequest, bytes_reader
from tornado_proxy.clients.curl.sockets import SocketWatch
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.errors import HookError, NoUpstreamAvailable, Phase, UpstreamError

log = logging.getLogger(__name__)

_HTTP_VERSIONS = {
    "1.1": pycurl.CURL_HTTP_VERSION_1_1,
    "2": pycurl.CURL_HTTP_VERSION_2TLS,
    "2-prior-knowledge": pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE,
    "3": pycurl.CURL_HTTP_VERSION_3,
}

# Milliseconds that an upstream which knows nothing of expectations holds the body up. RFC 9110 section 10.1.1 asks for
# such a limit, and this is libcurl's own.
_CONTINUE_TIMEOUT = 1000

# Bytes that libcurl is given, and sends, at a time: what our server receives at a time, because a piece that does not
# fit in here is copied once more, to be cut.
_UPLOAD_BUFFER = 256 * 1024
# Handles that are kept although they have sent much: the buffer stays with the handle.
_KEPT_LARGE = 16

# For curl_multi_socket_action(3): no socket, but timers that have run out, and handles that were added.
_WHAT_IS_DUE = ((pycurl.SOCKET_TIMEOUT, 0),)

# Bytes that malloc is made to keep at the end of the heap, and not to give back; see CurlDriver.initialize.
_KEPT_BY_MALLOC = 4 * 1024 * 1024


def nobody(*_: object) -> None:
    """Stand for the transfer of a handle that has none."""


class CurlDriver(CurlAsyncHTTPClient):
    """Drives libcurl's multi handle from the asyncio loop.

    Of Tornado's client it keeps the multi handle and its life; set-up, events, timers, queue and completion are its
    own, because Tornado's sets up each handle anew, re-registers a socket for each event, holds bodies back in a queue,
    has ten slots, and cannot cancel.
    """

    def initialize(self, options: CurlOptions) -> None:  # type: ignore[override]
        self.options = options
        self.loop = asyncio.get_running_loop()
        # Handles that are free, the most recently used last; transfers under way; requests that wait for the next turn,
        # or for a handle.
        self._idle: list[pycurl.Curl] = []
        # What _set_up last told each handle.
        self._basics: dict[pycurl.Curl, tuple[object, ...]] = {}
        self._active: dict[pycurl.Curl, CurlTransfer] = {}
        self._queue: deque[CurlRequest] = deque()
        self.sockets = SocketWatch(self.loop, self._on_ready, shares=options.http_version != "1.1")
        # When libcurl wants to be driven, in loop time, and the timer that will do it, due then or before.
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._soon: asyncio.Handle | None = None
        # Once a block was taken and given back, glibc keeps twice its size at the end of the heap (mallopt(3),
        # M_TRIM_THRESHOLD). Otherwise it would return to the kernel what each chunk frees there, and ask for it again
        # for the next.
        bytes(_KEPT_BY_MALLOC // 2)
        # Tornado's own adds a handle and removes it, so our callbacks run from here on.
        self._closed = False
        super().initialize(max_clients=0)
        self._multi.setopt(pycurl.M_MAXCONNECTS, options.max_idle_connections)

    def close(self) -> None:
        """End every transfer and connection, also when the loop was closed before. Idempotent."""
        if self._closed:
            return
        # From here on nothing is begun and nothing scheduled any more.
        self._closed = True
        for transfer in [request.transfer for request in self._queue] + list(self._active.values()):
            self.cancel(transfer)
            if self.loop.is_closed():
                # Nobody waits any more.
                continue
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
        """Send ``request`` in the next turn, or when a handle is free. What happens to it, its transfer is told.

        Raises ``RuntimeError`` once the client is closed.
        """
        if self._closed:
            raise RuntimeError("this client is closed")
        self._queue.append(request)
        limit = self.options.max_clients
        if limit is None or len(self._active) + len(self._queue) <= limit:
            self.drive_soon()
        elif request.connect_timeout:
            wait = request.connect_timeout
            request.transfer.queue_timer = self.loop.call_later(wait, self._queue_timed_out, request)

    def cancel(self, transfer: CurlTransfer) -> None:
        """End ``transfer`` at once, whether it is queued, paused or under way."""
        if transfer.curl is not None:
            # Removing an unfinished transfer closes its connection (curl_multi_remove_handle(3)).
            self._release(transfer.curl)
            transfer.curl = None
            self._begin_queued()
        elif self._queue:
            self._leave_queue(transfer)

    def _queue_timed_out(self, request: CurlRequest) -> None:
        transfer = request.transfer
        self._leave_queue(transfer)
        transfer.fail(NoUpstreamAvailable(f"all {self.options.max_clients} clients are busy", upstream=transfer.origin))

    def _leave_queue(self, transfer: CurlTransfer) -> None:
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
        try:
            self._set_up(curl, request)
        except Exception as exc:
            # What a hook may have put into the request. Not raised: one that was queued has no caller any more.
            self._basics.pop(curl, None)
            curl.close()
            error = HookError(f"libcurl does not take the request: {exc}", phase=Phase.SEND)
            error.__cause__ = exc
            request.transfer.fail(error)
            return
        request.transfer.curl = curl
        self._active[curl] = request.transfer
        # libcurl asks to be driven at once, which then starts all that were begun in this turn of the loop.
        self._multi.add_handle(curl)

    def _release(self, curl: pycurl.Curl) -> None:
        self._multi.remove_handle(curl)
        upload = self._active.pop(curl).upload
        kept = self.options.max_idle_connections
        if upload is not None and upload.total >= _UPLOAD_BUFFER:
            kept = min(kept, _KEPT_LARGE)
        if len(self._idle) < kept:
            # Or the last exchange, bodies and all, would be kept for as long as nobody needs the handle.
            for option in (pycurl.PREREQFUNCTION, pycurl.HEADERFUNCTION, pycurl.WRITEFUNCTION, pycurl.READFUNCTION):
                curl.setopt(option, nobody)
            if upload is not None and upload.length is None:
                curl.unsetopt(pycurl.TRAILERFUNCTION)
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

    def _on_ready(self) -> None:
        self._drive(self.sockets.ready())

    def _set_timeout(self, msecs: int) -> None:
        """libcurl wants to be driven in ``msecs`` (CURLMOPT_TIMERFUNCTION); -1 is never.

        A timer that is already due earlier stays: it finds nothing to do and is set again, which is cheaper than
        replacing it several times for each request.
        """
        if msecs < 0 or self._closed:
            self._deadline = None
        elif msecs == 0:
            self._deadline = None
            self.drive_soon()
        else:
            self._deadline = deadline = self.loop.time() + msecs / 1000
            if self._timer is None or self._due > deadline:
                if self._timer is not None:
                    self._timer.cancel()
                self._due = deadline
                self._timer = self.loop.call_at(deadline, self._on_timer)

    def drive_soon(self) -> None:
        """Drive libcurl in the next turn of the loop."""
        if self._soon is None and not self._closed:
            self._soon = self.loop.call_soon(self.drive)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._deadline > self.loop.time():
            self._due = self._deadline
            self._timer = self.loop.call_at(self._deadline, self._on_timer)
            return
        self._deadline = None
        self.drive()

    def drive(self) -> None:
        """Begin what waits, and drive libcurl as far as it has asked for it; not from inside its callbacks (rule 1)."""
        self._begin_queued()
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._drive(_WHAT_IS_DUE)

    def _drive(self, ready: Iterable[tuple[int, int]]) -> None:
        """Drive libcurl for each of these sockets, which are ready for that; then hand over what has ended."""
        running = len(self._active)
        for fd, action in ready:
            try:
                _, left = self._multi.socket_action(fd, action)
            except Exception:
                # Also what one of our own callbacks raised: pycurl passes it on from here.
                log.exception("libcurl could not be driven")
                left = -1
            running = min(running, left)
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
        # pycurl would give its own name to whoever gives none.
        set_(pycurl.USERAGENT, "")
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
        # Bytes to receive at a time, into a buffer that all share; each time the upstream is woken, to send more.
        # libcurl's own is 16 KiB; with 256 KiB a large body costs a third more. What a pause finds in there is kept
        # beside what the pipe holds, so not more. And bytes to send.
        set_(pycurl.BUFFERSIZE, 512 * 1024)
        set_(pycurl.UPLOAD_BUFFERSIZE, _UPLOAD_BUFFER)
        set_(pycurl.TCP_NODELAY, 1)
        set_(pycurl.TCP_KEEPALIVE, 1)
        set_(pycurl.MAXAGE_CONN, options.max_idle_seconds)
        set_(pycurl.MAXLIFETIME_CONN, options.max_connection_seconds)
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
            set_(pycurl.CONNECTTIMEOUT_MS, int(1000 * (request.connect_timeout or FOREVER)))
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
            set_(pycurl.READFUNCTION, bytes_reader(upload) if isinstance(upload, bytes) else transfer.on_read)
            if length is None:
                set_(pycurl.TRAILERFUNCTION, transfer.on_trailers)
