"""One HTTP/1.1 response, read from a connection: its heads, then its body, as RFC 9112 says and no other way.

For whoever speaks HTTP to the upstream without a library: the handshake of an upgrade, and the simple client. What
could be read in two ways is refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tornado.httputil import HTTPHeaders

from tornado_proxy.errors import InvalidResponse, Phase, ProxyError, UpstreamClosed
from tornado_proxy.framing import header_value_ok, is_token, response_length, response_may_have_body

# Bytes of a head. Also the most that a connection reads ahead of us.
MAX_HEAD = 64 * 1024
# Interim responses before the final one, and lines of a trailer section.
MAX_INTERIM = 20
_MAX_TRAILERS = 100
_READ_SIZE = 64 * 1024

# What an upstream can do to a reader of its answer; see `blamed`.
FAULTS = (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError, ProxyError)

_STATUS_LINE = re.compile(r"(HTTP/1\.[01]) ([1-5][0-9]{2})(?: ([^\r\n]*))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


@dataclass(frozen=True, slots=True)
class Head:
    """A status line and fields."""

    version: str
    status: int
    reason: str
    headers: HTTPHeaders


async def read_head(reader: asyncio.StreamReader) -> Head:
    """Return the next head, an interim one included; raises ``ValueError`` for what is none."""
    return parse_head(await reader.readuntil(b"\r\n\r\n"))


def parse_head(raw: bytes) -> Head:
    """Return the parts of a head that ends with its empty line; raise ``ValueError`` for one that could be read twice.

    RFC 9112 sections 2.2, 4 and 5: no bare CR or LF, no folded line, no space around a name.
    """
    start_line, *lines = raw.decode("latin-1")[:-4].split("\r\n")
    match = _STATUS_LINE.fullmatch(start_line)
    if match is None:
        raise ValueError(f"sent an invalid status line: {start_line[:80]!r}")
    headers = HTTPHeaders()
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip(" \t")
        if not colon or not is_token(name) or not header_value_ok(value):
            raise ValueError(f"sent an invalid field: {name[:80]!r}")
        headers.add(name, value)
    return Head(match[1], int(match[2]), match[3] or "", headers)


def members(headers: HTTPHeaders, name: str) -> list[str]:
    """Return the members of the list in ``name``, over all its lines, in lower case."""
    return [member.strip(" \t").lower() for member in ",".join(headers.get_list(name)).split(",")]


async def read_body(
    method: str, head: Head, reader: asyncio.StreamReader, trailers: list[bytes] | None = None
) -> AsyncIterator[bytes]:
    """Yield the body of the answer to ``method``, delimited as RFC 9112 section 6.3 says.

    The lines of trailers are appended to ``trailers``, or dropped. Raises ``ValueError`` where nobody could say how the
    body ends.
    """
    if not response_may_have_body(method, head.status):
        return
    codings = members(head.headers, "Transfer-Encoding")
    if codings != [""]:
        if codings != ["chunked"] or head.version != "HTTP/1.1":
            raise ValueError("sent a Transfer-Encoding other than chunked")
        while size := _chunk_size(await reader.readuntil(b"\n")):
            async for piece in _exactly(reader, size):
                yield piece
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError("sent a chunk that does not end where it should")
        for _ in range(_MAX_TRAILERS):
            line = await reader.readuntil(b"\n")
            if line == b"\r\n":
                return
            if trailers is not None:
                trailers.append(line)
        raise ValueError("sent too many trailers")
    length = response_length(head.headers)
    if length is not None:
        async for piece in _exactly(reader, length):
            yield piece
        return
    while piece := await reader.read(_READ_SIZE):
        yield piece
    if (broken := getattr(reader, "broken", None)) is not None:
        raise broken


def keeps_alive(method: str, head: Head) -> bool:
    """Return whether the connection may be used again behind this answer to ``method`` (RFC 9112 section 9.3)."""
    if head.version != "HTTP/1.1" or "close" in members(head.headers, "Connection"):
        return False
    framed = "Transfer-Encoding" in head.headers or "Content-Length" in head.headers
    return framed or not response_may_have_body(method, head.status)


def blamed(exc: Exception, origin: str, phase: Phase) -> ProxyError:
    """Return what ``exc``, one of `FAULTS` raised while we read an answer, says about the upstream."""
    if isinstance(exc, ProxyError):
        return exc
    if isinstance(exc, asyncio.IncompleteReadError | OSError):
        what = "in the middle of its body" if phase is Phase.BODY else "before its answer was complete"
        return UpstreamClosed(f"upstream {origin} closed {what}", phase=phase, upstream=origin)
    if isinstance(exc, asyncio.LimitOverrunError):
        return InvalidResponse(f"upstream {origin} sent too long a head or line", phase=phase, upstream=origin)
    return InvalidResponse(f"upstream {origin} {exc}", phase=phase, upstream=origin)


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, _READ_SIZE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


def _chunk_size(line: bytes) -> int:
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise ValueError("sent an invalid chunk size")
    return int(match[1], 16)
