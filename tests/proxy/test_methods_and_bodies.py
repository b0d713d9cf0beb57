"""Which methods pass, and how request bodies reach the upstream."""

import gzip

import pytest

from tests.support.proxy import SERVER
from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import ProxyHandler
from tornado_proxy.clients.curl.transfer import CurlTransfer

CHUNKED = [("Transfer-Encoding", "chunked")]
# A period of 251 bytes: no piece of it looks like its neighbour.
LARGE = bytes(range(251)) * 12_000


class Sub(ProxyHandler):
    """Served by a handler of its own."""


class TestMethods:
    """Behaviour 14: the standard methods pass, others only if listed; CONNECT never does."""

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
    async def test_a_standard_method_passes(self, proxy, echo, method):
        running = await proxy(echo.url)
        assert (await running.request(method, "/x")).status == 200
        assert echo.requests[-1].start_line == f"{method} /x HTTP/1.1"

    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "GET"])
    async def test_a_body_passes_with_any_method(self, proxy, echo, method):
        running = await proxy(echo.url)
        assert (await running.request(method, "/x", body=b"hello")).status == 200
        assert echo.requests[-1].method == method
        assert echo.requests[-1].body == b"hello"

    @pytest.mark.parametrize("method", ["PROPFIND", "PURGE", "get", "Get", "finish", "send_error", "X"])
    async def test_a_method_that_is_not_listed_gets_501(self, proxy, echo, method):
        running = await proxy(echo.url)
        assert (await running.request(method, "/x")).status == 501
        assert echo.accepted == 0
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.status) == ("downstream", 501)
        assert "custom_http_methods" in str(outcome.error)

    @pytest.mark.parametrize("method", ["PROPFIND", "PURGE", "finish", "M-SEARCH"])
    async def test_a_listed_method_passes(self, proxy, echo, method):
        running = await proxy(echo.url, custom_http_methods=["PROPFIND", "PURGE", "finish", "M-SEARCH"])
        assert (await running.request(method, "/x", body=b"<a/>")).status == 200
        assert echo.requests[-1].start_line == f"{method} /x HTTP/1.1"
        assert echo.requests[-1].body == b"<a/>"

    async def test_a_list_adds_and_removes_nothing_else(self, proxy, echo):
        running = await proxy(echo.url, custom_http_methods=("PURGE",))
        assert (await running.request("GET", "/x")).status == 200
        assert (await running.request("PROPFIND", "/x")).status == 501

    @pytest.mark.parametrize("target", ["127.0.0.1:80", "/x", "http://127.0.0.1/"])
    async def test_connect_is_refused(self, proxy, echo, target, expect_log):
        expect_log("CONNECT", required=False)
        running = await proxy(echo.url)
        assert (await running.request("CONNECT", target)).status >= 400
        assert echo.accepted == 0


class TestBrokenBodies:
    """A body that turns out to be malformed ends the exchange, and says nothing in the middle of a response."""

    @pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
    async def test_a_response_that_has_begun_is_cut(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", CHUNKED, chunk(b"one"))
        conn = await upstream.accept()
        await conn.read_head()
        piece = b"early" if framing.startswith("Content") else chunk(b"early")
        await conn.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + piece)
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_some() == piece
        await downstream.send(b"xyz\r\n")
        assert await downstream.read_until_closed() == b""
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"

    @pytest.mark.skipif(SERVER == "own", reason="our server leaves bodies compressed")
    @pytest.mark.parametrize("handler_class", [ProxyHandler, Sub])
    async def test_so_it_is_where_the_compression_breaks_off(self, proxy, upstream, expect_log, handler_class):
        expect_log("Malformed HTTP message", required=False)
        running = await proxy(upstream.url, handler_class, server_options={"decompress_request": True})
        compressed = gzip.compress(LARGE)
        fields = [*CHUNKED, ("Content-Encoding", "gzip")]
        downstream = await running.ask("POST", "/x", fields, chunk(compressed[:100]))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nearly")
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_some() == b"early"
        await downstream.send(LAST_CHUNK)
        assert await downstream.read_until_closed() == b""
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"

    async def test_before_the_response_it_is_answered_with_400(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", CHUNKED, chunk(b"one"))
        conn = await upstream.accept()
        await conn.read_head()
        await downstream.send(b"xyz\r\n")
        assert (await downstream.read_head()).status == 400
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"


class TestBodiesStream:
    """Behaviour 15: the whole body arrives, in order, over any number of partial reads, and as it comes."""

    async def test_content_length(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\none")
        conn = await upstream.accept()
        request = await conn.read_head()
        assert request.header("Content-Length") == "9"
        assert not request.has("Transfer-Encoding")
        # If the proxy collected the body, the upstream would not see "one" before "two" was sent.
        assert await conn.read_body(3) == b"one"
        await downstream.send(b"two")
        assert await conn.read_body(3) == b"two"
        await downstream.send(b"end")
        assert await conn.read_body() == b"end"
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    async def test_chunked(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", CHUNKED, chunk(b"one"))
        conn = await upstream.accept()
        request = await conn.read_head()
        assert request.all("Transfer-Encoding") == ["chunked"]
        assert not request.has("Content-Length")
        assert await conn.read_body(3) == b"one"
        await downstream.send(chunk(b"two"))
        assert await conn.read_body(3) == b"two"
        await downstream.send(LAST_CHUNK)
        assert await conn.read_body() == b""
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_a_large_body_is_equal(self, proxy, echo, framing):
        running = await proxy(echo.url)
        if framing == "length":
            await running.request("PUT", "/x", body=LARGE)
        else:
            pieces = [chunk(LARGE[i : i + 70_001]) for i in range(0, len(LARGE), 70_001)]
            await running.request("PUT", "/x", CHUNKED, b"".join(pieces) + LAST_CHUNK)
        assert echo.requests[-1].body == LARGE

    @pytest.mark.parametrize("size", [0, 1])
    async def test_an_empty_or_tiny_body_keeps_its_length(self, proxy, echo, size):
        running = await proxy(echo.url)
        await running.request("POST", "/x", body=b"x" * size)
        assert echo.requests[-1].header("Content-Length") == str(size)
        assert not echo.requests[-1].has("Transfer-Encoding")

    async def test_no_body_has_no_framing(self, proxy, echo):
        running = await proxy(echo.url)
        await running.get("/x")
        assert not echo.requests[-1].has("Content-Length")
        assert not echo.requests[-1].has("Transfer-Encoding")

    async def test_requests_on_one_connection_do_not_mix(self, proxy, echo):
        running = await proxy(echo.url)
        async with await running.connect() as downstream:
            await downstream.request("POST", "/1", body=b"first")
            await downstream.request("POST", "/2", CHUNKED, chunk(b"sec") + chunk(b"ond") + LAST_CHUNK)
            await downstream.request("GET", "/3")
            for _ in range(3):
                assert (await downstream.read_response()).status == 200
        assert [request.body for request in echo.requests] == [b"first", b"second", b""]


class TestSmallBodies:
    @pytest.mark.skipif(SERVER == "tornado", reason="Tornado's server gives the body out a turn of the loop later")
    async def test_what_came_with_the_head_is_there_when_libcurl_asks(self, proxy, echo, monkeypatch):
        """So that both go in one piece; libcurl would send a head alone, and be paused and resumed, else."""
        asked = []
        original = CurlTransfer.on_read

        def on_read(transfer, limit):
            asked.append(original(transfer, limit))
            return asked[-1]

        monkeypatch.setattr(CurlTransfer, "on_read", on_read)
        running = await proxy(echo.url, client="curl")
        downstreams = [await running.ask("POST", "/x", body=b"small") for _ in range(20)]
        for downstream in downstreams:
            assert (await downstream.read_response()).status == 200
        assert asked == [b"small"] * 20


class BufferingHandler(ProxyHandler):
    """Tornado reads the whole body before ``prepare``, as it does for handlers that do not stream."""

    _stream_request_body = False


class TestBodyAlreadyRead:
    """Behaviour 16: a body that was read before, or that a hook assigned, is used; the socket is not read again."""

    @pytest.mark.parametrize(
        ("headers", "body"),
        [((), b"already read"), (CHUNKED, chunk(b"already ") + chunk(b"read") + LAST_CHUNK)],
        ids=["length", "chunked"],
    )
    async def test_a_body_that_tornado_has_read(self, proxy, echo, headers, body):
        running = await proxy(echo.url, BufferingHandler)
        assert (await running.request("POST", "/x", headers, body)).status == 200
        assert echo.requests[-1].body == b"already read"
        assert echo.requests[-1].all("Content-Length") == ["12"]
        assert not echo.requests[-1].has("Transfer-Encoding")

    async def test_no_body_stays_none(self, proxy, echo):
        running = await proxy(echo.url, BufferingHandler)
        await running.get("/x")
        assert not echo.requests[-1].has("Content-Length")

    async def test_assigned_by_a_hook_although_a_body_is_there(self, proxy, echo):
        def rewrite_request(handler, request):
            request.body = b"mine"

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.request("POST", "/x", body=b"the downstream's")).status == 200
        assert echo.requests[-1].body == b"mine"

    async def test_assigned_by_a_hook_before_the_body_has_arrived(self, proxy, upstream):
        def rewrite_request(handler, request):
            request.body = b"mine"

        running = await proxy(upstream.url, rewrite_request=rewrite_request)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\none")
        # If the proxy waited for the inbound body, the upstream would not see this request yet.
        conn, request = await upstream.request()
        assert request.body == b"mine"
        await downstream.send(b"twoend")
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    async def test_the_next_request_on_the_connection_is_read_from_its_start(self, proxy, echo):
        def rewrite_request(handler, request):
            if handler.request.path == "/1":
                request.body = b"mine"

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        async with await running.connect() as downstream:
            # Small enough to have arrived before the answer: otherwise a server may close (RFC 9112 section 9.6).
            assert (await downstream.exchange("POST", "/1", body=b"first")).status == 200
            assert (await downstream.exchange("POST", "/2", body=b"second")).status == 200
        assert [request.body for request in echo.requests] == [b"mine", b"second"]


class TestContentLengthFollowsTheBody:
    """Behaviour 17: Content-Length is computed from the body that is sent, not copied from the one that came."""

    @pytest.mark.parametrize("new", [b"", b"shorter", b"longer than what came"])
    @pytest.mark.parametrize("framing", ["length", "chunked", "none"])
    async def test_recomputed(self, proxy, echo, framing, new):
        def rewrite_request(handler, request):
            request.body = new

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        headers, body = {
            "length": ((), b"what came"),
            "chunked": (CHUNKED, chunk(b"what came") + LAST_CHUNK),
            "none": ((), None),
        }[framing]
        assert (await running.request("POST", "/x", headers, body)).status == 200
        request = echo.requests[-1]
        assert request.body == new
        assert request.all("Content-Length") == [str(len(new))]
        assert not request.has("Transfer-Encoding")

    async def test_a_length_that_a_hook_sets_is_ignored(self, proxy, echo):
        def rewrite_request(handler, request):
            request.headers["Content-Length"] = "3"
            request.headers["Transfer-Encoding"] = "chunked"

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.request("POST", "/x", body=b"hello")).status == 200
        assert echo.requests[-1].body == b"hello"
        assert echo.requests[-1].all("Content-Length") == ["5"]
        assert not echo.requests[-1].has("Transfer-Encoding")

    async def test_none_removes_the_body(self, proxy, echo):
        def rewrite_request(handler, request):
            request.body = None
            request.method = "GET"

        running = await proxy(echo.url, rewrite_request=rewrite_request)
        assert (await running.request("POST", "/x", body=b"hello")).status == 200
        assert echo.requests[-1].method == "GET"
        assert not echo.requests[-1].has("Content-Length")
        assert not echo.requests[-1].has("Transfer-Encoding")
