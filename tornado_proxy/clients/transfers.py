"""Transfers that are tasks: what the clients on top of asyncio have in common.

A client subclasses :class:`TaskClient` and writes :meth:`TaskClient.transfer`: the story of one request, top to bottom.
It tells the :class:`Transfer` what comes back (``interim``, ``begin``, ``write``), takes the body from ``upload``, and
releases its connection in a ``finally``. Its return is the end of the body and its exception the failure; to abort is
to cancel it, so it closes what it holds wherever it is cancelled.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator
from time import monotonic

from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.errors import NoUpstreamAvailable, Phase, ProxyError, UpstreamError
from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse
from tornado_proxy.urls import split_url

# Seconds that a library may take to close the connection of an upload that broke off.
_UNWINDING = 0.5


class Transfer:
    """One request on its way, and what came back so far."""

    def __init__(self, request: UpstreamRequest) -> None:
        self.request = request
        self.origin, self.netloc, self.target = split_url(request.url, request.method)
        self.stream = BodyPipe(request.buffer_size)
        # Resolved with the response at the end of its head, or failed.
        self.head: asyncio.Future[UpstreamResponse] = asyncio.get_running_loop().create_future()
        self.response: UpstreamResponse | None = None
        # Why the upload ended early: it outranks what the library made of that.
        self.upload_error: ProxyError | None = None
        # What runs it; None before and after.
        self.task: asyncio.Task[None] | None = None
        self.started = monotonic()
        self._expecting = request.expect_continue

    @property
    def phase(self) -> Phase:
        """How far it has come, once there is a connection."""
        return Phase.HEAD if self.response is None else Phase.BODY

    # -- the request

    @property
    def connect_timeout(self) -> float | None:
        """Seconds that are left to connect in; what was spent in a queue is gone."""
        limit = self.request.connect_timeout
        return None if limit is None else max(0.001, limit - (monotonic() - self.started))

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The fields to send, Host first, the framing of the body last, and none that nobody asked for."""
        headers, body = self.request.headers, self.request.body
        pairs = [("Host", headers.get("Host", self.netloc))]
        pairs += [(name, value) for name, value in headers.get_all() if name != "Host"]
        if isinstance(body, BodyPipe) and body.length is None:
            pairs.append(("Transfer-Encoding", "chunked"))
        elif body is not None:
            pairs.append(("Content-Length", str(len(body) if isinstance(body, bytes) else body.length)))
        return pairs

    async def upload(self) -> AsyncIterator[bytes]:
        """Yield the request's body as it comes.

        Where the downstream waits to be told to send it, this tells it: a client that asked the upstream (which
        ``interim`` then was told of) or cannot ask takes the body when it is time.
        """
        body = self.request.body
        self.go_on()
        if isinstance(body, bytes):
            if body:
                yield body
        elif body is not None:
            try:
                while chunk := await body.read():
                    yield chunk
            except ProxyError as error:
                self.upload_error = error
                raise

    def go_on(self) -> None:
        """Tell the downstream, once, to send the body that it holds back."""
        if self._expecting:
            self._expecting = False
            if self.request.on_interim is not None:
                self.request.on_interim(100, "Continue", HTTPHeaders())

    # -- what came back

    def interim(self, status: int, reason: str, headers: HTTPHeaders) -> None:
        """An interim response came."""
        if status == 100:
            self.go_on()
        elif self.request.on_interim is not None:
            self.request.on_interim(status, reason, headers)

    def begin(self, status: int, reason: str, headers: HTTPHeaders, version: str = "HTTP/1.1") -> None:
        """The head is complete: :meth:`HTTPClient.send` returns."""
        self.response = UpstreamResponse(
            status, reason, headers, self.stream, self.origin, version=version, on_abort=self.abort
        )
        self.response.timings["head"] = monotonic() - self.started
        if not self.head.done():
            self.head.set_result(self.response)

    def abort(self) -> None:
        """End it, wherever it is. Only the first call cancels: a second would interrupt what closes the connection."""
        task, self.task = self.task, None
        if task is None:
            return
        if self.upload_error is not None and self.response is None:
            # It ends by itself, because of that. The delay is for a library that would not.
            asyncio.get_running_loop().call_later(_UNWINDING, task.cancel)
        else:
            task.cancel()

    async def write(self, chunk: bytes) -> None:
        """Pass on a piece of the body; return when there is room for the next."""
        room = self.stream.write(chunk)
        if room is not None:
            await room

    def trailers(self, fields: HTTPHeaders) -> None:
        """These came behind the body, which ends with the return of :meth:`TaskClient.transfer`."""
        assert self.response is not None
        self.response.trailers = fields

    # -- the end

    def end(self, error: BaseException | None = None) -> None:
        """It is over. The body is complete, or broken."""
        if self.response is not None:
            self.response.timings["upstream"] = monotonic() - self.started
            self.response.on_abort = None
        # What refers to itself in a circle waits for the garbage collector.
        self.task = None
        if error is None:
            self.stream.close()
        elif self.response is not None:
            self.stream.fail(error)
        elif not self.head.done():
            self.head.set_exception(error)


class TaskClient(HTTPClient):
    """Runs each transfer as a task of its own."""

    def __init__(self, max_clients: int | None = None) -> None:
        self._running: dict[asyncio.Task[None], Transfer] = {}
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(max_clients) if max_clients is not None else None

    @abc.abstractmethod
    async def transfer(self, transfer: Transfer) -> None:
        """Do all of one exchange with the upstream; see the top of this module."""

    @abc.abstractmethod
    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        """Return what ``exc``, which the library raised, says in our words."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        if self._closed:
            raise UpstreamError("client is closed")
        transfer = Transfer(request)
        transfer.task = task = asyncio.create_task(self._run(transfer))
        self._running[task] = transfer
        task.add_done_callback(self._running.pop)
        try:
            return await transfer.head
        except asyncio.CancelledError:
            transfer.abort()
            raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for transfer in list(self._running.values()):
            transfer.abort()
        self._closing = asyncio.create_task(self._close())

    async def wait_closed(self) -> None:
        if self._closing is not None:
            await self._closing

    async def release(self) -> None:
        """Close what is left when every transfer has ended: connections that were kept."""

    async def _close(self) -> None:
        if self._running:
            await asyncio.wait(list(self._running))
        await self.release()

    async def _run(self, transfer: Transfer) -> None:
        try:
            if self._slots is None:
                await self.transfer(transfer)
            else:
                await self._take_slot(transfer, self._slots)
                try:
                    await self.transfer(transfer)
                finally:
                    self._slots.release()
        except asyncio.CancelledError:
            # Nobody listens any more, unless it was close() that cancelled us.
            transfer.end(UpstreamError(f"client closed with {transfer.origin} in progress", upstream=transfer.origin))
        except ProxyError as error:
            transfer.end(transfer.upload_error or error)
        except Exception as exc:
            blamed = transfer.upload_error or self.blame(exc, transfer)
            if blamed.__cause__ is None:
                blamed.__cause__ = exc
            transfer.end(blamed)
        else:
            transfer.end()

    async def _take_slot(self, transfer: Transfer, slots: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(transfer.request.connect_timeout):
                await slots.acquire()
        except TimeoutError:
            raise NoUpstreamAvailable("all clients are busy", upstream=transfer.origin) from None
