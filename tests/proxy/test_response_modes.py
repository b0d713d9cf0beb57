"""How a response reaches the downstream, streamed and buffered."""

import asyncio

import pytest

from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import ProxyHandler

MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])
CHUNKED = [("Transfer-Encoding", "chunked")]
LARGE = bytes(range(251)) * 12_000


async def forward(proxy, upstream, response, *, method="GET", handler_class=ProxyHandler, **options):
    """Return what the downstream gets when the upstream sends exactly `response`."""
    running = await proxy(upstream.url, handler_class, **options)
    downstream = await running.ask(method, "/x")
    conn, _ = await upstream.request()
    await conn.send(response)
    if b"\r\nConnection: close" in response:
        conn.close()
    return await downstream.read_response()


class TestReason:
    """RFC 9112 section 4: for people, in whatever encoding they read."""

    @MODES
    @pytest.mark.parametrize(
        ("sent", "seen"),
        [
            (b"", b""),
            ("Schon g\u00fcltig \u2192".encode(), "Schon g\u00fcltig \u2192".encode()),
            (b"<b>", b"<b>"),
            # Both servers write UTF-8; the letters are kept, not the bytes.
            (b"Sch\xf6n", "Sch\u00f6n".encode()),
        ],
        ids=["none", "UTF-8", "HTML", "Latin-1"],
    )
    async def test_passes(self, proxy, upstream, mode, sent, seen):
        head = b"HTTP/1.1 200 " + sent + b"\r\nContent-Length: 2\r\n\r\n"
        response = await forward(proxy, upstream, head + b"ok", response_mode=mode)
        assert response.raw.startswith(b"HTTP/1.1 200 " + seen + b"\r\n")
        assert response.body == b"ok"

    async def test_of_an_interim_response_passes(self, proxy, upstream):
        said = "HTTP/1.1 103 Fr\u00fche Hinweise\r\n".encode()
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(said + b"Link: </a>\r\n\r\n")
        assert (await downstream.read_head()).raw.startswith(said)
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"


class TestBufferedResponse:
    """Behaviour 25: status, headers and body pass, and a buffered response can be changed before it is sent."""

    @MODES
    async def test_status_reason_headers_and_body_pass(self, proxy, upstream, mode):
        response = await forward(
            proxy,
            upstream,
            b"HTTP/1.1 418 Short And Stout\r\nX-One: 1\r\nServer: kettle/2\r\nContent-Type: text/tea\r\n"
            b'ETag: "leaves"\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 3\r\n\r\ntea',
            response_mode=mode,
            via=None,
        )
        assert (response.status, response.reason, response.body) == (418, "Short And Stout", b"tea")
        assert response.complete
        assert sorted(response.headers) == [
            ("Content-Length", "3"),
            ("Content-Type", "text/tea"),
            ("Date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("Etag", '"leaves"'),
            ("Server", "kettle/2"),
            ("X-One", "1"),
        ]

    @MODES
    async def test_tornados_own_headers_are_not_added(self, proxy, upstream, mode):
        response = await forward(
            proxy, upstream, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", response_mode=mode, via=None
        )
        # Date is the one field that a gateway may add (RFC 9110 section 6.6.1).
        assert set(response.names) - {"date"} == {"content-length"}

    async def test_nothing_is_sent_before_the_body_is_complete(self, proxy, upstream):
        bodies = []

        def rewrite_response(handler, response):
            bodies.append(response.body)
            # Nothing has gone out: even the status can still change.
            response.status = 201
            response.headers["X-Rewritten"] = "yes"
            response.body = response.body.upper()

        running = await proxy(upstream.url, response_mode="buffer", rewrite_response=rewrite_response)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none")
        assert bodies == []
        await conn.send(b"two")
        response = await downstream.read_response()
        assert bodies == [b"onetwo"]
        assert (response.status, response.body) == (201, b"ONETWO")
        assert response.header("X-Rewritten") == "yes"

    @MODES
    async def test_a_body_that_a_hook_replaces_gets_its_own_length(self, proxy, upstream, mode):
        async def rewrite_response(handler, response):
            response.body = (await response.read()) + b" and more"

        response = await forward(
            proxy,
            upstream,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            response_mode=mode,
            rewrite_response=rewrite_response,
        )
        assert response.body == b"hello and more"
        assert response.all("Content-Length") == ["14"]
        assert not response.has("Transfer-Encoding")

    async def test_a_body_above_the_limit_is_refused(self, proxy, upstream, expect_log):
        with expect_log("more than 10 bytes"):
            response = await forward(
                proxy,
                upstream,
                b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
                response_mode="buffer",
                max_buffered_response=10,
            )
        assert response.status == 502

    @MODES
    async def test_a_large_body_is_equal(self, proxy, upstream, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        sending = asyncio.ensure_future(conn.respond(200, body=LARGE))
        response = await downstream.read_response()
        await sending
        assert response.body == LARGE
        assert response.complete


class TestBufferedFraming:
    """Behaviour 26: a buffered response has Content-Length, never Transfer-Encoding, even after a chunked one."""

    async def test_content_length_is_kept(self, proxy, upstream):
        response = await forward(
            proxy, upstream, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", response_mode="buffer"
        )
        assert response.all("Content-Length") == ["5"]
        assert not response.has("Transfer-Encoding")

    @pytest.mark.parametrize("body", [b"", b"hello"])
    async def test_chunked_becomes_content_length(self, proxy, upstream, body):
        chunks = (chunk(body) if body else b"") + LAST_CHUNK
        response = await forward(
            proxy, upstream, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks, response_mode="buffer"
        )
        assert response.all("Content-Length") == [str(len(body))]
        assert not response.has("Transfer-Encoding")
        assert response.body == body

    async def test_until_close_becomes_content_length(self, proxy, upstream):
        response = await forward(
            proxy, upstream, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello", response_mode="buffer"
        )
        assert response.all("Content-Length") == ["5"]
        assert response.body == b"hello"


class Decorated(ProxyHandler):
    """Sets headers of its own before the exchange."""

    async def prepare(self):
        self.set_header("X-Both", "mine")
        self.set_header("X-Mine", "mine")
        await super().prepare()


BOTH = b"HTTP/1.1 200 OK\r\nX-Both: one\r\nX-Both: two\r\nX-Theirs: theirs\r\nContent-Length: 0\r\n\r\n"


class TestHeadersModes:
    """Behaviour 27: upstream headers stand before the handler's own (default when buffered) or replace them."""

    @pytest.mark.parametrize(
        ("mode", "headers_mode"),
        [("stream", "replace"), ("stream", "prepend"), ("buffer", "replace"), ("buffer", "prepend")],
    )
    async def test_as_said(self, proxy, upstream, mode, headers_mode):
        options = {"response_mode": mode, f"{mode}_headers_mode": headers_mode}
        response = await forward(proxy, upstream, BOTH, handler_class=Decorated, **options)
        assert response.all("X-Both") == (["one", "two"] if headers_mode == "replace" else ["one", "two", "mine"])
        assert response.all("X-Mine") == ["mine"]
        assert response.all("X-Theirs") == ["theirs"]

    @pytest.mark.parametrize(("mode", "both"), [("stream", ["one", "two"]), ("buffer", ["one", "two", "mine"])])
    async def test_by_default(self, proxy, upstream, mode, both):
        response = await forward(proxy, upstream, BOTH, handler_class=Decorated, response_mode=mode)
        assert response.all("X-Both") == both

    @pytest.mark.parametrize(("mode", "both"), [("stream", ["one", "two"]), ("buffer", ["one", "two", "mine"])])
    async def test_by_default_without_a_body(self, proxy, upstream, mode, both):
        head = BOTH.replace(b"Content-Length: 0\r\n", b"").replace(b"200 OK", b"204 No Content")
        response = await forward(proxy, upstream, head, handler_class=Decorated, response_mode=mode)
        assert response.all("X-Both") == both


class TestStreaming:
    """Behaviour 28: status and headers, then each chunk, pass as they arrive, before the body completes."""

    @pytest.mark.parametrize("framing", ["chunked", "length", "close"])
    async def test_each_chunk_passes_at_once(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        headers = {"chunked": CHUNKED, "length": [("Content-Length", "9")], "close": [("Connection", "close")]}
        # The upstream holds each part until the test has seen the one before: if it were buffered, this would deadlock.
        await conn.send_head(200, headers[framing])
        assert (await downstream.read_head()).status == 200
        for part in (b"one", b"two", b"end"):
            await conn.send(chunk(part) if framing == "chunked" else part)
            assert await downstream.read_body(3) == part
        if framing == "chunked":
            await conn.send(LAST_CHUNK)
        elif framing == "close":
            conn.close()
        assert await downstream.read_body() == b""
        assert (await running.next_outcome()).bytes_down == 9

    @pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
    async def test_whatever_is_accepted(self, proxy, upstream, accept):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x", [("Accept", accept)])
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x"))
        await downstream.read_head()
        assert await downstream.read_body(1) == b"x"

    async def test_a_small_response_is_one_write(self, proxy, upstream):
        response = b"HTTP/1.1 200 OK\r\nX-One: 1\r\nContent-Length: 5\r\n\r\nhello"
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(response)
        assert (await downstream.read_some()).endswith(b"\r\n\r\nhello")

    async def test_the_response_may_come_before_the_request_is_complete(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\none")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"one"
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"early")
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_body(5) == b"early"
        await downstream.send(b"two")
        assert await conn.read_body() == b"two"
        await conn.send_chunk(b"late")
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b"late"


class TestStreamedFraming:
    """Behaviour 29: the seed always chunks; ours keeps Content-Length, and says nothing that the upstream did not."""

    async def test_content_length_is_kept(self, proxy, upstream):
        response = await forward(proxy, upstream, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        assert response.all("Content-Length") == ["5"]
        assert not response.has("Transfer-Encoding")

    async def test_chunked_stays_chunked(self, proxy, upstream):
        body = chunk(b"hel") + chunk(b"lo") + LAST_CHUNK
        response = await forward(proxy, upstream, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        assert response.all("Transfer-Encoding") == ["chunked"]
        assert not response.has("Content-Length")
        assert (response.body, response.complete) == (b"hello", True)

    @pytest.mark.parametrize("version", [b"1.0", b"1.1"])
    async def test_until_close_becomes_chunked(self, proxy, upstream, version):
        head = b"HTTP/" + version + b" 200 OK\r\nConnection: close\r\n\r\n"
        response = await forward(proxy, upstream, head + b"hello")
        assert response.all("Transfer-Encoding") == ["chunked"]
        assert (response.body, response.complete) == (b"hello", True)

    async def test_an_http_1_0_downstream_gets_no_chunks_but_the_end_of_the_connection(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
        conn, _ = await upstream.request()
        await conn.respond(200, CHUNKED, chunk(b"hello") + LAST_CHUNK)
        response = await downstream.read_response()
        assert not response.has("Transfer-Encoding")
        assert (response.body, response.until_close) == (b"hello", True)

    @MODES
    @pytest.mark.parametrize(
        ("method", "head"),
        [
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"),
            ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
            ("GET", b"HTTP/1.1 204 No Content\r\nX-One: 1\r\n\r\n"),
            ("GET", b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\n\r\n'),
            ("GET", b'HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\nETag: "x"\r\n\r\n'),
        ],
    )
    async def test_a_response_without_a_body_gains_no_framing(self, proxy, upstream, mode, method, head):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask(method, "/x")
        conn, _ = await upstream.request()
        await conn.send(head)
        response = await downstream.read_response()
        assert response.status == int(head[9:12])
        assert response.all("Content-Length") == (["5000"] if b"Content-Length" in head else [])
        assert not response.has("Transfer-Encoding")
        # The connection is in step: the next answer is the next answer.
        await downstream.request("GET", "/y")
        await conn.read_request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    @MODES
    async def test_a_cut_body_does_not_look_complete(self, proxy, upstream, mode, expect_log):
        expect_log("upstream")
        response = await forward(
            proxy,
            upstream,
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hel"),
            response_mode=mode,
        )
        if mode == "buffer":
            assert response.status == 502
        else:
            assert (response.status, response.complete, response.body) == (200, False, b"hel")


class TestRepeatedHeaders:
    """Behaviour 30: upstream headers replace those set before, but never each other."""

    @MODES
    @pytest.mark.parametrize("headers_mode", ["replace", "prepend"])
    async def test_repeated_fields_stay_repeated(self, proxy, upstream, mode, headers_mode):
        response = await forward(
            proxy,
            upstream,
            b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\nSet-Cookie: b=2\r\nLink: <x>, <y>\r\n"
            b"Set-Cookie: a=1; Path=/\r\nLink: <z>\r\nContent-Length: 0\r\n\r\n",
            **{"response_mode": mode, f"{mode}_headers_mode": headers_mode},
        )
        assert response.all("Set-Cookie") == ["a=1; Path=/", "b=2", "a=1; Path=/"]
        assert response.all("Link") == ["<x>, <y>", "<z>"]

    async def test_what_the_handler_set_before_is_replaced(self, proxy, upstream):
        response = await forward(proxy, upstream, BOTH, handler_class=Decorated)
        assert response.all("X-Both") == ["one", "two"]


class TestDownstreamLeaves:
    """Behaviour 31: a downstream that leaves ends the exchange quietly, and the upstream transfer with it."""

    @staticmethod
    async def check(running, conn):
        await conn.closed()
        outcome = await running.next_outcome()
        assert outcome.side == "downstream"
        assert type(outcome.error).__name__ == "DownstreamClosed"
        return outcome

    @pytest.mark.parametrize("leave", ["close", "reset"])
    async def test_in_the_body(self, proxy, upstream, leave):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        # The upstream is idle: no write could tell that the downstream has gone.
        getattr(downstream, leave)()
        outcome = await self.check(running, conn)
        assert outcome.phase == "body"
        assert outcome.status == 200

    @MODES
    @pytest.mark.parametrize("leave", ["close", "reset"])
    async def test_before_the_head(self, proxy, upstream, mode, leave):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        getattr(downstream, leave)()
        outcome = await self.check(running, conn)
        assert outcome.phase == "head"
        assert outcome.status == 499

    async def test_in_a_buffered_body(self, proxy, upstream):
        running = await proxy(upstream.url, response_mode="buffer")
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        downstream.close()
        outcome = await self.check(running, conn)
        assert outcome.status == 499

    @pytest.mark.parametrize("leave", ["close", "reset"])
    async def test_in_its_own_body(self, proxy, upstream, leave):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\none")
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(3) == b"one"
        getattr(downstream, leave)()
        await self.check(running, conn)

    async def test_while_a_write_waits_for_it(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        # Until everything between is full: the kernel takes no more.
        sending = asyncio.ensure_future(conn.send(chunk(b"x" * 50_000_000)))
        await downstream.read_head()
        downstream.reset()
        with pytest.raises(ConnectionError):
            await sending
        await self.check(running, conn)

    async def test_the_error_callback_is_told_which_side(self, proxy, upstream):
        errors = []
        running = await proxy(upstream.url, error_callback=errors.append)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        downstream.close()
        await self.check(running, conn)
        assert [error.side for error in errors] == ["downstream"]
