"""What a client may ask of one connection. Beyond it the connection ends with ENHANCE_YOUR_CALM (RFC 9113 10.5)."""

from __future__ import annotations

from dataclasses import dataclass

# Frames that carry no content: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA, frames of unknown types, and
# whatever comes on closed streams. This many at once, and a tenth of them each second; a request and each KiB of
# content, in either direction, buy one more.
MAX_CONTROL_FRAMES = 1000
# What one request buys: browsers send a PRIORITY and a few WINDOW_UPDATEs with each.
CONTROL_FRAMES_PER_REQUEST = 10
_BYTES_PER_CONTROL_FRAME = 1024

# What the client may send before it must wait, all streams together. It is given back as soon as the bytes are here:
# how much of them is held, each stream's own window says, and a stream that is stalled cannot stall others.
CONNECTION_WINDOW = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What `HTTPServer` was given; see there."""

    max_concurrent_streams: int
    initial_window_size: int
    max_resets: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_concurrent_streams < 2**31:
            raise ValueError(f"max_concurrent_streams is {self.max_concurrent_streams}; write a number from 1")
        if not 1 <= self.initial_window_size < 2**31:
            raise ValueError(f"initial_window_size is {self.initial_window_size}; write 1 to 2**31 - 1 bytes")
        if self.max_resets < 1:
            raise ValueError(f"max_resets is {self.max_resets}; write a number from 1")


class Budget:
    """A token bucket: holds ``most``, and is refilled by a tenth of that each second."""

    __slots__ = ("_left", "_most", "_since", "_spare_bytes")

    def __init__(self, most: int, now: float) -> None:
        self._most = most
        self._left = float(most)
        # When the last one was taken.
        self._since = now
        self._spare_bytes = 0

    def spend(self, now: float) -> bool:
        """Take one; False when there is none left."""
        self._left = min(self._most, self._left + (now - self._since) * self._most / 10) - 1
        self._since = now
        return self._left >= 0

    def earn(self, count: int) -> None:
        """Add ``count``; there are never more than at the beginning."""
        self._left = min(self._most, self._left + count)

    def earn_bytes(self, size: int) -> None:
        """Add what ``size`` bytes of content buy."""
        count, self._spare_bytes = divmod(self._spare_bytes + size, _BYTES_PER_CONTROL_FRAME)
        if count:
            self.earn(count)
