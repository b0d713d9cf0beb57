"""A proxy on the test's own event loop, and what must be true once it is stopped."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tornado.httpserver
import tornado.web
from tornado.httputil import HTTPServerRequest
from tornado.netutil import bind_sockets

import tornado_proxy.server
from tests.support.declared import CLIENT
from tests.support.downstream import Downstream, Response
from tests.support.http2 import Http2
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import TIMEOUT, Pairs, within
from tornado_proxy import ProxyHandler, mount
from tornado_proxy.clients import close_clients
from tornado_proxy.messages import Outcome

# Which server is in front: Tornado's, as in app.listen(), or ours, as in the standalone proxy.
SERVER = os.environ.get("TORNADO_PROXY_TEST_SERVER", "tornado")
OnDone = Callable[..., Any]
TESTS = str(Path(__file__).resolve().parents[1])


class RunningProxy:
    """A proxy that listens on ``port``.

    ``outcomes`` are those of its exchanges, in the order in which they ended; :meth:`next_outcome` waits for one more.
    ``access_log`` has ``(status, method, target)`` for each request that Tornado finished.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.outcomes: list[Outcome] = []
        self.access_log: list[tuple[int, str | None, str | None]] = []
        self._new_outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._downstreams: list[Downstream] = []

    def start(self, rules: Sequence[Any], app_settings: dict[str, Any], server_options: dict[str, Any]) -> None:
        settings = {"log_function": self._log, **({"proxy_client": CLIENT} if CLIENT else {}), **app_settings}
        self.app = tornado.web.Application(list(rules), **settings)
        self.server: Any
        if SERVER == "tornado" and not server_options.get("http2"):
            self.server = tornado.httpserver.HTTPServer(self.app, **server_options)
        else:
            # Tornado's names, for what ours has a limit of its own for, or none.
            limit = server_options.pop("idle_connection_timeout", None)
            if limit is not None:
                server_options.update(idle_timeout=limit, header_timeout=limit)
            for name in ("max_buffer_size", "body_timeout"):
                server_options.pop(name, None)
            self.server = tornado_proxy.server.HTTPServer(self.app, **server_options)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sockets = bind_sockets(0, self.host, family)
        self.server.add_sockets(sockets)
        self.port: int = sockets[0].getsockname()[1]

    def _log(self, handler: tornado.web.RequestHandler) -> None:
        request: HTTPServerRequest = handler.request
        self.access_log.append((handler.get_status(), request.method, request.uri))

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    # Outcomes

    def record(self, then: OnDone | None = None) -> OnDone:
        """Return an ``on_done`` that records the outcome here and then does what `then` does."""

        async def on_done(handler: ProxyHandler, outcome: Outcome) -> None:
            self.outcomes.append(outcome)
            self._new_outcomes.put_nowait(outcome)
            if then is not None and inspect.isawaitable(result := then(handler, outcome)):
                await result

        return on_done

    async def next_outcome(self) -> Outcome:
        """Return the next outcome that no test has had yet, waiting for its exchange to end."""
        return await within(self._new_outcomes.get(), f"an outcome (so far {self.outcomes})")

    # Requests

    async def connect(self, *, receive_buffer: int | None = None) -> Downstream:
        """Return a new downstream connection, closed with the proxy."""
        downstream = await Downstream.connect(self.port, self.host, receive_buffer=receive_buffer)
        self._downstreams.append(downstream)
        return downstream

    async def connect2(self, **options: Any) -> Http2:
        """Return a new downstream connection that speaks HTTP/2; needs ``server_options={"http2": True}``."""
        client = await Http2.connect(self.port, self.host, **options)
        self._downstreams.append(client)
        return client

    async def request(self, method: str, target: str, headers: Pairs = (), body: bytes | None = None) -> Response:
        """Send one request on a connection of its own and return the response."""
        async with await Downstream.connect(self.port, self.host) as downstream:
            return await downstream.exchange(method, target, headers, body)

    async def get(self, target: str, headers: Pairs = ()) -> Response:
        return await self.request("GET", target, headers)

    async def ask(self, method: str, target: str = "/", headers: Pairs = (), body: bytes | None = None) -> Downstream:
        """Send one request on a new connection and return that connection."""
        downstream = await self.connect()
        await downstream.request(method, target, headers, body)
        return downstream

    # The end

    async def stop(self) -> None:
        """Hang up on the downstreams, let what they asked for end, stop the server."""
        for downstream in self._downstreams:
            downstream.close()
        self.server.stop()
        await within(self.server.close_all_connections(), "closing the proxy's downstream connections")


class ProxyFactory:
    """Starts proxies for one test: the ``proxy`` fixture.

    ::

        running = await proxy(upstream.url, prefix="/api", response_mode="buffer")
        running = await proxy.app([(r"/foo(/.*)?", ProxyHandler, {"upstream": upstream.url})])
    """

    def __init__(self, upstreams: Iterable[ScriptedUpstream]) -> None:
        self._upstreams = upstreams
        self._running: list[RunningProxy] = []
        self._before = asyncio.all_tasks()

    async def __call__(
        self,
        upstream: Any,
        handler_class: type[ProxyHandler] = ProxyHandler,
        prefix: str = "/",
        *,
        host: str = "127.0.0.1",
        app_settings: dict[str, Any] | None = None,
        server_options: dict[str, Any] | None = None,
        on_done: OnDone | None = None,
        **options: Any,
    ) -> RunningProxy:
        """Start a proxy of one mount. A `handler_class` that has an ``on_done`` of its own records nothing."""
        running = RunningProxy(host)
        if handler_class.on_done is ProxyHandler.on_done:
            options["on_done"] = running.record(on_done)
        rule = mount(prefix, upstream, handler_class, **options)
        return self._start(running, [rule], app_settings, server_options)

    async def app(
        self,
        rules: Sequence[Any] | Callable[[RunningProxy], Sequence[Any]],
        *,
        app_settings: dict[str, Any] | None = None,
        server_options: dict[str, Any] | None = None,
    ) -> RunningProxy:
        """Start an application of these rules, given at once or by a function of the proxy that will run them.

        The latter can give its mounts ``on_done=running.record()``.
        """
        running = RunningProxy()
        return self._start(running, rules(running) if callable(rules) else rules, app_settings, server_options)

    def _start(
        self,
        running: RunningProxy,
        rules: Sequence[Any],
        app_settings: dict[str, Any] | None,
        server_options: dict[str, Any] | None,
    ) -> RunningProxy:
        running.start(rules, app_settings or {}, server_options or {})
        self._running.append(running)
        return running

    async def stop(self) -> None:
        """Stop every proxy and fail if something of it is left."""
        for running in self._running:
            await running.stop()
        await self._check_tasks()
        await self._check_upstreams()
        await close_clients()

    async def _check_tasks(self) -> None:
        """Every task that the proxy started has ended."""
        left = {task for task in asyncio.all_tasks() - self._before - {asyncio.current_task()} if not of_the_test(task)}
        if left:
            _, left = await asyncio.wait(left, timeout=TIMEOUT)
        assert not left, f"the proxy left tasks behind: {left}"

    async def _check_upstreams(self) -> None:
        """No upstream connection is still in use: cut responses and unanswered requests have closed theirs."""
        for upstream in self._upstreams:
            for conn in upstream.busy:
                await conn.closed()


def of_the_test(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename.startswith(TESTS)
