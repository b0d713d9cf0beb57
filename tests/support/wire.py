"""A socket read by hand, and the little HTTP/1.1 that both ends of a test need.

Nothing here is lenient, guesses, or reads ahead of what the test asks for: the kernel's buffers are the only ones, so a
test that does not read makes the other side wait. Every wait ends after ``timeout`` seconds, with a message that says
what came.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Self, TypeVar

TIMEOUT = 5.0

Pairs = Sequence[tuple[str, str]]


class WireTimeout(AssertionError):
    """What the test waited for did not come in time."""


class WireClosed(AssertionError):
    """The other side closed or reset the connection before what the test waited for was complete."""


@dataclass(slots=True, kw_only=True)
class Head:
    """A start line and fields, as they were on the wire."""

    raw: bytes
    start_line: str
    headers: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        """Return the values of every field called `name`, in wire order."""
        return [value for other, value in self.headers if other.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Return the value of the one field called `name`, or None; fail if there are several."""
        values = self.all(name)
        assert len(values) < 2, f"{name} is repeated: {values}"
        return values[0] if values else None

    def has(self, name: str) -> bool:
        return bool(self.all(name))

    @property
    def names(self) -> list[str]:
        """The field names in wire order, lower-cased."""
        return [name.lower() for name, _ in self.headers]

    @property
    def chunked(self) -> bool:
        return any("chunked" in value.lower() for value in self.all("Transfer-Encoding"))

    @property
    def content_length(self) -> int | None:
        values = set(self.all("Content-Length"))
        assert len(values) < 2, f"Content-Length contradicts itself: {sorted(values)}"
        return int(values.pop()) if values else None


def parse_head(raw: bytes) -> Head:
    """Return the head in `raw`, which ends with its empty line."""
    lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    headers = []
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        assert colon, f"not a field line: {line!r} in {raw!r}"
        assert name == name.strip() != "", f"not a field name: {line!r} in {raw!r}"
        headers.append((name, value.strip(" \t")))
    return Head(raw=raw, start_line=lines[0], headers=headers)


def build_head(start_line: str, headers: Pairs) -> bytes:
    """Return the bytes of a head: these fields and no other."""
    lines = [start_line, *(f"{name}: {value}" if value else f"{name}:" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Body:
    """How the body after the last head ends, and how much of it is still to come."""

    kind: str = "none"  # "none" | "length" | "chunked" | "close"
    left: int = 0  # bytes still to come, of the body if "length", of the chunk if "chunked"
    done: bool = True
    surplus: bytearray = field(default_factory=bytearray)  # decoded, not yet asked for


class Wire:
    """One connected socket. `who` names it in messages."""

    def __init__(self, sock: socket.socket, who: str, timeout: float = TIMEOUT) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.who = who
        self.timeout = timeout
        self.was_reset = False  # by the other side
        self._buffer = bytearray()  # received, not yet taken
        self._tap: bytearray | None = None  # a copy of what is taken, while someone wants it
        self._body = Body()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.who}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # Writing

    async def send(self, data: bytes) -> None:
        """Send `data`; returns once the kernel has taken all of it."""
        async with self._deadline(f"could not send {len(data)} bytes: nobody reads"):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    # Reading bytes

    async def read_some(self, limit: int = 65536) -> bytes:
        """Return what there is, at least one byte; empty once the other side has closed."""
        if not self._buffer and not await self._receive(limit):
            return b""
        return self._take(min(limit, len(self._buffer)))

    async def read_exactly(self, size: int) -> bytes:
        await self._need(lambda: size if len(self._buffer) >= size else -1, f"{size} bytes")
        return self._take(size)

    async def read_until(self, mark: bytes) -> bytes:
        """Return everything up to and including `mark`."""
        end = await self._need(lambda: found + len(mark) if (found := self._buffer.find(mark)) >= 0 else -1, repr(mark))
        return self._take(end)

    async def read_until_closed(self) -> bytes:
        """Return everything that comes until the other side closes; a reset counts as closing."""
        async with self._deadline("was not closed"):
            while await self._receive():
                pass
        return self._take(len(self._buffer))

    async def closed(self) -> str:
        """Wait until the other side has closed; return ``"end"`` or ``"reset"``.

        What comes before that can be read afterwards.
        """
        async with self._deadline("was not closed by the other side"):
            try:
                while data := await asyncio.get_running_loop().sock_recv(self.sock, 65536):
                    self._buffer += data
            except ConnectionError:
                return "reset"
            except OSError:
                if self.sock.fileno() >= 0:
                    raise
                # The test has closed it meanwhile: what serves an upstream's connection does that in the end.
        return "end"

    def is_closed_by_other(self) -> bool:
        """Return whether the other side has closed by now, without waiting. What is readable is kept."""
        try:
            while data := self.sock.recv(65536):
                self._buffer += data
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def readable(self) -> bool:
        """Wait, for as long as it takes, until there is something to read; False once the other side has closed."""
        if not self._buffer:
            try:
                self._buffer += await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            except OSError:  # reset by the other side, or closed by the test
                return False
        return bool(self._buffer)

    # Reading messages

    async def read_head(self) -> Head:
        """Return the next head; its body can be read afterwards."""
        end = await self._need(
            lambda: found + 4 if (found := self._buffer.find(b"\r\n\r\n")) >= 0 else -1, "a complete head"
        )
        head = parse_head(self._take(end))
        self._body = self._framing(head)
        return head

    def _framing(self, head: Head) -> Body:
        if head.chunked:
            return Body("chunked", done=False)
        length = head.content_length or 0
        return Body("length", length, done=not length)

    async def read_chunk(self) -> bytes:
        """Return the next chunk of a chunked body, as it was framed; empty for the last one."""
        assert self._body.kind == "chunked", f"{self.who}: the body is not chunked"
        size = int((await self.read_until(b"\r\n")).split(b";")[0], 16)
        if not size:
            self._body.done = True
            while await self.read_until(b"\r\n") != b"\r\n":
                pass
            return b""
        self._body.left = size
        data = await self.read_exactly(size)
        self._body.left = 0
        assert await self.read_exactly(2) == b"\r\n", f"{self.who}: a chunk of {size} bytes does not end with CR LF"
        return data

    async def read_body(self, size: int | None = None) -> bytes:
        """Return the rest of the body, or the next `size` bytes of it however they are framed."""
        body = self._body
        while not body.done and (size is None or len(body.surplus) < size):
            body.surplus += await self._body_piece(body)
        if size is None:
            size = len(body.surplus)
        assert len(body.surplus) >= size, (
            f"{self.who}: the body ended before {size} bytes; so far {bytes(body.surplus)!r}"
        )
        data = bytes(body.surplus[:size])
        del body.surplus[:size]
        return data

    async def _body_piece(self, body: Body) -> bytes:
        if body.kind == "chunked":
            return await self.read_chunk()
        data = await self.read_some(body.left if body.kind == "length" else 65536)
        if not data and body.kind == "length":
            raise WireClosed(
                f"{self.who}: closed, {body.left} bytes short of Content-Length; had {bytes(body.surplus[-80:])!r}"
            )
        body.left -= len(data)
        body.done = not data if body.kind == "close" else not body.left
        return data

    # Ending

    def close(self) -> None:
        """Close both directions in good order."""
        self.sock.close()

    def half_close(self) -> None:
        """Send FIN and go on reading."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST."""
        with contextlib.suppress(OSError):  # already closed by the other side
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # Inside

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        if self._tap is not None:
            self._tap += data
        return data

    async def _receive(self, limit: int = 65536) -> bool:
        """Wait for more bytes; False once the other side has closed or reset."""
        async with self._deadline("nothing came"):
            try:
                data = await asyncio.get_running_loop().sock_recv(self.sock, limit)
            except ConnectionError:
                self.was_reset = True
                return False
        self._buffer += data
        return bool(data)

    async def _need(self, enough: Callable[[], int], what: str) -> int:
        """Receive until `enough` says how many bytes to take."""
        async with self._deadline(f"{what} did not come"):
            while (size := enough()) < 0:
                if not await self._receive():
                    raise WireClosed(f"{self.who}: closed before {what}; had {self._had()}")
        return size

    def _had(self) -> str:
        had = bytes(self._buffer)
        return repr(had) if len(had) <= 400 else f"{had[:200]!r} ... {len(had)} bytes ... {had[-200:]!r}"

    @contextlib.asynccontextmanager
    async def _deadline(self, failure: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError:
            raise WireTimeout(f"{self.who}: {failure} within {self.timeout} s; had {self._had()}") from None


T = TypeVar("T")


async def within(awaitable: Awaitable[T], what: str, timeout: float = TIMEOUT) -> T:
    """Await, failing with a message that says that `what` did not happen."""
    try:
        async with asyncio.timeout(timeout):
            return await awaitable
    except TimeoutError:
        raise WireTimeout(f"{what} did not happen within {timeout} s") from None


async def until(condition: Callable[[], object], what: str, timeout: float = TIMEOUT) -> None:
    """Poll `condition` until it holds."""
    deadline = monotonic() + timeout
    while not condition():
        assert monotonic() < deadline, f"{what} within {timeout} s"
        await asyncio.sleep(0.005)
