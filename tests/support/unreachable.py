"""Upstreams that no connection gets through to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import pytest


@contextlib.contextmanager
def nothing_listens() -> Iterator[str]:
    """Give a URL whose port is bound, so that nobody else takes it, but closed to connections."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """Give the URL of a listener whose queue is full: a further connection is neither made nor refused."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(10):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            try:
                async with asyncio.timeout(0.2):
                    await asyncio.get_running_loop().sock_connect(sock, address)
            except TimeoutError:
                break
        else:
            pytest.skip("this system accepts connections beyond the backlog")
        yield f"http://127.0.0.1:{address[1]}"
