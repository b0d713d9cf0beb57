"""How the standalone serves and stops: a server that drains, the signals that begin it, and several processes.

Nothing here knows the proxy.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

from tornado import netutil, process
from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate

# Connections that the kernel completes while the loop is busy.
BACKLOG = 1024
MAX_HEADER_SIZE = 64 * 1024
# Tornado's own limit is 100 MB and answers in our place; ours is the option max_body_size.
MAX_BODY_SIZE = 2**63 - 1
KEEP_ALIVE_SECONDS = 75.0
# Requests that were on their way when the drain began are read in this time, and then served.
LAST_CALL = 0.05
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
        """Return listening sockets, several where the name has several addresses."""
        if self.path is not None:
            return [netutil.bind_unix_socket(self.path, backlog=BACKLOG)]
        return netutil.bind_sockets(self.port, self.host or "", backlog=BACKLOG)

    def url(self, scheme: str, port: int) -> str:
        """Return what to type into a client; ``port`` is the one bound, which differs when 0 was asked for."""
        if self.path is not None:
            return f"unix:{self.path}"
        host = self.host or "0.0.0.0"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class DrainingServer(HTTPServer):
    """An HTTP server that can end well: finish what runs, take nothing new."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("idle_connection_timeout", KEEP_ALIVE_SECONDS)
        kwargs.setdefault("max_header_size", MAX_HEADER_SIZE)
        kwargs.setdefault("max_body_size", MAX_BODY_SIZE)
        super().initialize(*args, **kwargs)
        # The running or coming request of each open connection. A tunnel has left: it is no HTTP connection any more.
        self.requests: dict[HTTP1ServerConnection, HTTP1Connection] = {}
        self.draining = False
        # Set when the drain has begun and the last connection is gone.
        self.empty = asyncio.Event()

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        # Tornado calls this when a connection begins to wait for a request, not when one has arrived.
        connection = cast(HTTP1ServerConnection, server_conn)
        self.requests[connection] = cast(HTTP1Connection, request_conn)
        if self.draining:
            asyncio.get_running_loop().call_soon(self._close_if_idle, connection)
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        self.requests.pop(cast(HTTP1ServerConnection, server_conn), None)
        if self.draining and not self.requests:
            self.empty.set()

    async def drain(self) -> None:
        """Stop accepting at once; return when each request that had arrived is answered, and its connection closed."""
        self.stop()
        self.draining = True
        self.conn_params.no_keep_alive = True
        for request in self.requests.values():
            # So that a response whose head is still to come says Connection: close. Tornado settles this when it reads
            # the head of the request, and has no public name for it.
            request._disconnect_on_finish = True
        # A request may already lie in the kernel's buffer, where closing would turn it into a reset.
        await asyncio.sleep(LAST_CALL)
        for connection in list(self.requests):
            self._close_if_idle(connection)
        if self.requests:
            await self.empty.wait()

    def _close_if_idle(self, connection: HTTP1ServerConnection) -> None:
        request = self.requests.get(connection)
        # Without a request line nobody waits for an answer.
        if request is not None and request._request_start_line is None:
            connection.stream.close()


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
