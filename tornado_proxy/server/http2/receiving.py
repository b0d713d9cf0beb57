"""The request of one stream, on its way to the application, which may be slower than the client.

What the application has not taken is held here, at most a window of it: only what it has taken may be sent again
(RFC 9113 section 5.2). Nothing is given to it while it is busy with what it was given before.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from tornado.concurrent import Future
from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPInputError, HTTPMessageDelegate, RequestStartLine
from tornado.log import app_log

from tornado_proxy.errors import BadRequest
from tornado_proxy.framing import NO_BODY
from tornado_proxy.server.http2.frames import Error
from tornado_proxy.server.http2.heads import Malformed
from tornado_proxy.server.http2.outbox import Outbox
from tornado_proxy.server.link import Context
from tornado_proxy.server.parser import RequestHead, body_too_large

_CONTINUE = [(b":status", b"100")]


class StreamOwner(Protocol):
    """What a stream needs of its connection."""

    transport: asyncio.Transport
    context: Context
    write_paused: bool
    write_stall: float
    # Resolved, for everyone who need not wait.
    done: Future[None]
    loop: asyncio.AbstractEventLoop

    def fileno(self) -> int: ...
    def unsent(self) -> int: ...
    def has_left(self) -> bool: ...
    def window(self, stream_id: int) -> int: ...
    def enqueue(self, stream: Any) -> None: ...
    def wait_for_room(self, stream: Any) -> None: ...
    def open_window(self, stream: Any, size: int) -> int: ...
    def cut(self, stream: Any, code: Error) -> None: ...


class ReceivingStream(HTTPConnection):
    """The receiving half of a stream."""

    # The fields behind the request's body, where there are any; complete when the body is. As in `server.request`.
    request_trailers: HTTPHeaders | None = None

    def __init__(self, link: StreamOwner, stream_id: int, head: RequestHead, max_body_size: int) -> None:
        self.stream_id = stream_id
        # None once nothing can be written any more: finished, cut or lost.
        self._link: StreamOwner | None = link
        self._owner = link
        self._head = head
        # Our verdict: what goes upstream is framed by it. There need not be a Content-Length.
        self.framing = head.framing
        self.max_body_size = max_body_size
        # Called when the client leaves after the whole request has arrived.
        self.close_callback: Callable[[], None] | None = None
        # The client waits for 100, and we are to send it unless the application does.
        self.continue_due = head.expects_continue
        self.outbox = Outbox()
        # The client has sent all of the request.
        self.complete = False
        # To the end of the body, which it takes.
        self._delegate: HTTPMessageDelegate | None = None
        # What the application is busy with, and how many octets of content that is; and what has come since.
        self._busy: Future[Any] | None = None
        self._taking = 0
        self._pending = bytearray()
        # Octets that have come; and those that were taken without the window being opened yet.
        self._received = 0
        self._credit = 0
        self._body_deadline = math.inf

    def fail(self, status: int) -> None:
        """End the request by an answer of our own, or visibly short where the application's has begun."""
        raise NotImplementedError

    # -- the server and the connection call these

    @property
    def has_body(self) -> bool:
        """Whether a body was announced, be it an empty one."""
        return self.framing is not NO_BODY

    def begin(self, delegate: HTTPMessageDelegate) -> None:
        """Give the head to the application."""
        self._delegate = delegate
        head = self._head
        start_line = RequestStartLine(head.method, head.target, head.version)
        try:
            ready = delegate.headers_received(start_line, head.headers)
            if ready is None or self._is_ready(ready, 0):
                self._expect_body()
        except Exception as error:
            self._failed(error)

    def receive(self, data: bytes) -> None:
        """Take a piece of the body. Raises ``Malformed`` beyond the declared length."""
        self._received += len(data)
        length = self.framing.length
        if length is not None and self._received > length:
            raise Malformed("more content than Content-Length")
        if self._link is None or self._delegate is None:
            # It was answered, and the answer is still going out. Who sends all before it reads must come to an end.
            self._taken(len(data))
            return
        if not data:
            return
        if self._busy is None:
            self._deliver_piece(data, self._delegate)
        else:
            self._pending += data

    def take_padding(self, size: int) -> None:
        """Let the client send again what the window lost by padding."""
        self._taken(size)

    def request_ended(self) -> None:
        """Take the end of the request. Raises ``Malformed`` short of the declared length."""
        self.complete = True
        length = self.framing.length
        if length is not None and self._received != length:
            raise Malformed("less content than Content-Length")
        self._body_deadline = math.inf
        self._deliver()

    def tell(self) -> None:
        """Tell the application that the client will not get, or did not send, the rest."""
        callback, self.close_callback = self.close_callback, None
        if self._delegate is not None:
            self._tell_the_end()
        elif callback is not None:
            try:
                callback()
            except Exception:
                app_log.error("Uncaught exception", exc_info=True)

    # -- inside

    def _expect_body(self) -> None:
        """The application has taken the head: now the limit is known, and the client may be asked for the body."""
        if self._link is None:
            return
        length = self.framing.length
        if length is not None and length > self.max_body_size:
            raise body_too_large(self.max_body_size)
        if self.continue_due and not self._received:
            self.continue_due = False
            self.outbox.heads.append(_CONTINUE)
            self._link.enqueue(self)
        self._deliver()

    def _deliver(self) -> None:
        """Give the application what is here, and the end if that is all, unless it is busy."""
        while self._busy is None and self._delegate is not None and self._link is not None:
            if self._pending:
                piece, self._pending = bytes(self._pending), bytearray()
                self._deliver_piece(piece, self._delegate)
            elif self.complete:
                delegate, self._delegate = self._delegate, None
                try:
                    delegate.finish()
                except Exception as error:
                    self._failed(error)
            else:
                return

    def _deliver_piece(self, piece: bytes, delegate: HTTPMessageDelegate) -> None:
        try:
            if self._received > self.max_body_size:
                raise body_too_large(self.max_body_size)
            self.continue_due = False
            ready = delegate.data_received(piece)
            if ready is None or self._is_ready(ready, len(piece)):
                self._taken(len(piece))
        except Exception as error:
            self._failed(error)

    def _taken(self, size: int) -> None:
        """So much was taken, by the application or for nobody, and the client may send as much again."""
        if not self.complete:
            self._credit = self._owner.open_window(self, self._credit + size)

    def _drop_held(self) -> None:
        """Drop what the application has not taken, and will not: the window is the client's all the same."""
        held = len(self._pending) + (self._taking if self._busy is not None else 0)
        self._busy = None
        self._pending.clear()
        self._taken(held)

    def _is_ready(self, answer: Awaitable[None], size: int) -> bool:
        """Return whether a delegate's answer lets us go on; if not, we go on when it is resolved."""
        future = asyncio.ensure_future(answer)
        if future.done():
            future.result()
            return True
        self._busy = future
        self._taking = size
        future.add_done_callback(self._on_ready)
        return False

    def _on_ready(self, future: Future[Any]) -> None:
        if future is not self._busy:
            # The request has ended otherwise; the failure is nobody's.
            if not future.cancelled():
                future.exception()
            return
        self._busy = None
        try:
            future.result()
            if self._taking:
                self._taken(self._taking)
                self._deliver()
            else:
                self._expect_body()
        except (Exception, asyncio.CancelledError) as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """Answer for what the application, or a limit, has raised."""
        if isinstance(error, BadRequest):
            self.fail(error.status_code)
        elif isinstance(error, HTTPInputError):
            self.fail(400)
        else:
            app_log.error("Uncaught exception", exc_info=error)
            self.fail(500)

    def _tell_the_end(self) -> None:
        delegate, self._delegate = self._delegate, None
        if delegate is None:
            return
        try:
            delegate.on_connection_close()
        except Exception:
            app_log.error("Uncaught exception", exc_info=True)
