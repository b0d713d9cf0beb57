"""A scripted client, for tests of applications that proxy: no upstream, no socket, no network.

::

    client = FakeClient(answer(200, body=b"hello"), ConnectError("refused"), script)
    app = Application([mount("/", "http://upstream.example", client=client)])
    ...
    assert client.requests[0].url == "http://upstream.example/x"

Each request takes the next of what was given, and the last one stays. One is an :func:`answer`, a ``ProxyError`` to
fail with, or a script: an async function that plays the upstream as slowly and as badly as a test wants it to::

    async def script(upstream: FakeUpstream) -> None:
        body = await upstream.read_all()                       # or read(), piece by piece; or not at all
        upstream.send_head(200, {"Content-Type": "text/plain"})
        await upstream.write(b"one")                           # waits while nobody reads
        raise UpstreamClosed("the cable was cut")              # or return: the end of the body

A script is cancelled when the proxy aborts. ``FakeClient`` keeps the contract of every client, so what passes with it
passes with a real one as far as the proxy's side goes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus

from tornado.httputil import HTTPHeaders

from tornado_proxy.clients.base import Capabilities
from tornado_proxy.clients.transfers import TaskClient, Transfer
from tornado_proxy.errors import Phase, ProxyError, UpstreamClosed, UpstreamError
from tornado_proxy.framing import response_may_have_body
from tornado_proxy.messages import UpstreamRequest

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


class FakeUpstream:
    """One request, seen by the script that plays its upstream."""

    def __init__(self, transfer: Transfer) -> None:
        self.request: UpstreamRequest = transfer.request
        self._transfer = transfer
        self._upload: AsyncIterator[bytes] | None = None

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The fields that would be on the wire: Host first, those of the body's framing last."""
        return self._transfer.fields

    @property
    def trailers(self) -> list[tuple[str, str]]:
        """The fields behind the request's body, once :meth:`read` has returned its end."""
        return list(self.request.trailers.get_all())

    async def read(self) -> bytes:
        """Return the next piece of the request's body; ``b""`` is its end. Raises what broke it off."""
        if self._upload is None:
            self._upload = self._transfer.upload()
        return await anext(self._upload, b"")

    async def read_all(self) -> bytes:
        """Return the rest of the request's body."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)

    def interim(self, status: int, headers: Headers = ()) -> None:
        """Send an interim response, such as 103."""
        self._transfer.interim(status, _reason(status), _headers(headers))

    def send_head(self, status: int = 200, headers: Headers = (), reason: str | None = None) -> None:
        """Send the head of the response; the proxy has it from now on."""
        self._transfer.begin(status, _reason(status) if reason is None else reason, _headers(headers))

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the response's body; return when there is room for the next."""
        response = self._transfer.response
        if response is None:
            raise RuntimeError("write() before send_head()")
        if response_may_have_body(self.request.method, response.status):
            await self._transfer.write(chunk)

    def send_trailers(self, fields: Headers) -> None:
        """Send these behind the body; return from the script after that."""
        if self._transfer.response is None:
            raise RuntimeError("send_trailers() before send_head()")
        self._transfer.trailers(_headers(fields))


Script = Callable[[FakeUpstream], Awaitable[None]]


def answer(status: int = 200, headers: Headers = (), body: bytes = b"", reason: str | None = None) -> Script:
    """Return a script that takes the request whole and answers so. Content-Length is added unless said otherwise."""

    async def script(upstream: FakeUpstream) -> None:
        await upstream.read_all()
        fields = _headers(headers)
        bodiless = status in (204, 304)
        if not bodiless and "Content-Length" not in fields and "Transfer-Encoding" not in fields:
            fields["Content-Length"] = str(len(body))
        upstream.send_head(status, fields.get_all(), reason)
        await upstream.write(body)

    return script


class FakeClient(TaskClient):
    """Answers from a script. ``requests`` are those that were sent, as the hooks left them, in order."""

    capabilities = Capabilities(trailers=True, request_trailers=True)

    def __init__(self, *answers: Script | ProxyError) -> None:
        super().__init__()
        self._answers = list(answers or (answer(),))
        self.requests: list[UpstreamRequest] = []

    async def transfer(self, transfer: Transfer) -> None:
        self.requests.append(transfer.request)
        following = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(following, ProxyError):
            raise following
        await following(FakeUpstream(transfer))
        if transfer.response is None:
            raise UpstreamClosed("script ended without an answer", phase=Phase.HEAD, upstream=transfer.origin)

    def blame(self, exc: Exception, transfer: Transfer) -> ProxyError:
        return UpstreamError(f"script raised {exc!r}", phase=transfer.phase, upstream=transfer.origin)


def _headers(given: Headers) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in given.items() if isinstance(given, Mapping) else given:
        headers.add(name, value)
    return headers


def _reason(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
