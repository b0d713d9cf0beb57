"""The upstream of a test: real sockets whose every byte, pause and hang-up the test decides.

By hand::

    conn = await upstream.accept()
    request = await conn.read_request()
    await conn.respond(200, [("X-A", "1")], b"hello")

By itself::

    async with EchoUpstream() as echo:          # answers with what it saw, as JSON
    async with ScriptedUpstream() as upstream:
        upstream.serve(handler)                 # await handler(conn, request), for each request, with keep-alive
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Self

from tests.support.serving import Serving
from tests.support.wire import LAST_CHUNK, TIMEOUT, Head, Pairs, Wire, WireClosed, build_head, chunk, within


@dataclass(slots=True, kw_only=True)
class Request(Head):
    """A request as the upstream saw it; ``body`` is None until it was read."""

    method: str
    target: str
    version: str
    body: bytes | None = None


class UpstreamConnection(Wire):
    """One connection that the proxy made."""

    def __init__(self, sock: socket.socket, who: str, timeout: float) -> None:
        super().__init__(sock, who, timeout)
        self.requests: list[Request] = []
        # What was sent since the last request head, interim responses left out: enough to tell whether the response is
        # complete.
        self._sent_head = bytearray()
        self._sent_size = 0
        self._sent_tail = b""

    # Requests

    async def read_head(self) -> Request:
        """Return the next request head; its body is still to be read."""
        head = await super().read_head()
        parts = head.start_line.split(" ")
        assert len(parts) == 3, f"{self.who}: not a request line: {head.start_line!r}"
        method, target, version = parts
        request = Request(
            raw=head.raw,
            start_line=head.start_line,
            headers=head.headers,
            method=method,
            target=target,
            version=version,
        )
        self.requests.append(request)
        self._sent_head.clear()
        self._sent_size, self._sent_tail = 0, b""
        return request

    async def read_request(self) -> Request:
        """Return the next request with its whole body."""
        request = await self.read_head()
        request.body = await self.read_body()
        return request

    # Responses

    async def send(self, data: bytes) -> None:
        """Send exactly these bytes."""
        self._sent_size += len(data)
        if b"\r\n\r\n" not in self._sent_head:
            self._sent_head += data
            while self._sent_head.startswith(b"HTTP/1.1 10") and self._sent_head[11:12] != b"1":
                end = self._sent_head.find(b"\r\n\r\n") + 4
                if end < 4:
                    break
                del self._sent_head[:end]
                self._sent_size -= end
        self._sent_tail = (self._sent_tail + data[-8:])[-8:]
        while self._sent_head[9:10] == b"1" and self._sent_head[9:12] != b"101" and b"\r\n\r\n" in self._sent_head:
            # An interim response; the response is still to come.
            end = self._sent_head.index(b"\r\n\r\n") + 4
            del self._sent_head[:end]
            self._sent_size -= end
        await super().send(data)

    async def send_head(self, status: int, headers: Pairs = (), *, reason: str | None = None) -> None:
        """Send a response head of exactly these fields."""
        reason = _phrase(status) if reason is None else reason
        await self.send(build_head(f"HTTP/1.1 {status} {reason}", headers))

    async def send_chunk(self, data: bytes) -> None:
        """Send one chunk; an empty one ends the body."""
        await self.send(chunk(data) if data else LAST_CHUNK)

    async def respond(
        self, status: int = 200, headers: Pairs = (), body: bytes = b"", *, reason: str | None = None
    ) -> None:
        """Send a whole response: exactly these fields, and Content-Length if they say nothing about the body's end.

        `body` goes out as it is given, but not in answer to HEAD.
        """
        names = {name.lower() for name, _ in headers}
        bodiless = status < 200 or status in (204, 304)
        if not bodiless and not names & {"content-length", "transfer-encoding"}:
            headers = [*headers, ("Content-Length", str(len(body)))]
        reason = _phrase(status) if reason is None else reason
        head = build_head(f"HTTP/1.1 {status} {reason}", headers)
        to_head = bool(self.requests) and self.requests[-1].method == "HEAD"
        await self.send(head if to_head else head + body)

    @property
    def between_exchanges(self) -> bool:
        """Whether the proxy may keep this connection: no request was read, or the last one was answered completely."""
        if not self.requests:
            return not self._buffer
        end = self._sent_head.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        status = int(self._sent_head[9:12])
        if 100 <= status < 200:
            return False
        if self.requests[-1].method == "HEAD" or status in (204, 304):
            return True
        head = self._sent_head[:end].lower()
        if b"\r\ntransfer-encoding:" in head:
            return self._sent_tail.endswith(b"\r\n\r\n")
        if b"\r\ncontent-length:" in head:
            return self._sent_size - end >= int(head.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
        return False


class ScriptedUpstream(Serving[UpstreamConnection]):
    """Listens on `port` of `host`, by default a free one, or on a unix socket; hands its connections to the test.

    ``connections`` are all that were ever made, open or not, and ``accepted`` their number. All are closed on exit.
    """

    def __init__(
        self, *, unix_socket: Path | None = None, host: str = "127.0.0.1", port: int = 0, timeout: float = TIMEOUT
    ) -> None:
        super().__init__()
        self.timeout = timeout
        self.host = host
        self.port = port
        self.connections: list[UpstreamConnection] = []
        self.requests: list[Request] = []  # served by a handler; by hand, see the connections
        self._unix_socket = unix_socket

    async def __aenter__(self) -> Self:
        if self._unix_socket is None:
            self._listener = socket.create_server((self.host, self.port), backlog=1024)
            self.port = self._listener.getsockname()[1]
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._unix_socket))
            self._listener.listen(1024)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept_all)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        await self.end_tasks()
        for conn in self.connections:
            conn.close()
        self.raise_failure()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def accepted(self) -> int:
        self._accept_all()
        return len(self.connections)

    @property
    def busy(self) -> list[UpstreamConnection]:
        """The connections that the proxy keeps open although their last response is not complete."""
        return [conn for conn in self.connections if not conn.is_closed_by_other() and not conn.between_exchanges]

    def refuse(self) -> None:
        """Stop listening: further connections are refused, those made stay."""
        if self._listener.fileno() >= 0:
            self._accept_all()
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    async def accept(self) -> UpstreamConnection:
        """Return the next connection that no test has had yet."""
        return await within(
            self._new.get(), f"a connection to upstream (accepted so far: {self.accepted})", self.timeout
        )

    async def request(self) -> tuple[UpstreamConnection, Request]:
        """Return the next new connection and its first request, whole."""
        conn = await self.accept()
        return conn, await conn.read_request()

    def _accept_all(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            if self._unix_socket is None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = UpstreamConnection(sock, f"upstream connection {len(self.connections) + 1}", self.timeout)
            self.connections.append(conn)
            self.begin(conn)

    async def answer(self, begun: UpstreamConnection) -> None:
        """Await ``handler(conn, request)`` for each request, whose body was read."""
        conn = begun
        try:
            while await conn.readable():
                request = await conn.read_request()
                self.requests.append(request)
                await self.handler(conn, request)
        except (ConnectionError, WireClosed):
            pass  # the proxy hung up; a test that minds looks at its side
        except OSError:
            if conn.sock.fileno() >= 0:  # else the handler closed it
                raise
        finally:
            conn.close()


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else "Unknown"


class EchoUpstream(ScriptedUpstream):
    """Answers every request with what it saw, as JSON: method, target, headers and body."""

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.serve(echo)
        return self


async def echo(conn: UpstreamConnection, request: Request) -> None:
    """Answer with what the upstream saw."""
    seen = {
        "method": request.method,
        "target": request.target,
        "headers": request.headers,
        "body": (request.body or b"").decode("latin-1"),
    }
    await conn.respond(200, [("Content-Type", "application/json")], json.dumps(seen).encode())
