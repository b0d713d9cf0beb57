"""The downstream of a test: a client that sends and shows exact bytes.

::

    async with await Downstream.connect(proxy.port) as downstream:
        await downstream.request("GET", "/x", [("X-A", "1")])
        response = await downstream.read_response()
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from tests.support.wire import TIMEOUT, Body, Head, Pairs, Wire, WireClosed, build_head, within


@dataclass(slots=True, kw_only=True)
class ResponseHead(Head):
    """A status line and fields, as they were on the wire."""

    version: str
    status: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Response(ResponseHead):
    """A response as the downstream saw it.

    ``raw`` is all of it, head and framing included; ``interim`` the 1xx heads before it. ``complete`` is False when the
    connection ended before the body did, and ``until_close`` True when only that end says where the body ends.
    """

    body: bytes
    complete: bool
    until_close: bool = False
    interim: list[ResponseHead] = field(default_factory=list)


class Downstream(Wire):
    """A connection to the proxy."""

    def __init__(self, sock: socket.socket, who: str, timeout: float = TIMEOUT) -> None:
        super().__init__(sock, who, timeout)
        self.port: int = sock.getpeername()[1] if sock.family != socket.AF_UNIX else 0
        self._methods: deque[str] = deque()  # of the requests still to be answered

    @classmethod
    async def connect(
        cls, port: int, host: str = "127.0.0.1", *, receive_buffer: int | None = None, timeout: float = TIMEOUT
    ) -> Self:
        """Connect to `port`; `receive_buffer` makes the kernel hold no more than about that for us."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await within(
                asyncio.get_running_loop().sock_connect(sock, (host, port)), f"the connection to port {port}", timeout
            )
        except BaseException:
            sock.close()
            raise
        return cls(sock, f"downstream {sock.getsockname()[1]}", timeout)

    # Requests

    async def request(self, method: str, target: str, headers: Pairs = (), body: bytes | None = None) -> None:
        """Send a request: Host unless given, Content-Length if there is a body and nothing else says where it ends."""
        names = {name.lower() for name, _ in headers}
        if "host" not in names:
            headers = [("Host", f"127.0.0.1:{self.port}"), *headers]
        if body is not None and not names & {"content-length", "transfer-encoding"}:
            headers = [*headers, ("Content-Length", str(len(body)))]
        self.expect(method)
        await self.send(build_head(f"{method} {target} HTTP/1.1", headers) + (body or b""))

    def expect(self, method: str) -> None:
        """Say which method was sent with :meth:`send`, where that decides how the response ends (HEAD)."""
        self._methods.append(method)

    # Responses

    async def read_head(self) -> ResponseHead:
        """Return the next response head, 1xx included; its body can be read afterwards."""
        head = await super().read_head()
        version, status, reason = head.start_line.split(" ", 2)
        return ResponseHead(
            raw=head.raw,
            start_line=head.start_line,
            headers=head.headers,
            version=version,
            status=int(status),
            reason=reason,
        )

    def _framing(self, head: Head) -> Body:
        status = int(head.start_line.split(" ")[1])
        if 100 <= status < 200 and status != 101:
            return Body()
        method = self._methods.popleft() if self._methods else "GET"
        if method == "HEAD" or status in (204, 304):
            return Body()
        if head.chunked or head.content_length is not None:
            return super()._framing(head)
        return Body("close", done=False)

    async def read_response(self) -> Response:
        """Return the next response, whole or cut: see its ``complete``. Fails if not even a head came."""
        self._tap = bytearray()
        try:
            interim = []
            while 100 <= (head := await self.read_head()).status < 200 and head.status != 101:
                interim.append(head)
                self._tap.clear()
            body = self._body
            try:
                data, complete = await self.read_body(), True
            except WireClosed:
                data, complete = bytes(body.surplus), False
            if body.kind == "close":
                complete = not self.was_reset
            elif not complete and body.kind == "chunked":
                # What came of the chunk that was cut.
                data += self._take(min(body.left, len(self._buffer)))
            return Response(
                raw=bytes(self._tap),
                start_line=head.start_line,
                headers=head.headers,
                version=head.version,
                status=head.status,
                reason=head.reason,
                body=data,
                complete=complete,
                until_close=body.kind == "close",
                interim=interim,
            )
        finally:
            self._tap = None

    async def exchange(self, method: str, target: str, headers: Pairs = (), body: bytes | None = None) -> Response:
        """Send a request and return its response."""
        await self.request(method, target, headers, body)
        return await self.read_response()
