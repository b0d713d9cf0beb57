"""What the kernel knows of a connection's other end, and what it holds for it (tcp(7), poll(2))."""

from __future__ import annotations

import fcntl
import select
import socket
import sys
import termios
from typing import Any

_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR

# Bytes that the kernel may take beyond those that it can send. Of each connection whose other end does not read it
# would take up to net.ipv4.tcp_wmem, 4 MiB on most systems: 500 of them used up what it has for all of TCP, and while
# that was written everybody else waited for two seconds. Half of this would cost a fast client's download 3 %.
_TAKEN_AHEAD = 1024 * 1024


def take_less_ahead(sock: Any) -> None:
    """Have the kernel take little more than it can send (TCP_NOTSENT_LOWAT); not of other sockets than TCP's.

    ``sock`` may be a transport's. What a listening socket accepts inherits it.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, _TAKEN_AHEAD)


def unacknowledged(fd: int) -> int:
    """Return how many bytes the kernel holds for the other end (SIOCOUTQ): megabytes, before a write has to wait."""
    count = bytearray(4)
    fcntl.ioctl(fd, termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def seen(fd: int, events: int) -> int:
    """Return which of ``events`` (of ``select.poll``) there are now; POLLHUP and POLLERR whether asked for or not."""
    poll = select.poll()
    poll.register(fd, events)
    return sum(found for _, found in poll.poll(0))


def has_left(fd: int) -> bool:
    """Return whether the other end has closed its side, or all of it, whatever it said before."""
    return bool(seen(fd, _HANG_UP))


def was_reset(fd: int) -> bool:
    """Return whether the connection was broken off.

    POLLHUP would not tell: it is also there when both directions have ended well and bytes still wait to be read.
    """
    return bool(seen(fd, select.POLLERR) & select.POLLERR)
