"""Strict parsers at both ends, not ours: h11 as the upstream, and as what reads the proxy's answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Self

import h11

from tests.support.wire import TIMEOUT


@dataclass
class SeenRequest:
    """What h11 made of one request; ``complete`` is False when its body broke off."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    complete: bool = False

    def token(self) -> bytes | None:
        values = [value for name, value in self.headers if name == b"x-token"]
        return values[0] if len(values) == 1 else None


class StrictUpstream:
    """Answers each request that h11 accepts, and remembers what it does not."""

    def __init__(self) -> None:
        self.requests: list[SeenRequest] = []
        # Bytes that are no valid HTTP/1.1, with what h11 said.
        self.refused: list[str] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for writer in list(self._writers):
            writer.close()
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        conn = h11.Connection(h11.SERVER)
        seen: SeenRequest | None = None
        raw = b""
        try:
            while True:
                try:
                    event = conn.next_event()
                except h11.RemoteProtocolError as exc:
                    # The proxy may hang up in the middle of a body, which is how it says that it is not complete.
                    # And bytes above 0x7f pass in a target as they came, which h11 does not like.
                    if raw and not reader.at_eof() and raw.partition(b"\r\n")[0].isascii():
                        self.refused.append(f"{exc}: {raw!r}")
                    return
                if event is h11.NEED_DATA:
                    data = await reader.read(65536)
                    raw = (raw + data)[-4000:]
                    conn.receive_data(data)
                elif isinstance(event, h11.Request):
                    seen = SeenRequest(event.method, event.target, list(event.headers))
                    self.requests.append(seen)
                elif isinstance(event, h11.Data):
                    assert seen is not None
                    seen.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert seen is not None
                    seen.complete = True
                    body = b"seen " + (seen.token() or b"nothing")
                    fields = [("Content-Length", str(len(body))), ("X-Token", seen.token() or b"")]
                    writer.write(conn.send(h11.Response(status_code=200, headers=fields)) or b"")
                    if seen.method != b"HEAD":
                        writer.write(conn.send(h11.Data(data=body)) or b"")
                    writer.write(conn.send(h11.EndOfMessage()) or b"")
                    await writer.drain()
                    if conn.our_state is not h11.DONE:
                        return
                    conn.start_next_cycle()
                    raw = b""
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    return
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


@dataclass
class SeenResponse:
    """What h11 made of the proxy's answer; ``complete`` only where its end was a good one."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False


async def read_strictly(reader: asyncio.StreamReader, method: bytes = b"GET", timeout: float = TIMEOUT) -> SeenResponse:
    """Return the answer to a request with `method`; ``status`` 0 when the connection ended before any.

    Raises ``h11.RemoteProtocolError`` for what is no valid answer, but for one that breaks off.
    """
    conn = h11.Connection(h11.CLIENT)
    conn.send(h11.Request(method=method, target=b"/", headers=[("Host", "h")]))
    conn.send(h11.EndOfMessage())
    response = SeenResponse()
    async with asyncio.timeout(timeout):
        while True:
            try:
                event = conn.next_event()
            except h11.RemoteProtocolError:
                if reader.at_eof():
                    return response
                raise
            if event is h11.NEED_DATA:
                try:
                    conn.receive_data(await reader.read(65536))
                except ConnectionError:
                    return response
            elif isinstance(event, h11.Response):
                response.status, response.headers = event.status_code, list(event.headers)
            elif isinstance(event, h11.Data):
                response.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                response.complete = True
                return response
            elif isinstance(event, h11.ConnectionClosed):
                return response
