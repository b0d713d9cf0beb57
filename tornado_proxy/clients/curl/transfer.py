"""One transfer: a request in libcurl's hands, the callbacks that libcurl makes for it, and what came back."""

from __future__ import annotations

import asyncio
import logging
import re
from functools import lru_cache
from typing import Protocol

import pycurl
from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.curl.errors import map_error
from tornado_proxy.clients.curl.sockets import SocketWatch
from tornado_proxy.errors import InvalidResponse, Phase, ProxyError, Retry, UpstreamClosed
from tornado_proxy.fieldlines import parse_fields
from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.trailers import MAX_LINES, field_lines, trailer_fields

log = logging.getLogger(__name__)

# libcurl makes one up for HTTP/2 and HTTP/3.
_STATUS_LINE = re.compile(rb"(HTTP/(?:1\.[01]|2|3)) ([0-9]{3})(?: ([^\r\n]*))?\r?\n")

# Bytes of a status line that is remembered: an upstream has few, but it is the one who writes them.
_SHORT = 80

# Bytes of a piece of an upload that are worth a system call of their own.
_LARGE = 128 * 1024

# Interim responses that one answer may have; libcurl itself takes thousands.
_MAX_INTERIM = 20


def _read_status(line: bytes) -> tuple[str, int, str] | None:
    """Return version, status and reason of a status line, ``None`` for what is none."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        return None
    return match[1].decode("latin-1"), int(match[2]), (match[3] or b"").decode("latin-1")


_known_status = lru_cache(maxsize=256)(_read_status)


class Driver(Protocol):
    """What a transfer needs of whoever drives libcurl."""

    loop: asyncio.AbstractEventLoop
    sockets: SocketWatch

    def drive(self) -> None: ...
    def drive_soon(self) -> None: ...
    def cancel(self, transfer: CurlTransfer) -> None: ...


class CurlTransfer:
    """One request in libcurl's hands, and what came back so far.

    Ends exactly once, in `finish` (libcurl says so) or `cancel` (we do).
    """

    # Whether libcurl can be paused before there is nothing to give or no room: with HTTP/1.1, where a connection has no
    # other transfers. On one that is shared it would go on delivering, without end.
    pauses_ahead = True

    __slots__ = (
        "_answered_417",
        "_driver",
        "_ends_at_head",
        "_expecting",
        "_interim",
        "_lines",
        "_on_interim",
        "_on_sending",
        "_recv_paused",
        "_resumed",
        "_send_paused",
        "_sends",
        "_timed",
        "connection",
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

    def __init__(self, driver: Driver, request: UpstreamRequest, origin: str) -> None:
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
        # Local port and upstream address of the connection that it was sent on.
        self.connection: tuple[int, tuple[str, int]] = (0, ("", 0))
        # The upstream has been asked whether it wants the body, and has not said so yet.
        self._expecting = request.expect_continue
        self._answered_417 = False
        self._on_interim = request.on_interim
        self._on_sending = request.on_sending
        self._timed = request.timed
        self._driver = driver
        self._lines: list[bytes] = []
        self._interim = 0
        self._send_paused = False
        self._recv_paused = False
        # Receiving was resumed at once in this turn of the loop; next time it waits for the next.
        self._resumed = False

    # -- called by libcurl (rules 1 and 2)

    def on_prereq(self, ip: str, _local_ip: str, port: int, local_port: int) -> int:
        """Allow the request to be sent once, on a quiet connection; called when libcurl is about to use one.

        libcurl takes a connection that it looked at less than a second ago for healthy, and repeats a request, whatever
        its method, when a reused connection dies before the first byte of an answer (``Curl_retry_request``). Both are
        refused here, which it reports as E_ABORTED_BY_CALLBACK: bytes that wait on an idle connection belong to no
        request of ours, and whether a second try is safe (RFC 9110 section 9.2.2) only the forwarder knows.
        """
        self._sends += 1
        if self._sends > 1:
            return int(pycurl.PREREQFUNC_ABORT)
        self.connection = (local_port, (ip, port))
        if self._driver.sockets.is_quiet(*self.connection):
            if self._on_sending is not None:
                self._on_sending()
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
            # One more than are taken says that there were too many.
            if len(self.trailers) <= MAX_LINES:
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
        if not self.pauses_ahead:
            if self.stream.stuffed():
                self._recv_paused = True
                return int(pycurl.WRITEFUNC_PAUSE)
            self.stream.offer(chunk)
        elif not (self.stream.offer(chunk) or self._recv_paused):
            # What it has received already it gives us all the same; of what is refused it makes another copy.
            self._recv_paused = True
            self._set_pauses()
        return None

    def on_read(self, limit: int) -> bytes | int:
        """Give up to ``limit`` bytes of the upload; ``b""`` is its end."""
        assert self.upload is not None
        if self._expecting:
            # The upstream said 100, or nothing for as long as libcurl waits (CONTINUE_TIMEOUT).
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
        if self.pauses_ahead and len(chunk) >= _LARGE and self.upload.starving():
            # Or libcurl would ask again as soon as the socket can be written to, which takes an event of its own, only
            # to be told "nothing yet"; that costs a tenth of the whole.
            self._send_paused = True
            self._set_pauses()
        return chunk

    def on_trailers(self) -> list[bytes]:
        """Give the lines behind the last chunk of the upload, whose end :meth:`on_read` has given."""
        assert self.upload is not None
        return field_lines(self.upload.trailers)

    def _take_head(self, lines: list[bytes]) -> int | None:
        if not lines:
            return self._refuse("sent an empty head")
        line = lines[0]
        found = _known_status(line) if len(line) <= _SHORT else _read_status(line)
        if found is None:
            return self._refuse(f"sent an invalid status line: {line[:80]!r}")
        version, status, reason = found
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
        if not version.startswith("HTTP/1"):
            self._driver.sockets.share(*self.connection, self.origin)
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
            self._set_pauses()
            if self._resumed:
                # A downstream that takes bytes as fast as they come would keep the loop to itself.
                self._driver.drive_soon()
                return
            self._resumed = True
            self._driver.loop.call_soon(self._next_turn)
            self._driver.drive()

    def _next_turn(self) -> None:
        self._resumed = False

    def resume_sending(self) -> None:
        """The upload's pipe has bytes again, or its end."""
        if self._send_paused:
            self._send_paused = False
            self._set_pauses()
            assert self.upload is not None
            if self.upload.size >= _LARGE:
                self._driver.drive()
            else:
                # More of them may come in this turn, for one system call.
                self._driver.drive_soon()

    def _set_pauses(self) -> None:
        if self.curl is None:
            return
        # pause() sets both directions at once (curl_easy_pause(3)).
        paused = (pycurl.PAUSE_RECV if self._recv_paused else 0) | (pycurl.PAUSE_SEND if self._send_paused else 0)
        try:
            self.curl.pause(paused)
        except pycurl.error:
            # The transfer broke while it was paused; libcurl reports that error when it is next driven.
            log.debug("transfer to %s broke while paused", self.origin)

    def finish(self, errno: int = 0, message: str = "") -> None:
        """libcurl is done with the request. The handle is returned by the driver after this."""
        error = self.error
        if errno and error is None and not self._answered_417:
            error = self._map_error(errno, message)
        if self.response is not None and self._timed:
            self.response.timings.update(self._timings())
        if error is None and self.response is None:
            error = UpstreamClosed(
                f"upstream {self.origin} closed without an answer", phase=Phase.HEAD, upstream=self.origin
            )
        self.curl = None
        self._let_go()
        if error is None:
            if self.trailers and self.response is not None:
                self.response.trailers = trailer_fields(self.trailers)
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
        self._let_go()

    def _let_go(self) -> None:
        """Nobody needs to call us any more. What refers to itself in a circle waits for the garbage collector."""
        self.stream.on_drain = None
        self._on_interim = self._on_sending = None
        if self.upload is not None:
            self.upload.on_data = None
        if self.response is not None:
            self.response.on_abort = None

    def _map_error(self, errno: int, message: str) -> ProxyError:
        return map_error(errno, message, self.origin, Phase.HEAD if self.response is None else Phase.BODY)

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
