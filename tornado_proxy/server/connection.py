"""One connection from a client: reads its requests one after the other and gives them to the application.

How far the current request has been read is ``_state``. A request goes through HEAD, BODY and RUNNING; a connection
ends through DROPPING, where what still comes is read and dropped, or at once. ``_advance`` is the only place that
parses.

Reading goes on while the application works: up to ``READ_AHEAD`` bytes are taken in, so that a client that leaves is
noticed although nobody wants its bytes yet.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

from tornado.concurrent import Future
from tornado.httputil import HTTPInputError, RequestStartLine
from tornado.iostream import IOStream
from tornado.log import app_log

from tornado_proxy.errors import BadRequest
from tornado_proxy.server.detach import hand_over
from tornado_proxy.server.ending import BODY, CLOSED, DROPPING, HEAD, RUNNING, EndingLink
from tornado_proxy.server.link import Server, leave_tls
from tornado_proxy.server.parser import ChunkedBody, SizedBody, body_too_large, check_incomplete, parse_head, too_large
from tornado_proxy.server.request import RequestConnection
from tornado_proxy.server.turns import BUSY

READ_AHEAD = 64 * 1024
# Bytes of a body received at a time, when they can go on at once, and passed on as one. Each system call costs as much
# as some 50 KB; with half of this an upload costs a fifth more, and a stalled one may hold all of it.
RECEIVE_SIZE = 256 * 1024


class Connection(EndingLink):
    """Tornado's ``server_conn``."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        # No CR LF CR LF begins before this.
        self._scanned = 0
        # The one empty line before a request line was there.
        self._blank_skipped = False
        # This connection has had a response.
        self._answered = False
        # Knows where the body ends.
        self._body: SizedBody | ChunkedBody = SizedBody(0)
        # Bytes of it that the application was given, or would have been.
        self._received = 0
        self._advancing = False
        # A _Bulk stands in for us at the transport.
        self._bulk = False

    # -- the transport calls these

    def get_buffer(self, sizehint: int) -> memoryview:
        server = self._server
        return server.buffer if self._state is BODY and self._waiting is None else server.buffer_ahead

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes == len(self._server.buffer) and self._state is BODY:
            self._take_bulk()
        self.data_received(self._server.buffer[:nbytes])

    def data_received(self, data: memoryview | bytes) -> None:
        """Take what has come: bytes, or what they are to be made of at once."""
        state = self._state
        if state is DROPPING:
            self._drop(len(data))
            return
        if state is RUNNING or self._waiting is not None or self._unread:
            self._pending += data
            if len(self._pending) >= READ_AHEAD:
                self.pause_reading()
            return
        if state is HEAD and self._server.running >= BUSY:
            self._pending += data
            self._server.reads.add(self._advance)
        elif state is not CLOSED:
            self._advance(data)

    def eof_received(self) -> None:
        """Take the client for gone, also if it only ended its side: nobody can tell, and most mean it (nginx, Tornado).

        Returns nothing, so the transport closes itself once what was written is out.
        """
        if self._state is not CLOSED:
            self.flush()
            self._closing()
            self._lose_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = CLOSED
        super().connection_lost(exc)
        self._lose_request()
        self._pending.clear()
        self._server.closed(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._state is HEAD and self._pending:
            # Not from here: the transport is still in the middle of its write.
            self._loop.call_soon(self._advance)

    # -- reading

    @property
    def _unread(self) -> bool:
        """The client has to read the last response before its next request is read: not every application waits.

        Else whoever pipelines and does not read would fill our memory with responses.
        """
        return self.write_paused and self._state is HEAD

    def _take_bulk(self) -> None:
        """Have the transport make bytes of what comes, until the body ends or has to wait: there is a lot of it."""
        self._bulk = True
        self.transport.set_protocol(_Bulk(self))

    def _leave_bulk(self) -> None:
        self._bulk = False
        self.transport.set_protocol(self)

    def _advance(self, received: memoryview | bytes = b"") -> None:
        """Go on with what has been received, until more is needed or someone else's turn has come.

        ``received`` has just come.
        """
        if self._advancing:
            self._pending += received
            return
        self._advancing = True
        try:
            if received:
                self._take_in(received)
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
        if len(self._pending) > max(READ_AHEAD, self._server.max_header_size):
            # At least one whole request, which has its turn first. A client may send faster than it is answered.
            self.pause_reading()
        elif self._state is not CLOSED:
            self.resume_reading()

    def _step(self) -> bool:
        """Take one step; True if another may follow."""
        if self._state is HEAD:
            # See _unread.
            return not self.write_paused and self._read_head()
        if self._state is BODY:
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
        self._state = BODY
        self._body = ChunkedBody() if framing.chunked else SizedBody(framing.length or 0)
        self._received = 0
        self.request = request = RequestConnection(self, head, self._server.max_body_size)
        self._server.running += 1
        self._delegate = delegate = self._server.start_request(self, request)
        start_line = RequestStartLine(head.method, head.target, head.version)
        ready = delegate.headers_received(start_line, head.headers)
        if ready is None or self._ready(ready):
            self._expect_body(request)

    def _expect_body(self, request: RequestConnection) -> None:
        """The application has taken the head: now the limit is known, and the client may be asked for the body."""
        if request.finished:
            return
        length = request.declared_length
        if length is not None and length > request.max_body_size:
            raise body_too_large(request.max_body_size)
        if request.continue_due and not self._pending:
            request.send_continue()

    def _take_in(self, received: memoryview | bytes) -> None:
        """Give what has just come to the application if all of it is body, so that it is copied once; else keep it."""
        request, body = self.request, self._body
        if self._state is not BODY or self._pending or not body.holds(len(received)):
            self._pending += received
            return
        assert request is not None
        piece = body.take_all(received)
        if request.finished:
            self._count_dropped(len(piece))
        self._deliver(request, piece)

    def _read_body(self) -> bool:
        """Give the next piece of the body to the application, or tell it the end."""
        request = self.request
        assert request is not None
        body = self._body
        if body.done:
            self._end_body(request)
            return False
        pending = self._pending
        size = len(pending)
        if not size:
            return False
        piece = body.take(pending)
        if body.trailers is not None:
            request.request_trailers = body.trailers
        if request.finished:
            self._count_dropped(size - len(pending))
        if piece:
            self._deliver(request, piece)
        return len(pending) < size or body.done

    def _deliver(self, request: RequestConnection, piece: bytes) -> None:
        self._received += len(piece)
        if request.finished or self._delegate is None:
            return
        if self._received > request.max_body_size:
            raise body_too_large(request.max_body_size)
        request.continue_due = False
        ready = self._delegate.data_received(piece)
        if ready is not None:
            self._ready(ready)

    def _end_body(self, request: RequestConnection) -> None:
        if self._bulk:
            self._leave_bulk()
        delegate, self._delegate = self._delegate, None
        assert delegate is not None
        if request.finished:
            # Tornado's way of telling a delegate that its request ended before it saw the end of it.
            delegate.on_connection_close()
            self._response_done(request)
            return
        self._state = RUNNING
        self.deadline = math.inf
        delegate.finish()

    def _ready(self, answer: Awaitable[None]) -> bool:
        """Return whether a delegate's answer lets us go on; if not, we go on when it is resolved."""
        future = answer if isinstance(answer, asyncio.Future) else asyncio.ensure_future(answer)
        if future.done():
            future.result()
            return True
        self._waiting = future
        if self._bulk:
            self._leave_bulk()
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

    def proceed(self) -> None:
        """Go on without waiting for the turn in which the future's callbacks are called."""
        if self._waiting is not None and self._waiting.done():
            self._on_ready(self._waiting)

    # -- writing; the request calls these

    @property
    def draining(self) -> bool:
        return self._server.draining

    def body_has_begun(self) -> bool:
        return bool(self._received or self._pending)

    def set_body_timeout(self, timeout: float) -> None:
        if self._state is BODY:
            self.deadline = self._loop.time() + timeout

    def response_finished(self, upgraded: bool) -> None:
        """The application has written all of its response."""
        request = self.request
        assert request is not None
        if upgraded:
            # What comes now is not HTTP, and is kept as it is until detach().
            self._state = RUNNING
            return
        if self._state is RUNNING:
            self._response_done(request)
            return
        # RFC 9112 section 9.6: closing now would turn what the client still sends into a reset, which destroys the
        # response's last bytes. So its rest is read and dropped, and if that is soon done the connection lives on.
        if request.closing and not self._body.done:
            self._end_our_side()
            return
        self.deadline = self._loop.time() + self._server.linger_time
        self._dropped = 0
        if self._received:
            # A delegate that has answered need not take the piece that it holds.
            self._waiting = None
        self._loop.call_soon(self._advance)

    def _response_done(self, request: RequestConnection) -> None:
        """Both the request and its response are complete: wait for the next, or close."""
        self._end_request()
        self._answered = True
        if request.closing or self._server.draining:
            self._close()
            return
        self._state = HEAD
        self.deadline = self._loop.time() + self._server.idle_timeout
        if self._pending:
            # Not from here: the application is still in the middle of its finish().
            self._loop.call_soon(self._advance)

    def detach(self) -> IOStream:
        """Return a stream over this connection, which is no HTTP connection any more."""
        self.flush()
        self._state = CLOSED
        self._end_request()
        self._waiting = self._delegate = None
        # Who is the transport's protocol from here on is not for us to say.
        self._bulk = False
        if self.tls and not self.transport.is_closing():
            leave_tls(self.transport)
        self.deadline = math.inf
        self._server.closed(self)
        pending, self._pending = bytes(self._pending), bytearray()
        return hand_over(self.transport, pending, paused=self.reading_paused)


class _Bulk(asyncio.Protocol):
    """Stands in for a connection while a large body comes.

    asyncio then receives each piece into bytes of its own, which go on as they are: out of the server's buffer they
    would have to be copied once more, which costs an upload a twentieth.
    """

    def __init__(self, connection: Connection) -> None:
        self.data_received = connection.data_received  # type: ignore[method-assign]
        self.eof_received = connection.eof_received  # type: ignore[method-assign]
        self.connection_lost = connection.connection_lost  # type: ignore[method-assign]
        self.pause_writing = connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = connection.resume_writing  # type: ignore[method-assign]
