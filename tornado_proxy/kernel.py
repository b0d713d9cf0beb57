"""What the kernel knows of a connection's other end, and what it holds for it (tcp(7), poll(2))."""

from __future__ import annotations

import fcntl
import select
import sys
import termios

_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def unacknowledged(fd: int) -> int:
    """Return how many bytes the kernel holds for the other end (SIOCOUTQ): megabytes, before a write has to wait."""
    count = bytearray(4)
    fcntl.ioctl(fd, termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def has_left(fd: int) -> bool:
    """Return whether the other end has closed its side, or all of it, whatever it said before."""
    poll = select.poll()
    poll.register(fd, _HANG_UP)
    return bool(poll.poll(0))
