"""HTTP/2 to the upstream: what the downstream sees of streams that are refused, reset, and left."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("h2", reason="h2, which plays the upstream, is not installed")

from h2.errors import ErrorCodes

from tests.support.h2_upstream import H2Upstream

OPTIONS = {"client": "curl", "client_options": {"http_version": "2-prior-knowledge"}}


@pytest.fixture
async def upstream(upstreams):
    async with H2Upstream() as upstream:
        upstreams.append(upstream)
        yield upstream


class TestRefusedStreams:
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    async def test_are_sent_again(self, proxy, upstream, method):
        running = await proxy(upstream.url, **OPTIONS)
        downstream = await running.ask(method, "/x")
        stream, _ = await upstream.request()
        stream.reset(ErrorCodes.REFUSED_STREAM)
        again, request = await upstream.request()
        assert request.method == method
        await again.respond(200, [], b"hello")
        assert (await downstream.read_response()).body == b"hello"
        assert (await running.next_outcome()).attempts == 2

    async def test_not_where_a_part_of_the_body_is_gone(self, proxy, upstream, expect_log):
        expect_log("refused the stream")
        running = await proxy(upstream.url, **OPTIONS)
        downstream = await running.ask("POST", "/x", [], b"hello")
        stream, _ = await upstream.request()
        stream.reset(ErrorCodes.REFUSED_STREAM)
        assert (await downstream.read_response()).status == 502
        assert upstream.accepted == 1

    async def test_more_requests_than_the_upstream_takes_at_a_time(self, proxy, upstreams):
        async with H2Upstream(max_streams=10) as upstream:
            upstreams.append(upstream)
            gate = asyncio.Event()

            async def answer(stream, _):
                if upstream.accepted == 30:
                    gate.set()
                await gate.wait()
                await stream.respond(200, [], b"hello")

            upstream.serve(answer)
            running = await proxy(upstream.url, **OPTIONS)
            responses = await asyncio.gather(*(running.get(f"/{number}") for number in range(30)))
            assert [response.body for response in responses] == [b"hello"] * 30


class TestBrokenStreams:
    async def test_a_post_is_not_sent_again(self, proxy, upstream, expect_log):
        expect_log("reset by server")
        running = await proxy(upstream.url, **OPTIONS)
        downstream = await running.ask("POST", "/x")
        stream, _ = await upstream.request()
        stream.reset(ErrorCodes.HTTP_1_1_REQUIRED)
        assert (await downstream.read_response()).status == 502
        assert upstream.accepted == 1

    async def test_half_a_body_is_seen_to_be_half(self, proxy, upstream, expect_log):
        expect_log("reset by server")
        running = await proxy(upstream.url, **OPTIONS)
        downstream = await running.ask("GET", "/x")
        stream, _ = await upstream.request()
        await stream.send_head(200)
        await stream.send_data(b"half")
        await downstream.read_head()
        assert await downstream.read_body(4) == b"half"
        stream.reset(ErrorCodes.INTERNAL_ERROR)
        assert b"0\r\n\r\n" not in await downstream.read_until_closed()
        assert (await running.next_outcome()).phase == "body"

    async def test_a_connection_that_died_while_idle_costs_no_request(self, proxy, upstream):
        running = await proxy(upstream.url, **OPTIONS)
        for _ in range(3):
            downstream = await running.ask("POST", "/x", [], b"hello")
            stream, _ = await upstream.request()
            await stream.respond(200)
            assert (await downstream.read_response()).status == 200
            stream.connection.writer.close()
            await stream.connection.lost.wait()
        assert [outcome.attempts for outcome in running.outcomes] == [1, 2, 2]


class TestWhoLeaves:
    async def test_takes_only_its_own_stream_along(self, proxy, upstream):
        running = await proxy(upstream.url, **OPTIONS)
        leaving, staying = await running.ask("GET", "/leaving"), await running.ask("GET", "/staying")
        streams = {}
        for _ in range(2):
            stream, request = await upstream.request()
            streams[request.target] = stream
        leaving.close()
        assert await streams["/leaving"].closed() == "reset"
        await streams["/staying"].respond(200, [], b"hello")
        assert (await staying.read_response()).body == b"hello"


class TestHeads:
    async def test_what_is_for_one_connection_stays_there(self, proxy, upstream):
        running = await proxy(upstream.url, **OPTIONS)
        fields = [("TE", "trailers"), ("Connection", "TE, X-A"), ("X-A", "1"), ("Keep-Alive", "1"), ("X-B", "2")]
        downstream = await running.ask("GET", "/x", fields)
        stream, request = await upstream.request()
        assert {name for name in request.names if not name.startswith("x-forwarded")} == {"x-b", "via"}
        await stream.respond(200, [("x-c", "3")], b"hello", trailers=[("x-d", "4")])
        response = await downstream.read_response()
        assert (response.status, response.body) == (200, b"hello")
        assert (response.header("X-C"), response.has("X-D")) == ("3", False)
        assert response.header("Via") == "2 tornado_proxy"

    async def test_the_host_is_the_upstream_or_the_downstreams(self, proxy, upstream):
        for keep, expected in [(False, f"127.0.0.1:{upstream.port}"), (True, "front.example")]:
            running = await proxy(upstream.url, preserve_host_header=keep, **OPTIONS)
            downstream = await running.ask("GET", "/x", [("Host", "front.example")])
            stream, request = await upstream.request()
            assert request.authority == expected
            await stream.respond(200)
            await downstream.read_response()

    async def test_an_upload_whose_length_nobody_knows(self, proxy, upstream):
        running = await proxy(upstream.url, **OPTIONS)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        stream = await upstream.accept()
        assert await stream.read_body(3) == b"one"
        await downstream.send(b"0\r\n\r\n")
        assert await stream.read_body() == b""
        assert not stream.seen.has("Content-Length")
        await stream.respond(200)
        assert (await downstream.read_response()).status == 200

    async def test_trailers_of_a_request_stay_here(self, proxy, upstream):
        """libcurl sends none over HTTP/2."""
        running = await proxy(upstream.url, server_options={"http2": True}, **OPTIONS)
        downstream = await running.connect()
        await downstream.send(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n")
        await downstream.send(b"3\r\none\r\n0\r\nX-A: 1\r\n\r\n")
        stream, request = await upstream.request()
        assert (request.body, stream.trailers, request.has("Trailer")) == (b"one", [], False)
        await stream.respond(200)
        assert (await downstream.read_response()).status == 200
