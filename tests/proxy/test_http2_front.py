"""HTTP/2 in front, HTTP/1.1 behind: what becomes of each exchange."""

from __future__ import annotations

import asyncio
import json
from time import monotonic

import pytest

from tests.support.http2 import END_STREAM, Code, Type, frame, request_fields, rst_stream
from tests.support.memory import bytes_held
from tests.support.process import StandaloneProxy
from tests.support.wire import LAST_CHUNK, chunk, until, within
from tornado_proxy.draining import active_exchanges

HTTP2 = {"http2": True}
CHUNKED = [("Transfer-Encoding", "chunked")]


@pytest.fixture
async def fronted(proxy):
    """Start a proxy that speaks HTTP/2 and return it with a client."""

    async def start(upstream, *, server=(), own=None, **options):
        running = await proxy(upstream, server_options={**HTTP2, **dict(server)}, **options)
        return running, await running.connect2(own=own)

    return start


class TestRequests:
    async def test_the_head_byte_for_byte(self, fronted, upstream):
        running, client = await fronted(upstream.url)
        await client.request(
            "GET", "/a%2Fb/../c?x=1&&y", [("accept", "*/*"), ("x-a", "1"), ("x-a", ""), ("te", "trailers")]
        )
        conn = await upstream.accept()
        head = await conn.read_head()
        assert head.raw.decode().split("\r\n") == [
            "GET /a%2Fb/../c?x=1&&y HTTP/1.1",
            f"Host: 127.0.0.1:{upstream.port}",
            "Accept: */*",
            "X-A: 1",
            "X-A:",
            "X-Forwarded-For: 127.0.0.1",
            "X-Forwarded-Proto: http",
            "X-Forwarded-Host: a",
            "X-Forwarded-Port: 80",
            "Via: 2.0 tornado_proxy",
            "",
            "",
        ]
        await conn.respond(200)
        assert (await client.response(1)).status == 200
        assert (await running.next_outcome()).error is None

    async def test_the_authority_is_the_host(self, fronted, upstream):
        _, client = await fronted(upstream.url, preserve_host_header=True)
        await client.send(client.head(request_fields(authority="example.com:8443")))
        conn, request = await upstream.request()
        assert request.header("Host") == "example.com:8443"
        assert request.header("X-Forwarded-Port") == "8443"
        await conn.respond(200)
        await client.response(1)

    async def test_crumbs_arrive_as_one_cookie(self, fronted, echo):
        _, client = await fronted(echo.url)
        await client.exchange("GET", "/", [("cookie", "a=1"), ("cookie", "b=2")])
        assert echo.requests[-1].all("Cookie") == ["a=1; b=2"]

    @pytest.mark.parametrize(
        ("fields", "body", "framing"),
        [
            ([], None, (None, False)),
            ([("content-length", "5")], b"hello", (5, False)),
            ([("content-length", "0")], None, (0, False)),
            ([], b"hello", (None, True)),
            ([], b"", (None, True)),
        ],
    )
    async def test_the_framing_is_our_verdict(self, fronted, echo, fields, body, framing):
        """A body without a length becomes chunked, whatever its method; nothing is no body at all."""
        _, client = await fronted(echo.url)
        for method in ("POST", "GET"):
            response = await client.exchange(method, "/x", fields, body)
            assert response.status == 200
            request = echo.requests[-1]
            assert (request.content_length, request.chunked, request.body or b"") == (*framing, body or b"")

    async def test_in_a_handler_that_has_read_the_body(self, fronted, echo, proxy):
        """The body is there before the handler is asked; its length is then known."""
        from tornado.web import RequestHandler

        from tornado_proxy import ProxyMixin

        class Handler(ProxyMixin, RequestHandler):
            async def post(self):
                await self.proxy(echo.url)

        running = await proxy.app([("/.*", Handler)], server_options=HTTP2)
        client = await running.connect2()
        assert (await client.exchange("POST", "/x", body=b"hello")).status == 200
        request = echo.requests[-1]
        assert (request.content_length, request.body) == (5, b"hello")

    @pytest.mark.parametrize(
        "fields",
        [
            [("transfer-encoding", "chunked")],
            [("content-length", "3"), ("content-length", "4")],
            [("x", "a\r\nX-Smuggled: 1")],
            [("x\r\nx-smuggled", "1")],
            [("connection", "x-forwarded-for")],
        ],
    )
    async def test_what_would_be_another_message_never_leaves(self, fronted, upstream, fields):
        running, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", fields, b"abc")
        assert (await client.response(stream)).reset == Code.PROTOCOL
        assert upstream.accepted == 0
        assert running.outcomes == []

    async def test_a_body_that_is_too_short_is_never_complete_upstream(self, fronted, upstream):
        running, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", [("content-length", "5")], b"abc", end=False)
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"abc"
        await client.data(stream, b"", end=True)
        assert (await client.response(stream)).reset == Code.PROTOCOL
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"

    async def test_more_than_was_said_does_not_reach_it(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", [("content-length", "3")], end=False)
        conn = await upstream.accept()
        await conn.read_head()
        await client.data(stream, b"abcGET /smuggled HTTP/1.1\r\n\r\n", end=True)
        assert (await client.response(stream)).reset == Code.PROTOCOL
        assert await conn.read_until_closed() == b""

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "//", 200), ("OPTIONS", "*", 200), ("BREW", "/", 501), ("TRACE", "/", 200)],
    )
    async def test_methods_and_targets(self, fronted, echo, method, path, status):
        _, client = await fronted(echo.url)
        assert (await client.exchange(method, path)).status == status

    async def test_websocket_is_not_offered(self, fronted, upstream):
        """SETTINGS_ENABLE_CONNECT_PROTOCOL is 0 (RFC 8441 section 3)."""
        _, client = await fronted(upstream.url)
        fields = [(":method", "CONNECT"), (":protocol", "websocket"), *request_fields()[1:]]
        await client.send(client.head(fields))
        assert (await client.response(1)).reset == Code.PROTOCOL
        assert upstream.accepted == 0


class TestResponses:
    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_a_body(self, fronted, upstream, mode, framing):
        _, client = await fronted(upstream.url, response_mode=mode)
        stream = await client.request("GET", "/x")
        conn, _ = await upstream.request()
        head = [
            ("X-A", "1"),
            ("X-A", "2"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Connection", "x-hop"),
            ("X-Hop", "1"),
        ]
        if framing == "length":
            await conn.respond(203, [*head, ("Keep-Alive", "timeout=5")], b"hello")
        else:
            await conn.send_head(203, [*head, *CHUNKED])
            await conn.send(chunk(b"hel") + chunk(b"lo") + LAST_CHUNK)
        response = await client.response(stream)
        assert (response.status, response.body, response.complete) == (203, b"hello", True)
        names = sorted(name for name, _ in response.headers if name not in ("date", "via"))
        length = ["content-length"] if framing == "length" or mode == "buffer" else []
        assert names == [*length, "set-cookie", "set-cookie", "x-a", "x-a"]

    async def test_each_chunk_passes_at_once(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        assert (await client.response_head(stream)).status == 200
        for number in range(1, 20):
            await conn.send_chunk(b"x")
            assert len(await client.body(stream, number)) == number
        await conn.send_chunk(b"")
        assert (await client.response(stream)).complete

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
    async def test_no_content_is_no_frame(self, fronted, upstream, method, status):
        _, client = await fronted(upstream.url)
        stream = await client.request(method, "/x")
        conn, _ = await upstream.request()
        length = [] if status == 204 else [("Content-Length", "5")]
        await conn.respond(status, [("ETag", '"x"'), *length])
        response = await client.response(stream)
        assert (response.status, response.header("etag"), response.body) == (status, '"x"', b"")
        assert [seen.type for seen in client.frames if seen.stream == stream] == [Type.HEADERS]

    async def test_error_pages(self, fronted, upstream, expect_log):
        expect_log("WARNING tornado_proxy.forwarder: GET /x: upstream")
        upstream.refuse()
        running, client = await fronted(upstream.url)
        response = await client.exchange("GET", "/x")
        assert (response.status, response.complete) == (502, True)
        assert (await running.next_outcome()).status == 502


class TestInterimResponses:
    async def test_interim_responses(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        while not (client.responses.get(stream) and client.responses[stream].interim):
            await client.read_frame()
        await conn.respond(200, body=b"ok")
        response = await client.response(stream)
        assert response.interim == [(103, [("link", "</x>")])]
        assert response.body == b"ok"


class TestExpectations:
    async def test_the_upstream_is_asked_for_the_body(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", [("expect", "100-continue"), ("content-length", "5")], end=False)
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Expect") == "100-continue"
        await client.ping()
        assert stream not in client.responses
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not client.responses.get(stream):
            await client.read_frame()
        assert client.responses[stream].interim == [(100, [])]
        await client.data(stream, b"hello", end=True)
        assert await conn.read_body() == b"hello"
        await conn.respond(200)
        assert (await client.response(stream)).status == 200

    async def test_a_refusal_in_its_place(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", [("expect", "100-continue"), ("content-length", "5")], end=False)
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(417)
        response = await client.response(stream)
        assert (response.status, response.interim) == (417, [])
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR


class TestTrailersOverHTTP2:
    @pytest.mark.parametrize("body", [b"", b"message"])
    async def test_trailers(self, fronted, upstream, body):
        """What gRPC says at the end; nobody need have asked for it in HTTP/2."""
        _, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", body=b"ask")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        if body:
            await conn.send_chunk(body)
        await conn.send(b"0\r\nGrpc-Status: 0\r\nGrpc-Message: fine\r\n\r\n")
        response = await client.response(stream)
        assert (response.body, response.trailers) == (body, [("grpc-status", "0"), ("grpc-message", "fine")])


class TestTheEndOfOneSide:
    @pytest.mark.parametrize("when", ["before the head", "in the body"])
    async def test_a_stream_that_is_cut_takes_the_upstream_with_it(self, fronted, upstream, when):
        running, client = await fronted(upstream.url)
        stream = await client.request("GET", "/x")
        other = await client.request("GET", "/other")
        conn, _ = await upstream.request()
        neighbour, _ = await upstream.request()
        if when == "in the body":
            await conn.send_head(200, CHUNKED)
            await conn.send_chunk(b"x")
            await client.body(stream, 1)
        await client.send(rst_stream(stream))
        await within(conn.closed(), "the end of the upstream connection", 1.0)
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.status) == ("downstream", 200 if when == "in the body" else 499)
        await neighbour.respond(200, body=b"ok")
        assert (await client.response(other)).body == b"ok"

    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_one_that_is_cut_with_its_head_asks_nobody(self, fronted, upstream, method):
        """Rapid reset: the handler has not begun, and nobody could have told it."""
        running, client = await fronted(upstream.url)
        sent = b""
        for _ in range(20):
            stream = client._next_stream
            sent += client.head(request_fields(method), end=method == "GET") + rst_stream(stream)
        await client.send(sent)
        for _ in range(20):
            assert (await running.next_outcome()).status == 499
        assert upstream.accepted == 0

    async def test_so_does_an_upload_that_is_cut(self, fronted, upstream):
        running, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", body=b"abc", end=False)
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"abc"
        await client.send(rst_stream(stream))
        assert LAST_CHUNK not in await within(conn.read_until_closed(), "the end of the upstream connection", 1.0)
        assert (await running.next_outcome()).side == "downstream"

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_a_response_that_is_cut_is_never_complete(self, fronted, upstream, expect_log, framing):
        expect_log("WARNING tornado_proxy.forwarder: GET /x: upstream")
        running, client = await fronted(upstream.url)
        stream = await client.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED if framing == "chunked" else [("Content-Length", "100")])
        await conn.send(chunk(b"begun") if framing == "chunked" else b"begun")
        await client.body(stream, 5)
        conn.close()
        response = await client.response(stream)
        assert (response.body, response.complete, response.reset) == (b"begun", False, Code.INTERNAL)
        assert (await running.next_outcome()).side == "upstream"


class TestEarlyAnswer:
    async def test_an_early_answer_ends_the_upload(self, fronted, upstream):
        running, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", [("content-length", "1000000")], b"x" * 1000, end=False)
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(403, [("Connection", "close")], body=b"no")
        response = await client.response(stream)
        assert (response.status, response.body, response.complete) == (403, b"no", True)
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        await client.data(stream, b"x" * 100_000)
        await running.next_outcome()
        await conn.closed()
        await client.ping()


class TestFullDuplex:
    async def test_bytes_flow_both_ways(self, fronted, upstream):
        _, client = await fronted(upstream.url)
        stream = await client.request("POST", "/x", end=False)
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send_head(200, CHUNKED)
        for number in range(1, 10):
            await client.data(stream, b"%d" % number)
            assert await conn.read_body(1) == b"%d" % number
            await conn.send_chunk(b"%d" % number)
            assert len(await client.body(stream, number)) == number
        await client.data(stream, end=True)
        await conn.read_body()
        await conn.send_chunk(b"")
        assert (await client.response(stream)).body == b"123456789"


class TestBackPressure:
    async def test_a_stalled_stream_stalls_its_upstream_and_nobody_else(self, fronted, upstream):
        running, client = await fronted(upstream.url, own={4: 1000})
        client.keep_windows = True
        stalled = await client.request("GET", "/large")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        conn.timeout = 60
        sent: list[float] = []
        sending = asyncio.ensure_future(flood(conn, sent))
        await client.body(stalled, 1000)
        await until(lambda: monotonic() - sent[-1] > 0.2, "a stalled upstream")
        assert held(running) < 1_500_000
        for _ in range(5):
            stream = await client.request("GET", "/small")
            other, _ = await upstream.request()
            await other.respond(200, [("Connection", "close")], body=b"ok")
            other.close()
            assert (await client.response(stream)).body == b"ok"
        assert not sending.done()
        await client.send(rst_stream(stalled))
        await within(conn.closed(), "the end of the upstream connection", 1.0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert (await running.next_outcome()).status == 200

    async def test_a_stalled_upload_holds_its_client_back_and_nobody_else(self, fronted, upstream):
        running, client = await fronted(upstream.url, server={"initial_window_size": 65_536})
        stream = await client.request("POST", "/stalled", end=False)
        conn = await upstream.accept()
        await conn.read_head()
        sent = 0
        # The window opens while the upstream's kernel and the proxy's pipe have room.
        while True:
            granted = 65_536 + sum(
                int.from_bytes(seen.payload, "big")
                for seen in client.frames
                if (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream)
            )
            if sent + 16_384 <= granted:
                await client.data(stream, b"x" * 16_384)
                sent += 16_384
            try:
                async with asyncio.timeout(0.2):
                    await client.ping()
                    if sent + 16_384 > granted:
                        await client.read_until(lambda seen: seen.type == Type.WINDOW_UPDATE and seen.stream == stream)
            except TimeoutError:
                break
        assert held(running) < 1_500_000
        other = await client.request("GET", "/other")
        neighbour, _ = await upstream.request()
        await neighbour.respond(200, body=b"ok")
        assert (await client.response(other)).body == b"ok"
        # And when it is taken, all of it arrives.
        arriving = asyncio.ensure_future(conn.read_body())
        await client.data(stream, end=True)
        assert len(await arriving) == sent
        await conn.respond(200)
        assert (await client.response(stream)).status == 200
        await running.next_outcome()

    @pytest.mark.parametrize("window", [0, 1])
    async def test_a_window_that_does_not_open_is_a_write_that_does_not_get_through(self, fronted, upstream, window):
        running, client = await fronted(upstream.url, own={4: window}, write_timeout=0.3)
        client.keep_windows = True
        stream = await client.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"x" * 100)
        # Others are served meanwhile, which is no progress of this one.
        response = await client.response(stream)
        assert (response.body, response.reset) == (b"x" * window, Code.INTERNAL)
        outcome = await running.next_outcome()
        assert (outcome.side, str(outcome.error)) == ("downstream", "downstream took no byte for 0.3 s")


async def flood(conn, sent):
    while True:
        sent.append(monotonic())
        await conn.send_chunk(b"x" * 65_536)


def held(running):
    """Return how many bytes of bodies are held, those for streams that are stalled included."""
    streams = [stream for connection in running.server._connections for stream in connection.streams.values()]
    return bytes_held() + sum(stream.outbox.size + len(stream._pending) for stream in streams)


class TestManyAtOnce:
    async def test_a_hundred_and_nothing_is_mixed_up(self, fronted, echo):
        _, client = await fronted(echo.url)
        await client.ready()
        sent = b""
        for number in range(100):
            fields = request_fields("POST", f"/{number}", [("x-token", str(number))])
            stream = client._next_stream
            sent += client.head(fields, end=False)
            sent += frame(Type.DATA, b"body %d" % number, stream=stream, flags=END_STREAM)
        await client.send(sent)
        for number in range(100):
            response = await client.response(2 * number + 1)
            assert response.status == 200
            seen = json.loads(response.body)
            assert str(number) in json.dumps(seen)
        assert active_exchanges() == 0


class TestStandalone:
    def test_a_library_that_is_missing_is_named(self, tmp_path):
        import subprocess
        import sys

        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['h2'] = None\n")
        run = subprocess.run(
            [sys.executable, "-m", "tornado_proxy", "--to", "http://127.0.0.1:1", "--http2"],
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert run.returncode == 2
        assert "--http2 needs h2: pip install 'tornado_proxy[http2]'" in run.stderr
        assert run.stderr.count("\n") == 1

    async def test_it_drains(self, upstream):
        from tests.support.http2 import Http2

        starting = StandaloneProxy("--to", upstream.url, "--http2")
        standalone = await asyncio.to_thread(starting.__enter__)
        try:
            client = await Http2.connect(standalone.port)
            stream = await client.request("GET", "/x")
            conn, _ = await upstream.request()
            await conn.send_head(200, [("Content-Length", "4")])
            await conn.send(b"ab")
            await client.body(stream, 2)
            standalone.signal()
            assert (await client.goaway()).last_stream == 2**31 - 1
            assert (await client.goaway()).last_stream == stream
            await conn.send(b"cd")
            assert (await client.response(stream)).body == b"abcd"
            assert await client.closed() == "end"
            client.close()
            assert await asyncio.to_thread(standalone.wait) == 0
        finally:
            await asyncio.to_thread(standalone.stop)
