"""A client in pure Python: nothing but asyncio and our own strict reader of responses.

For where pycurl is missing. Tornado's ``SimpleAsyncHTTPClient`` is the model and not the base: it adds fields of its
own, holds bodies to 100 MB, refuses trailers and chunk extensions, and cannot be cancelled in the middle of a TLS
handshake. One connection for each request, closed behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.dial import dial
from tornado_proxy.clients.settings import Settings
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import Phase, ProxyError, Retry, UpstreamError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.responses import FAULTS, MAX_HEAD, MAX_INTERIM, Head, blamed, read_body, read_head

# Bytes that may wait for the kernel before an upload waits.
_HIGH_WATER = 64 * 1024

# Seconds that an upstream which knows nothing of expectations holds the body up (RFC 9110 section 10.1.1).
_CONTINUE_TIMEOUT = 1.0


class SimpleClient(TaskClient):
    """Pure Python, HTTP/1.1, no connection used twice."""

    capabilities = Capabilities(keep_alive=False)

    def __init__(self, **options: Any) -> None:
        self._settings = Settings.parse("simple", options)
        super().__init__(self._settings.max_clients)

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        """Raise ``ValueError``, naming the option and the cure, unless these can be passed to the constructor."""
        Settings.parse("simple", options)

    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        if isinstance(exc, FAULTS):
            error = blamed(exc, transfer.origin, transfer.phase)
            if not isinstance(exc, ProxyError):
                # Not a kept-alive connection, so it was not stale: what happened once may happen again.
                error.retry = Retry.NEVER
            return error
        return UpstreamError(f"upstream {transfer.origin}: {exc!r}", phase=transfer.phase, upstream=transfer.origin)

    async def transfer(self, transfer: Transfer) -> None:
        settings, request = self._settings, transfer.request
        context = settings.context() if transfer.origin.startswith("https:") else None
        reader, writer = await dial(
            transfer.origin,
            transfer.connect_timeout,
            context=context,
            unix_socket=settings.unix_socket,
            limit=MAX_HEAD,
        )
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)
        # Set when the body may go: at once, when the upstream asks for it, or when it says nothing.
        asked = asyncio.Event()
        sending = asyncio.create_task(self._send(transfer, writer, asked))
        try:
            head = await self._final_head(transfer, reader, asked)
            if request.expect_continue and not asked.is_set():
                # The answer came in place of the question's: the body is not wanted.
                sending.cancel()
            # A copy: what is removed from it on its way downstream still says how the body ends.
            transfer.begin(head.status, head.reason, head.headers.copy(), head.version)
            async for piece in read_body(request.method, head, reader):
                await transfer.write(piece)
        finally:
            sending.cancel()
            # Nothing is lost: either both messages are complete, or the one that is not shall be seen to break off.
            writer.transport.abort()

    async def _send(self, transfer: Transfer, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        request = transfer.request
        fields = transfer.fields
        if request.expect_continue:
            fields.append(("Expect", "100-continue"))
        lines = [f"{request.method} {transfer.target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if request.expect_continue:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), _CONTINUE_TIMEOUT)
            asked.set()
        chunked = isinstance(request.body, BodyPipe) and request.body.length is None
        try:
            async for piece in transfer.upload():
                writer.writelines((b"%x\r\n" % len(piece), piece, b"\r\n") if chunked else (piece,))
                await writer.drain()
            if chunked:
                writer.write(b"0\r\n\r\n")
        except OSError:
            # The upstream takes no more; whether it has answered, the reader sees.
            return
        except Exception as exc:
            # Half a body: the connection says so by closing.
            if transfer.upload_error is None:
                transfer.upload_error = UpstreamError(f"upload failed: {exc!r}", phase=Phase.SEND)
            writer.transport.abort()

    async def _final_head(self, transfer: Transfer, reader: asyncio.StreamReader, asked: asyncio.Event) -> Head:
        for _ in range(MAX_INTERIM + 1):
            head = await read_head(reader)
            if head.status >= 200:
                return head
            if head.status == 101:
                raise ValueError("answered with status 101")
            if head.status == 100:
                asked.set()
            transfer.interim(head.status, head.reason, head.headers)
        raise ValueError("sent too many interim responses")
