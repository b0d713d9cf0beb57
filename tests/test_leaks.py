"""Clients that leave anywhere, a thousand of them, leave nothing behind: FA-02, FA-27."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import re
import socket
import ssl
import struct
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerConnectionDelegate, ResponseStartLine
from tornado.iostream import IOStream, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application

from tests.support.downstream import Downstream
from tests.support.http2 import Http2, rst_stream
from tests.support.process import StandaloneProxy
from tests.support.upstream import Request, ScriptedUpstream, UpstreamConnection
from tests.support.wire import TIMEOUT, WireClosed, chunk, until
from tornado_proxy import ProxyHandler, draining, mount
from tornado_proxy.clients import DEFAULT_CLIENT, close_clients, shared_client
from tornado_proxy.server import HTTPServer as OwnServer

CLIENTS = 1000
AT_A_TIME = 50
CHUNKED = [("Transfer-Encoding", "chunked")]
PIECE = b"x" * 16_384
SHORT = PIECE * 16
# So few that some clients leave while their request waits for its turn.
CLIENT_OPTIONS = {"max_clients": 20}


async def answer(conn: UpstreamConnection, request: Request) -> None:
    """Answer as the target says."""
    match request.target:
        case "/hold":
            await conn.readable()  # until the proxy hangs up
        case "/events":
            await conn.send_head(200, [("Content-Type", "text/event-stream"), *CHUNKED])
            await conn.send_chunk(b"data: 1\n\n")
            await conn.readable()
        case "/endless":
            await conn.send_head(200, CHUNKED)
            while True:
                await conn.send_chunk(PIECE)
        case _:
            await conn.respond(200, body=SHORT)


# Where a client leaves: each sends something and returns when it is there.


async def before_the_head_is_sent(downstream: Downstream, chance: random.Random) -> None:
    head = b"GET /short HTTP/1.1\r\nHost: h\r\nX: y\r\n\r\n"
    await downstream.send(head[: chance.randrange(len(head))])


async def before_the_response(downstream: Downstream, chance: random.Random) -> None:
    await downstream.request("GET", "/hold")
    await some_turns(chance)


async def in_a_download(downstream: Downstream, chance: random.Random) -> None:
    await downstream.request("GET", chance.choice(["/endless", "/short"]))
    for _ in range(chance.randrange(6)):
        await downstream.read_some(chance.randrange(1, 65_536))


async def in_an_upload(downstream: Downstream, chance: random.Random) -> None:
    chunked = chance.random() < 0.5
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {10**9}"
    target = chance.choice(["/unread/x", "/x"])
    await downstream.send(f"POST {target} HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
    data = chunk(PIECE) if chunked else PIECE
    for _ in range(chance.randrange(8)):
        # Half a chunk, now and then.
        await downstream.send(data[: chance.choice([len(data), len(data), len(data) // 2])])
        await some_turns(chance)


async def between_two_events(downstream: Downstream, chance: random.Random) -> None:
    await downstream.request("GET", "/events")
    await downstream.read_head()
    assert await downstream.read_body(9) == b"data: 1\n\n"


async def some_turns(chance: random.Random) -> None:
    for _ in range(chance.randrange(10)):
        await asyncio.sleep(0)


Point = Callable[[Downstream, random.Random], Awaitable[None]]
POINTS: list[Point] = [
    before_the_head_is_sent,
    before_the_response,
    in_a_download,
    in_an_upload,
    between_two_events,
]


async def a_thousand_leave(port: int) -> Counter[str]:
    """Let `CLIENTS` come and leave, each somewhere; return how many got how far."""
    chance = random.Random(9)
    reached: Counter[str] = Counter()

    async def come_and_leave(number: int) -> None:
        point = POINTS[number % len(POINTS)]
        downstream = await Downstream.connect(port, receive_buffer=chance.choice([None, 4096]), timeout=30)
        with contextlib.suppress(ConnectionError, WireClosed):
            await point(downstream, chance)
            reached[point.__name__] += 1
        (downstream.reset if chance.random() < 0.5 else downstream.close)()

    for start in range(0, CLIENTS, AT_A_TIME):
        await asyncio.gather(*(come_and_leave(number) for number in range(start, start + AT_A_TIME)))
    return reached


@pytest.fixture
async def unread() -> AsyncIterator[ScriptedUpstream]:
    """An upstream that reads nothing, not even a head."""
    async with ScriptedUpstream() as scripted:
        yield scripted


class TestAThousandThatLeave:
    async def test_leave_no_descriptor_task_handle_or_upstream_connection(self, proxy, upstream, unread):
        upstream.timeout = 30
        upstream.serve(answer)
        running = await proxy.app(
            lambda running: [
                mount("/unread", unread.url, on_done=running.record(), client_options=CLIENT_OPTIONS),
                mount("/", upstream.url, on_done=running.record(), client_options=CLIENT_OPTIONS),
            ]
        )
        # What the first exchange sets up for good is no leak.
        assert (await running.get("/warm")).complete
        await running.next_outcome()
        tasks = asyncio.all_tasks()
        driver = shared_client(DEFAULT_CLIENT, CLIENT_OPTIONS)._driver

        def descriptors() -> int:
            # Both ends of each upstream connection are ours; one that is kept alive is no leak.
            ends = sum(conn.sock.fileno() >= 0 for conn in [*upstream.connections, *unread.connections])
            return len(list(Path("/proc/self/fd").iterdir())) - 2 * ends

        def new_tasks() -> list[asyncio.Task[object]]:
            # One of ours waits on each upstream connection that is kept alive.
            return [task for task in asyncio.all_tasks() - tasks if "_serve" not in repr(task.get_coro())]

        before = descriptors()
        reached = await a_thousand_leave(running.port)
        assert min(reached[point.__name__] for point in POINTS) > CLIENTS // len(POINTS) // 2, reached
        await until(lambda: draining.active_exchanges() == 0, "every exchange ended")
        assert (len(driver._active), len(driver._queue)) == (0, 0)
        await until(lambda: not upstream.busy, "no upstream connection stayed in the middle of an exchange")
        for conn in unread.connections:
            await conn.closed()
            conn.close()
        await until(lambda: descriptors() <= before, "every descriptor came back")
        await until(lambda: not new_tasks(), "every task ended")
        # Each exchange that began has ended once; those of whom no whole head came never began.
        assert CLIENTS // 2 < len(running.outcomes) <= CLIENTS
        assert (await running.get("/after")).body == SHORT

    async def test_leave_the_standalone_proxy_as_it_was(self, unread):
        async with ScriptedUpstream(timeout=30) as upstream:
            upstream.serve(answer)
            starting = StandaloneProxy(
                "--to",
                upstream.url,
                "--mount",
                f"/unread={unread.url}",
                "--client-options",
                "max_clients=20",
                # On a busy machine the slots that stalled uploads hold are given back late.
                "--connect-timeout",
                "30",
            )
            proxy = await asyncio.to_thread(starting.__enter__)
            try:
                async with await Downstream.connect(proxy.port) as downstream:
                    assert (await downstream.exchange("GET", "/warm")).complete
                    before = proxy.fds() - self.kept(upstream) - 1
                await a_thousand_leave(proxy.port)
                for conn in unread.connections:
                    await conn.closed()
                await until(lambda: not upstream.busy, "no upstream connection stayed in the middle of an exchange")
                await until(lambda: proxy.fds() - self.kept(upstream) <= before, "every descriptor came back")
                async with await Downstream.connect(proxy.port) as downstream:
                    assert (await downstream.exchange("GET", "/after")).body == SHORT
                assert "Traceback" not in proxy.output, proxy.output
            finally:
                await asyncio.to_thread(proxy.stop)

    def kept(self, upstream: ScriptedUpstream) -> int:
        return sum(conn.sock.fileno() >= 0 for conn in upstream.connections)


class TestStreamsThatAreCut:
    async def test_a_thousand_of_them_leave_nothing(self, proxy, upstream, unread):
        """Of HTTP/2, wherever their exchange is; the connections go on, and have a response to the last request."""
        upstream.serve(answer)
        running = await proxy.app(
            lambda running: [
                mount("/unread", unread.url, on_done=running.record(), client_options=CLIENT_OPTIONS),
                mount("/", upstream.url, on_done=running.record(), client_options=CLIENT_OPTIONS),
            ],
            server_options={"http2": True, "max_resets": 1000},
        )
        assert (await running.get("/warm")).complete
        await running.next_outcome()
        tasks = asyncio.all_tasks()
        driver = shared_client(DEFAULT_CLIENT, CLIENT_OPTIONS)._driver
        clients = [await running.connect2(own={4: 100_000}) for _ in range(10)]
        for client in clients:
            await client.ready()
        await asyncio.gather(*(a_hundred_are_cut(client, number) for number, client in enumerate(clients)))
        await until(lambda: draining.active_exchanges() == 0, "every exchange ended")
        assert (len(driver._active), len(driver._queue)) == (0, 0)
        await until(lambda: not upstream.busy, "no upstream connection stayed in the middle of an exchange")
        for conn in unread.connections:
            await conn.closed()
            conn.close()
        await until(
            lambda: not [task for task in asyncio.all_tasks() - tasks if "_serve" not in repr(task.get_coro())],
            "every task ended",
        )
        assert len(running.outcomes) == CLIENTS + 1
        for client in clients:
            assert (await client.exchange("GET", "/after")).body == SHORT
        assert not any(connection.streams for connection in running.server._connections)


async def a_hundred_are_cut(client: Http2, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(CLIENTS // 10):
        target = chance.choice(["/hold", "/events", "/endless", "/short", "/unread/x"])
        body = chance.choice([None, None, b"x" * chance.randrange(20_000)])
        stream = await client.request("POST" if body else "GET", target, body=body, end=chance.random() < 0.5)
        for _ in range(chance.randrange(4)):
            # What has come by now: perhaps nothing.
            await client.ping()
        await client.send(rst_stream(stream))


OURS = ("tornado_proxy", "tornado.")
# What holds much besides.
HOLDERS = {
    "frame",
    "traceback",
    "BadRequest",
    "HTTP1Connection",
    "HTTPHeaders",
    "DirectDownstream",
    "ProxyHandler",
    "Sub",
    "UpstreamRequest",
}


async def left_to_the_collector(do: Callable[[], Awaitable[None]]) -> Counter[type]:
    """Return what ``do`` leaves that only the garbage collector can free, by its class."""
    gc.collect()
    gc.disable()
    try:
        await do()
        await asyncio.sleep(0)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return Counter(map(type, gc.garbage))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def holders(left: Counter[type]) -> dict[type, int]:
    """Return those of which more is there than the last exchange may still need."""
    return {kind: count for kind, count in left.items() if count > 2 and kind.__name__ in HOLDERS}


SAID = {
    "1.1": b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    # With the client's SETTINGS.
    "2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]),
    "detached": b"GET /detached HTTP/1.1\r\nHost: h\r\n\r\n",
}


class Answering(HTTPServerConnectionDelegate):
    """Answers, or takes the connection of who asks for that and reads it to its end. No handler, which has circles."""

    def __init__(self) -> None:
        self.reading: set[asyncio.Task[None]] = set()

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        return Answer(self, request_conn)


class Answer(HTTPMessageDelegate):
    def __init__(self, app: Answering, connection: Any) -> None:
        self.app = app
        self.connection = connection

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        self.detaches = start_line.path == "/detached"

    def finish(self) -> None:
        if not self.detaches:
            self.connection.write_headers(ResponseStartLine("", 200, "OK"), HTTPHeaders({"Content-Length": "1"}), b"x")
            self.connection.finish()
            return
        task = asyncio.ensure_future(read_to_the_end(self.connection.detach()))
        self.app.reading.add(task)
        task.add_done_callback(self.app.reading.discard)


async def read_to_the_end(stream: IOStream) -> None:
    with contextlib.suppress(StreamClosedError):
        await stream.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await stream.read_until_close()


class Sub(ProxyHandler):
    """Served by a handler of its own."""


# How the exchange ends of an upload: once it is there and the downstream goes, or before it is.
UPLOADS_END = ["waits", "leaves", "resets", "breaks off", "malformed", "answered", "failed"]


def connections(running: Any) -> int:
    """Return how many connections the server has."""
    return len(running.server._connections)


class TestAnExchangeThatEnded:
    @pytest.mark.parametrize("client", [Downstream, Http2], ids=["1.1", "2"])
    async def test_leaves_nothing_to_the_garbage_collector(self, proxy, upstream, client):
        """What refers to itself in a circle is freed late, and looking for it takes a fifth of a small exchange."""
        upstream.serve(answer)
        running = await proxy(upstream.url, server_options={"http2": True} if client is Http2 else {})
        async with await client.connect(running.port) as downstream:
            assert (await downstream.exchange("GET", "/warm")).complete

            async def exchanges() -> None:
                for _ in range(20):
                    assert (await downstream.exchange("GET", "/warm")).complete
                    assert (await downstream.exchange("POST", "/warm", body=b"x" * 1000)).complete
                    await running.next_outcome()

            left = await left_to_the_collector(exchanges)
        # The last one may not have been let go of yet.
        ours = {kind: count for kind, count in left.items() if kind.__module__.startswith(OURS)}
        assert all(count <= 2 for count in ours.values()), ours

    @pytest.mark.parametrize(
        "head",
        [
            b"GET / HTTP/1.2\r\nHost: h\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nX-Padding: " + b"x" * 70_000 + b"\r\n",
            b"NONE / HTTP/1.1\r\nHost: h\r\n",
            b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n",
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 20\r\n",
            b"GET / HTTP/1.1\r\nHost: h\r\nVia: " + b"1.1 tornado_proxy, " * 9 + b"\r\n",
        ],
        ids=["version", "coding", "size", "method", "CONNECT", "body", "loop"],
    )
    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_by_being_refused_leaves_nothing_either(
        self, proxy, echo, monkeypatch, expect_log, handler_class, head
    ):
        """Whoever floods us with what is refused chooses how large what is left is."""
        monkeypatch.setattr("tests.support.proxy.SERVER", "own")
        expect_log("came through tornado_proxy", required=False)
        running = await proxy.app([mount("/", echo.url, handler_class, max_body_size=10)])

        async def refused() -> None:
            async with await Downstream.connect(running.port) as downstream:
                await downstream.send(head + b"Connection: close\r\n\r\n")
                assert re.match(rb"HTTP/1.1 (4|5)", await downstream.read_until_closed())

        async def several() -> None:
            for _ in range(10):
                await refused()

        await refused()
        left = await left_to_the_collector(several)
        assert not holders(left), left

    @pytest.mark.parametrize("end", UPLOADS_END)
    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_before_its_upload_leaves_nothing(self, proxy, upstream, expect_log, handler_class, end):
        """Its connection holds what it has read ahead."""
        expect_log(f"upstream {upstream.url}: |499 POST|Malformed HTTP message", required=False)
        running = await proxy.app([mount("/", upstream.url, handler_class, retries=0)])

        async def upload() -> None:
            chunked = end in ("malformed", "breaks off")
            length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {2 if end == 'waits' else 1000}"
            async with await Downstream.connect(running.port) as downstream:
                await downstream.send(f"POST / HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
                await downstream.send(chunk(b"ab") if chunked else b"ab")
                conn = await upstream.accept()
                await conn.read_head()
                match end:
                    case "waits":
                        await conn.read_body()
                        downstream.close()
                    case "leaves":
                        downstream.close()
                    case "resets":
                        downstream.reset()
                    case "breaks off":
                        # Where the server waits for the next chunk.
                        assert await conn.read_some(100)
                        downstream.close()
                    case "malformed":
                        await downstream.send(b"no chunk\r\n")
                        await downstream.read_until_closed()
                    case "answered":
                        await conn.respond(413, [("Connection", "close")])
                        assert (await downstream.read_response()).status == 413
                    case "failed":
                        conn.close()
                        assert (await downstream.read_response()).status == 502
                downstream.close()
                if end != "failed":
                    await conn.closed()
                    conn.close()
                await until(lambda: not draining.active_exchanges(), "the exchange ended")
                await until(lambda: not connections(running), "the connection ended")

        async def several() -> None:
            for _ in range(10):
                await upload()

        await upload()
        left = await left_to_the_collector(several)
        assert not holders(left), left

    async def test_at_a_second_attempt_leaves_nothing_of_the_first(self, proxy, upstream, monkeypatch):
        monkeypatch.setattr("tests.support.proxy.SERVER", "own")

        async def leave_after(conn: UpstreamConnection, request: Request) -> None:
            await conn.respond(200)
            # What was kept is dead when it is used again.
            conn.close()

        upstream.serve(leave_after)
        running = await proxy.app([mount("/", upstream.url)])
        async with await Downstream.connect(running.port) as downstream:
            assert (await downstream.exchange("GET", "/")).complete

            async def several() -> None:
                for _ in range(10):
                    assert (await downstream.exchange("GET", "/")).complete

            left = await left_to_the_collector(several)
        assert not holders(left), left

    @pytest.mark.parametrize("said", SAID.values(), ids=SAID)
    @pytest.mark.parametrize("end", ["close", "reset"])
    async def test_over_tls_leaves_nothing_of_its_connection(self, certificates, said, end):
        """asyncio has 256 KiB for each, which a thousand clients that come and go would make 300 MB."""
        app = Answering()
        options = {"certfile": certificates.chain, "keyfile": certificates.key}
        front = OwnServer(app, http2=True, ssl_options=options)
        (sock,) = bind_sockets(0, "127.0.0.1")
        front.add_sockets([sock])
        # Not of asyncio's: what that leaves of a client is not ours.
        context = ssl.create_default_context(cafile=certificates.root)
        context.set_alpn_protocols(["h2", "http/1.1"] if said.startswith(b"PRI") else ["http/1.1"])

        def come_and_go() -> None:
            with (
                socket.create_connection(sock.getsockname(), timeout=TIMEOUT) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
            ):
                client.sendall(said)
                assert client.recv(1000)
                if end == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        async def several() -> None:
            for _ in range(10):
                await asyncio.to_thread(come_and_go)
            await until(lambda: not front._connections, "the connections are closed")
            await until(lambda: not app.reading, "the streams are closed")

        left = await left_to_the_collector(several)
        front.stop()
        assert left[SSLProtocol] <= 2, left

    @pytest.mark.parametrize("server", ["own", "tornado"])
    @pytest.mark.parametrize("who", ["downstream", "upstream before its head", "upstream in its body"])
    async def test_early_leaves_no_more(self, upstream, expect_log, server, who):
        """Where many end early, what each still held would else be held until the collector comes."""

        async def end_early(conn: UpstreamConnection, request: Request) -> None:
            if who == "downstream":
                await answer(conn, request)
            if who == "upstream in its body":
                await conn.send_head(200, CHUNKED)
                await conn.send_chunk(PIECE)
            conn.close()

        if who != "downstream":
            expect_log(f"upstream {upstream.url}: ")
        upstream.serve(end_early)
        app = Application([mount("/", upstream.url, retries=0)], log_function=lambda handler: None)
        front = OwnServer(app) if server == "own" else HTTPServer(app)
        (sock,) = bind_sockets(0, "127.0.0.1")
        front.add_sockets([sock])

        async def come_and_leave() -> None:
            async with await Downstream.connect(sock.getsockname()[1], receive_buffer=4096) as downstream:
                await downstream.request("GET", "/endless")
                await downstream.read_head()
                if who == "downstream":
                    (exchange,) = draining._exchanges
                    await until(exchange.downstream.unsent, "the download stalled")
                    downstream.reset()
                elif who == "upstream in its body":
                    await downstream.read_until_closed()
            await until(lambda: not draining.active_exchanges(), "the exchange ended")
            await asyncio.sleep(0)

        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await come_and_leave()
            left = Counter(type(each).__name__ for each in gc.get_objects())
        finally:
            gc.enable()
            front.stop()
            await front.close_all_connections()
            await close_clients()
        assert all(left[name] <= 2 for name in ("Exchange", "BodyPipe", "ProxyHandler")), left
