"""Which protocol is spoken, on one port: RFC 9113 section 3."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from hpack import Encoder
from tornado import netutil, web

from tests.server.conftest import respond
from tests.support.http2 import END_HEADERS, END_STREAM, PREFACE, Type, frame, settings
from tests.support.wire import until
from tornado_proxy.server import HTTPServer

CHECKOUT = Path(__file__).resolve().parents[2]
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Protocol(web.RequestHandler):
    def get(self):
        self.write(f"{self.request.version} {self.request.protocol}")
        if self.request.protocol == "https":
            self.write(f" {self.request.get_ssl_certificate()}")


RULES = [("/", Protocol)]


class TestWithoutTLS:
    async def test_both_on_one_port(self, serve):
        running = serve(RULES, http2=True)
        downstream = await running.connect()
        client = await running.connect2()
        for _ in range(3):
            assert (await downstream.exchange("GET", "/")).body == b"HTTP/1.1 http"
        assert (await downstream.exchange("POST", "/", body=b"x")).status == 405
        assert (await client.exchange("GET", "/")).body == b"HTTP/2.0 http"

    @pytest.mark.parametrize("first", ["", "P", "PR", "PRI", "PRI ", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r"])
    async def test_it_waits_for_the_first_byte_that_differs(self, serve, recorder, first):
        """Nothing is lost of what came before."""
        running = serve(recorder, http2=True)
        downstream = await running.connect()
        await downstream.send(first.encode())
        await asyncio.sleep(0.01)
        await downstream.send(b"X / HTTP/1.1\r\nHost: a\r\n\r\n")
        head = (first + "X").split(" ")
        if len(head) == 1:
            await recorder.seen("head", head[0], "/")
        else:
            assert (await downstream.read_head()).status in (400, 505)

    async def test_it_may_come_before_more_than_is_received_at_a_time(self, serve, recorder):
        running = serve(recorder, http2=True)
        # So that as much is there at once.
        running.server.buffer = running.server.buffer[: len(running.server.buffer_ahead) + 10]
        downstream = await running.ask(b"P")
        await until(lambda: any(choice._received for choice in running.server._connections), "the first byte")
        recorder.on_finish = respond
        body = b"x" * 100_000
        await downstream.send(b"OST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert (await downstream.read_response()).status == 200
        assert recorder.body == body

    async def test_requests_that_came_with_it_are_not_lost(self, serve, recorder):
        recorder.on_finish = respond
        downstream = await serve(recorder, http2=True).ask(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx" + GET
        )
        for _ in range(2):
            assert (await downstream.read_response()).body == b"ok"

    async def test_nobody_speaks_it_where_it_is_not_wanted(self, serve, recorder):
        downstream = await serve(recorder).ask(PREFACE + settings())
        assert (await downstream.read_head()).status == 505

    async def test_upgrade_is_not_answered(self, serve, recorder):
        """h2c by Upgrade is gone with RFC 9113: the field is one like any other, which asks for nothing."""
        recorder.on_finish = respond
        running = serve(recorder, http2=True)
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
        downstream = await running.ask(GET[:-2] + upgrade)
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])

    async def test_a_unix_socket(self, serve, tmp_path: Path):
        running = serve(RULES, http2=True)
        running.server.add_socket(netutil.bind_unix_socket(str(tmp_path / "socket")))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(PREFACE + settings())
        assert (await reader.readexactly(9))[3] == Type.SETTINGS
        writer.close()


class TestUnderTLS:
    @pytest.mark.parametrize(
        ("offered", "http2", "chosen"),
        [
            (["h2", "http/1.1"], True, "h2"),
            (["http/1.1", "h2"], True, "h2"),
            (["h2"], True, "h2"),
            (["http/1.1"], True, "http/1.1"),
            ([], True, None),
            (["h2", "http/1.1"], False, "http/1.1"),
        ],
    )
    async def test_alpn_chooses(self, serve, certificate, trusting, offered, http2, chosen):
        options = {"certfile": certificate[0], "keyfile": certificate[1]}
        running = serve(RULES, http2=http2, ssl_options=options)
        trusting.set_alpn_protocols(offered)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen
        if chosen == "h2":
            head = Encoder().encode([(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "a")])
            writer.write(PREFACE + settings() + frame(Type.HEADERS, head, stream=1, flags=END_STREAM | END_HEADERS))
            assert (await reader.readuntil(b"HTTP/2.0 https None"))[3] == Type.SETTINGS
        else:
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()

    async def test_a_context_of_ones_own(self, serve, certificate, trusting):
        context = netutil.ssl_options_to_context(
            {"certfile": certificate[0], "keyfile": certificate[1]}, server_side=True
        )
        running = serve(RULES, http2=True, ssl_options=context)
        trusting.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.close()

    async def test_the_preface_does_not_overrule_it(self, serve, certificate, trusting):
        """Prior knowledge is for connections without TLS (RFC 9113 section 3.3)."""
        running = serve(RULES, http2=True, ssl_options={"certfile": certificate[0], "keyfile": certificate[1]})
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting)
        writer.write(PREFACE + settings())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 505 ")
        writer.close()


WITHOUT_H2 = """
import sys
sys.modules["h2"] = None
from tornado.web import Application
from tornado_proxy.server import HTTPServer
HTTPServer(Application())
assert not [name for name in sys.modules if name.startswith(("tornado_proxy.server.http2", "hpack", "hyperframe"))]
try:
    HTTPServer(Application(), http2=True)
except RuntimeError as error:
    print(error)
"""


class TestTheLibrary:
    def test_is_imported_when_it_is_wanted_only_and_missed_by_name(self):
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_H2], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
        assert run.stdout.startswith("http2=True needs h2: pip install 'tornado_proxy[http2]'"), run.stderr

    def test_the_server_may_be_made_before_its_loop(self, recorder):
        assert HTTPServer(recorder, http2=True).http2_limits.max_concurrent_streams == 100
