"""Bytes pass as they come, both ways, and an answer that was cut never looks whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib

import pytest

from tests.support.wire import LAST_CHUNK, WireClosed, chunk

CHUNKED = [("Transfer-Encoding", "chunked")]
UPLOADS = pytest.mark.parametrize("framing", ["chunked", "length"])
BODY = bytes(range(251)) * 8_000


def upload_head(framing: str, size: int) -> bytes:
    length = f"Content-Length: {size}" if framing == "length" else "Transfer-Encoding: chunked"
    return f"POST /x HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode()


def piece(framing: str, data: bytes) -> bytes:
    return chunk(data) if framing == "chunked" else data


class TestResponseStreaming:
    """What the upstream sends reaches the downstream before the upstream sends more."""

    @pytest.mark.parametrize("accepting", ["*/*", "text/event-stream"])
    async def test_server_sent_events_pass_one_by_one(self, proxy, upstream, accepting):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/events", [("Accept", accepting)])
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Type", "text/event-stream"), *CHUNKED])
        # Before any event: EventSource is open once it has the head.
        assert (await downstream.read_head()).header("Content-Type") == "text/event-stream"
        for number in range(20):
            event = b"id: %d\ndata: tick\n\n" % number
            await conn.send_chunk(event)
            assert await downstream.read_body(len(event)) == event
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_each_single_byte_passes_at_once(self, proxy, upstream):
        """BP-06."""
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await downstream.read_head()
        for number in range(100):
            byte = bytes([number])
            await conn.send_chunk(byte)
            assert await downstream.read_body(1) == byte
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_a_flood_of_tiny_chunks_arrives_equal(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        body = BODY[:20_000]
        flood = b"".join(chunk(body[i : i + 1]) for i in range(len(body))) + LAST_CHUNK
        sending = asyncio.ensure_future(conn.respond(200, CHUNKED, flood))
        response = await downstream.read_response()
        await sending
        assert response.complete
        assert response.body == body


class TestUploadStreaming:
    """What the downstream sends reaches the upstream before the downstream sends more."""

    @UPLOADS
    async def test_each_piece_passes_at_once(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing, 9))
        conn = await upstream.accept()
        await conn.read_head()
        for part in (b"one", b"two", b"end"):
            await downstream.send(piece(framing, part))
            assert await conn.read_body(3) == part
        if framing == "chunked":
            await downstream.send(LAST_CHUNK)
        assert await conn.read_body() == b""
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    @UPLOADS
    @pytest.mark.parametrize("size", [0, 1, 65_536, 262_144, len(BODY)])
    async def test_the_body_arrives_equal(self, proxy, upstream, framing, size):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        body = BODY[:size]
        pieces = [body[start : start + 10_007] for start in range(0, size, 10_007)]
        framed = b"".join(piece(framing, each) for each in pieces) + (LAST_CHUNK if framing == "chunked" else b"")
        sending = asyncio.ensure_future(downstream.send(upload_head(framing, size) + framed))
        conn, request = await upstream.request()
        await sending
        assert hashlib.sha256(request.body).digest() == hashlib.sha256(body).digest()
        if framing == "length":
            assert request.all("Content-Length") == [str(size)]
            assert not request.has("Transfer-Encoding")
        else:
            assert request.all("Transfer-Encoding") == ["chunked"]
            assert not request.has("Content-Length")
        await conn.respond(204)
        assert (await downstream.read_response()).status == 204
        assert (await running.next_outcome()).bytes_up == size


class TestFullDuplex:
    """BP-07: both bodies flow at the same time."""

    @UPLOADS
    async def test_the_echo_of_each_piece_comes_before_the_next_is_sent(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing, 30))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send_head(200, CHUNKED)
        assert (await downstream.read_head()).status == 200
        for number in range(10):
            part = b"%03d" % number
            await downstream.send(piece(framing, part))
            assert await conn.read_body(3) == part
            await conn.send_chunk(part)
            assert await downstream.read_body(3) == part
        if framing == "chunked":
            await downstream.send(LAST_CHUNK)
        assert await conn.read_body() == b""
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""
        outcome = await running.next_outcome()
        assert (outcome.error, outcome.bytes_up, outcome.bytes_down) == (None, 30, 30)


class TestEarlyAnswer:
    """ST-03, ST-04: an answer that comes before the request is complete is relayed at once, to its last byte."""

    @UPLOADS
    async def test_a_413_is_readable_to_the_last_byte(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing, 10_000_000) + piece(framing, BODY[:1024]))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(1024) == BODY[:1024]
        page = b"too large " * 5_000
        # It closes at once and never reads the rest.
        await conn.respond(413, [("Connection", "close")], page)
        conn.close()
        # The downstream goes on sending before it looks.
        for _ in range(5):
            await downstream.send(piece(framing, BODY[:10_000]))
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (413, page, True)

    @UPLOADS
    async def test_a_413_passes_while_the_upstream_keeps_the_connection_and_reads_nothing(
        self, proxy, upstream, framing
    ):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(upload_head(framing, 10_000_000) + piece(framing, BODY[:1024]))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.respond(413, body=b"too large")
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (413, b"too large", True)

    @UPLOADS
    @pytest.mark.parametrize("answering", ["chunked", "length"])
    async def test_a_200_passes_at_once_while_the_rest_is_still_sent(self, proxy, upstream, framing, answering):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        size = 500_000
        await downstream.send(upload_head(framing, size) + piece(framing, BODY[:1024]))
        conn = await upstream.accept()
        await conn.read_head()
        assert await conn.read_body(1024) == BODY[:1024]
        answer = (200, CHUNKED, chunk(b"enough") + LAST_CHUNK) if answering == "chunked" else (200, (), b"enough")
        await conn.respond(*answer)
        # All of the answer's bytes; libcurl tells of the end of a chunked one only when the request is sent as well.
        assert (await downstream.read_head()).status == 200
        assert await (downstream.read_chunk() if answering == "chunked" else downstream.read_body(6)) == b"enough"
        rest = BODY[1024:size]
        last = LAST_CHUNK if framing == "chunked" else b""
        sending = asyncio.ensure_future(downstream.send(piece(framing, rest) + last))
        # All of it or only a part, as the proxy likes, but nothing else.
        with contextlib.suppress(WireClosed):
            assert await conn.read_body() == rest
        await sending
        assert (await running.next_outcome()).status == 200


class TestHTTP10Downstream:
    """An HTTP/1.0 client gets an answer that ends, whether or not its length is known."""

    @pytest.mark.parametrize("keep_alive", [False, True])
    async def test_with_a_known_length(self, proxy, upstream, keep_alive):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        wish = b"Connection: keep-alive\r\n" if keep_alive else b""
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\n" + wish + b"\r\n")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"hello")
        response = await downstream.read_response()
        assert (response.body, response.complete, response.until_close) == (b"hello", True, False)
        assert not response.has("Transfer-Encoding")
        if not keep_alive:
            assert await downstream.closed() == "end"

    @pytest.mark.parametrize("framing", ["chunked", "close"])
    async def test_with_an_unknown_length(self, proxy, upstream, framing):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED if framing == "chunked" else [("Connection", "close")])
        head = await downstream.read_head()
        assert not head.has("Transfer-Encoding")
        for part in (b"one", b"two"):
            await conn.send(piece(framing, part))
            assert await downstream.read_body(3) == part
        if framing == "chunked":
            await conn.send(LAST_CHUNK)
        else:
            conn.close()
        assert await downstream.read_body() == b""
        assert not downstream.was_reset

    async def test_a_cut_answer_of_unknown_length_ends_in_a_reset(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.send(b"GET /x HTTP/1.0\r\nHost: h\r\n\r\n")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        conn.close()
        # Nothing else could tell it from a whole answer.
        assert await downstream.closed() == "reset"


class TestCutAnswer:
    """FA-03: what the upstream cut does not look whole downstream, wherever the cut was."""

    @pytest.mark.parametrize(
        ("head", "body", "leave"),
        [
            (b"Content-Length: 10\r\n", b"hello", "close"),
            (b"Content-Length: 10\r\n", b"hello", "reset"),
            (b"Transfer-Encoding: chunked\r\n", chunk(b"hello"), "close"),
            (b"Transfer-Encoding: chunked\r\n", chunk(b"hello"), "reset"),
            (b"Transfer-Encoding: chunked\r\n", b"a\r\nhello", "close"),
            (b"Transfer-Encoding: chunked\r\n", chunk(b"hello") + b"0\r\n", "close"),
            (b"Connection: close\r\n", b"hello", "reset"),
        ],
        ids=["short", "short-reset", "chunks", "chunks-reset", "in-a-chunk", "before-the-trailers", "until-close"],
    )
    async def test_the_downstream_connection_is_closed_short(self, proxy, upstream, expect_log, head, body, leave):
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)
        assert (await downstream.read_head()).status == 200
        # The bytes of a chunk that is not complete pass too, framed anew.
        await downstream.read_until(b"hello")
        getattr(conn, leave)()
        await downstream.closed()
        # Neither the last chunk nor the missing bytes: only the end.
        rest = await downstream.read_until_closed()
        assert LAST_CHUNK not in rest
        assert b"0\r\n" not in rest
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.phase, outcome.status) == ("upstream", "body", 200)

    async def test_at_each_offset(self, proxy, upstream, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url)
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nall of i"
        head_end = whole.index(b"\r\n\r\n") + 4
        for offset in range(len(whole) + 1):
            downstream = await running.ask("POST", "/x", body=b"once")
            conn, _ = await upstream.request()
            if offset:
                await conn.send(whole[:offset])
            conn.close()
            response = await downstream.read_response()
            if offset < head_end:
                assert response.status == 502, whole[:offset]
            else:
                assert response.status == 200
                assert response.body == whole[head_end:offset]
                assert response.complete == (offset == len(whole))
            downstream.close()
            await running.next_outcome()
