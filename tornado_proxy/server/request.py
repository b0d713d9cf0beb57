"""What the application gets for each request: the way to answer it. Tornado's ``HTTPConnection``, and some more.

Nothing here reads; that is done in ``connection``, which makes one of these for each request and outlives it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Protocol

from tornado.concurrent import Future
from tornado.escape import native_str, utf8
from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPOutputError, RequestStartLine, ResponseStartLine
from tornado.iostream import IOStream

from tornado_proxy.framing import NO_BODY, Framing
from tornado_proxy.headers import NOT_IN_TRAILERS, lines_of, remove_hop_by_hop
from tornado_proxy.server.detach import closed_stream
from tornado_proxy.server.link import HOLD_BELOW, Context, end_waiting
from tornado_proxy.server.parser import RequestHead, connection_options

NO_LIMIT = 2**63 - 1
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# Status line by code and reason. Applications choose the reasons, so there must be an end.
_status_lines: dict[tuple[int, str], bytes] = {}
_MAX_STATUS_LINES = 500
_FORBIDDEN_IN_REASON = re.compile(rb"[\r\n\0]")


class Stream:
    """As much of an ``IOStream`` as ``HTTPServerRequest`` and handlers ask of ``connection.stream``."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @property
    def socket(self) -> Any:
        """The TLS object, where there is one, else the socket: ``get_ssl_certificate`` asks it."""
        transport = self._owner.transport
        return transport.get_extra_info("ssl_object") or transport.get_extra_info("socket")

    def fileno(self) -> int:
        return self._owner.fileno()

    def closed(self) -> bool:
        return self._owner.transport.is_closing()

    def close(self) -> None:
        self._owner.abort()

    def set_nodelay(self, value: bool) -> None:
        """Do nothing: small writes are never held back here."""


class Owner(Protocol):
    """What a request needs of its connection."""

    transport: asyncio.Transport
    context: Context
    # The transport has asked us to stop for a while.
    write_paused: bool
    # Resolved, for everyone who need not wait.
    done: Future[None]

    @property
    def draining(self) -> bool: ...
    def fileno(self) -> int: ...
    def write(self, data: bytes) -> None: ...
    def hold(self, data: bytes) -> None: ...
    def send(self, data: bytes) -> None: ...
    def write_waiter(self) -> Future[None]: ...
    def body_has_begun(self) -> bool: ...
    def response_finished(self, upgraded: bool) -> None: ...
    def fail(self, status: int) -> None: ...
    def abort(self, *, reset: bool = False) -> None: ...
    def unsent(self) -> int: ...
    def has_left(self) -> bool: ...
    def detach(self) -> IOStream: ...
    def proceed(self) -> None: ...
    def set_body_timeout(self, timeout: float) -> None: ...


class RequestConnection(HTTPConnection):
    """One request, and the way to answer it."""

    def __init__(self, link: Owner, head: RequestHead, max_body_size: int) -> None:
        # None once nothing can be written any more: finished, closed or detached.
        self._link: Owner | None = link
        self._owner = link
        self._head = head
        # How the body of the request is delimited.
        self.framing: Framing | None = head.framing
        self.context = link.context
        # The fields behind the request's body, where there are any; complete when the body is. Nobody has judged them:
        # what the head may say they may not (RFC 9110 section 6.5.1).
        self.request_trailers: HTTPHeaders | None = None
        # The body may be this long; the application may change it until headers_received is done.
        self.max_body_size = max_body_size
        # Called when the client leaves after the whole request has arrived.
        self.close_callback: Callable[[], None] | None = None
        # The connection ends with this response.
        self.closing = not head.keep_alive
        # The client waits for 100, and we are to send it unless the application does.
        self.continue_due = head.expects_continue
        self.head_sent = False
        # finish() was called; nothing follows.
        self.finished = False
        self._chunked = False
        # Bytes that the declared length still promises; None where none was declared.
        self._left: int | None = None
        # How a chunked body ends, with its trailers.
        self._last_chunk = b"0\r\n\r\n"
        # Only the end of the connection delimits the response.
        self._until_close = False
        self._upgraded = False

    # -- Tornado's interface

    @property
    def stream(self) -> Stream:
        """What stands in for the ``IOStream`` below Tornado's connections."""
        return Stream(self._owner)

    def set_close_callback(self, callback: Callable[[], None] | None) -> None:
        self.close_callback = callback

    def set_max_body_size(self, max_body_size: int) -> None:
        self.max_body_size = max_body_size

    def set_body_timeout(self, timeout: float) -> None:
        if self._link is not None:
            self._link.set_body_timeout(timeout)

    @property
    def no_keep_alive(self) -> bool:
        """The connection ends with this response."""
        return self.closing

    @no_keep_alive.setter
    def no_keep_alive(self, value: bool) -> None:
        self.closing = self.closing or value

    def write_headers(
        self,
        start_line: RequestStartLine | ResponseStartLine,
        headers: HTTPHeaders,
        chunk: bytes | None = None,
    ) -> Future[None]:
        """Send the head, and the first piece of the body with it."""
        assert isinstance(start_line, ResponseStartLine)
        link = self._link
        if link is None or link.transport.is_closing():
            return closed_write()
        self._frame(start_line.code, headers, link)
        data = _status_line(start_line.code, start_line.reason) + serialize(headers)
        self.head_sent = True
        if not chunk:
            # Whoever sends a head alone wants it to be seen.
            link.send(data)
        elif self._chunked and len(chunk) < HOLD_BELOW:
            # It waits for what may follow it: most small bodies are one chunk.
            link.hold(b"%b%x\r\n%b\r\n" % (data, len(chunk), chunk))
        else:
            link.send(data + self._format(chunk, link))
        return link.write_waiter() if link.write_paused else link.done

    def write(self, chunk: bytes) -> Future[None]:
        """Send a piece of the body; nothing, where the head could not be sent."""
        link = self._link
        if link is None or link.transport.is_closing():
            return closed_write()
        if chunk and self.head_sent:
            link.send(self._format(chunk, link))
        return link.write_waiter() if link.write_paused else link.done

    def finish(self) -> None:
        """End the response. What the client still sends of this request is dropped."""
        link = self._link
        if link is None:
            self.finished = True
            return
        if not self.head_sent:
            # RequestHandler gives up like this when its head has a character in it that cannot be sent.
            link.fail(500)
            return
        if self._left:
            # A message that is short of its length must not be followed by another.
            link.abort()
            raise HTTPOutputError(f"Tried to write {self._left} bytes less than Content-Length")
        self.finished = True
        self._link = None
        if self._chunked:
            link.send(self._last_chunk)
        link.response_finished(self._upgraded)

    def detach(self) -> IOStream:
        """Hand the connection over, as a stream; what has been read of it and not used is in there."""
        # WebSocketHandler finishes its 101 first. After any other end there is nothing left to hand over.
        gone = self._link is None and not self._upgraded
        self.finished = True
        self._link = None
        return closed_stream() if gone else self._owner.detach()

    # -- beyond Tornado's: for whoever relays

    def unsent(self) -> int:
        """Return the number of bytes that were written and that the client has not acknowledged; 0 if none waits."""
        return self._link.unsent() if self._link is not None else 0

    def has_left(self) -> bool:
        """Return whether the client has closed its side, also while nothing is read."""
        return self._link is None or self._link.has_left()

    def close_after_response(self) -> None:
        """End the connection with this response, and say so where the head is still to come."""
        self.closing = True

    def abort(self) -> None:
        """Close now, so that an unfinished response is seen to be unfinished. What was written goes out."""
        if self._link is not None:
            self._link.abort(reset=self._until_close)

    def takes_trailers(self) -> bool:
        """Return whether :meth:`set_trailers` may be called: behind chunks, for who asks (RFC 9110 section 6.5.1)."""
        return self._chunked and any(
            "trailers" in connection_options(line) for line in self._head.headers.get_list("Te")
        )

    def set_trailers(self, headers: HTTPHeaders) -> None:
        """Send these behind the body when the response is finished. Raises ``ValueError`` as ``write_headers`` does."""
        fields = headers.copy()
        remove_hop_by_hop(fields, NOT_IN_TRAILERS)
        self._last_chunk = b"0" + serialize(fields)

    def begin_body(self, has_body: bool) -> None:
        """Take over: no limit of the server's, and no 100 Continue but by :meth:`send_interim`."""
        self.max_body_size = NO_LIMIT
        self.continue_due = False

    def proceed(self) -> None:
        """Deliver what has arrived of the body, if what the application asked us to wait for is done."""
        if self._link is not None:
            self._link.proceed()

    def is_closed(self) -> bool:
        """Return whether nothing can be written any more because the connection has ended."""
        return self._link is None or self._link.transport.is_closing()

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """Send a 1xx head; not to HTTP/1.0 (RFC 9110 section 15.2), and not after the final head."""
        link = self._link
        if link is None or self.head_sent or self._head.version != "HTTP/1.1" or link.transport.is_closing():
            return
        if status == 100:
            self._continued()
        link.write(_status_line(status, reason) + serialize(headers))

    # -- for the server

    @property
    def has_body(self) -> bool:
        """Whether a body was announced, be it an empty one."""
        return self._head.framing is not NO_BODY

    @property
    def declared_length(self) -> int | None:
        """How long the body of the request is, where its head says so."""
        return self._head.framing.length

    def send_continue(self) -> None:
        """Send the 100 that is due, unless it is too late or needless (RFC 9110 section 10.1.1)."""
        link = self._link
        if self.continue_due and link is not None and not self.head_sent:
            self._continued()
            link.write(CONTINUE)

    def closed(self) -> None:
        """Refuse all that the application still wants to write."""
        self._link = None

    # -- inside

    def _continued(self) -> None:
        self.continue_due = self._head.expects_continue = False

    def _frame(self, code: int, headers: HTTPHeaders, link: Owner) -> None:
        """Decide how the client will see the end of the response (RFC 9112 section 6.3), and say so in ``headers``."""
        http11 = self._head.version == "HTTP/1.1"
        fields = lines_of(headers)
        # Anew, because a head that could not be sent may be followed by another.
        self._chunked, self._left, self._until_close = False, None, False
        if 100 <= code < 200 or code == 204:
            # RFC 9110 section 8.6: no Content-Length here. There is no content either.
            if "Content-Length" in fields:
                del headers["Content-Length"]
            self._left = 0
            self._upgraded = code == 101
        elif self._head.method == "HEAD" or code == 304:
            self._left = 0
        elif "Content-Length" in fields:
            lengths = fields["Content-Length"]
            # Tornado lets bytes pass, here as in other fields.
            self._left = length_of(lengths[0] if len(lengths) == 1 else ",".join(lengths))
        elif http11:
            self._chunked = True
        else:
            self._until_close = self.closing = True
        if self._chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif "Transfer-Encoding" in fields:
            # Beside a length it would be a second framing, and HTTP/1.0 does not know it.
            del headers["Transfer-Encoding"]

        if self._head.expects_continue and not link.body_has_begun():
            # The client may send its body or not: nobody knows what the next byte will be.
            self.closing = True
        if self._upgraded:
            return
        if "Connection" in fields and "close" in connection_options(headers["Connection"]):
            self.closing = True
        elif self.closing or link.draining:
            self.closing = True
            if http11:
                headers["Connection"] = "close"
        elif not http11:
            # RFC 9112 section 9.3: the client asked for it, and cannot know that it got it otherwise.
            headers["Connection"] = "Keep-Alive"

    def _format(self, chunk: bytes, link: Owner) -> bytes:
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self._left is not None:
            self._left -= len(chunk)
            if self._left < 0:
                # What follows would be read as the next response.
                link.abort()
                raise HTTPOutputError("Tried to write more data than Content-Length")
        return chunk


def serialize(headers: HTTPHeaders) -> bytes:
    """Return the field lines and the empty line after them. Raises ``ValueError`` where one would end early."""
    fields = lines_of(headers)
    try:
        lines = ["", *[name + ": " + value for name, values in fields.items() for value in values], "", ""]
    except TypeError:
        # Tornado lets bytes pass.
        lines = ["", *[native_str(name) + ": " + native_str(value) for name, value in headers.get_all()], "", ""]
    text = "\r\n".join(lines)
    # As many as we put in ourselves; one search for all values instead of one for each.
    breaks = len(lines) - 1
    if text.count("\n") != breaks or text.count("\r") != breaks or "\0" in text:
        raise ValueError("Illegal characters (CR, LF or NUL) in header")
    return text.encode("latin-1")


def length_of(value: str) -> int:
    """Return the length that the application has promised. Raises ``ValueError`` for what is none."""
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"invalid Content-Length {value!r}")
    return int(value)


def _status_line(code: int, reason: str) -> bytes:
    """Return the status line, without its end: :func:`serialize` begins with that."""
    line = _status_lines.get((code, reason))
    if line is None:
        line = b"HTTP/1.1 %d %b" % (code, utf8(reason))
        if _FORBIDDEN_IN_REASON.search(line):
            raise ValueError(f"Illegal characters (CR, LF or NUL) in reason {reason!r}")
        if len(_status_lines) < _MAX_STATUS_LINES:
            _status_lines[code, reason] = line
    return line


def closed_write() -> Future[None]:
    """Return what a write is answered with that comes too late."""
    future: Future[None] = Future()
    end_waiting([future])
    return future
