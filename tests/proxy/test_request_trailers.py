"""The trailers of a request, upstream: what passes, what never does, and how a request without an end looks.

Our own server is in front, of which HTTP/1.1 and HTTP/2 share a port; Tornado's takes no request that has any.
"""

from __future__ import annotations

import asyncio

import pytest
from tornado.httpserver import HTTPServer
from tornado.web import Application, RequestHandler

from tests.support.downstream import Downstream
from tests.support.http2 import END_HEADERS, END_STREAM, Type, frame, rst_stream
from tests.support.wire import LAST_CHUNK, chunk, within
from tornado_proxy import ProxyHandler, ProxyMixin, mount

OWN = {"http2": True}
HEAD = b"POST /x HTTP/1.1\r\nHost: front.example\r\nTransfer-Encoding: chunked\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
async def fronted(proxy):
    async def start(upstream, handler_class=ProxyHandler, **options):
        return await proxy(upstream, handler_class, server_options=OWN, **options)

    return start


async def sent(running, data: bytes):
    downstream = await running.connect()
    await downstream.send(data)
    return downstream


async def end_of(conn) -> bytes:
    """Return the last chunk and the trailers."""
    line, lines = b"", b""
    while line != b"\r\n":
        line = await conn.read_until(b"\r\n")
        lines += line
    return lines


async def answered(conn, downstream, running) -> None:
    """Let the exchange end, and see that its connection can be used again: nobody has lost count."""
    await conn.send(OK)
    assert (await downstream.read_response()).status == 200
    assert (await running.next_outcome()).error is None
    assert not conn.is_closed_by_other()


class TestRequestTrailers:
    async def test_they_follow_the_body_byte_for_byte(self, fronted, upstream):
        running = await fronted(upstream.url)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        head = await conn.read_head()
        assert head.chunked
        assert not head.has("Trailer")
        assert await conn.read_chunk() == b"hello"
        await downstream.send(b"0\r\nX-Checksum: 7\r\ngrpc-x:\t\xe9 \r\nX-Check")
        await downstream.send(b"sum: 8\r\nX-Empty:\r\n\r\n")
        # In the order and the spelling of HTTPHeaders, as in heads.
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\nX-Checksum: 8\r\nGrpc-X: \xe9\r\nX-Empty: \r\n\r\n"
        await answered(conn, downstream, running)

    @pytest.mark.parametrize("body", [b"", b"hello"])
    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    async def test_so_do_those_that_come_with_the_whole_request(self, fronted, upstream, body, mode):
        running = await fronted(upstream.url, response_mode=mode)
        data = chunk(body) if body else b""
        downstream = await sent(running, HEAD + b"\r\n" + data + b"0\r\nX-Checksum: 7\r\n\r\n")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_exactly(len(data)) == data
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\n\r\n"
        await answered(conn, downstream, running)

    async def test_and_those_of_http2(self, fronted, upstream):
        running = await fronted(upstream.url)
        client = await running.connect2()
        stream = await client.request("POST", "/x", [("trailer", "x-checksum")], b"hello", end=False)
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Trailer") == "X-Checksum"
        assert await conn.read_chunk() == b"hello"
        block = client.block([("x-checksum", "7"), ("content-length", "5"), ("x-other", "")])
        await client.send(frame(Type.HEADERS, block, stream=stream, flags=END_STREAM | END_HEADERS))
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\nX-Other: \r\n\r\n"
        await conn.send(OK)
        assert (await client.response(stream)).status == 200

    async def test_none_is_the_wire_as_it_always_was(self, fronted, upstream):
        running = await fronted(upstream.url, forwarded=None, via=None)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello") + LAST_CHUNK)
        conn = await upstream.accept()
        host = f"Host: 127.0.0.1:{upstream.port}".encode()
        expected = b"POST /x HTTP/1.1\r\n" + host + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        assert await conn.read_exactly(len(expected)) == expected
        await answered(conn, downstream, running)

    async def test_what_is_announced_is_announced(self, fronted, upstream):
        running = await fronted(upstream.url)
        announcement = (
            b"Trailer: X-Checksum, content-length, X-Head, x_forwarded_for\r\nTrailer: x-more\r\nX-Head: 1\r\n"
        )
        downstream = await sent(running, HEAD + announcement + b"\r\n" + LAST_CHUNK)
        conn = await upstream.accept()
        assert (await conn.read_head()).all("Trailer") == ["X-Checksum, X-More"]
        assert await end_of(conn) == LAST_CHUNK
        await answered(conn, downstream, running)

    @pytest.mark.parametrize("length", ["Content-Length: 5\r\n", ""])
    async def test_where_none_can_follow_none_is_announced(self, fronted, echo, length):
        running = await fronted(echo.url)
        body = b"hello" if length else b""
        downstream = await sent(running, f"POST /x HTTP/1.1\r\nHost: a\r\nTrailer: X-A\r\n{length}\r\n".encode() + body)
        assert (await downstream.read_response()).status == 200
        assert not echo.requests[-1].has("Trailer")

    async def test_a_filtered_body_keeps_them(self, fronted, upstream):
        running = await fronted(upstream.url, filter_request_body=lambda handler, piece: piece.upper())
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello") + b"0\r\nX-Checksum: 7\r\n\r\n")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"HELLO"
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\n\r\n"
        await answered(conn, downstream, running)

    async def test_a_length_leaves_no_room_for_them(self, fronted, upstream):
        """HTTP/2 allows both, HTTP/1.1 does not."""
        running = await fronted(upstream.url)
        client = await running.connect2()
        stream = await client.request("POST", "/x", [("content-length", "5")], b"hello", end=False)
        block = client.block([("x-checksum", "7")])
        await client.send(frame(Type.HEADERS, block, stream=stream, flags=END_STREAM | END_HEADERS))
        conn, request = await upstream.request()
        assert (request.content_length, request.body) == (5, b"hello")
        await conn.send(OK)
        assert (await client.response(stream)).status == 200
        # What follows is the next request.
        stream = await client.request("GET", "/y")
        assert (await conn.read_head()).start_line == "GET /y HTTP/1.1"
        await conn.send(OK)
        assert (await client.response(stream)).status == 200

    async def test_nor_does_a_body_that_was_read_before(self, proxy, upstream):
        class Reading(ProxyMixin, RequestHandler):
            async def post(self):
                await self.proxy(upstream.url)

        running = await proxy.app([("/x", Reading)], server_options=OWN)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello") + b"0\r\nX-Checksum: 7\r\n\r\n")
        conn, request = await upstream.request()
        assert (request.content_length, request.body, request.has("X-Checksum")) == (5, b"hello", False)
        await conn.send(OK)
        assert (await downstream.read_response()).status == 200

    async def test_they_go_with_the_next_attempt(self, fronted, upstream):
        """One that asked nobody has taken nothing of the body, nor of what is behind it."""
        upstreams = ["http://127.0.0.1:1", upstream.url]
        running = await fronted(lambda: upstreams.pop(0))
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello") + b"0\r\nX-Checksum: 7\r\n\r\n")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"hello"
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\n\r\n"
        await conn.send(OK)
        assert (await downstream.read_response()).status == 200
        assert (await running.next_outcome()).attempts == 2

    async def test_an_early_answer_needs_none(self, fronted, upstream):
        running = await fronted(upstream.url)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"hello"
        await conn.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert (await downstream.read_response()).status == 413
        await downstream.send(b"0\r\nX-Checksum: 7\r\n\r\n" + b"GET /y HTTP/1.1\r\nHost: a\r\n\r\n")
        again, request = await upstream.request()
        assert (request.method, request.target, request.has("X-Checksum")) == ("GET", "/y", False)
        await again.send(OK)
        assert (await downstream.read_response()).status == 200


HEAD_FIELDS = [
    ("X-User", "client"),
    ("Authorization", "Basic eDp5"),
    ("X_Alias", "1"),
    ("Connection", "X-Hop"),
    ("X-Hop", "1"),
]
ATTEMPTS = [
    # The request, or the next one.
    *("Content-Length: 0", "Transfer-Encoding: chunked", "content_length: 0", "Transfer_Encoding: x", "Host: evil"),
    # Who asks.
    *("X-Forwarded-For: 9.9.9.9", "x_forwarded_for: 9.9.9.9", "X.Forwarded.For: 9.9.9.9", "Forwarded: for=9.9.9.9"),
    *(
        "X-Real-IP: 9.9.9.9",
        "x_real_ip: 9.9.9.9",
        "Via: 1.1 evil",
        "True-Client-Ip: 9.9.9.9",
        "X-Forwarded-Proto: https",
    ),
    *("Authorization: Basic evil", "Cookie: a=evil", "Proxy: http://evil", "Proxy-Authorization: Basic evil"),
    # What was there, in any spelling, was added, or was nominated.
    *("X-User: evil", "x-user: evil", "x_user: evil", "X-Alias: evil", "X-Hop: evil", "x_hop: evil", "X-Later: evil"),
    "Connection: X-Later",
    # What the upstream does.
    *("Range: bytes=0-0", "If-None-Match: *", "Expect: 100-continue", "Max-Forwards: 0", "TE: gzip", "Upgrade: h2c"),
    *("Cache-Control: no-store", "Content-Type: text/evil", "Trailer: X-User", "X-Http-Method-Override: DELETE"),
]


class TestSmuggling:
    """RFC 9110 section 6.5.1: an upstream may join what comes behind the body with the head."""

    @pytest.mark.parametrize("trusted", [(), ("127.0.0.0/8",)], ids=["nobody", "trusted"])
    async def test_over_http1(self, fronted, upstream, trusted):
        running = await fronted(upstream.url, trusted_proxies=trusted)
        head = "".join(f"{name}: {value}\r\n" for name, value in HEAD_FIELDS).encode()
        lines = "".join(f"{line}\r\n" for line in ATTEMPTS).encode()
        data = HEAD + head + b"\r\n" + chunk(b"hello") + b"0\r\n" + lines + b"X-Ok: 1\r\n\r\n"
        downstream = await sent(running, data)
        conn = await upstream.accept()
        assert "evil" not in (await conn.read_head()).raw.decode()
        assert await conn.read_chunk() == b"hello"
        assert await end_of(conn) == b"0\r\nX-Ok: 1\r\n\r\n"
        await answered(conn, downstream, running)

    async def test_over_http2(self, fronted, upstream):
        running = await fronted(upstream.url)
        client = await running.connect2()
        fields = [(name.lower(), value) for name, value in HEAD_FIELDS if name not in ("Connection", "X-Hop")]
        stream = await client.request("POST", "/x", fields, b"hello", end=False)
        lines = [line.lower().split(": ") for line in ATTEMPTS]
        # What is HTTP/1.1's, and TE, end the stream there (RFC 9113 section 8.2.2).
        ends_it = ("transfer-encoding", "connection", "upgrade", "te", "x-hop", "x_hop", "x-later")
        pairs = [(name, value) for name, value in lines if name not in ends_it]
        block = client.block([*pairs, ("x-ok", "1")])
        await client.send(frame(Type.HEADERS, block, stream=stream, flags=END_STREAM | END_HEADERS))
        conn = await upstream.accept()
        assert "evil" not in (await conn.read_head()).raw.decode()
        assert await conn.read_chunk() == b"hello"
        assert await end_of(conn) == b"0\r\nX-Ok: 1\r\n\r\n"
        await conn.send(OK)
        assert (await client.response(stream)).status == 200

    @pytest.mark.parametrize("by", ["option", "method"])
    @pytest.mark.parametrize("in_the_head", [True, False], ids=["removed", "not there"])
    async def test_what_rewrite_request_removes_does_not_come_back(self, fronted, upstream, by, in_the_head):
        """A hook cannot remove what is not there yet, so it says what may come."""

        def rewrite(handler, request):
            request.headers.pop("X-User", None)
            request.headers["X-Added"] = "1"

        class Rewriting(ProxyHandler):
            def rewrite_request(self, request):
                rewrite(self, request)

        running = await (
            fronted(upstream.url, rewrite_request=rewrite) if by == "option" else fronted(upstream.url, Rewriting)
        )
        head = b"Trailer: X-User\r\n" + (b"X-User: evil\r\n" if in_the_head else b"")
        trailers = b"0\r\nX-User: evil\r\nX_User: evil\r\nX-Added: evil\r\nX-Other: 1\r\n\r\n"
        downstream = await sent(running, HEAD + head + b"\r\n" + trailers)
        conn = await upstream.accept()
        seen = await conn.read_head()
        assert (seen.has("X-User"), seen.has("Trailer")) == (False, False)
        assert await end_of(conn) == LAST_CHUNK
        await answered(conn, downstream, running)

    @pytest.mark.parametrize("late", [True, False])
    async def test_those_that_it_lists_pass(self, fronted, upstream, late):
        gate = asyncio.Event()

        async def rewrite(handler, request):
            await gate.wait()
            request.headers["Trailer"] = "x-checksum, X-Head, Content-Length"

        running = await fronted(upstream.url, rewrite_request=rewrite)
        trailers = b"0\r\nX-Checksum: 7\r\nX-User: evil\r\nX-Head: evil\r\nContent-Length: 9\r\n\r\n"
        downstream = await sent(running, HEAD + b"X-Head: 1\r\n\r\n" + (b"" if late else trailers))
        gate.set()
        conn = await upstream.accept()
        assert (await conn.read_head()).header("Trailer") == "x-checksum, X-Head, Content-Length"
        if late:
            await downstream.send(trailers)
        assert await end_of(conn) == b"0\r\nX-Checksum: 7\r\n\r\n"
        await answered(conn, downstream, running)

    async def test_normalize_headers_is_asked_about_them_too(self, fronted, upstream):
        def normalize(pairs):
            return [(name, value.upper()) for name, value in pairs if name != "X-Secret"] + [("X-Added", "1")]

        running = await fronted(upstream.url, normalize_headers=normalize)
        downstream = await sent(running, HEAD + b"\r\n0\r\nX-Secret: evil\r\nX-A: abc\r\nX-Added: evil\r\n\r\n")
        conn = await upstream.accept()
        assert (await conn.read_head()).all("X-Added") == ["1"]
        assert await end_of(conn) == b"0\r\nX-A: ABC\r\n\r\n"
        await answered(conn, downstream, running)

    @pytest.mark.parametrize(
        ("normalize", "says"),
        [
            (lambda pairs: [("X-A", "a\r\nb")] if ("X-T", "1") in pairs else pairs, "X-A|Illegal|raised"),
            (lambda pairs: 1 / 0 if ("X-T", "1") in pairs else pairs, "normalize_headers raised"),
        ],
        ids=["CR LF", "raises"],
    )
    async def test_what_it_cannot_do_ends_the_request(self, fronted, upstream, expect_log, normalize, says):
        expect_log("normalize_headers")
        running = await fronted(upstream.url, normalize_headers=normalize)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"hello"
        await downstream.send(b"0\r\nX-T: 1\r\n\r\n")
        assert await within(conn.read_until_closed(), "the end of the upstream connection") == b""
        assert (await downstream.read_response()).status == 500


MALFORMED = {
    "CR": (b"X-A: a\rb\r\n\r\n", 400),
    "LF": (b"X-A: a\nb\r\n\r\n", 400),
    "NUL": (b"X-A: a\0b\r\n\r\n", 400),
    "folded": (b"X-A: a\r\n b\r\n\r\n", 400),
    "a space before the colon": (b"Content-Length : 0\r\n\r\n", 400),
    "no colon": (b"GET /evil HTTP/1.1\r\n\r\n", 400),
    "ten thousand": (b"X-A: a\r\n" * 10_000 + b"\r\n", 431),
    "a megabyte": (b"X-A: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
}


class TestARequestWithoutItsEnd:
    """What is not complete must not look complete: the upstream sees its connection end, and no last chunk."""

    @pytest.mark.parametrize("name", MALFORMED)
    async def test_malformed(self, fronted, upstream, name):
        trailers, status = MALFORMED[name]
        running = await fronted(upstream.url)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"hello"
        sending = asyncio.ensure_future(downstream.send(b"0\r\nX-Good: 1\r\n" + trailers))
        assert await within(conn.read_until_closed(), "the end of the upstream connection") == b""
        assert (await downstream.read_response()).status == status
        await asyncio.wait([sending])
        sending.exception()
        assert (await running.next_outcome()).side == "downstream"

    @pytest.mark.parametrize("how", ["close", "reset"])
    @pytest.mark.parametrize("cut", [b"0", b"0\r\n", b"0\r\nX-Good: 1", b"0\r\nX-Good: 1\r\n", b"0\r\nX-Good: 1\r\n\r"])
    async def test_a_client_that_leaves(self, fronted, upstream, how, cut):
        running = await fronted(upstream.url)
        downstream = await sent(running, HEAD + b"\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_chunk() == b"hello"
        await downstream.send(cut)
        getattr(downstream, how)()
        assert await within(conn.read_until_closed(), "the end of the upstream connection") == b""
        assert (await running.next_outcome()).status == 499

    async def test_a_stream_that_is_cut(self, fronted, upstream):
        """Trailers without END_STREAM, of which more could come (RFC 9113 section 8.1), and RST_STREAM in mid-block."""
        for flags, cut in ((END_HEADERS, b""), (END_STREAM, rst_stream)):
            running = await fronted(upstream.url)
            client = await running.connect2()
            stream = await client.request("POST", "/x", [], b"hello", end=False)
            conn = await upstream.accept()
            await conn.read_head()
            assert await conn.read_chunk() == b"hello"
            await client.send(frame(Type.HEADERS, client.block([("x-good", "1")]), stream=stream, flags=flags))
            if cut:
                await client.send(cut(stream))
            assert await within(conn.read_until_closed(), "the end of the upstream connection") == b""
            assert (await running.next_outcome()).status == 499


class TestClientsThatSendNone:
    @pytest.mark.parametrize("client", ["httpx", "aiohttp"])
    async def test_the_body_ends_without_them(self, fronted, upstream, client):
        pytest.importorskip(client, reason=f"{client} is not installed")
        running = await fronted(upstream.url, client=client)
        downstream = await sent(running, HEAD + b"Trailer: X-Checksum\r\n\r\n" + chunk(b"hello"))
        conn = await upstream.accept()
        assert not (await conn.read_head()).has("Trailer")
        assert await conn.read_chunk() == b"hello"
        await downstream.send(b"0\r\nX-Checksum: 7\r\n\r\n")
        assert await end_of(conn) == LAST_CHUNK
        await answered(conn, downstream, running)


class TestUnderTornadosServer:
    async def test_there_are_none(self, upstream):
        """It refuses what it would have to drop, and the upstream sees no end."""
        server = HTTPServer(Application([mount("/", upstream.url)], log_function=lambda handler: None))
        server.listen(0, "127.0.0.1")
        (sock,) = server._sockets.values()
        async with await Downstream.connect(sock.getsockname()[1]) as downstream:
            await downstream.send(HEAD + b"\r\n" + chunk(b"hello"))
            conn = await upstream.accept()
            await conn.read_head()
            assert await conn.read_chunk() == b"hello"
            await downstream.send(b"0\r\nX-Checksum: 7\r\n\r\n")
            assert await within(conn.read_until_closed(), "the end of the upstream connection") == b""
            assert b" 400 " in (await downstream.read_until_closed())[:20]
        server.stop()
        await server.close_all_connections()
