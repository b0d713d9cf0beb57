"""How the standalone serves and stops: where it listens, the signals that end it, and several processes.

Nothing here knows the proxy.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from tornado import netutil, process

# Connections that the kernel completes while the loop is busy.
BACKLOG = 1024
# A process that died is replaced no sooner, or one that cannot run at all would be forked in a tight loop.
RESTART_DELAY = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to listen. ``host`` is ``None`` for every address; a ``path`` is a unix socket."""

    host: str | None = None
    port: int = 0
    path: str | None = None

    def bind(self) -> list[socket.socket]:
        """Return listening sockets, several where the name has several addresses. Raises ``OSError``."""
        if self.path is not None:
            _refuse_if_served(self.path)
            return [netutil.bind_unix_socket(self.path, backlog=BACKLOG)]
        return netutil.bind_sockets(self.port, self.host or "", backlog=BACKLOG)

    def url(self, scheme: str, port: int) -> str:
        """Return what to type into a client; ``port`` is the one bound, which differs when 0 was asked for."""
        if self.path is not None:
            return f"unix:{self.path}"
        host = self.host or "0.0.0.0"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _refuse_if_served(path: str) -> None:
    """Raise ``OSError`` where a process listens on the unix socket ``path``.

    Binding would take the path from it. What a process left that has ended may go.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        # Where its queue is full it listens as well: then this raises.
        sock.setblocking(False)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@dataclass(frozen=True, slots=True)
class Workers:
    """The read ends of two pipes that tie the worker processes to the first one.

    Nobody takes the byte out of ``drain``, so each worker finds it there, also one started later; when the first
    process dies, the end of file says the same. A byte from ``end`` means at once. Signals would not do: terminals
    and service managers send them to every process, and a worker cannot tell a second signal from a forwarded first.
    """

    drain: int
    end: int


def fork_workers(count: int, sockets: list[socket.socket], ready: Callable[[], None]) -> Workers:
    """Return in each of ``count`` new processes. The first process stays here, replaces those that die, and exits.

    Called before any event loop exists; calls ``ready`` once, in the first process. ``sockets`` are closed there when
    the drain begins: while anyone holds a listening socket, the kernel goes on completing connections.
    """
    drain_read, drain_write = os.pipe()
    end_read, end_write = os.pipe()
    stopping = False
    forks = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            # More bytes than workers; each takes one.
            os.write(end_write, bytes(4096))
            end_by(signum)
        stopping = True
        os.write(drain_write, b"\0")
        for listening in sockets:
            listening.close()

    def count_fork() -> None:
        nonlocal forks
        forks += 1

    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)
    os.register_at_fork(before=count_fork)
    ready()
    process.fork_processes(count, max_restarts=sys.maxsize)

    # From here on in a worker. The first process forwards what the terminal says; SIGTERM is for the loop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(drain_write)
    os.close(end_write)
    if stopping:
        sys.exit(0)
    if forks > count:
        time.sleep(RESTART_DELAY)
    return Workers(drain_read, end_read)


def end_by(signum: int) -> None:
    """End this process as ``signum`` would have, had nobody handled it."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def stop_requested(workers: Workers | None) -> asyncio.Event:
    """Return an event that is set when serving should stop; a second request ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(signum: int) -> None:
        if stop.is_set():
            end_by(signum)
        stop.set()

    def on_drain(workers: Workers) -> None:
        loop.remove_reader(workers.drain)
        stop.set()

    def on_end(workers: Workers) -> None:
        loop.remove_reader(workers.end)
        if os.read(workers.end, 1):
            os._exit(1)

    if workers is None:
        for signum in STOP_SIGNALS:
            loop.add_signal_handler(signum, on_signal, signum)
    else:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_reader(workers.drain, on_drain, workers)
        loop.add_reader(workers.end, on_end, workers)
    return stop
