"""Tornado's own handlers, unchanged, on this server."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from pathlib import Path

import pytest
import websockets
from tornado import web, websocket
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerRequest, ResponseStartLine
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets, bind_unix_socket
from tornado.routing import Matcher, Rule

from tests.server.handlers import Flushing, Upload

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Sync(web.RequestHandler):
    def get(self):
        self.write("hello")


class Echo(websocket.WebSocketHandler):
    def open(self):
        self.set_nodelay(True)

    async def on_message(self, message):
        await self.write_message(message, binary=isinstance(message, bytes))


class Detached(web.RequestHandler):
    """Speaks lines once it has the stream."""

    async def get(self):
        stream = self.detach()
        await stream.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n")
        try:
            while True:
                line = await stream.read_until(b"\n")
                await stream.write(line * 3)
                if line == b"big\n":
                    await stream.write(b"x" * 3_000_000)
        except StreamClosedError:
            self.settings["ended"].set()


class Checked(web.RequestHandler):
    def post(self):
        self.write(self.request.connection.request_trailers["X-Checksum"])


class Failing(web.RequestHandler):
    def get(self):
        raise ZeroDivisionError

    def post(self):
        self.set_header("X", "fine")
        self._headers["X"] = "not\r\nfine"


RULES = [
    (r"/", Sync),
    (r"/flushing", Flushing),
    (r"/upload", Upload),
    (r"/refuse", Upload),
    (r"/checked", Checked),
    (r"/ws", Echo),
    (r"/lines", Detached),
    (r"/failing", Failing),
]


def app(**settings):
    return web.Application(RULES, log_function=lambda handler: None, **settings)


class TestHandlers:
    async def test_a_plain_handler(self, serve):
        downstream = await (running := serve(app())).connect()
        for _ in range(3):
            response = await downstream.exchange("GET", "/")
            assert (response.status, response.body, response.header("Content-Length")) == (200, b"hello", "5")
        etag = response.header("Etag")
        unchanged = await downstream.exchange("GET", "/", [("If-None-Match", etag)])
        assert (unchanged.status, unchanged.body) == (304, b"")
        assert (await downstream.exchange("HEAD", "/")).status == 405
        assert (await downstream.exchange("GET", "/nowhere")).status == 404
        assert running.server._connections

    async def test_a_handler_that_flushes(self, serve):
        downstream = await serve(app()).connect()
        assert (await downstream.exchange("GET", "/flushing")).body == b"onetwo"
        assert (await downstream.exchange("POST", "/flushing", body=b"x" * 200_000)).body == b"x" * 200_000

    async def test_a_streamed_body(self, serve):
        downstream = await serve(app()).connect()
        assert (await downstream.exchange("POST", "/upload", body=b"x" * 1_000_000)).body == b"1000000"
        response = await downstream.exchange("POST", "/refuse", body=b"x" * 1_000_000)
        assert (response.status, response.body) == (413, b"no")
        assert (await downstream.exchange("POST", "/upload", body=b"x")).body == b"1"

    async def test_trailers_of_a_request(self, serve):
        """By themselves, where a handler looks for them (RFC 9110 section 6.5.1)."""
        downstream = await serve(app()).connect()
        await downstream.send(b"POST /checked HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await downstream.send(b"3\r\nabc\r\n0\r\nX-Checksum: 7\r\n\r\n")
        assert (await downstream.read_response()).body == b"7"

    async def test_ranges_of_a_file(self, serve, tmp_path: Path):
        (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
        downstream = await serve(app(static_path=str(tmp_path))).connect()
        whole = await downstream.exchange("GET", "/static/file")
        assert whole.body == bytes(range(256)) * 1000
        part = await downstream.exchange("GET", "/static/file", [("Range", "bytes=5-9")])
        assert (part.status, part.body) == (206, bytes([5, 6, 7, 8, 9]))
        head = await downstream.exchange("HEAD", "/static/file")
        assert (head.body, head.content_length) == (b"", 256_000)

    async def test_compression(self, serve):
        downstream = await serve(app(compress_response=True)).connect()
        response = await downstream.exchange("GET", "/flushing", [("Accept-Encoding", "gzip")])
        assert response.header("Content-Encoding") == "gzip"
        assert gzip.decompress(response.body) == b"onetwo"

    async def test_a_handler_that_fails(self, serve, expect_log):
        downstream = await serve(app()).connect()
        expect_log("ZeroDivisionError")
        assert (await downstream.exchange("GET", "/failing")).status == 500
        assert (await downstream.exchange("GET", "/")).status == 200

    async def test_a_head_that_cannot_be_sent_is_no_hang(self, serve, expect_log):
        expect_log("Illegal characters")
        expect_log("Cannot send error response after headers written")
        downstream = await serve(app()).connect()
        assert (await downstream.exchange("POST", "/failing", body=b"")).status == 500
        assert await downstream.closed() == "end"

    async def test_a_callback_takes_requests_as_with_tornado(self, serve):
        def callback(request):
            request.connection.write_headers(
                web.httputil.ResponseStartLine("", 200, "OK"), web.httputil.HTTPHeaders({"Content-Length": "1"}), b"x"
            )
            request.connection.finish()

        downstream = await serve(callback).connect()
        assert (await downstream.exchange("GET", "/")).body == b"x"

    async def test_a_unix_socket(self, serve, tmp_path: Path):
        running = serve(app())
        running.server.add_socket(bind_unix_socket(str(tmp_path / "socket")))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (await reader.read()).endswith(b"hello")
        writer.close()


class TestRequests:
    """What handlers see of a request, which is not made by Tornado's constructor here."""

    QUERY = b"/x?a=1&b=%2F+x&a=2&empty=&flag&%e9=%ff"

    @staticmethod
    def seen(request: HTTPServerRequest) -> dict[str, object]:
        names = ("method", "uri", "version", "path", "query", "body", "host", "host_name", "protocol", "remote_ip")
        names += ("arguments", "query_arguments", "body_arguments", "files")
        return {name: getattr(request, name) for name in names} | {"headers": list(request.headers.get_all())}

    async def test_they_see_what_tornado_shows(self, serve):
        requests = []

        class Keep(web.RequestHandler):
            def post(self):
                requests.append(self.seen(self.request))

            seen = staticmethod(TestRequests.seen)

        app = web.Application([(r".*", Keep)])
        tornados = HTTPServer(app)
        sockets = bind_sockets(0, "127.0.0.1", socket.AF_INET)
        tornados.add_sockets(sockets)
        running = serve(app)
        body = b"form=1&a=3"
        heads = [
            b"POST " + self.QUERY + b" HTTP/1.1\r\nHost: Example.COM:81\r\nX-A: 1\r\nX-A: 2\r\n",
            b"POST /plain HTTP/1.0\r\n",
        ]
        for head in heads:
            data = head + b"Connection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            data += b"Content-Length: %d\r\n\r\n" % len(body) + body
            assert b" 200 OK" in await running.talk(data)
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", sockets[0].getsockname()[1])
                writer.write(data)
                assert b" 200 OK" in await reader.read()
                writer.close()
            ours, theirs = requests[-2:]
            assert ours == theirs
        tornados.stop()
        await tornados.close_all_connections()

    async def test_arguments_are_parsed_when_a_handler_asks(self, serve, expect_log):
        class Asking(web.RequestHandler):
            def get(self):
                self.write(self.get_query_argument("a") if self.request.path == "/asks" else b"not asked")

        running = serve(web.Application([(r".*", Asking)], log_function=lambda handler: None))
        fields = b"a&" * 1000 + b"a"
        expect_log("invalid query: ")
        tail = b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        assert (await running.talk(b"GET /?" + fields + tail)).endswith(b"not asked")
        assert (await running.talk(b"GET /asks?" + fields + tail)).startswith(b"HTTP/1.1 400 ")
        assert (await running.talk(b"GET /asks?" + fields[2:] + tail)).startswith(b"HTTP/1.1 200 ")

    async def test_a_rule_may_be_the_first_to_ask(self, serve):
        class ByArgument(Matcher):
            def match(self, request):
                return {} if "a" in request.arguments else None

        running = serve([Rule(ByArgument(), Sync)])
        tail = b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert (await running.talk(b"GET /?a" + tail)).startswith(b"HTTP/1.1 200 ")
        assert (await running.talk(b"GET /?" + b"a&" * 1000 + b"a" + tail)).startswith(b"HTTP/1.1 400 ")

    async def test_hosts_are_told_apart(self, serve):
        app = web.Application([(r"/", Sync)])
        app.add_handlers(r"other\.example", [(r"/", Failing)])
        assert b" 200 " in await serve(app).talk(b"GET / HTTP/1.1\r\nHost: one.example\r\nConnection: close\r\n\r\n")

    async def test_a_start_request_of_ones_own_is_called(self, serve):
        class Refusing(web.Application):
            def start_request(self, server_conn, request_conn):
                return Refusal(request_conn)

        class Refusal(HTTPMessageDelegate):
            def __init__(self, connection):
                self.connection = connection

            def finish(self):
                headers = HTTPHeaders({"Content-Length": "0"})
                self.connection.write_headers(ResponseStartLine("", 418, "I'm a teapot"), headers)
                self.connection.finish()

        answer = await serve(Refusing([(r"/", Sync)])).talk(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 418 ")

    async def test_templates_are_read_anew_in_debug_mode(self, serve, tmp_path: Path):
        class Page(web.RequestHandler):
            def get(self):
                self.render("page.html")

        page = tmp_path / "page.html"
        page.write_text("one")
        app = web.Application([(r"/", Page)], template_path=str(tmp_path), compiled_template_cache=False)
        running = serve(app)
        assert (await running.talk(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).endswith(b"one")
        page.write_text("two")
        assert (await running.talk(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).endswith(b"two")


class TestTunnels:
    async def test_websockets(self, serve):
        running = serve(app())
        async with websockets.connect(f"ws://127.0.0.1:{running.port}/ws", max_size=None) as client:
            for message in ("one", b"two", "x" * 500_000):
                await client.send(message)
                assert await client.recv() == message
            assert not running.server._connections

    async def test_websockets_under_tls(self, serve, certificate, trusting):
        running = serve(app(), ssl_options={"certfile": certificate[0], "keyfile": certificate[1]})
        async with websockets.connect(f"wss://127.0.0.1:{running.port}/ws", max_size=None, ssl=trusting) as client:
            for message in ("one", b"two", "x" * 500_000):
                await client.send(message)
                assert await client.recv() == message

    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    async def test_a_detached_stream(self, serve, certificate, trusting, tls):
        ended = asyncio.Event()
        options = {"ssl_options": {"certfile": certificate[0], "keyfile": certificate[1]}} if tls else {}
        running = serve(app(ended=ended), **options)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting if tls else None)
        # The first line comes with the request, and must not be lost or taken for one.
        writer.write(b"GET /lines HTTP/1.1\r\nHost: a\r\n\r\nfirst\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(18) == b"first\n" * 3
        writer.write(b"big\n")
        assert await reader.readexactly(12) == b"big\n" * 3
        assert await reader.readexactly(3_000_000) == b"x" * 3_000_000
        writer.write(b"y" * 300_000 + b"\n")
        assert await reader.readexactly(900_003) == (b"y" * 300_000 + b"\n") * 3
        writer.close()
        await ended.wait()


class TestTLS:
    async def test_requests_and_alpn(self, serve, certificate, trusting):
        seen = []

        class Handler(web.RequestHandler):
            def get(self):
                seen.append((self.request.protocol, self.request.remote_ip, self.request.get_ssl_certificate()))
                self.write("x" * 2_000_000)

        running = serve([("/", Handler)], ssl_options={"certfile": certificate[0], "keyfile": certificate[1]})
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        writer.write(GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert len(await reader.read()) > 4_000_000
        assert seen == [("https", "127.0.0.1", None)] * 2
        writer.close()

    async def test_who_does_not_speak_it_is_closed(self, serve, certificate):
        running = serve(app(), ssl_options={"certfile": certificate[0], "keyfile": certificate[1]})
        downstream = await running.ask(GET)
        assert b"HTTP" not in await downstream.read_until_closed()
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", running.port, ssl=context)
