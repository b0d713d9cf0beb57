"""How a connection ends: by its last response, by a refusal, in the middle of a response, or by the clock.

The rule behind most of it: closing a socket while the client still sends makes the kernel reset the connection, and the
reset destroys what the client has not read yet (RFC 9112 section 9.6). So wherever more may come, our side is ended
first, and what comes is dropped for a while.
"""

from __future__ import annotations

import contextlib
import logging
from enum import IntEnum
from http import HTTPStatus
from typing import Any

from tornado.concurrent import Future
from tornado.httputil import HTTPMessageDelegate
from tornado.log import app_log

from tornado_proxy.errors import BadRequest
from tornado_proxy.server.link import Link, Server
from tornado_proxy.server.request import RequestConnection

log = logging.getLogger(__name__)


class State(IntEnum):
    """How far the current request has been read."""

    HEAD = 0  # waiting for a request, or in the middle of its head
    BODY = 1  # the application has the head; the body is coming, or its end is still to be told
    RUNNING = 2  # all of it has been read; the response is to be finished
    DROPPING = 3  # our side has ended or is about to; what comes is dropped until the client ends too
    CLOSED = 4  # closing, once what was written is out; or handed over


# A look into the class takes ten times as long as one at these, and there is one with every step.
HEAD, BODY, RUNNING, DROPPING, CLOSED = State


class EndingLink(Link):
    """A link that knows its current request, and how to end it and itself."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._state = HEAD
        # Received, not used yet.
        self._pending = bytearray()
        # The current request, from its head to the end of its response; and its delegate, to the end of its body.
        self.request: RequestConnection | None = None
        self._delegate: HTTPMessageDelegate | None = None
        # The application is not ready for more of the request.
        self._waiting: Future[Any] | None = None
        # Bytes that nobody wants any more.
        self._dropped = 0
        # A response was cut off: nobody waits long for what is left of it.
        self._cut = False

    def _refuse(self, error: BadRequest) -> None:
        """Answer a request that is not one, or whose body is not one."""
        log.debug("refused a request from %s: %s", self.context, error)
        self.fail(error.status_code)

    def fail(self, status: int) -> None:
        """End the current request by an answer of our own, or visibly short where the application's has begun."""
        if self._state >= DROPPING:
            return
        request = self.request
        if request is not None and request.finished:
            # The response was complete.
            self._end_our_side()
        elif request is not None and request.head_sent:
            request.abort()
        else:
            reason = HTTPStatus(status).phrase.encode()
            self.write(b"HTTP/1.1 %d %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % (status, reason))
            self._end_our_side()

    def abort(self, *, reset: bool = False) -> None:
        """End the connection in the middle of a response; ``reset`` where its end would look like the body's."""
        self.flush()
        if reset:
            self.reset_on_close()
            self._closing()
            self.transport.abort()
            self._loop.call_soon(self._lose_request)
            return
        self._cut = True
        if self.tls or (self._state is RUNNING and not self._pending):
            # TLS cannot end one side only; better that the cut is seen at once than that all of the rest arrives.
            self._close_now()
        else:
            self._end_our_side()
        self.deadline = self._loop.time() + self._server.linger_time

    def _close(self) -> None:
        """Close once what was written is out."""
        self.flush()
        if self._pending or self.reading_paused:
            # What the client has sent beyond this request would become a reset.
            self._end_our_side()
        else:
            self._close_now()

    def _close_now(self) -> None:
        self._closing()
        self.transport.close()
        self._loop.call_soon(self._lose_request)

    def _end_our_side(self) -> None:
        """Say that nothing follows, and read on until the client ends too or the time is up (RFC 9112 section 9.6)."""
        self.flush()
        if self.transport.is_closing():
            return
        self._closing()
        self._state = DROPPING
        self.deadline = self._loop.time() + self._server.linger_time
        self._dropped = len(self._pending)
        self._pending.clear()
        self.resume_reading()
        if not self.tls:
            # TLS has an end of its own, which must come first.
            with contextlib.suppress(OSError):  # it has gone; the transport is about to notice
                self.transport.write_eof()
        self._loop.call_soon(self._lose_request)

    def _closing(self) -> None:
        self._state = CLOSED
        self._waiting = None
        self.deadline = self._loop.time() + self.write_stall
        if self.request is not None:
            self.request.closed()

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > self._server.linger_bytes:
            self._closing()
            self.transport.close()

    def _count_dropped(self, size: int) -> None:
        self._dropped += size
        if self._dropped > self._server.linger_bytes:
            self._end_our_side()

    def _end_request(self) -> RequestConnection | None:
        """Return the current request, where there is one; there is none from now on."""
        request, self.request = self.request, None
        if request is not None:
            self._server.running -= 1
        return request

    def _lose_request(self) -> None:
        """Tell the application that the client will not get, or did not send, the rest."""
        request = self._end_request()
        delegate, self._delegate = self._delegate, None
        self._waiting = None
        if request is None:
            return
        request.closed()
        callback, request.close_callback = request.close_callback, None
        try:
            if delegate is not None:
                delegate.on_connection_close()
            elif callback is not None:
                callback()
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)

    # -- the server calls these

    def begin_drain(self) -> None:
        """Say nothing yet: in HTTP/1.1 the next response does."""

    @property
    def idle(self) -> bool:
        """No request has arrived that is not answered."""
        return self._state is HEAD

    def close_idle(self) -> None:
        """Close for want of a request."""
        self._close()

    def sweep(self, now: float) -> None:
        """Look after what only time can tell; called about once a second."""
        if self.reading_paused and self._state < DROPPING and self.has_left():
            # Its bytes wait in the kernel in front of its end, which we shall therefore not read soon.
            self._closing()
            self.transport.close()
            self._lose_request()
        if now >= self.deadline:
            self._timed_out(now)

    def _timed_out(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent_at_sweep and self._state is not BODY and not self._cut:
            # It is still reading the last response.
            self._unsent_at_sweep = unsent
            self.deadline = now + self.write_stall
        elif self._state is HEAD:
            if self._pending:
                self.fail(408)
            else:
                self._close()
        elif self._state is BODY:
            if self.request is not None and self.request.finished:
                self._end_our_side()
            else:
                self.fail(408)
        elif self._state is DROPPING and not unsent:
            self._close_now()
        else:
            self.transport.abort()
