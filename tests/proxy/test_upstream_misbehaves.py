"""What is no valid HTTP from the upstream is a 502, and what stands beside the answer does not get into it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.proxy.test_odd_bodies import others_meanwhile
from tests.support.wire import LAST_CHUNK, chunk

CHUNKED = [("Transfer-Encoding", "chunked")]
OK = b"HTTP/1.1 200 OK\r\n"
MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])


def known(reason: str):
    return pytest.mark.xfail(strict=True, reason=reason)


STATUS_LINES = {
    "no status": b"HTTP/1.1\r\n",
    "an empty status": b"HTTP/1.1  OK\r\n",
    "two digits": b"HTTP/1.1 20 OK\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\n",
    "letters": b"HTTP/1.1 2xx OK\r\n",
    "a sign": b"HTTP/1.1 +20 OK\r\n",
    "below 100": b"HTTP/1.1 099 OK\r\n",
    "600": b"HTTP/1.1 600 OK\r\n",
    "999": b"HTTP/1.1 999 OK\r\n",
    "no space": b"HTTP/1.1200 OK\r\n",
    "another protocol": b"ICY 200 OK\r\n",
    "lower case": b"http/1.1 200 OK\r\n",
    "a major version of 2": b"HTTP/2.0 200 OK\r\n",
    "a major version of 3": b"HTTP/3 200 OK\r\n",
    "a version without a minor one": b"HTTP/1 200 OK\r\n",
    "a carriage return in the reason": b"HTTP/1.1 200 O\rK\r\n",
    "a NUL in the reason": b"HTTP/1.1 200 O\0K\r\n",
    "a control character in the reason": b"HTTP/1.1 200 O\x01K\r\n",
    "a request": b"GET / HTTP/1.1\r\n",
}
FIELDS = {
    "no colon": b"X-A 1\r\n",
    "no name": b": 1\r\n",
    "a space before the colon": b"X-A : 1\r\n",
    "a space in the name": b"X A: 1\r\n",
    "a tab in the name": b"X\tA: 1\r\n",
    "a control character in the name": b"X\x01A: 1\r\n",
    "a quote in the name": b'X"A: 1\r\n',
    "a NUL in the value": b"X-A: a\0b\r\n",
    "a carriage return in the value": b"X-A: a\rX-B: b\r\n",
    "a control character in the value": b"X-A: a\x01b\r\n",
    "a folded line first": b" X-A: 1\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 4\r\n",
    "a list of two lengths": b"Content-Length: 5, 4\r\n",
    "a negative length": b"Content-Length: -5\r\n",
    "a length with a sign": b"Content-Length: +5\r\n",
    "a length with letters": b"Content-Length: 5x\r\n",
    "an empty length": b"Content-Length:\r\n",
    "a hexadecimal length": b"Content-Length: 0x5\r\n",
    "a length beyond 64 bits": b"Content-Length: 99999999999999999999\r\n",
    "an unknown transfer coding": b"Transfer-Encoding: squeezed\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n",
}
FIELD_MARKS: dict = {}


def cases(table):
    return [pytest.param(value, id=name) for name, value in table.items()]


class TestAMalformedHead:
    """None of it reaches the downstream: it gets a 502, and its connection goes on."""

    async def check(self, proxy, upstream, expect_log, mode, sent) -> None:
        expect_log("upstream")
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()
        await conn.send(sent)
        # Not only once the upstream closes.
        response = await downstream.read_response()
        conn.close()
        assert (response.status, response.complete) == (502, True), response.raw
        assert b"hello" not in response.raw
        assert not response.has("X-A")
        await downstream.request("GET", "/next")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    @MODES
    @pytest.mark.parametrize("line", cases(STATUS_LINES))
    async def test_a_status_line(self, proxy, upstream, expect_log, mode, line):
        await self.check(proxy, upstream, expect_log, mode, line + b"Content-Length: 5\r\n\r\nhello")

    @MODES
    @pytest.mark.parametrize("fields", cases(FIELDS))
    async def test_a_field(self, proxy, upstream, expect_log, mode, fields):
        await self.check(proxy, upstream, expect_log, mode, OK + fields + b"\r\nhello")

    @MODES
    @pytest.mark.parametrize(
        "sent",
        [b"hello", b"\r\n\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00\x01", b"<html>hello</html>"],
        ids=["text", "empty lines", "NULs", "TLS", "HTML"],
    )
    async def test_no_http_at_all(self, proxy, upstream, expect_log, mode, sent):
        expect_log("upstream")
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()
        await conn.send(sent)
        conn.close()
        assert (await downstream.read_response()).status == 502

    async def test_an_empty_line_in_place_of_a_head_is_no_fault_of_ours(self, proxy, upstream, expect_log, capfd):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 100 Continue\r\n\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        assert (await downstream.read_response()).status in (200, 502)
        assert "Traceback" not in capfd.readouterr().err


class TestAHugeHead:
    """It is refused at a limit of libcurl's, whatever it is made of, and not collected without end."""

    @pytest.mark.parametrize(
        "fields",
        [
            b"X-A: " + b"a" * 400_000 + b"\r\n",
            b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(400)),
            b"X: y\r\n" * 6_000,
            b"Set-Cookie: a=b\r\n" * 6_000,
        ],
        ids=["one line", "long lines", "short lines", "cookies"],
    )
    async def test_is_a_502(self, proxy, upstream, expect_log, fields):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                await conn.send(OK + fields + b"Content-Length: 5\r\n\r\nhello")

        await asyncio.gather(send(), conn.closed())
        assert (await downstream.read_response()).status == 502

    async def test_one_of_common_size_passes(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        fields = [(f"X-{n}", "a" * 500) for n in range(100)]
        await conn.respond(200, fields, b"hello")
        response = await downstream.read_response()
        assert [(name, value) for name, value in response.headers if name.startswith("X-")] == fields


class TestAmbiguousFraming:
    """Where two fields say how long the body is, the downstream sees one."""

    @MODES
    async def test_equal_lengths_become_one(self, proxy, upstream, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello")
        response = await downstream.read_response()
        assert (response.all("Content-Length"), response.body) == (["5"], b"hello")

    @MODES
    @pytest.mark.parametrize("length", [b"3", b"5", b"100"])
    async def test_chunks_outrank_a_length(self, proxy, upstream, mode, length):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        body = chunk(b"hello") + LAST_CHUNK
        await conn.send(OK + b"Content-Length: " + length + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (200, b"hello", True)
        assert len(response.all("Content-Length") + response.all("Transfer-Encoding")) == 1

    async def test_chunked_twice_is_a_502(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()
        await conn.send(OK + b"Transfer-Encoding: chunked, chunked\r\n\r\nhello")
        assert (await downstream.read_response()).status == 502

    @pytest.mark.parametrize(
        "broken",
        [b"x\r\nhello\r\n", b"5\r\nhelloo\r\n", b"-5\r\nhello\r\n", b"ffffffffffffffffff\r\nhello", b"\r\nhello"],
        ids=["no number", "too long", "negative", "too large", "empty"],
    )
    async def test_a_broken_chunk_is_a_visible_cut(self, proxy, upstream, expect_log, broken):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        await conn.send(broken + LAST_CHUNK)
        await downstream.closed()
        assert LAST_CHUNK not in await downstream.read_until_closed()
        assert (await running.next_outcome()).side == "upstream"


class TestSwitchingProtocolsUnasked:
    """A 101 that nobody asked for is a 502, and nothing behind it passes."""

    @MODES
    @pytest.mark.parametrize("fields", [b"", b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
    async def test_is_a_502(self, proxy, upstream, expect_log, mode, fields):
        expect_log("status 101")
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 101 Switching Protocols\r\n" + fields + b"\r\nraw bytes")
        assert await conn.closed() in ("end", "reset")
        response = await downstream.read_response()
        assert response.status == 502
        assert b"raw bytes" not in response.raw
        assert upstream.accepted == 1


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nX-Hint: 1\r\nSet-Cookie: hint=1\r\n\r\n"


class TestInterimResponses:
    """What comes before the final head is no part of it."""

    @MODES
    async def test_their_fields_are_not_merged(self, proxy, upstream, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(EARLY_HINTS * 2 + OK + b"X-A: 1\r\nContent-Length: 5\r\n\r\nhello")
        response = await downstream.read_response()
        assert (response.status, response.body) == (200, b"hello")
        assert response.all("X-A") == ["1"]
        assert not {"link", "x-hint", "set-cookie"} & set(response.names)

    @pytest.mark.parametrize("gap", [False, True], ids=["at once", "one by one"])
    async def test_too_many_are_a_502(self, proxy, upstream, expect_log, gap):
        expect_log("too many interim")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        try:
            for _ in range(200):
                await conn.send(EARLY_HINTS)
                if gap:
                    await asyncio.sleep(0)
        except ConnectionError:
            pass
        await conn.closed()
        assert (await downstream.read_response()).status == 502

    async def test_one_cut_short_is_a_502(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("POST", "/x", body=b"once")
        conn, _ = await upstream.request()
        await conn.send(EARLY_HINTS + b"HTTP/1.1 103 Ea")
        conn.close()
        assert (await downstream.read_response()).status == 502

    async def test_early_hints_reach_the_downstream_at_once(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        downstream.timeout = 1.0
        conn, _ = await upstream.request()
        await conn.send(EARLY_HINTS)
        # Before the final head is sent.
        head = await downstream.read_head()
        assert (head.status, head.all("Link")) == (103, ["</a.css>; rel=preload"])
        await conn.respond(200, body=b"hello")
        assert (await downstream.read_response()).body == b"hello"

    async def test_early_hints_do_not_reach_an_http_1_0_downstream(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")
        conn, _ = await upstream.request()
        await conn.send(EARLY_HINTS)
        await conn.respond(200, body=b"hello")
        response = await downstream.read_response()
        assert (response.status, response.interim, response.body) == (200, [], b"hello")


class TestTrailers:
    """What comes behind the body is no part of the head, and breaks nothing."""

    TRAILERS = b"0\r\nX-A: trailer\r\nContent-Length: 99\r\nSet-Cookie: t=1\r\nTransfer-Encoding: x\r\n\r\n"

    @MODES
    async def test_are_not_merged(self, proxy, upstream, mode):
        running = await proxy(upstream.url, response_mode=mode)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(OK + b"X-A: head\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hello") + self.TRAILERS)
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (200, b"hello", True)
        assert response.all("X-A") == ["head"]
        assert not response.has("Set-Cookie")

    async def test_a_flood_of_them_stalls_nobody(self, proxy, upstream, expect_log):
        """ST-05."""
        expect_log("upstream", required=False)
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"hello")

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                await conn.send(b"0\r\n" + b"X-Trailer: 1234567890\r\n" * 45_000 + b"\r\n")

        sending = asyncio.ensure_future(send())
        reading = asyncio.ensure_future(downstream.read_response())
        others = await others_meanwhile(running.port, reading)
        response = await reading
        await sending
        assert others[-1] < 1.0
        assert others[len(others) // 2] < 0.1
        # Taken or refused, but in neither case merged, and a refusal shows.
        assert response.body == b"hello"
        assert not response.has("X-Trailer")
        assert response.complete == ((await running.next_outcome()).error is None)


ONE = {
    "length": OK + b"Content-Length: 5\r\n\r\nfirst",
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"first") + LAST_CHUNK,
}


class TestTwoResponses:
    """More than was asked for is dropped with its connection."""

    @pytest.mark.parametrize("framing", ONE)
    async def test_the_second_answers_nobody(self, proxy, upstream, framing):
        running = await proxy(upstream.url)

        async def serve(conn, request):
            if request.target == "/first":
                await conn.send(ONE[framing] + ONE[framing].replace(b"first", b"other"))
            else:
                await conn.respond(200, body=b"second")

        upstream.serve(serve)
        downstream = await running.connect()
        response = await downstream.exchange("GET", "/first")
        assert (response.body, response.complete) == (b"first", True)
        for _ in range(3):
            assert (await downstream.exchange("GET", "/second")).body == b"second"

    @pytest.mark.parametrize(
        "framing",
        [
            "length",
            pytest.param(
                "chunked", marks=known("libcurl drops what it read behind the last chunk, and keeps the connection")
            ),
        ],
    )
    async def test_their_connection_is_not_used_again(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        # Only the beginning of the second: the rest would come in the middle of the next exchange.
        await conn.send(ONE[framing] + OK)
        assert (await downstream.read_response()).body == b"first"
        await downstream.request("GET", "/second")
        conn.timeout = 0.5
        assert await conn.closed() == "end"
        fresh, _ = await upstream.request()
        await fresh.respond(200, body=b"second")
        assert (await downstream.read_response()).body == b"second"

    async def test_a_body_beyond_its_length_is_cut_off_there(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        await conn.send(OK + b"Content-Length: 5\r\n\r\nfirst and more")
        response = await downstream.read_response()
        assert (response.body, response.complete) == (b"first", True)
        await conn.closed()
