"""What a stream still has to send: heads, content, and how it ends. Knows nothing of frames and windows."""

from __future__ import annotations

from collections import deque

from tornado_proxy.server.http2.heads import Fields


class Outbox:
    """Filled by the application, emptied by whoever sends.

    It ends in one of three ways: with the last head (``bodyless``, or nothing was put behind it), with the last
    content, or with ``trailers``.
    """

    __slots__ = ("_chunks", "_offset", "bodyless", "ended", "heads", "size", "trailers")

    def __init__(self) -> None:
        # Interim heads, and the final one last.
        self.heads: deque[Fields] = deque()
        self._chunks: deque[bytes] = deque()
        # Octets of the first chunk that have been taken.
        self._offset = 0
        # Octets of content that wait.
        self.size = 0
        # No content follows the final head, which is in ``heads`` or was taken.
        self.bodyless = False
        # Nothing is put in here any more.
        self.ended = False
        # Sent when all of the content is, where there are any.
        self.trailers: Fields = []

    def put(self, chunk: bytes) -> None:
        """Add content."""
        if chunk:
            self._chunks.append(chunk)
            self.size += len(chunk)

    def take(self, limit: int) -> bytes:
        """Return up to ``limit`` octets of content, small chunks joined."""
        chunks, offset = self._chunks, self._offset
        first = chunks[0]
        if len(first) - offset > limit:
            self._offset = offset + limit
            self.size -= limit
            return first[offset : offset + limit]
        taken = [chunks.popleft()[offset:] if offset else chunks.popleft()]
        self._offset = 0
        size = len(taken[0])
        while chunks and size + len(chunks[0]) <= limit:
            taken.append(chunks.popleft())
            size += len(taken[-1])
        self.size -= size
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def clear(self) -> None:
        """Drop everything: nobody will get it."""
        self.heads.clear()
        self._chunks.clear()
        self.size = self._offset = 0
        self.trailers = []
        self.ended = True

    @property
    def waiting(self) -> bool:
        """Whether there is anything to be sent, if only the end."""
        return bool(self.heads or self.size or self.ended)

    @property
    def ends_here(self) -> bool:
        """Whether what was taken last was the last of it."""
        if self.heads:
            return False
        return self.bodyless or (self.ended and not self.size and not self.trailers)
