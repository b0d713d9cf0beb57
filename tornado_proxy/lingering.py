"""How Tornado's server connection ends, where its own way would harm a proxy's clients.

Two mends to one ``HTTP1Connection``, which serves one request. Both reach into Tornado 6.6's private names, here only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from tornado.httputil import HTTPHeaders
from tornado.iostream import SSLIOStream

log = logging.getLogger(__name__)

# Seconds that a client may go on sending after the whole response; what it sends is dropped. RFC 9112 section 9.6.
LINGER_TIME = 2.0


def close_after_response(connection: Any) -> None:
    """Close once the response is out, and say so: for HTTP/1.0 clients without a length, and after faulty framing."""
    connection._disconnect_on_finish = True
    # write_headers would promise "Keep-Alive" to an HTTP/1.0 client that asked for it; this is all that it looks at.
    connection._request_headers = HTTPHeaders()


def linger(connection: Any) -> None:
    """Read on for a while when the response is complete before the request.

    Tornado closes at once. What the client still sends then makes the kernel reset the connection, and the reset
    destroys the response's last bytes before they are read (RFC 9112 section 9.6). So let the server loop read on (it
    drops what it reads once the response is finished) until the body ends, which keeps the connection, or the time is
    up.
    """
    end_request, finish = connection._finish_request, connection.finish
    # Whether the connection was to be closed anyway, and not only because the body is still coming.
    closing = False

    def finish_noting_why() -> None:
        nonlocal closing
        closing = connection._disconnect_on_finish
        finish()

    def end_with_care(future: Any) -> None:
        stream = connection.stream
        if connection._read_finished or stream is None or stream.closed():
            end_request(future)
            return
        loop = asyncio.get_running_loop()
        # A quick upstream answers before the server loop has noticed that there is no body, or no more of it: the next
        # turn or two of the loop show.
        loop.call_soon(look, loop, loop.time() + LINGER_TIME, future, 0.0)

    def look(loop: asyncio.AbstractEventLoop, until: float, future: Any, wait: float) -> None:
        stream = connection.stream
        if connection._read_finished:
            connection._disconnect_on_finish = closing
        elif stream is not None and not stream.closed() and loop.time() < until:
            if closing and wait:
                _half_close(stream)
            loop.call_later(wait, look, loop, until, future, min(2 * wait + 0.0005, 0.05))
            return
        end_request(future)

    connection.finish = finish_noting_why
    connection._finish_request = end_with_care


def _half_close(stream: Any) -> None:
    """End our side, for a client that waits for the end. Not under TLS, whose own end must come first."""
    if isinstance(stream, SSLIOStream):
        return
    try:
        stream.socket.shutdown(socket.SHUT_WR)
    except OSError as exc:
        # The client has gone; the server loop is about to read that.
        log.debug("cannot end our side: %s", exc)
