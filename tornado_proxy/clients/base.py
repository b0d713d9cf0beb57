"""The contract between the forwarder and whatever speaks HTTP to the upstream."""

from __future__ import annotations

import abc

from tornado_proxy.messages import UpstreamRequest, UpstreamResponse


class HTTPClient(abc.ABC):
    """Sends one request, once, and streams both bodies.

    A client never follows a redirect, decodes a body, keeps a cookie, reads the environment, invents a header or alters
    the request target. It never retries by itself a request that the upstream may have seen (RFC 9110 section 9.2.2).
    An instance belongs to one event loop.
    """

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
