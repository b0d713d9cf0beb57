"""BodyPipe: bounded bytes between one producer and one consumer. The only back-pressure code in the package.

A producer that can wait awaits what :meth:`BodyPipe.write` returns; one that cannot (libcurl's write callback) offers
its chunk (:meth:`BodyPipe.offer`) and, if told so, stops until ``on_drain`` is called. A consumer that can wait awaits
:meth:`BodyPipe.read`; one that cannot (libcurl's read callback) calls :meth:`BodyPipe.take` and resumes when
``on_data`` is called.

Rule for editors: nothing here runs the other side's code except ``on_data`` and ``on_drain``. They are called at most
once for each time that their side found the pipe empty or full, and never from inside a libcurl callback: the side that
waits is never the side that calls.
"""

from __future__ import annotations

from asyncio import Future, get_running_loop
from collections import deque
from collections.abc import Callable
from time import monotonic

from tornado.httputil import HTTPHeaders

# Bytes that read() joins small chunks to. A system call for each 64 KiB would cost more than all the rest.
_READ_SIZE = 256 * 1024


class BodyPipe:
    """A body on its way, with at most about ``limit`` bytes held.

    The limit is soft by one chunk: a write is accepted whole whenever the pipe is below its limit, so that no chunk is
    ever split or copied to enforce it. What :meth:`read` has returned counts until the consumer asks for more: one
    that is held up holds it.

    The body ends in exactly one of two ways: :meth:`close` (complete) or :meth:`fail` (broken). After either, writes
    are dropped. Both may be called again; the first call counts.
    """

    __slots__ = (
        "_chunks",
        "_discarded",
        "_ended",
        "_out",
        "_reader",
        "_starved",
        "_stuffed",
        "_writer",
        "error",
        "last_read",
        "last_write",
        "length",
        "limit",
        "on_data",
        "on_drain",
        "size",
        "total",
        "trailers",
    )

    def __init__(self, limit: int, length: int | None = None) -> None:
        self.limit = limit
        # What the producer announced (Content-Length), or None. Not enforced here: framing is the two ends' business.
        self.length = length
        # Bytes held now, and bytes that were ever accepted. What the consumer has, and may still hold, is in neither.
        self.size = 0
        self.total = 0
        # When bytes last came in and went out, by time.monotonic().
        self.last_write = self.last_read = monotonic()
        # The fields to send behind the body, if any; there before close() is called.
        self.trailers: HTTPHeaders | None = None
        # Why the body is broken, for the consumer; None while it is not.
        self.error: BaseException | None = None
        # Called when there is something to take, or the end, after the consumer found nothing.
        self.on_data: Callable[[], None] | None = None
        # Called when there is room again after the producer found the pipe full.
        self.on_drain: Callable[[], None] | None = None
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._discarded = 0
        # Bytes that the last read() returned.
        self._out = 0
        # The consumer that awaits read(), and the producer that awaits what write() returned.
        self._reader: Future[None] | None = None
        self._writer: Future[None] | None = None
        # take() would find nothing; nothing should be offered.
        self._starved = False
        self._stuffed = False

    # -- the producer's side

    def offer(self, chunk: bytes) -> bool:
        """Accept ``chunk``; return ``False`` if it should be the last until ``on_drain`` is called."""
        if self._ended or not chunk:
            return True
        self._chunks.append(chunk)
        self.size += len(chunk)
        self.total += len(chunk)
        self.last_write = monotonic()
        if self._reader is not None or self._starved:
            self._wake_consumer()
        return not self.stuffed()

    def stuffed(self) -> bool:
        """Return whether there is no room; then ``on_drain`` will be called when there is, or the consumer aborts."""
        if self._ended or self.size + self._out < self.limit:
            return False
        self._stuffed = True
        return True

    def write(self, chunk: bytes) -> Future[None] | None:
        """Accept ``chunk``; return ``None`` (go on) or a future that is done when there is room again."""
        if self._ended or not chunk:
            return None
        self._chunks.append(chunk)
        self.size += len(chunk)
        self.total += len(chunk)
        self.last_write = monotonic()
        self._wake_consumer()
        if self.size + self._out < self.limit:
            return None
        if self._writer is None:
            self._writer = get_running_loop().create_future()
        return self._writer

    def close(self) -> None:
        """The body is complete; what is held can still be read."""
        if not self._ended:
            self._ended = True
            self._wake_consumer()
            self._wake_producer()

    def fail(self, error: BaseException) -> None:
        """The body is broken: the consumer gets what is held, then ``error``."""
        if not self._ended:
            self._ended = True
            self.error = error
            self._wake_consumer()
            self._wake_producer()

    @property
    def ended(self) -> bool:
        """Whether :meth:`close` or :meth:`fail` was called; bytes may still be held."""
        return self._ended

    @property
    def held(self) -> int:
        """Bytes that count against ``limit``."""
        return self.size + self._out

    # -- the consumer's side

    @property
    def exhausted(self) -> bool:
        """Whether the body ended well and every byte was read."""
        return self._ended and not self._chunks and self.error is None

    @property
    def consumed(self) -> int:
        """Bytes that the consumer has had."""
        return self.total - self.size - self._discarded

    async def read(self) -> bytes:
        """Return what is held, waiting for the first byte; ``b""`` is the end. Raises the error of :meth:`fail`.

        Small chunks come joined, up to 256 KiB.
        """
        if self._out:
            self._let_go()
        while not self._chunks:
            if self._ended:
                if self.error is not None:
                    raise self.error
                return b""
            self._reader = get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._pop()

    def read_nowait(self) -> bytes:
        """Return what :meth:`read` would, or nothing where it would wait."""
        if self._out:
            self._let_go()
        return self._pop() if self._chunks else b""

    def take(self, limit: int) -> bytes | None:
        """Return up to ``limit`` bytes, ``b""`` at the end, or ``None``: nothing yet, ``on_data`` will be called.

        Raises the error of :meth:`fail` once what was held before it has been taken.
        """
        if self._out:
            self._let_go()
        if not self._chunks:
            if self._ended:
                if self.error is not None:
                    raise self.error
                return b""
            self._starved = True
            return None
        chunk = self._chunks.popleft()
        if len(chunk) > limit:
            self._chunks.appendleft(chunk[limit:])
            chunk = chunk[:limit]
        self.size -= len(chunk)
        self.last_read = monotonic()
        if self.size < self.limit:
            self._wake_producer()
        return chunk

    def starving(self) -> bool:
        """Return whether :meth:`take` would return ``None``; then ``on_data`` will be called, as if it had."""
        if self._chunks or self._ended:
            return False
        self._starved = True
        return True

    def discard(self) -> None:
        """Drop what is held and all that will come; the producer never waits again."""
        self._ended = True
        self._discarded += self.size
        self._chunks.clear()
        self.size = 0
        self._wake_producer()

    def _let_go(self) -> None:
        """The consumer asks for more, so it is done with what it had."""
        self._out = 0
        if self.size < self.limit:
            self._wake_producer()

    def _pop(self) -> bytes:
        chunks = self._chunks
        data = chunks.popleft()
        if chunks:
            # Small chunks that have piled up go as one; the whole pipe would double what a stalled consumer holds.
            size = len(data)
            several = [data]
            while chunks and size + len(chunks[0]) <= _READ_SIZE:
                size += len(chunks[0])
                several.append(chunks.popleft())
            data = b"".join(several)
        self.size -= len(data)
        self._out = len(data)
        self.last_read = monotonic()
        return data

    def _wake_consumer(self) -> None:
        if self._reader is not None:
            if not self._reader.done():
                self._reader.set_result(None)
        elif self._starved:
            self._starved = False
            if self.on_data is not None:
                self.on_data()

    def _wake_producer(self) -> None:
        if self._writer is not None:
            if not self._writer.done():
                self._writer.set_result(None)
            self._writer = None
        if self._stuffed:
            self._stuffed = False
            if self.on_drain is not None:
                self.on_drain()
