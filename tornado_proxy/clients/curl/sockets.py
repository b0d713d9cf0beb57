"""Which of a client's sockets are ready, and which idle ones have something to say.

The sockets are watched in an epoll of their own, and that one by the loop: the loop's books about a socket would be
wrong as soon as the client closes it, and cost more than the system calls. An idle socket stays in the epoll: that
saves two system calls for each request, and shows what comes unasked.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Iterator

import pycurl

from tornado_proxy.kernel import has_left, take_less_ahead

log = logging.getLogger(__name__)

_READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


class SocketWatch:
    """Calls ``on_ready()`` from the loop when there are watched sockets that are :meth:`ready`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_ready: Callable[[], None], *, shares: bool = False) -> None:
        self._loop = loop
        # Whether a connection may be asked for that is in use, because the client may speak HTTP/2.
        self._shares = shares
        self._epoll = select.epoll()
        # Sockets that are wanted now, and whether for writing too; others may still be in the epoll, idle.
        self._watched: dict[int, bool] = {}
        # Sockets that were quiet once already; new ones may have something to say that is not for HTTP, such as the
        # session tickets of TLS 1.3.
        self._used: set[int] = set()
        # Sockets that became readable while they were idle.
        self._noisy: set[int] = set()
        # What the last look found readable; None when there was none in this turn of the loop.
        self._readable: set[int] | None = None
        # The sockets of each local port, and back, as of when they were new. The kernel gives one port to several
        # connections, to different addresses; those that are closed stay until their descriptor is used again.
        self._sockets: dict[int, list[int]] = {}
        self._ports: dict[int, int] = {}
        # Sockets that carry several exchanges at a time, and to whom: HTTP/2. Those of them that are good for no more.
        self._shared: dict[int, str] = {}
        self._condemned: set[int] = set()
        loop.add_reader(self._epoll.fileno(), on_ready)

    def watch(self, fd: int, readable: bool, writable: bool) -> None:
        """Watch ``fd``, for the first time or otherwise than before."""
        self._watched[fd] = writable
        mask = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
        try:
            self._epoll.modify(fd, mask)
        except FileNotFoundError:
            self._epoll.register(fd, mask)
            if fd in self._noisy:
                self._noisy.discard(fd)
                if self._is_open(fd):
                    # Not a new one: its transfer was paused, when it is as if it were idle, and more has come.
                    return
            self._used.discard(fd)
            self._shared.pop(fd, None)
            self._condemned.discard(fd)
            self._meet(fd)

    def unwatch(self, fd: int) -> None:
        """``fd`` is idle now, or about to be closed; the kernel forgets a closed socket by itself."""
        if self._watched.pop(fd, False):
            # Answered before it was watched for reading. An idle socket can always be written to, which says nothing.
            try:
                self._epoll.modify(fd, select.EPOLLIN)
            except OSError as exc:
                log.debug("socket %d: %s", fd, exc)

    def ready(self) -> Iterator[tuple[int, int]]:
        """Look, and yield each watched socket that is ready, with what for: CSELECT_IN, CSELECT_OUT.

        What is done with one may unwatch others, which are then left out.
        """
        for fd, events in self._epoll.poll(0):
            if fd in self._watched:
                readable = pycurl.CSELECT_IN if events & _READABLE else 0
                yield fd, readable | pycurl.CSELECT_OUT if events & select.EPOLLOUT else readable
                continue
            if not events & _READABLE:
                continue
            # Bytes or the end on an idle connection. The client, or is_quiet, finds that out before it is used again;
            # until then we must not be woken for it over and over.
            self._noisy.add(fd)
            try:
                self._epoll.unregister(fd)
            except OSError as exc:
                # Closed since, by what the sockets before it made the client do.
                log.debug("socket %d: %s", fd, exc)

    def is_quiet(self, local_port: int, address: tuple[str, int]) -> bool:
        """Return whether nothing, not even the end, waits to be read on the connection from this port to ``address``.

        Asked before each request. On a new connection nothing can be left of the one before; it counts as quiet, and so
        does a unix-domain socket, which has no port. On one that is shared, what waits says to whom it belongs; only
        the end of one that is idle is looked for.
        """
        fd = self._find(local_port, address)
        if fd is None:
            return True
        if fd not in self._used:
            self._used.add(fd)
            return True
        if fd in self._condemned:
            return False
        if self._shares and fd in self._watched:
            return True
        if fd in self._shared:
            return not has_left(fd)
        if fd in self._noisy:
            return False
        if self._readable is None:
            # One look does for the requests of this turn.
            self._loop.call_soon(self._forget_look)
        elif fd not in self._readable:
            return True
        # What was readable may have been read since.
        self._readable = readable = {ready for ready, events in self._epoll.poll(0) if events & _READABLE}
        return fd not in readable

    def share(self, local_port: int, address: tuple[str, int], origin: str) -> None:
        """The connection, to ``origin``, turned out to carry several exchanges at a time."""
        fd = self._find(local_port, address)
        if fd is not None:
            self._shared[fd] = origin

    def condemn(self, local_port: int, address: tuple[str, int], origin: str) -> None:
        """Nothing good will come on this connection, to ``origin``, any more."""
        fd = self._find(local_port, address)
        if fd is not None:
            self._shared[fd] = origin
            self._condemned.add(fd)

    def has_dead(self, origin: str) -> bool:
        """Return whether there is a shared connection to ``origin`` that is idle and no good."""
        for fd in (*self._condemned, *self._noisy):
            if self._shared.get(fd) == origin and self._is_open(fd) and (fd in self._condemned or has_left(fd)):
                return True
        return False

    def carrying(self, local_port: int, address: tuple[str, int]) -> list[int]:
        """Return the watched sockets that may be this connection: one, or all where there is no port to tell by."""
        fd = self._find(local_port, address)
        return [other for other in self._watched if fd is None or other == fd]

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _forget_look(self) -> None:
        self._readable = None

    def _find(self, local_port: int, address: tuple[str, int]) -> int | None:
        fds = self._sockets.get(local_port)
        if fds is None:
            return None
        if len(fds) == 1:
            return fds[0]
        # A descriptor may be in use again, for a connection of somebody else's to the same upstream.
        return next((fd for fd in fds if self._is_open(fd) and _upstream_address(fd) == address), None)

    def _is_open(self, fd: int) -> bool:
        """Return whether ``fd`` still is the socket that it was when it was new."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            return False
        try:
            return sock.family in (socket.AF_INET, socket.AF_INET6) and self._ports.get(fd) == sock.getsockname()[1]
        except OSError:
            return False
        finally:
            sock.detach()

    def _meet(self, fd: int) -> None:
        """Note the port of a socket that is new, and set what libcurl does not."""
        if (before := self._ports.pop(fd, None)) is not None:
            self._sockets[before].remove(fd)
            if not self._sockets[before]:
                del self._sockets[before]
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            # Clients watch other things than sockets too: a resolver's wake-up.
            return
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                port = sock.getsockname()[1]
                self._sockets.setdefault(port, []).append(fd)
                self._ports[fd] = port
                take_less_ahead(sock)
        finally:
            sock.detach()


def _upstream_address(fd: int) -> tuple[str, int] | None:
    """Return address and port of the other end, ``None`` where there is none (any more)."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        address = sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()
    return address[:2] if isinstance(address, tuple) else None
