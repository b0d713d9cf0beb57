"""What an upstream does with what the proxy begins, be it connections or streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

Begun = TypeVar("Begun")


class Serving(Generic[Begun]):
    """Keeps what was begun for the test, or answers it by itself once there is a handler.

    What :meth:`answer` lets through has failed: it is kept in ``failures``, and the end raises the first.
    """

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self._new: asyncio.Queue[Begun] = asyncio.Queue()
        self._handler: Callable[[Begun, Any], Awaitable[None]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, begun: Begun) -> None:
        """Let :attr:`handler` answer what is asked of us here."""
        raise NotImplementedError

    def serve(self, handler: Callable[[Begun, Any], Awaitable[None]]) -> None:
        """From now on answer by itself: await ``handler(begun, request)`` for each request.

        What a handler raises fails the test, except that the proxy hung up.
        """
        self._handler = handler
        while not self._new.empty():
            self.run(self._serve(self._new.get_nowait()))

    @property
    def handler(self) -> Callable[[Begun, Any], Awaitable[None]]:
        """The one that was given last."""
        assert self._handler is not None
        return self._handler

    def begin(self, begun: Begun) -> None:
        """Take what the proxy has begun."""
        if self._handler is None:
            self._new.put_nowait(begun)
        else:
            self.run(self._serve(begun))

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run this until it ends, or we do."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def raise_failure(self) -> None:
        if self.failures:
            raise self.failures[0]

    async def _serve(self, begun: Begun) -> None:
        try:
            await self.answer(begun)
        except Exception as error:
            self.failures.append(error)
