"""Starts our own server for an application of the test, and checks what it leaves behind."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerConnectionDelegate, ResponseStartLine
from tornado.netutil import bind_sockets
from tornado.web import Application

from tests.support.downstream import Downstream
from tests.support.http2 import Http2
from tests.support.wire import within
from tornado_proxy.server import HTTPServer


class Running:
    """A server on ``port``, and the clients that the test made."""

    def __init__(self, app: Any, options: dict[str, Any]) -> None:
        self.server = HTTPServer(app, **options)
        sockets = bind_sockets(0, "127.0.0.1", socket.AF_INET)
        self.server.add_sockets(sockets)
        self.port: int = sockets[0].getsockname()[1]
        self._downstreams: list[Downstream] = []

    async def connect(self, **options: Any) -> Downstream:
        downstream = await Downstream.connect(self.port, **options)
        self._downstreams.append(downstream)
        return downstream

    async def connect2(self, **options: Any) -> Http2:
        """Connect with HTTP/2, and prior knowledge of it."""
        client = await Http2.connect(self.port, **options)
        self._downstreams.append(client)
        return client

    async def ask(self, data: bytes) -> Downstream:
        """Connect and send exactly this."""
        downstream = await self.connect()
        await downstream.send(data)
        return downstream

    async def talk(self, data: bytes) -> bytes:
        """Send exactly this and return everything that comes until the server closes."""
        return await (await self.ask(data)).read_until_closed()

    async def stop(self) -> None:
        self.server.stop()
        for downstream in self._downstreams:
            downstream.close()
        await within(self.server.close_all_connections(), "the end of all connections")
        assert not self.server._connections
        assert self.server.running == 0


Serve = Callable[..., Running]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers: ``running = serve(rules_or_delegate, **options)``."""
    servers: list[Running] = []

    def start(app: Any, **options: Any) -> Running:
        if isinstance(app, list):
            app = Application(app, log_function=lambda handler: None)
        running = Running(app, options)
        servers.append(running)
        return running

    yield start
    for running in servers:
        await running.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The files of a certificate for localhost and its key."""
    folder: Path = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made = subprocess.run([*command, "-keyout", key, "-out", cert], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("openssl cannot make a certificate")
    return cert, key


@pytest.fixture
def trusting(certificate: tuple[str, str]) -> ssl.SSLContext:
    """The context of a client that trusts the certificate."""
    context = ssl.create_default_context(cafile=certificate[0])
    context.check_hostname = False
    context.set_alpn_protocols(["http/1.1"])
    return context


class Recorder(HTTPServerConnectionDelegate):
    """An application that notes what it is told, and lets the test answer.

    ``events`` has ``("head", method, target)``, ``("data", bytes)``, ``("finish",)`` and ``("close",)`` in their order.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.connections: list[Any] = []
        self.heads: list[Any] = []
        self._news = asyncio.Event()
        # Returned by headers_received and data_received, once each.
        self.head_futures: list[asyncio.Future[None]] = []
        self.data_futures: list[asyncio.Future[None]] = []
        # Called with the request_conn when all of the request is there, or when its head is.
        self.on_finish: Callable[[Any], None] | None = None
        self.on_head: Callable[[Any], None] | None = None

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        self.connections.append(request_conn)
        return _RecordingDelegate(self, request_conn)

    def note(self, *event: Any) -> None:
        self.events.append(event)
        self._news.set()

    @property
    def body(self) -> bytes:
        return b"".join(event[1] for event in self.events if event[0] == "data")

    async def until(self, condition: Callable[[], object], what: str) -> None:
        async def wait() -> None:
            while not condition():
                self._news.clear()
                await self._news.wait()

        await within(wait(), what)

    async def seen(self, *event: Any, count: int = 1) -> None:
        await self.until(lambda: self.events.count(event) >= count, f"{event} in {self.events!r:.300}")


class _RecordingDelegate(HTTPMessageDelegate):
    def __init__(self, recorder: Recorder, connection: Any) -> None:
        self.recorder = recorder
        self.connection = connection

    def headers_received(self, start_line: Any, headers: Any) -> Any:
        self.recorder.heads.append((start_line, headers))
        self.recorder.note("head", start_line.method, start_line.path)
        if self.recorder.on_head is not None:
            self.recorder.on_head(self.connection)
        return self.recorder.head_futures.pop(0) if self.recorder.head_futures else None

    def data_received(self, chunk: bytes) -> Any:
        self.recorder.note("data", chunk)
        return self.recorder.data_futures.pop(0) if self.recorder.data_futures else None

    def finish(self) -> None:
        self.recorder.note("finish")
        if self.recorder.on_finish is not None:
            self.recorder.on_finish(self.connection)

    def on_connection_close(self) -> None:
        self.recorder.note("close")


@pytest.fixture
async def recorder() -> Recorder:
    return Recorder()


OK = ResponseStartLine("", 200, "OK")


def respond(connection: Any, body: bytes = b"ok", status: int = 200, **fields: str) -> None:
    """Answer with a Content-Length."""
    headers = _headers(fields)
    headers["Content-Length"] = str(len(body))
    connection.write_headers(ResponseStartLine("", status, "OK"), headers, body)
    connection.finish()


def answer(recorder: Recorder, status: int = 200, chunks: Sequence[bytes] = (b"a", b"bc"), **fields: str) -> None:
    """Let each request be answered in these pieces, with no fields but these."""

    def send(connection: Any) -> None:
        connection.write_headers(ResponseStartLine("", status, "Why"), _headers(fields), chunks[0] if chunks else None)
        for chunk in chunks[1:]:
            connection.write(chunk)
        connection.finish()

    recorder.on_finish = send


def _headers(fields: dict[str, str]) -> HTTPHeaders:
    """Return what stands for names with hyphens, which no keyword has."""
    return HTTPHeaders({name.replace("_", "-"): value for name, value in fields.items()})
