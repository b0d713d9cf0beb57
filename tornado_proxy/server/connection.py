"""One connection from a client: reads its requests one after the other and gives them to the application.

How far the current request has been read is ``_state``. A request goes through HEAD, BODY and RUNNING; a connection
ends through DROPPING, where what still comes is read and dropped, or at once. ``_advance`` is the only place that
parses.

Reading goes on while the application works: up to ``READ_AHEAD`` bytes are taken in, so that a client that leaves is
noticed although nobody wants its bytes yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable
from enum import IntEnum
from http import HTTPStatus
from typing import Any, Protocol

from tornado.concurrent import Future
from tornado.httputil import HTTPInputError, HTTPMessageDelegate, RequestStartLine
from tornado.iostream import IOStream
from tornado.log import app_log

from tornado_proxy.errors import BadRequest
from tornado_proxy.server.detach import hand_over
from tornado_proxy.server.link import Link
from tornado_proxy.server.parser import ChunkedBody, body_too_large, check_incomplete, parse_head, too_large
from tornado_proxy.server.request import RequestConnection

log = logging.getLogger(__name__)

READ_AHEAD = 64 * 1024
# Seconds without progress after which a client that does not read its last response is given up.
WRITE_STALL = 60.0


class State(IntEnum):
    """How far the current request has been read."""

    HEAD = 0  # waiting for a request, or in the middle of its head
    BODY = 1  # the application has the head; the body is coming, or its end is still to be told
    RUNNING = 2  # all of it has been read; the response is to be finished
    DROPPING = 3  # our side has ended or is about to; what comes is dropped until the client ends too
    CLOSED = 4  # closing, once what was written is out; or handed over


class Server(Protocol):
    """What a connection needs of its server."""

    loop: asyncio.AbstractEventLoop
    done: Future[None]
    draining: bool
    buffer: memoryview
    max_header_size: int
    max_body_size: int
    header_timeout: float
    idle_timeout: float
    linger_time: float
    linger_bytes: int

    def start_request(self, server_conn: object, request_conn: RequestConnection) -> HTTPMessageDelegate: ...
    def opened(self, connection: Connection) -> None: ...
    def closed(self, connection: Connection) -> None: ...


class Connection(Link):
    """Tornado's ``server_conn``."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.loop)
        self._server = server
        self.done = server.done
        # Received, not used yet.
        self._pending = bytearray()
        # No CR LF CR LF begins before this.
        self._scanned = 0
        # The one empty line before a request line was there.
        self._blank_skipped = False
        self._state = State.HEAD
        # This connection has had a response.
        self._answered = False
        # The current request, from its head to the end of its response; and its delegate, to the end of its body.
        self.request: RequestConnection | None = None
        self._delegate: HTTPMessageDelegate | None = None
        # Bytes of the body still to come, or what knows their end.
        self._left = 0
        self._chunks: ChunkedBody | None = None
        self._received = 0
        # The application is not ready for more of the request.
        self._waiting: Future[Any] | None = None
        self._advancing = False
        # When the sweep looks at us again, by the loop's clock; and what was unsent when it last did.
        self.deadline = math.inf
        self._unsent_at_sweep = 0
        self._dropped = 0

    # -- the transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.deadline = self._loop.time() + self._server.header_timeout
        self._server.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        state = self._state
        pending = self._pending
        if state is State.DROPPING:
            self._drop(nbytes)
            return
        pending += self._server.buffer[:nbytes]
        if state is State.RUNNING or self._waiting is not None:
            if len(pending) >= READ_AHEAD:
                self.pause_reading()
            return
        if state is not State.CLOSED:
            self._advance()

    def eof_received(self) -> None:
        """Take the client for gone, also if it only ended its side: nobody can tell, and most mean it (nginx, Tornado).

        Returns nothing, so the transport closes itself once what was written is out.
        """
        if self._state is not State.CLOSED:
            self._closing()
            self._lose_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = State.CLOSED
        self.deadline = math.inf
        self.writing_ended(exc)
        self._lose_request()
        self._server.closed(self)

    # -- reading

    def _advance(self) -> None:
        """Go on with what has been received, until more is needed or someone else's turn has come."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._waiting is None and self._step():
                pass
        except BadRequest as error:
            self._refuse(error)
        except HTTPInputError as error:
            self._refuse(BadRequest(str(error)))
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)
            self.fail(500)
        finally:
            self._advancing = False
        if len(self._pending) < READ_AHEAD and self._state is not State.CLOSED:
            self.resume_reading()

    def _step(self) -> bool:
        """Take one step; True if another may follow."""
        if self._state is State.HEAD:
            return self._read_head()
        if self._state is State.BODY:
            return self._read_body()
        return False

    def _read_head(self) -> bool:
        pending = self._pending
        if not self._blank_skipped and pending[:1] == b"\r":
            # RFC 9112 section 2.2: one empty line before the request line is ignored.
            if len(pending) == 1:
                return False
            if pending[1] == 0x0A:
                del pending[:2]
            self._blank_skipped = True
        if not pending:
            return False
        limit = self._server.max_header_size
        end = pending.find(b"\r\n\r\n", self._scanned)
        if end < 0:
            if not self._scanned and self._answered:
                # The first head has its time from the beginning of the connection.
                self.deadline = self._loop.time() + self._server.header_timeout
            check_incomplete(pending, self._scanned, limit)
            self._scanned = max(0, len(pending) - 3)
            return False
        if end + 4 > limit:
            raise too_large(pending, limit)
        text = pending[:end].decode("latin-1")
        del pending[: end + 4]
        self._scanned = 0
        self._blank_skipped = False
        self._start_request(text)
        return True

    def _start_request(self, text: str) -> None:
        head = parse_head(text)
        framing = head.framing
        self.deadline = math.inf
        self._state = State.BODY
        self._chunks = ChunkedBody() if framing.chunked else None
        self._left = framing.length or 0
        self._received = 0
        self.request = request = RequestConnection(self, head, self._server.max_body_size)
        self._delegate = delegate = self._server.start_request(self, request)
        start_line = RequestStartLine(head.method, head.target, head.version)
        ready = delegate.headers_received(start_line, head.headers)
        if ready is None or self._ready(ready):
            self._expect_body(request)

    def _expect_body(self, request: RequestConnection) -> None:
        """The application has taken the head: now the limit is known, and the client may be asked for the body."""
        if request.finished:
            return
        if self._left > request.max_body_size:
            raise body_too_large(request.max_body_size)
        if request.continue_due and not self._pending:
            request.send_continue()

    def _read_body(self) -> bool:
        """Give the next piece of the body to the application, or tell it the end."""
        request = self.request
        assert request is not None
        pending = self._pending
        if self._chunks is not None:
            if not self._chunks.done:
                if not pending:
                    return False
                size = len(pending)
                piece = self._chunks.take(pending)
                if request.finished:
                    self._count_dropped(size - len(pending))
                return self._deliver(request, piece) if piece else self._chunks.done
        elif self._left:
            if not pending:
                return False
            if len(pending) <= self._left:
                piece = bytes(pending)
                pending.clear()
            else:
                piece = bytes(pending[: self._left])
                del pending[: self._left]
            self._left -= len(piece)
            if request.finished:
                self._count_dropped(len(piece))
            return self._deliver(request, piece)
        self._end_body(request)
        return False

    def _deliver(self, request: RequestConnection, piece: bytes) -> bool:
        self._received += len(piece)
        if request.finished or self._delegate is None:
            return self._state is State.BODY
        if self._received > request.max_body_size:
            raise body_too_large(request.max_body_size)
        request.continue_due = False
        ready = self._delegate.data_received(piece)
        if ready is not None:
            self._ready(ready)
        return True

    def _end_body(self, request: RequestConnection) -> None:
        delegate, self._delegate = self._delegate, None
        assert delegate is not None
        if request.finished:
            # Tornado's way of telling a delegate that its request ended before it saw the end of it.
            delegate.on_connection_close()
            self._response_done(request)
            return
        self._state = State.RUNNING
        self.deadline = math.inf
        delegate.finish()

    def _ready(self, answer: Awaitable[None]) -> bool:
        """Return whether a delegate's answer lets us go on; if not, we go on when it is resolved."""
        future = asyncio.ensure_future(answer)
        if future.done():
            future.result()
            return True
        self._waiting = future
        future.add_done_callback(self._on_ready)
        return False

    def _on_ready(self, future: Future[Any]) -> None:
        if future is not self._waiting:
            # The request has ended otherwise; the failure is nobody's.
            if not future.cancelled():
                future.exception()
            return
        self._waiting = None
        request = self.request
        try:
            future.result()
            if request is not None and not self._received:
                self._expect_body(request)
        except BadRequest as error:
            self._refuse(error)
        except HTTPInputError as error:
            self._refuse(BadRequest(str(error)))
        except (Exception, asyncio.CancelledError):
            app_log.error("Uncaught exception", exc_info=True)
            self.fail(500)
        self._advance()

    # -- writing; the request calls these

    @property
    def draining(self) -> bool:
        return self._server.draining

    def body_has_begun(self) -> bool:
        return bool(self._received or self._pending)

    def set_body_timeout(self, timeout: float) -> None:
        if self._state is State.BODY:
            self.deadline = self._loop.time() + timeout

    def response_finished(self, upgraded: bool) -> None:
        """The application has written all of its response."""
        request = self.request
        assert request is not None
        if upgraded:
            # What comes now is not HTTP. detach() follows in this turn; nothing may be parsed until then.
            return
        if self._state is State.RUNNING:
            self._response_done(request)
            return
        # RFC 9112 section 9.6: closing now would turn what the client still sends into a reset, which destroys the
        # response's last bytes. So its rest is read and dropped, and if that is soon done the connection lives on.
        if request.closing and self._body_outstanding():
            self._end_our_side()
            return
        self.deadline = self._loop.time() + self._server.linger_time
        self._dropped = 0
        if self._received:
            # A delegate that has answered need not take the piece that it holds.
            self._waiting = None
        self._loop.call_soon(self._advance)

    def _body_outstanding(self) -> bool:
        return bool(self._left) or (self._chunks is not None and not self._chunks.done)

    def _response_done(self, request: RequestConnection) -> None:
        """Both the request and its response are complete: wait for the next, or close."""
        self.request = None
        self._answered = True
        if request.closing or self._server.draining:
            self._close()
            return
        self._state = State.HEAD
        self.deadline = self._loop.time() + self._server.idle_timeout
        if self._pending:
            # Not from here: the application is still in the middle of its finish().
            self._loop.call_soon(self._advance)

    # -- ending

    def _refuse(self, error: BadRequest) -> None:
        """Answer a request that is not one, or whose body is not one."""
        log.debug("refused a request from %s: %s", self.context, error)
        self.fail(error.status_code)

    def fail(self, status: int) -> None:
        """End the current request by an answer of our own, or visibly short where the application's has begun."""
        if self._state >= State.DROPPING:
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
        elif self._state is State.RUNNING and not self._pending:
            self._close()
        else:
            self._end_our_side()

    def _close(self) -> None:
        """Close once what was written is out."""
        self.flush()
        if self._pending or self.reading_paused:
            # What the client has sent beyond this request would become a reset.
            self._end_our_side()
            return
        self._closing()
        self.transport.close()
        self._loop.call_soon(self._lose_request)

    def _end_our_side(self) -> None:
        """Say that nothing follows, and read on until the client ends too or the time is up (RFC 9112 section 9.6)."""
        self.flush()
        if self.transport.is_closing():
            return
        self._closing()
        self._state = State.DROPPING
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
        self._state = State.CLOSED
        self._waiting = None
        self.deadline = self._loop.time() + WRITE_STALL
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

    def _lose_request(self) -> None:
        """Tell the application that the client will not get, or did not send, the rest."""
        request, self.request = self.request, None
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

    def detach(self) -> IOStream:
        """Return a stream over this connection, which is no HTTP connection any more."""
        self.flush()
        self._state = State.CLOSED
        self._waiting = self.request = self._delegate = None
        self.deadline = math.inf
        self._server.closed(self)
        pending, self._pending = bytes(self._pending), bytearray()
        return hand_over(self.transport, pending, paused=self.reading_paused)

    # -- the server calls these

    @property
    def idle(self) -> bool:
        """No request has arrived that is not answered."""
        return self._state is State.HEAD

    def close_idle(self) -> None:
        """Close for want of a request."""
        self._close()

    def sweep(self, now: float) -> None:
        """Look after what only time can tell; called about once a second."""
        if self.reading_paused and self._state < State.DROPPING and self.has_left():
            # Its bytes wait in the kernel in front of its end, which we shall therefore not read soon.
            self._closing()
            self.transport.close()
            self._lose_request()
        if now >= self.deadline:
            self._timed_out(now)

    def _timed_out(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent_at_sweep and self._state is not State.BODY:
            # It is still reading the last response.
            self._unsent_at_sweep = unsent
            self.deadline = now + WRITE_STALL
        elif self._state is State.HEAD:
            if self._pending:
                self.fail(408)
            else:
                self._close()
        elif self._state is State.BODY:
            if self.request is not None and self.request.finished:
                self._end_our_side()
            else:
                self.fail(408)
        else:
            self.transport.abort()
