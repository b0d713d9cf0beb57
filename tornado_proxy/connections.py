"""The server's connection, as an exchange needs it beyond what Tornado's ``HTTPConnection`` interface offers.

Our own server's connections are :class:`ServerConnection` themselves. Tornado's are not; :class:`TornadoConnection`
reaches into the private names of its 6.6 ``HTTP1Connection``, and does so here only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable
from typing import Any, Protocol

from tornado.httputil import HTTPHeaders, HTTPInputError
from tornado.iostream import SSLIOStream, StreamClosedError

from tornado_proxy.framing import Framing
from tornado_proxy.kernel import has_left, unacknowledged, was_reset

log = logging.getLogger(__name__)

# Seconds that a client may go on sending after the whole response; what it sends is dropped. RFC 9112 section 9.6.
LINGER_TIME = 2.0

_NO_LIMIT = 2**63 - 1


class ServerConnection(Protocol):
    """One request's use of a downstream connection."""

    @property
    def framing(self) -> Framing | None:
        """How the request's body is delimited; ``None`` where nobody has judged that yet."""

    @property
    def request_trailers(self) -> HTTPHeaders | None:
        """The fields behind the request's body, as they came, once it has ended; ``None`` where there are none."""

    def begin_body(self, has_body: bool) -> None:
        """Prepare for a body that is read while the response may already be under way; send no 100 for it.

        Where the client waits for that, a response that comes before it, and before the body, ends the connection.
        """

    def proceed(self) -> None:
        """Deliver what has arrived of the body now, where that is possible: who takes it is prepared."""

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """Send a 1xx response before the final one; ``reason`` is sent in UTF-8."""

    def is_closed(self) -> bool:
        """Return whether the connection is known to have ended."""

    def unsent(self) -> int:
        """Return how many bytes of what was written wait for the other end to read."""

    def has_left(self) -> bool:
        """Return whether the other end has closed its side, though we are not reading."""

    def close_after_response(self) -> None:
        """Close once the response is out, and say so: after faulty framing, and for HTTP/1.0 without a length.

        In HTTP/2 there is nothing to do: where a request ends is never in doubt, and the connection is others' too.
        """

    def takes_trailers(self) -> bool:
        """Return whether the response can end with trailers. Known once its head is sent."""

    def set_trailers(self, headers: HTTPHeaders) -> None:
        """Send these behind the body when the response is finished (RFC 9110 section 6.5)."""

    def abort(self) -> None:
        """Close now. What was written goes out; then the end comes too early, which the other end sees."""


def server_connection(connection: Any) -> ServerConnection:
    """Return ``connection`` where it is a :class:`ServerConnection` itself, else Tornado's as one."""
    if hasattr(connection, "begin_body"):
        return connection  # type: ignore[no-any-return]
    return TornadoConnection(connection)


class TornadoConnection:
    """Tornado's ``HTTP1Connection``, which serves one request."""

    __slots__ = ("_awaited", "_connection")

    framing: Framing | None = None
    # It takes no request that has any.
    request_trailers: HTTPHeaders | None = None

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        # The body, while the client waits to be told to send it.
        self._awaited: _AwaitedBody | None = None
        headers = connection._request_headers
        if headers is not None and ("Content-Length" in headers or "Transfer-Encoding" in headers):
            # Now, because a handler may answer before its body is begun.
            _Linger(connection)
            _cut_on_broken_body(connection)

    def begin_body(self, has_body: bool) -> None:
        connection = self._connection
        if has_body and "Expect" in connection._request_headers:
            self._awaited = _AwaitedBody(connection)
        _withhold_continue(connection)
        if has_body:
            # Tornado's own limit is 100 MB and answers in our place; ours is the option max_body_size.
            connection.set_max_body_size(_NO_LIMIT)
        else:
            # The server loop finds that out in the next turn; a response that is complete before would make it close.
            connection._read_finished = True
            # It listens for the end from then on too, and never tells of one that it has seen before.
            on_close = connection._close_callback
            connection.stream.set_close_callback(on_close)
            # libuv, and so uvloop, tells of a reset once and never again: it may have done so already.
            if on_close is not None and (connection.stream.closed() or was_reset(connection.stream.fileno())):
                on_close()

    def proceed(self) -> None:
        """Do nothing: Tornado's server finds out when its turn comes."""

    def send_interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        stream = self._connection.stream
        if stream is None or stream.closed():
            return
        if status == 100 and self._awaited is not None:
            self._awaited.will_come()
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.get_all()])
        # As Tornado writes a final head: its start line in UTF-8.
        stream.write(f"HTTP/1.1 {status} {reason}\r\n".encode() + fields.encode("latin-1") + b"\r\n")

    def is_closed(self) -> bool:
        return self._connection.stream is None or self._connection.stream.closed()

    def unsent(self) -> int:
        # IOStream has no public count. writing() says whether, the two indexes how much is left.
        stream = self._connection.stream
        if stream is None or not stream.writing():
            return 0
        return int(stream._total_write_index - stream._total_write_done_index) + unacknowledged(stream.fileno()) or 1

    def has_left(self) -> bool:
        stream = self._connection.stream
        if stream is None or stream.closed():
            return True
        return has_left(stream.fileno())

    def close_after_response(self) -> None:
        # What is still to come of the body is dropped, and has no limit: Tornado would answer once more.
        self._connection.set_max_body_size(_NO_LIMIT)
        self._connection._disconnect_on_finish = True
        # write_headers would promise "Keep-Alive" to an HTTP/1.0 client that asked for it; it looks at nothing else.
        self._connection._request_headers = HTTPHeaders()

    def takes_trailers(self) -> bool:
        # It writes the last chunk and the end in one.
        return False

    def set_trailers(self, headers: HTTPHeaders) -> None:
        raise RuntimeError("Tornado's server sends no trailers")

    def abort(self) -> None:
        connection = self._connection
        # There will be no end of a response to linger at.
        _put_back(connection)
        stream = connection.stream
        if stream is None or stream.closed():
            if stream is not None and stream.error is not None:
                # Of who was reset the stream keeps the error, that its frames, and one of them the stream.
                stream.error.__traceback__ = None
            return
        begun = connection._response_start_line is not None
        if begun and not connection._chunking_output and connection._expected_content_remaining is None:
            # Only the connection's end delimits this body; make it an error for its reader.
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


class _AwaitedBody:
    """Closes with a response that comes before the client was told to send its body, and before it does so by itself.

    Whether it sends the body after that is its own choice (RFC 9110 section 10.1.1), and Tornado would read the next
    request as the body. Where it is to close it says so.
    """

    __slots__ = ("_connection", "_deliver", "_would_close")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._deliver = connection._deliver_body
        self._would_close = connection._disconnect_on_finish
        connection._disconnect_on_finish = True
        connection._deliver_body = self._deliver_first

    def will_come(self) -> None:
        connection = self._connection
        connection.__dict__.pop("_deliver_body", None)
        if connection._response_start_line is None:
            connection._disconnect_on_finish = self._would_close

    async def _deliver_first(self, delegate: Any, data: bytes) -> None:
        self.will_come()
        await self._deliver(delegate, data)


class _Linger:
    """Reads on for a while when the response is complete before the request.

    Tornado closes at once. What the client still sends then makes the kernel reset the connection, and the reset
    destroys the response's last bytes before they are read (RFC 9112 section 9.6). So let the server loop read on (it
    drops what it reads once the response is finished) until the body ends, which keeps the connection, or the time is
    up.
    """

    __slots__ = ("_closing", "_connection", "_end_request", "_finish", "_until")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._end_request, self._finish = connection._finish_request, connection.finish
        # Whether the connection was to be closed anyway, and not only because the body is still coming.
        self._closing = False
        self._until = 0.0
        connection.finish = self._finish_noting_why
        connection._finish_request = self._end_with_care

    def _finish_noting_why(self) -> None:
        self._closing = self._connection._disconnect_on_finish
        self._finish()

    def _end_with_care(self, future: Any) -> None:
        connection = self._connection
        stream = connection.stream
        if connection._read_finished or stream is None or stream.closed():
            self._end(future)
            return
        loop = asyncio.get_running_loop()
        self._until = loop.time() + LINGER_TIME
        # A quick upstream answers before the server loop has noticed that there is no more of the body: the next turn
        # or two of the loop show.
        loop.call_soon(self._look, loop, future, 0.0)

    def _look(self, loop: asyncio.AbstractEventLoop, future: Any, wait: float) -> None:
        connection = self._connection
        stream = connection.stream
        if connection._read_finished:
            connection._disconnect_on_finish = self._closing
        elif stream is not None and not stream.closed() and loop.time() < self._until:
            if self._closing and wait:
                _half_close(stream)
            loop.call_later(wait, self._look, loop, future, min(2 * wait + 0.0005, 0.05))
            return
        self._end(future)

    def _end(self, future: Any) -> None:
        _put_back(self._connection)
        self._end_request(future)


def _put_back(connection: Any) -> None:
    """Let the connection have its own methods; what stood in their place would leave it to the garbage collector."""
    for name in ("finish", "_finish_request", "_read_body", "_deliver_body"):
        connection.__dict__.pop(name, None)


def _cut_on_broken_body(connection: Any) -> None:
    """Close when the request's body turns out to be malformed and the response has begun.

    Tornado writes a 400 whatever it has written before, which the client would read as part of the running response.
    """
    read_body = connection._read_body

    def guarded(*args: Any) -> Awaitable[None] | None:
        # Which raises where the framing is malformed or the length above a limit.
        try:
            body: Awaitable[None] | None = read_body(*args)
        except HTTPInputError:
            cut_if_begun()
            raise
        return None if body is None else guarded_body(body)

    async def guarded_body(body: Awaitable[None]) -> None:
        try:
            await body
        except StreamClosedError as exc:
            # Between chunks it refers to a frame of Tornado's, that to the future of its read, and that to it.
            exc.__traceback__ = None
            raise
        except HTTPInputError:
            cut_if_begun()
            raise

    def cut_if_begun() -> None:
        if connection._response_start_line is not None:
            connection.stream.close()
            raise StreamClosedError

    connection._read_body = guarded


def _withhold_continue(connection: Any) -> None:
    """Keep Tornado from saying "100 Continue" before the upstream was asked.

    It looks for the field in the turn of the loop in which it learns that ``prepare`` is done, which is the next one.
    """
    headers = connection._request_headers
    if "Expect" in headers:
        expected = headers.get_list("Expect")
        del headers["Expect"]

        def restore() -> None:
            for value in expected:
                headers.add("Expect", value)

        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, restore)


def _half_close(stream: Any) -> None:
    """End our side, for a client that waits for the end. Not under TLS, whose own end must come first."""
    if isinstance(stream, SSLIOStream):
        return
    try:
        stream.socket.shutdown(socket.SHUT_WR)
    except OSError as exc:
        # The client has gone; the server loop is about to read that.
        log.debug("cannot end our side: %s", exc)
