"""The contract between the forwarder and whatever speaks HTTP to the upstream."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from tornado_proxy.messages import UpstreamRequest, UpstreamResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a client can do, where clients differ. What is false here is a limitation that its users must know.

    The contract suite holds each client to exactly its record, and options that need what is missing fail at start-up.
    """

    # -- bodies
    # The response's head is returned, and its body passes, while the upstream still sends.
    streams_response: bool = True
    # An upload waits for the upstream to take it, so that memory is bounded whatever its size.
    upload_backpressure: bool = True
    # An answer is seen while the upload still runs; without this, only when the upload is done or broken off.
    early_response: bool = True

    # -- the wire
    # Path and query go out byte for byte, whatever printable ASCII they hold.
    raw_target: bool = True
    # Bytes above 0x7F that are not UTF-8 pass in the target, and in values of fields; without these, 400.
    eight_bit_target: bool = True
    eight_bit_fields: bool = True
    # on_interim is told of responses such as 103 (Early Hints).
    interim: bool = True
    # The upstream is asked before a body is sent; without this, the downstream is told to send it at once.
    expect_continue: bool = True
    # What comes behind a body is in response.trailers.
    trailers: bool = False
    # What is in request.trailers at the end of a body of unknown length is sent behind it; without this, it is dropped.
    request_trailers: bool = False
    # The upstream may be asked for trailers: it is spoken to in HTTP/2 or HTTP/3, where servers of gRPC insist on it.
    te: bool = False

    # -- connections
    # They are kept and used again.
    keep_alive: bool = True
    # fresh_connection is heeded.
    fresh_connection: bool = True
    # A body that only the connection's end delimits, cut under TLS without the end that TLS has, is known for cut.
    sees_tls_cut: bool = True
    unix_socket: bool = True
    # on_sending is called; without this, response_timeout counts the wait for a connection too.
    tells_sending: bool = False
    http2: bool = False
    http3: bool = False


class HTTPClient(abc.ABC):
    """Sends one request, once, and streams both bodies.

    A client never follows a redirect, decodes a body, keeps a cookie, reads the environment, invents a header or alters
    the request target. It never retries by itself a request that the upstream may have seen (RFC 9110 section 9.2.2).
    An instance belongs to one event loop.
    """

    # Of the class; an instance may have one of its own.
    capabilities = Capabilities()

    @abc.abstractmethod
    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send ``request``; return as soon as the response's head is there.

        ``request.body`` is consumed while this waits and, where the response comes early, after it returned. The
        response's body is pulled from ``response.stream``, which ends with ``close()`` or, with a
        :class:`~tornado_proxy.errors.ProxyError`, with ``fail()``. Interim responses (1xx) are not returned.

        Raises a :class:`~tornado_proxy.errors.ProxyError`. Cancelling ends the transfer at once and closes its
        connection; after the return ``response.abort()`` does.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End all transfers and connections. Idempotent."""

    async def wait_closed(self) -> None:  # noqa: B027
        """Return once what :meth:`close` began is done: for clients that cannot close a connection at once."""
