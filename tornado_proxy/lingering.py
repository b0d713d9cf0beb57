"""How Tornado's server connection ends, where its own way would harm a proxy's clients.

Two mends to one ``HTTP1Connection``, which serves one request. Both reach into Tornado 6.6's private names, here only.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from tornado.httputil import HTTPHeaders

# Seconds that a client may go on sending after the whole response; what it sends is dropped. RFC 9112 section 9.6.
LINGER_TIME = 2.0
_LOOK = 0.05


def close_after_response(connection: Any) -> None:
    """Close once the response is out, and say so: for HTTP/1.0 clients without a length, and after faulty framing."""
    connection._disconnect_on_finish = True
    # write_headers would promise "Keep-Alive" to an HTTP/1.0 client that asked for it; this is all that it looks at.
    connection._request_headers = HTTPHeaders()


def linger(connection: Any) -> None:
    """Close with care when the response is complete before the request.

    Tornado closes at once. What the client still sends then makes the kernel reset the connection, and the reset destroys
    the response's last bytes before they are read (RFC 9112 section 9.6). So: end our side, let the server loop read on
    for a while (it drops what it reads once the response is finished), then close.
    """
    finish = connection._finish_request

    def finish_request(future: Any) -> None:
        stream = connection.stream
        if connection._read_finished or stream is None or stream.closed():
            finish(future)
            return
        if isinstance(stream.socket, socket.socket) and not hasattr(stream.socket, "pending"):
            # Not under TLS, whose own end must come first.
            stream.socket.shutdown(socket.SHUT_WR)
        loop = asyncio.get_running_loop()
        look(loop, loop.time() + LINGER_TIME, future)

    def look(loop: asyncio.AbstractEventLoop, until: float, future: Any) -> None:
        stream = connection.stream
        if stream is None or stream.closed() or connection._read_finished or loop.time() >= until:
            finish(future)
        else:
            loop.call_later(_LOOK, look, loop, until, future)

    connection._finish_request = finish_request
