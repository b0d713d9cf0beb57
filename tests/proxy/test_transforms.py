"""Bodies that hooks change: what is said about them stays true, and encoded ones can be read."""

from __future__ import annotations

import asyncio
import gzip
import os
import zlib

import pytest

from tornado_proxy import InvalidResponse, ProxyHandler

PAGE = b"<html><body class=x>hello</body></html>" * 100

# All that speaks of the exact bytes of a body.
EXACT = [
    ("ETag", '"v1"'),
    ("Digest", "sha-256=x"),
    ("Repr-Digest", "sha-256=:x:"),
    ("Content-MD5", "x"),
    ("Accept-Ranges", "bytes"),
]


def brotli(data):
    return pytest.importorskip("brotli").compress(data, quality=5)


def zstd(data):
    return pytest.importorskip("backports.zstd").compress(data)


ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli, "zstd": zstd}


async def through(running, upstream, method="GET", *, status=200, headers=(), body=b"", ask=()):
    """Return what the downstream gets for this response, and what the upstream was asked."""
    downstream = await running.ask(method, "/x", ask)
    conn, request = await upstream.request()
    await conn.respond(status, headers, body)
    return await downstream.read_response(), request


def assert_exact(response):
    """What was said about the upstream's body still is."""
    for name, value in EXACT:
        assert response.header(name) == value


def assert_changed(response, length):
    """Nothing is said about the upstream's body any more."""
    assert response.header("ETag") == 'W/"v1"'
    for name, _ in EXACT[1:]:
        assert not response.has(name)
    assert response.content_length == length


def upper(handler, chunk):
    return chunk.upper() + b"!"


class Decoding(ProxyHandler):
    def rewrite_response(self, response):
        response.decode()


@pytest.fixture(params=["stream", "buffer"])
def mode(request):
    return request.param


class TestFilter:
    async def test_the_fields_follow_the_body(self, proxy, upstream, mode):
        running = await proxy(upstream.url, filter_response_body=upper, response_mode=mode)
        response, _ = await through(running, upstream, headers=EXACT, body=b"hello")
        assert response.body == b"HELLO!"
        assert_changed(response, 6 if mode == "buffer" else None)

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304)])
    async def test_head_and_304_speak_of_the_same_body(self, proxy, upstream, mode, method, status):
        running = await proxy(upstream.url, filter_response_body=upper, response_mode=mode)
        headers = [*EXACT, ("Content-Length", "5")]
        response, _ = await through(running, upstream, method, status=status, headers=headers)
        assert response.status == status
        assert_changed(response, None)

    async def test_the_upstream_is_asked_for_the_whole(self, proxy, upstream):
        running = await proxy(upstream.url, filter_response_body=upper)
        ask = [("Range", "bytes=1-2"), ("If-Range", '"v1"')]
        response, request = await through(running, upstream, ask=ask, body=b"hello")
        assert not request.has("Range")
        assert not request.has("If-Range")
        assert (response.status, response.body) == (200, b"HELLO!")

    async def test_a_part_all_the_same_is_refused(self, proxy, upstream, mode, expect_log):
        expect_log("changed the body of a partial response")
        running = await proxy(upstream.url, filter_response_body=upper, response_mode=mode)
        response, _ = await through(
            running, upstream, status=206, headers=[("Content-Range", "bytes 0-4/9")], body=b"hello"
        )
        assert response.status == 500

    async def test_a_response_that_a_hook_excepts(self, proxy, upstream, mode):
        def rewrite(handler, response):
            response.filtered = False

        running = await proxy(upstream.url, filter_response_body=upper, rewrite_response=rewrite, response_mode=mode)
        headers = [*EXACT, ("Content-Range", "bytes 0-4/9")]
        response, _ = await through(running, upstream, status=206, headers=headers, body=b"hello")
        assert (response.status, response.body, response.content_length) == (206, b"hello", 5)
        assert_exact(response)


class TestRewrite:
    @staticmethod
    async def rewritten(proxy, upstream, mode, rewrite, **kwargs):
        async def hook(handler, response):
            await response.read()
            rewrite(response)

        running = await proxy(upstream.url, rewrite_response=hook, response_mode=mode)
        return (await through(running, upstream, headers=kwargs.pop("headers", EXACT), **kwargs))[0]

    @pytest.mark.parametrize("body", [b"longer than it was", b"HELLO", b""])
    async def test_a_body_that_was_replaced(self, proxy, upstream, mode, body):
        def rewrite(response):
            response.body = body

        response = await self.rewritten(proxy, upstream, mode, rewrite, body=b"hello")
        assert response.body == body
        assert_changed(response, len(body))

    async def test_a_body_that_was_only_read(self, proxy, upstream, mode):
        response = await self.rewritten(proxy, upstream, mode, lambda response: None, body=b"hello")
        assert response.body == b"hello"
        assert_exact(response)

    async def test_a_body_that_was_replaced_by_its_equal(self, proxy, upstream, mode):
        def rewrite(response):
            response.body = response.body.replace(b"x", b"y")

        response = await self.rewritten(proxy, upstream, mode, rewrite, body=b"hello")
        assert_exact(response)

    async def test_a_chunked_body_that_was_only_read_gets_a_length(self, proxy, upstream, mode):
        running = await proxy(upstream.url, rewrite_response=lambda handler, response: response.read())
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        await conn.send_head(200, [*EXACT, ("Transfer-Encoding", "chunked")])
        await conn.send_chunk(b"hello")
        await conn.send_chunk(b"")
        response = await downstream.read_response()
        assert (response.body, response.content_length) == (b"hello", 5)
        assert_exact(response)

    async def test_head_of_a_body_that_may_be_replaced(self, proxy, upstream, mode):
        def rewrite(response):
            response.body = response.body.replace(b"x", b"y")

        headers = [*EXACT, ("Content-Length", "5")]
        response = await self.rewritten(proxy, upstream, mode, rewrite, method="HEAD", headers=headers)
        assert_changed(response, None)

    async def test_a_part_that_was_replaced_is_refused(self, proxy, upstream, mode, expect_log):
        expect_log("remove Range in rewrite_request")

        def rewrite(response):
            response.body = b"changed"

        response = await self.rewritten(proxy, upstream, mode, rewrite, status=206, body=b"hello")
        assert response.status == 500

    async def test_a_part_that_was_only_read_passes(self, proxy, upstream, mode):
        headers = [("Content-Range", "bytes 0-4/9")]
        response = await self.rewritten(
            proxy, upstream, mode, lambda response: None, status=206, headers=headers, body=b"hello"
        )
        assert (response.status, response.body, response.content_length) == (206, b"hello", 5)

    async def test_no_body_any_more(self, proxy, upstream, mode):
        def rewrite(response):
            response.status = 204

        response = await self.rewritten(proxy, upstream, mode, rewrite, body=b"hello")
        assert (response.status, response.content_length) == (204, None)


class TestDecode:
    @pytest.mark.parametrize("coding", ENCODERS)
    async def test_the_relayed_body_is_the_decoded_one(self, proxy, upstream, mode, coding):
        running = await proxy(upstream.url, Decoding, response_mode=mode)
        headers = [*EXACT, ("Content-Encoding", coding)]
        response, _ = await through(running, upstream, headers=headers, body=ENCODERS[coding](PAGE))
        assert response.body == PAGE
        assert not response.has("Content-Encoding")
        assert_changed(response, len(PAGE) if mode == "buffer" else None)

    async def test_a_filter_sees_the_decoded_chunks(self, proxy, upstream, mode):
        running = await proxy(upstream.url, Decoding, filter_response_body=upper, response_mode=mode)
        headers = [("Content-Encoding", "gzip")]
        response, _ = await through(running, upstream, headers=headers, body=gzip.compress(b"hello"))
        assert response.body == b"HELLO!"

    async def test_read_after_it_is_decoded(self, proxy, upstream, mode):
        async def hook(handler, response):
            response.decode()
            response.body = (await response.read()).replace(b"hello", b"hi")

        running = await proxy(upstream.url, rewrite_response=hook, response_mode=mode)
        headers = [("Content-Encoding", "gzip")]
        response, _ = await through(running, upstream, headers=headers, body=gzip.compress(b"hello"))
        assert (response.body, response.content_length) == (b"hi", 2)

    async def test_decoded_can_be_looked_at_piece_by_piece(self, proxy, upstream):
        async def hook(handler, response):
            handler.finish(b"".join([chunk async for chunk in response.decoded()]))

        running = await proxy(upstream.url, rewrite_response=hook)
        headers = [("Content-Encoding", "gzip")]
        response, _ = await through(running, upstream, headers=headers, body=gzip.compress(PAGE))
        assert response.body == PAGE

    async def test_each_piece_passes_as_soon_as_it_can_be_decoded(self, proxy, upstream):
        """The upstream holds the second piece until the first was seen."""
        running = await proxy(upstream.url, Decoding)
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        compressor = zlib.compressobj(wbits=31)
        await conn.send_head(200, [("Transfer-Encoding", "chunked"), ("Content-Encoding", "gzip")])
        for piece in (b"one", b"two"):
            await conn.send_chunk(compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH))
            if piece == b"one":
                await downstream.read_head()
            assert await downstream.read_body(3) == piece
        await conn.send_chunk(compressor.flush())
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_without_a_coding_nothing_changes(self, proxy, upstream, mode):
        running = await proxy(upstream.url, Decoding, response_mode=mode)
        response, _ = await through(running, upstream, headers=EXACT, body=b"hello")
        assert response.content_length == 5
        assert_exact(response)

    async def test_identity_is_no_coding(self, proxy, upstream):
        running = await proxy(upstream.url, Decoding)
        headers = [*EXACT, ("Content-Encoding", "identity")]
        response, _ = await through(running, upstream, headers=headers, body=b"hello")
        assert_exact(response)

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304)])
    async def test_head_and_304_speak_of_the_same_body(self, proxy, upstream, mode, method, status):
        running = await proxy(upstream.url, Decoding, response_mode=mode)
        headers = [*EXACT, ("Content-Encoding", "gzip"), ("Content-Length", "50")]
        response, _ = await through(running, upstream, method, status=status, headers=headers)
        assert not response.has("Content-Encoding")
        assert_changed(response, None)

    @pytest.mark.parametrize(
        ("status", "coding", "sentence"),
        [(200, "exi", "'exi' is not one of gzip"), (206, "gzip", "a part of an encoded body; remove Range")],
    )
    async def test_what_cannot_be_decoded_is_502(self, proxy, upstream, expect_log, status, coding, sentence):
        expect_log(sentence)
        running = await proxy(upstream.url, Decoding)
        response, _ = await through(
            running, upstream, status=status, headers=[("Content-Encoding", coding)], body=b"hello"
        )
        assert response.status == 502
        assert (await running.next_outcome()).side == "upstream"

    async def test_a_hook_may_let_it_pass_as_it_is(self, proxy, upstream):
        def hook(handler, response):
            with pytest.raises(InvalidResponse):
                response.decode()

        running = await proxy(upstream.url, rewrite_response=hook)
        headers = [*EXACT, ("Content-Encoding", "exi")]
        response, _ = await through(running, upstream, headers=headers, body=b"hello")
        assert (response.body, response.header("Content-Encoding")) == (b"hello", "exi")
        assert_exact(response)

    async def test_garbage_before_the_head_is_502(self, proxy, upstream, mode, expect_log):
        expect_log("not a valid gzip body")
        running = await proxy(upstream.url, Decoding, response_mode=mode)
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        await conn.respond(200, [("Content-Encoding", "gzip")], b"no gzip at all")
        response = await downstream.read_response()
        # The body may come with the head, or a moment later; then the head has gone.
        assert response.status == 502 or not response.complete

    async def test_cut_short_cuts_the_downstream_too(self, proxy, upstream, expect_log):
        expect_log("gzip body is cut short")
        running = await proxy(upstream.url, Decoding)
        headers = [("Content-Encoding", "gzip")]
        response, _ = await through(running, upstream, headers=headers, body=gzip.compress(PAGE)[:-4])
        assert not response.complete
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.phase) == ("upstream", "body")

    async def test_after_a_part_was_taken_it_is_too_late(self, proxy, upstream, expect_log):
        expect_log("decode\\(\\) after a part of the body was taken")

        async def hook(handler, response):
            async for _ in response:
                break
            response.decode()

        running = await proxy(upstream.url, rewrite_response=hook)
        headers = [("Content-Encoding", "gzip")]
        response, _ = await through(running, upstream, headers=headers, body=gzip.compress(PAGE))
        assert response.status == 500


class TestBombs:
    """64 MB in 64 KB."""

    BOMB = gzip.compress(bytes(64 << 20))
    HEADERS = (("Content-Encoding", "gzip"),)

    async def test_buffered_it_is_stopped_at_the_limit(self, proxy, upstream, mode, expect_log):
        expect_log("more than 100000 bytes|larger than 100000 bytes")

        async def hook(handler, response):
            response.decode()
            await response.read()

        running = await proxy(upstream.url, rewrite_response=hook, response_mode=mode, max_buffered_response=100_000)
        response, _ = await through(running, upstream, headers=self.HEADERS, body=self.BOMB)
        assert response.status == 502

    async def test_a_reader_that_does_not_read_stops_it(self, proxy, upstream):
        """So little is held that decoding stands still with most of the bomb undone."""
        given = 0

        def count(handler, chunk):
            nonlocal given
            assert len(chunk) <= 64 * 1024
            given += len(chunk)
            return chunk

        running = await proxy(upstream.url, Decoding, filter_response_body=count)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(200, self.HEADERS, self.BOMB)
        await downstream.read_head()
        before = -1
        while given != before:
            before = given
            await asyncio.sleep(0.1)
        assert given < 16 << 20
        downstream.close()
        await running.next_outcome()

    async def test_the_loop_goes_round_meanwhile(self, proxy, upstream):
        turns = 0

        async def hook(handler, response):
            size = 0
            async for chunk in response.decoded():
                size += len(chunk)
            assert size == 64 << 20
            handler.finish(str(turns))

        running = await proxy(upstream.url, rewrite_response=hook)
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        await conn.respond(200, self.HEADERS, self.BOMB)

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.ensure_future(turn())
        response = await downstream.read_response()
        turning.cancel()
        assert int(response.body) > 30

    async def test_an_encoded_body_holds_the_upstream_back(self, proxy, upstream):
        """What cannot be sent downstream is not read: the upstream's socket fills up."""
        running = await proxy(upstream.url, Decoding)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Transfer-Encoding", "chunked"), *self.HEADERS])
        compressor = zlib.compressobj(0, wbits=31)
        sent = 0
        while sent < 256 << 20:
            try:
                async with asyncio.timeout(0.5):
                    await conn.send_chunk(compressor.compress(os.urandom(1 << 20)))
            except (TimeoutError, AssertionError):
                break
            sent += 1 << 20
        assert sent < 64 << 20
        downstream.close()
        await running.next_outcome()
