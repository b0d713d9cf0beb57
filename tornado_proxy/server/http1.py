"""HTTPServer: listens, keeps count of its connections, and ends well."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import mmap
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

from tornado import netutil
from tornado.concurrent import Future
from tornado.httpserver import _CallableAdapter
from tornado.httputil import HTTPMessageDelegate, HTTPServerConnectionDelegate, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.platform.asyncio import BaseAsyncIOLoop

from tornado_proxy.kernel import take_less_ahead
from tornado_proxy.server.application import RoutedRequest, routes_itself
from tornado_proxy.server.connection import READ_AHEAD, RECEIVE_SIZE, Connection
from tornado_proxy.server.request import RequestConnection
from tornado_proxy.server.turns import Together

logger = logging.getLogger(__name__)

BACKLOG = 1024
# Connections accepted in one turn of the loop, so that those which are open have theirs too.
ACCEPT_AT_ONCE = 64
# Seconds until accepting is tried again when there are no descriptors left.
ACCEPT_RETRY = 1.0
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Requests that were on their way when the drain began are read in this time, and then served.
LAST_CALL = 0.05
# Tornado's limit: without streaming the whole body is held in memory.
MAX_BODY_SIZE = 100 * 1024 * 1024


class HTTPServer:
    """Serves ``app``, an ``Application`` or any other delegate of Tornado, over HTTP/1.0, HTTP/1.1 and HTTP/2.

    ``ssl_options``: a dict as Tornado takes it, or an ``SSLContext``; default ``None``, no TLS.
    ``protocol``: ``request.protocol``, where something in front of us takes off the TLS. Default ``None``: as it is.
    ``max_header_size``: a larger head gets 431, a longer request line 414. Default 64 KiB.
    ``header_timeout``: seconds for a head, and from the connection to the first one; then 408. Default 60.
    ``idle_timeout``: seconds that a connection may wait for its next request. Default 75.
    ``max_body_size``: a larger body gets 413, unless the handler calls ``set_max_body_size``. Default ``None``: 100
    MiB, as in Tornado, because a handler that does not stream holds all of it.
    ``linger_time``, ``linger_bytes``: how long, and how much of, a body is read and dropped after the response is
    complete. Shorter saves connections, and lets early answers be lost to clients that are still sending. Default
    2 seconds, 64 MiB.

    ``http2``: serve HTTP/2 too (RFC 9113), to clients that choose it by ALPN, which is then set in ``ssl_options``, or,
    without TLS, that begin with it. Needs the extra ``[http2]``; raises ``RuntimeError`` without. Default ``False``.
    The limits above hold for it as far as they can: ``max_header_size`` is counted as in SETTINGS_MAX_HEADER_LIST_SIZE,
    and a body that comes after the response is not read at all. Further, for each connection:
    ``max_concurrent_streams``: requests at a time; more are refused, for the client to send again. Default 100.
    ``initial_window_size``: octets of a body that a client may send before the application has taken any; as many are
    held in memory for each stream that is stalled. Smaller makes uploads slower where round trips are long. Default 256
    KiB.
    ``max_resets``: streams that the client may cut before they are answered, or make us cut, and a tenth of that each
    second; one more ends the connection with ENHANCE_YOUR_CALM (CVE-2023-44487, CVE-2025-8671). Default 500.

    :meth:`listen`, :meth:`add_sockets`, :meth:`add_socket`, :meth:`stop` and :meth:`close_all_connections` are as on
    Tornado's server; :meth:`drain` is our own.
    """

    def __init__(
        self,
        app: HTTPServerConnectionDelegate | Callable[[HTTPServerRequest], None],
        *,
        ssl_options: dict[str, Any] | ssl.SSLContext | None = None,
        protocol: str | None = None,
        max_header_size: int = 64 * 1024,
        header_timeout: float = 60.0,
        idle_timeout: float = 75.0,
        max_body_size: int | None = None,
        linger_time: float = 2.0,
        linger_bytes: int = 64 * 1024 * 1024,
        http2: bool = False,
        max_concurrent_streams: int = 100,
        initial_window_size: int = 256 * 1024,
        max_resets: int = 500,
    ) -> None:
        self.app = app
        self._routes_itself = routes_itself(app)
        self.protocol = protocol
        self.max_header_size = max_header_size
        self.max_body_size = MAX_BODY_SIZE if max_body_size is None else max_body_size
        self.header_timeout = header_timeout
        self.idle_timeout = idle_timeout
        self.linger_time = linger_time
        self.linger_bytes = linger_bytes
        self._tls = _server_context(ssl_options)
        self._new_protocol: Callable[[], asyncio.BufferedProtocol] = functools.partial(Connection, self)
        if http2:
            choice, limits = _load_http2()
            if self._tls is not None:
                self._tls.set_alpn_protocols(["h2", "http/1.1"])
            self.http2_limits = limits(max_concurrent_streams, initial_window_size, max_resets)
            self._new_protocol = functools.partial(choice, self, self._new_protocol)
        # Every connection reads into this, and takes its bytes out before another one's turn. It begins with a page:
        # where large blocks of malloc() begin, 16 bytes further, some processors copy at a fifth of the speed. Private,
        # or processes that are forked would share it.
        self.buffer = memoryview(mmap.mmap(-1, RECEIVE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.buffer_ahead = self.buffer[:READ_AHEAD]
        # No connection takes another request.
        self.draining = False
        # Requests of HTTP/1.1 that are not answered yet.
        self.running = 0
        self._listening: set[socket.socket] = set()
        self._connections: set[Connection] = set()
        # Connections that asyncio is making transports for; under TLS that takes a handshake.
        self._starting: set[asyncio.Task[None]] = set()
        # Set while there are no connections.
        self._empty = asyncio.Event()
        self._empty.set()
        # Often enough for the shortest limit, and not so often that many idle connections cost anything.
        self._sweep_every = min(1.0, max(0.01, min(header_timeout, idle_timeout, linger_time) / 4))
        self._sweeping = False

    # -- listening

    def listen(
        self, port: int, address: str | None = None, *, backlog: int = BACKLOG, reuse_port: bool = False
    ) -> None:
        """Listen on ``port`` of ``address``, by default of every one."""
        self.add_sockets(netutil.bind_sockets(port, address, backlog=backlog, reuse_port=reuse_port))

    def add_sockets(self, sockets: list[socket.socket]) -> None:
        """Accept connections on sockets that listen. They are closed by :meth:`stop`."""
        for sock in sockets:
            self.add_socket(sock)

    def add_socket(self, sock: socket.socket) -> None:
        """Accept connections on a socket that listens."""
        # Here and not in __init__, because a server may be made before its loop, as Tornado's may.
        self.loop = cast(BaseAsyncIOLoop, IOLoop.current()).asyncio_loop
        self.done: Future[None] = self.loop.create_future()
        self.done.set_result(None)
        self.reads, self.writes = Together(self.loop), Together(self.loop)
        sock.setblocking(False)
        take_less_ahead(sock)
        self._listening.add(sock)
        self.loop.add_reader(sock, self._accept, sock)

    def stop(self) -> None:
        """Stop accepting. Connections live on; see :meth:`close_all_connections` and :meth:`drain`."""
        listening, self._listening = self._listening, set()
        for sock in listening:
            self.loop.remove_reader(sock)
            sock.close()

    async def close_all_connections(self) -> None:
        """Close every connection, also in the middle of a response; return when they are closed. Not tunnels."""
        await self._started()
        for connection in list(self._connections):
            connection.transport.abort()
        await self._empty.wait()

    async def drain(self) -> None:
        """Stop accepting at once; return when each request that had arrived is answered, and its connection closed."""
        for sock in self._listening:
            # What the kernel has accepted for us would be reset.
            for _ in range(BACKLOG // ACCEPT_AT_ONCE):
                self._accept(sock)
        self.stop()
        self.draining = True
        for connection in self._connections:
            connection.begin_drain()
        # A request may already lie in the kernel's buffer, where closing would turn it into a reset.
        await asyncio.sleep(LAST_CALL)
        await self._started()
        for connection in list(self._connections):
            if connection.idle:
                connection.close_idle()
        await self._empty.wait()

    # -- accepting

    def _accept(self, sock: socket.socket) -> None:
        """Accept what has come. asyncio's own loop, in 3.11, goes on trying when it has run out of descriptors."""
        for _ in range(ACCEPT_AT_ONCE):
            try:
                accepted, _address = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in OUT_OF_RESOURCES:
                    raise
                # The socket stays readable, so that looking again at once would be a busy loop.
                logger.warning("cannot accept connections: %s; trying again in %.0f s", exc.strerror, ACCEPT_RETRY)
                self.loop.remove_reader(sock)
                self.loop.call_later(ACCEPT_RETRY, self._accept_again, sock)
                return
            accepted.setblocking(False)
            task = self.loop.create_task(self._start(accepted))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def _accept_again(self, sock: socket.socket) -> None:
        if sock in self._listening:
            self.loop.add_reader(sock, self._accept, sock)

    async def _start(self, sock: socket.socket) -> None:
        limits: dict[str, Any] = {}
        if self._tls is not None:
            limits = {
                "ssl": self._tls,
                "ssl_handshake_timeout": self.header_timeout,
                "ssl_shutdown_timeout": self.linger_time,
            }
        try:
            await self.loop.connect_accepted_socket(self._new_protocol, sock, **limits)
        except OSError as exc:
            # Mostly a handshake with someone who does not speak TLS.
            logger.debug("a connection was not made: %s", exc)
            sock.close()
        except BaseException:
            sock.close()
            raise

    async def _started(self) -> None:
        if self._starting:
            await asyncio.wait(self._starting, timeout=self.linger_time)

    # -- connections call these

    def start_request(self, server_conn: object, request_conn: RequestConnection) -> HTTPMessageDelegate:
        """Return what takes the request."""
        if self._routes_itself:
            return RoutedRequest(self.app, server_conn, request_conn, request_conn.has_body)  # type: ignore[arg-type]
        if isinstance(self.app, HTTPServerConnectionDelegate):
            return self.app.start_request(server_conn, request_conn)
        return _CallableAdapter(self.app, request_conn)

    def opened(self, connection: Connection) -> None:
        """Count a connection."""
        self._connections.add(connection)
        self._empty.clear()
        if not self._sweeping:
            self._sweeping = True
            self.loop.call_later(self._sweep_every, self._sweep)

    def closed(self, connection: Connection) -> None:
        """Forget a connection that was closed, or is no HTTP connection any more."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def _sweep(self) -> None:
        """One timer for all connections: one for each, set for each request, would cost as much as a small request."""
        now = self.loop.time()
        for connection in list(self._connections):
            connection.sweep(now)
        self._sweeping = bool(self._connections)
        if self._sweeping:
            self.loop.call_later(self._sweep_every, self._sweep)


def _load_http2() -> tuple[Any, Any]:
    """Return the class of connections that may speak HTTP/2, and that of their limits."""
    try:
        from tornado_proxy.server.http2.choice import Choice
        from tornado_proxy.server.http2.limits import Limits
    except ImportError as exc:
        if (exc.name or "").startswith("tornado_proxy"):
            raise
        raise RuntimeError(f"http2=True needs h2: pip install 'tornado_proxy[http2]' ({exc})") from exc
    return Choice, Limits


def _server_context(options: dict[str, Any] | ssl.SSLContext | None) -> ssl.SSLContext | None:
    if options is None:
        return None
    if isinstance(options, dict):
        if "certfile" not in options:
            raise KeyError('missing key "certfile" in ssl_options')
        options = netutil.ssl_options_to_context(options, server_side=True)
        options.set_alpn_protocols(["http/1.1"])
    return options
