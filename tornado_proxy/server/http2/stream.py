"""One stream: one request, and the way to answer it. For the application what `server.request` is in HTTP/1.1.

A stream ends in one of four ways: both sides have ended it; we have, and the rest of the request is not wanted
(NO_ERROR); someone has cut it (RST_STREAM); the connection has gone. After any of them nothing can be written, and
whoever still works for it has been told.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from http import HTTPStatus

from tornado.concurrent import Future
from tornado.httputil import HTTPHeaders, HTTPOutputError, RequestStartLine, ResponseStartLine
from tornado.iostream import IOStream

from tornado_proxy.server.http2.frames import Error
from tornado_proxy.server.http2.heads import http2_trailers, response_fields
from tornado_proxy.server.http2.receiving import ReceivingStream, StreamOwner
from tornado_proxy.server.link import end_waiting
from tornado_proxy.server.parser import RequestHead
from tornado_proxy.server.request import NO_LIMIT, Stream, closed_write, length_of

# Octets that may wait for the end of this turn of the loop before whoever writes must wait for it too. Windows can be
# as large as the client's memory; ours is not meant to be.
WRITE_AHEAD = 64 * 1024


class RequestStream(ReceivingStream):
    """Tornado's ``HTTPConnection``, and a ``ServerConnection`` for whoever relays."""

    def __init__(self, link: StreamOwner, stream_id: int, head: RequestHead, max_body_size: int) -> None:
        super().__init__(link, stream_id, head, max_body_size)
        self.context = link.context
        # The final head was put into the outbox.
        self.head_sent = False
        # finish() was called.
        self.finished = False
        # Octets that the declared length still promises; None where none was declared.
        self._left: int | None = None
        # It stands in the queue of those that may send.
        self.queued = False
        self._waiters: list[Future[None]] = []
        # What was unsent at the last look, and since when.
        self._unsent_at_sweep = 0
        self._stalled_since = math.inf

    # -- Tornado's interface

    @property
    def stream(self) -> Stream:
        """What stands in for the ``IOStream`` below Tornado's connections."""
        # Of a StreamOwner it asks these three things only.
        return Stream(self)  # type: ignore[arg-type]

    @property
    def transport(self) -> asyncio.Transport:
        """That of the connection; for :attr:`stream`."""
        return self._owner.transport

    def fileno(self) -> int:
        return self._owner.fileno()

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        self.close_callback = callback

    def set_max_body_size(self, max_body_size: int) -> None:
        self.max_body_size = max_body_size

    def set_body_timeout(self, timeout: float) -> None:
        if not self.complete:
            self._body_deadline = self._owner.loop.time() + timeout

    def write_headers(
        self,
        start_line: RequestStartLine | ResponseStartLine,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> Future[None]:
        """Send the head, and the first piece of the body with it."""
        assert isinstance(start_line, ResponseStartLine)
        if self._link is None:
            return closed_write()
        if self.head_sent:
            # h2 would refuse it, and the connection could not go on.
            self.abort()
            raise HTTPOutputError("Tried to write a second head")
        if start_line.code < 200:
            raise ValueError(f"status {start_line.code} is none of a final response in HTTP/2")
        left = self._promised(start_line.code, headers)
        self.outbox.heads.append(response_fields(start_line.code, headers))
        self._left = left
        self.outbox.bodyless = self._head.method == "HEAD" or start_line.code in (204, 304)
        self.head_sent = True
        return self.write(chunk or b"")

    def write(self, chunk: bytes) -> Future[None]:
        """Send a piece of the body; nothing, where the head could not be sent."""
        link = self._link
        if link is None:
            return closed_write()
        if not self.head_sent:
            return link.done
        if self._left is not None:
            self._left -= len(chunk)
            if self._left < 0:
                # The client would take the message for malformed (RFC 9113 section 8.1.1).
                self.abort()
                raise HTTPOutputError("Tried to write more data than Content-Length")
        self.outbox.put(chunk)
        link.enqueue(self)
        # It goes at the end of this turn if there is room, and then nobody need wait for that.
        waiting = self.outbox.size
        if not link.write_paused and (not waiting or waiting <= min(link.window(self.stream_id), WRITE_AHEAD)):
            return link.done
        waiter: Future[None] = link.loop.create_future()
        self._waiters.append(waiter)
        link.wait_for_room(self)
        return waiter

    def finish(self) -> None:
        """End the response. What the client still sends of this request is not wanted (RFC 9113 section 8.1)."""
        link = self._link
        if link is None:
            self.finished = True
            return
        if not self.head_sent:
            # RequestHandler gives up like this when its head has a character in it that cannot be sent.
            self.fail(500)
            return
        if self._left and not self.outbox.bodyless:
            self.abort()
            raise HTTPOutputError(f"Tried to write {self._left} bytes less than Content-Length")
        self._end_response(link)
        self.close_callback = None
        if self._delegate is not None:
            # Tornado's way of telling a delegate that its request ended before it saw the end of it.
            link.loop.call_soon(self._tell_the_end)

    def detach(self) -> IOStream:
        """Raise: a stream is not a connection, and what is asked for is HTTP/1.1's (RFC 9113 section 8.6)."""
        raise HTTPOutputError("a request of HTTP/2 has no connection of its own to detach")

    # -- beyond Tornado's: for whoever relays

    def unsent(self) -> int:
        """Return how many bytes wait: for the windows where those are closed, else for the connection too."""
        link = self._link
        if link is None:
            return 0
        waiting = self.outbox.size
        if waiting and link.window(self.stream_id) <= 0:
            # Others may send, which is no progress of ours.
            return waiting
        return waiting + link.unsent()

    def has_left(self) -> bool:
        """Return whether the client has closed its side, also while nothing is read."""
        return self._link is None or self._link.has_left()

    def is_closed(self) -> bool:
        """Return whether nothing can be written any more because the stream or the connection has ended."""
        return self._link is None

    def close_after_response(self) -> None:
        """Do nothing: where one request ends and the next begins is never in doubt here."""

    def abort(self) -> None:
        """End the stream, so that an unfinished response is seen to be unfinished. What was written goes out."""
        link = self._link
        if link is not None:
            link.cut(self, Error.INTERNAL_ERROR)
            link.loop.call_soon(self.tell)

    def begin_body(self, has_body: bool) -> None:
        """Take over: no limit of the server's, and no 100 Continue but by :meth:`send_interim`."""
        self.max_body_size = NO_LIMIT
        self.continue_due = False

    def proceed(self) -> None:
        """Do nothing: bodies come in frames of their own."""

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """Send a 1xx head, unless the final one was sent. 101 does not exist here (RFC 9113 section 8.6)."""
        if not 100 <= status < 200:
            raise ValueError(f"status {status} is none of an interim response")
        link = self._link
        if link is None or self.head_sent or status == 101:
            return
        if status == 100:
            self.continue_due = False
        self.outbox.heads.append(response_fields(status, headers))
        link.enqueue(self)

    def takes_trailers(self) -> bool:
        """Return whether :meth:`set_trailers` may be called: always, where there can be a body."""
        return self._link is not None and not self.outbox.bodyless

    def set_trailers(self, headers: HTTPHeaders) -> None:
        """Send these behind the body when the response is finished. Raises ``ValueError`` as ``write_headers`` does."""
        if not self.outbox.bodyless:
            self.outbox.trailers = http2_trailers(headers)

    # -- for the connection

    def fail(self, status: int) -> None:
        """End the request by an answer of our own, or visibly short where the application's has begun."""
        link = self._link
        if link is None:
            return
        if self.head_sent:
            self.abort()
            return
        self.head_sent = True
        self.outbox.heads.append(own_answer(status))
        self._end_response(link)
        link.loop.call_soon(self.tell)

    def closed(self) -> None:
        """Refuse all that the application still wants to write, and drop what it has written."""
        self._link = None
        self._busy = None
        self._pending.clear()
        self.outbox.clear()
        waiters, self._waiters = self._waiters, []
        end_waiting(waiters)

    def lose(self) -> None:
        """Drop everything, and tell the application that the client will not get, or did not send, the rest.

        It is told in the next turn of the loop: a handler whose request came in this one has not begun yet.
        """
        self.closed()
        self._owner.loop.call_soon(self.tell)

    def written(self) -> None:
        """All that was written is out."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def sweep(self, now: float) -> None:
        """Look after what only time can tell."""
        if now >= self._body_deadline:
            self._body_deadline = math.inf
            self.fail(408)
        owner = self._owner
        # Where the client does not read, heads and ends wait as well, which are no content; else they wait for nothing.
        waiting = self.outbox.size + (owner.unsent() if owner.write_paused else 0)
        if not self.finished or waiting != self._unsent_at_sweep:
            self._unsent_at_sweep = waiting
            self._stalled_since = now
        elif now >= self._stalled_since + owner.write_stall:
            owner.cut(self, Error.CANCEL)

    # -- inside

    def _end_response(self, link: StreamOwner) -> None:
        self.finished = True
        self.outbox.ended = True
        self._link = None
        self._drop_held()
        link.enqueue(self)

    def _promised(self, code: int, headers: HTTPHeaders) -> int | None:
        """Return how much content must come."""
        if code == 204:
            # RFC 9110 section 8.6.
            if "Content-Length" in headers:
                del headers["Content-Length"]
            return 0
        if self._head.method == "HEAD" or code == 304:
            return 0
        return length_of(headers["Content-Length"]) if "Content-Length" in headers else None


def own_answer(status: int) -> list[tuple[bytes, bytes]]:
    """Return the fields of an answer that is not the application's."""
    return [(b":status", b"%d" % HTTPStatus(status)), (b"content-length", b"0")]
