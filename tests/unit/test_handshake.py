"""What is a handshake, what answers it, and how the head and the body of an answer are read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from tornado.httputil import HTTPHeaders

from tornado_proxy import handshake, responses
from tornado_proxy.framing import CHUNKED, NO_BODY, Framing
from tornado_proxy.handshake import accept_value, head_bytes, wants_upgrade

ASKING = [("Connection", "Upgrade"), ("Upgrade", "websocket")]


def fields(*pairs: tuple[str, str]) -> HTTPHeaders:
    headers = HTTPHeaders()
    for name, value in pairs:
        headers.add(name, value)
    return headers


def asks(*pairs: tuple[str, str], method: str = "GET", version: str = "HTTP/1.1", framing: Framing = NO_BODY) -> bool:
    # All of a request that counts; a real one needs a connection.
    request = SimpleNamespace(method=method, version=version, headers=fields(*pairs))
    return wants_upgrade(request, framing)  # type: ignore[arg-type]


class TestTheVerdict:
    @pytest.mark.parametrize(
        "pairs",
        [
            ASKING,
            [("Connection", "keep-alive, Upgrade"), ("Upgrade", "websocket")],
            [("Connection", "keep-alive"), ("Connection", "upgrade"), ("Upgrade", "WebSocket")],
            [("Connection", "Upgrade"), ("Upgrade", "h2c, websocket")],
            [("Connection", "Upgrade"), ("Upgrade", "h2c"), ("Upgrade", "websocket")],
        ],
    )
    def test_a_handshake_is_recognised_over_all_lines_and_in_any_case(self, pairs):
        assert asks(*pairs)

    @pytest.mark.parametrize(
        "pairs",
        [
            [],
            [("Upgrade", "websocket")],
            [("Connection", "Upgrade")],
            [("Connection", "keep-alive"), ("Upgrade", "websocket")],
            [("Connection", "Upgrade"), ("Upgrade", "h2c")],
            [("Connection", "Upgrade"), ("Upgrade", "websocket/13")],
            [("Connection", "Upgrade"), ("Upgrade", "xwebsocket")],
            [("Connection", "not-upgrade"), ("Upgrade", "websocket")],
        ],
    )
    def test_all_else_is_plain_http(self, pairs):
        assert not asks(*pairs)

    def test_http_1_0_cannot_upgrade(self):
        assert not asks(*ASKING, version="HTTP/1.0")

    @pytest.mark.parametrize("method", ["POST", "HEAD", "get"])
    def test_another_method_cannot_upgrade(self, method):
        assert not asks(*ASKING, method=method)

    @pytest.mark.parametrize("framing", [CHUNKED, Framing(5, False), Framing(0, False)])
    def test_a_framed_body_rules_it_out(self, framing):
        assert not asks(*ASKING, framing=framing)


class TestTheAccept:
    def test_is_that_of_the_rfc(self):
        assert accept_value("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class TestTheHeadWeSend:
    def test_keeps_fields_lines_and_order_and_asks_last(self):
        headers = fields(("Host", "h"), ("X-A", "1"), ("X-A", "2"), ("Sec-WebSocket-Key", "k"))
        assert head_bytes("GET / HTTP/1.1", headers) == (
            b"GET / HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2\r\nSec-WebSocket-Key: k\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )

    @pytest.mark.parametrize("bad", ["a\r\nX: y", "a\nb", "\x00", "\u0142"])
    def test_refuses_what_would_leave_its_line(self, bad):
        headers = fields(("Host", "h"))
        headers["X-A"] = bad
        with pytest.raises(ValueError, match="control character"):
            head_bytes("GET / HTTP/1.1", headers)


class TestTheHeadWeRead:
    def test_gives_its_parts(self):
        head = responses.parse_head(b"HTTP/1.1 101 Go on\r\nA: 1\r\nA:2 \r\nB:\r\n\r\n")
        assert (head.version, head.status, head.reason) == ("HTTP/1.1", 101, "Go on")
        assert list(head.headers.get_all()) == [("A", "1"), ("A", "2"), ("B", "")]

    @pytest.mark.parametrize("line", [b"HTTP/1.1 200", b"HTTP/1.0 404 "])
    def test_a_reason_may_be_missing(self, line):
        assert responses.parse_head(line + b"\r\n\r\n").reason == ""

    @pytest.mark.parametrize(
        "raw",
        [
            b"\r\n\r\n",
            b"HTTP/2 200 OK\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1  200 OK\r\n\r\n",
            b"HTTP/1.1 600 OK\r\n\r\n",
            b"http/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\nA: 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA : 1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: 1\rB: 2\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n",
        ],
    )
    def test_what_could_be_read_twice_is_refused(self, raw):
        with pytest.raises(ValueError, match="sent an invalid"):
            responses.parse_head(raw)


class TestTheSwitch:
    KEY = "dGhlIHNhbXBsZSBub25jZQ=="
    GOOD = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept_value(KEY)))

    def check(self, *pairs, version="HTTP/1.1", keys=(KEY,)):
        handshake._check_switch(responses.Head(version, 101, "", fields(*pairs)), list(keys))

    def test_a_valid_one_passes(self):
        self.check(*self.GOOD)

    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_each_of_its_fields_is_needed(self, missing):
        with pytest.raises(ValueError, match=r"101|websocket|Accept"):
            self.check(*(pair for number, pair in enumerate(self.GOOD) if number != missing))

    @pytest.mark.parametrize("extra", [("Upgrade", "h2c"), ("Sec-WebSocket-Accept", "x")])
    def test_nor_may_one_be_there_twice_and_differ(self, extra):
        with pytest.raises(ValueError, match=r"websocket|Accept"):
            self.check(*self.GOOD, extra)

    @pytest.mark.parametrize("keys", [(), (KEY, KEY), ("other",)])
    def test_it_must_answer_the_one_key(self, keys):
        with pytest.raises(ValueError, match="Accept"):
            self.check(*self.GOOD, keys=keys)

    def test_http_1_0_cannot_switch(self):
        with pytest.raises(ValueError, match=r"HTTP/1\.0"):
            self.check(*self.GOOD, version="HTTP/1.0")


class TestTheBody:
    async def read(self, raw: bytes, *pairs: tuple[str, str], status: int = 403, version: str = "HTTP/1.1") -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        head = responses.Head(version, status, "", fields(*pairs))
        return b"".join([chunk async for chunk in responses.read_body("GET", head, reader)])

    async def test_ends_by_its_length(self):
        assert await self.read(b"no, and more", ("Content-Length", "2")) == b"no"

    async def test_ends_with_the_last_chunk_and_its_trailers(self):
        raw = b"2;ext=1\r\nno\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nmore"
        assert await self.read(raw, ("Transfer-Encoding", "chunked")) == b"no0123456789"

    async def test_ends_with_the_connection_where_nothing_else_says(self):
        assert await self.read(b"no") == b"no"

    @pytest.mark.parametrize("status", [204, 304])
    async def test_is_not_there_for_some_statuses(self, status):
        assert await self.read(b"junk", ("Content-Length", "4"), status=status) == b""

    @pytest.mark.parametrize("raw", [b"x\r\n", b"2 2\r\nno\r\n0\r\n\r\n", b"2\r\nnope\r\n", b"-1\r\n", b"2\nno\r\n"])
    async def test_chunks_that_lie_are_refused(self, raw):
        with pytest.raises(ValueError, match="chunk"):
            await self.read(raw, ("Transfer-Encoding", "chunked"))

    @pytest.mark.parametrize("raw", [b"", b"5\r\nno"])
    async def test_one_that_breaks_off_is_seen(self, raw):
        with pytest.raises(asyncio.IncompleteReadError):
            await self.read(raw, ("Transfer-Encoding", "chunked"))
        with pytest.raises(asyncio.IncompleteReadError):
            await self.read(raw, ("Content-Length", "100"))

    @pytest.mark.parametrize(("coding", "version"), [("gzip, chunked", "HTTP/1.1"), ("chunked", "HTTP/1.0")])
    async def test_other_codings_are_refused(self, coding, version):
        with pytest.raises(ValueError, match="Transfer-Encoding"):
            await self.read(b"", ("Transfer-Encoding", coding), version=version)

    async def test_an_endless_trailer_section_is_refused(self):
        with pytest.raises(ValueError, match="trailers"):
            await self.read(b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n", ("Transfer-Encoding", "chunked"))
