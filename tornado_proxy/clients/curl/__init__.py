"""libcurl as the upstream client: a lean, streaming, cancellable driver on Tornado's ``CurlAsyncHTTPClient``.

Theory of operation. One *transfer* is one libcurl easy handle doing one request. libcurl calls us back for each header
line and each piece of body; those callbacks only fill the head and the response's pipe, and set futures, so what they
cause happens in the next turn of the loop. Back-pressure is libcurl's own pause: a callback that finds its pipe full
(or empty, when sending) returns PAUSE, or pauses its transfer when it has made it so, and the pipe calls us when that
has changed. Then libcurl is driven at once: a large body that took a turn of the loop for each step would cost a tenth
more.

Steps are taken for all at once: requests that come in one turn of the loop are begun together in the next, and what is
ready is received from every socket before any transfer is ended. A step for one transfer is so much code, ours,
libcurl's and the kernel's, that the processor no longer has it at hand when the next transfer gets there by way of all
the other steps. At 32 requests under way this saves some 4 %, and nobody waits longer for it.

Rules for editors:

1. Never call into libcurl from a callback that libcurl makes: add_handle, remove_handle and socket_action are called
   from the loop only (curl_multi_socket_action(3)). The one exception is to pause (curl_easy_pause(3)).
2. No code of users runs inside a callback: set a future, fill a pipe, record an error. Nothing else.
3. Every option that differs between requests is set for each request; handles keep everything else (`driver`).
   There is no ``reset()`` in between: it would cost about 25 calls for each request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tornado_proxy.clients.base import Capabilities, HTTPClient
from tornado_proxy.clients.curl.driver import CurlDriver
from tornado_proxy.clients.curl.multiplexed import MultiplexedDriver, MultiplexedTransfer
from tornado_proxy.clients.curl.options import CurlOptions
from tornado_proxy.clients.curl.request import CurlRequest
from tornado_proxy.clients.curl.transfer import CurlTransfer
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.urls import split_url

__all__ = ["CurlClient", "CurlOptions"]


class CurlClient(HTTPClient):
    """The default client. Constructed inside a running event loop, to which it then belongs."""

    capabilities = Capabilities(tells_sending=True, trailers=True, request_trailers=True, http2=True, http3=True)

    def __init__(self, **options: Any) -> None:
        parsed = CurlOptions.parse("curl", options)
        multiplexed = parsed.http_version != "1.1"
        # Of the driver that is made with it.
        self._transfer: Callable[[Any, UpstreamRequest, str], CurlTransfer] = (
            MultiplexedTransfer if multiplexed else CurlTransfer
        )
        driver = MultiplexedDriver if multiplexed else CurlDriver
        if multiplexed:
            # libcurl (8.23) has trailers for chunks only.
            self.capabilities = replace(self.capabilities, te=True, request_trailers=False)
        self._driver: CurlDriver = driver(force_instance=True, options=parsed)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        CurlOptions.parse("curl", options)

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        origin, _, target = split_url(request.url, request.method)
        transfer = self._transfer(self._driver, request, origin)
        transfer.stream.on_drain = transfer.resume_receiving
        if transfer.upload is not None:
            transfer.upload.on_data = transfer.resume_sending
        self._driver.start(CurlRequest(transfer, request, origin, target))
        try:
            return await transfer.head
        except asyncio.CancelledError:
            transfer.cancel()
            raise

    def close(self) -> None:
        self._driver.close()
