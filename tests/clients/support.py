"""What the contract needs: requests, and a way to see that somebody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from tornado_proxy.flow import BodyPipe
from tornado_proxy.messages import UpstreamRequest, UpstreamResponse

# Seconds in which something that goes on would have gone on.
STILL = 0.3
# Far more than two pipes and the kernel's buffers on both sides hold.
MORE_THAN_HELD = 32 * 1024 * 1024
PIECE = b"x" * 64 * 1024


def request_for(method: str, url: str, body: Any = None, headers: Any = (), **more: Any) -> UpstreamRequest:
    """Return a request as the forwarder makes it."""
    start_line = RequestStartLine(method, "/", "HTTP/1.1")
    inbound = HTTPServerRequest(start_line=start_line, headers=HTTPHeaders({"Host": "front.example"}))
    fields = HTTPHeaders()
    for name, value in headers:
        fields.add(name, value)
    return UpstreamRequest(method, url, fields, body, inbound, **more)


async def until_it_waits(step: Callable[[], Awaitable[int]]) -> int:
    """Repeat `step`, which returns a number of bytes, until it has to wait; return their sum. Fails if it never does.

    The step that waits is cancelled.
    """
    total = 0
    while total < MORE_THAN_HELD:
        try:
            async with asyncio.timeout(STILL):
                total += await step()
        except TimeoutError:
            return total
    raise AssertionError(f"{total} bytes went through and nobody waits")


def filling(pipe: BodyPipe) -> Callable[[], Awaitable[int]]:
    """Return a step that writes a piece to the pipe and waits for room, as the forwarder does."""

    async def step() -> int:
        room = pipe.write(PIECE)
        if room is not None:
            await asyncio.shield(room)
        return len(PIECE)

    return step


async def collected(response: UpstreamResponse) -> tuple[bytes, BaseException | None]:
    """Return the body, as far as it came, and what broke it off."""
    body = b""
    try:
        async for chunk in response:
            body += chunk
    except Exception as error:
        return body, error
    return body, None
