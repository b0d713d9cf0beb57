"""Which exchanges are under way in this process, and how they come to an end when it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol


class Ending(Protocol):
    """An exchange, as far as its end goes."""

    def end(self) -> asyncio.Task[Any]:
        """End because the process ends; return the task that does."""


_exchanges: set[Ending] = set()
_waiters: list[asyncio.Future[None]] = []
# Set by begin_drain().
_draining = False


def active_exchanges() -> int:
    """Return how many exchanges are under way in this process."""
    return len(_exchanges)


async def drained() -> None:
    """Return once no exchange is under way."""
    while _exchanges:
        waiter = asyncio.get_running_loop().create_future()
        _waiters.append(waiter)
        await waiter


def begin_drain() -> None:
    """Open no more tunnels in this process: upgrades get 503 from now on. All else goes on."""
    global _draining
    _draining = True


async def end_exchanges() -> None:
    """End every exchange, tunnels above all, and return when their outcomes were told."""
    ending = [exchange.end() for exchange in _exchanges]
    if ending:
        await asyncio.wait(ending, timeout=1.0)


# -- exchanges call these

#: Count an exchange.
began: Callable[[Ending], None] = _exchanges.add


def draining() -> bool:
    """Return whether :func:`begin_drain` was called."""
    return _draining


def ended(exchange: Ending) -> None:
    """Forget an exchange, which has let go of everything."""
    _exchanges.discard(exchange)
    if not _exchanges:
        while _waiters:
            waiter = _waiters.pop()
            if not waiter.done():
                waiter.set_result(None)
