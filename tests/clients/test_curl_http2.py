"""CurlClient with HTTP/2 upstream: the contract, and what only HTTP/2 can do."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest
from tornado.httputil import HTTPHeaders

from tests.clients.contract import Aborting, Bodies, Heads
from tests.clients.support import MORE_THAN_HELD, PIECE, collected, filling, request_for, until_it_waits
from tests.clients.wire_contract import failure_of
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import within
from tornado_proxy.errors import UpstreamClosed
from tornado_proxy.flow import BodyPipe

pytest.importorskip("h2", reason="h2, which plays the upstream, is not installed")


from tests.clients.http2_support import OverHTTP2, Suite, begun, frame, warm
from tests.support.h2_upstream import H2Stream, H2Upstream, server_context


class TestContract(OverHTTP2, Heads, Bodies, Aborting):
    """A stream is to it what a connection is in HTTP/1.1."""


class TestRequests(Suite):
    """What the upstream sees; that it is sound, the library that plays the upstream has said already."""

    async def seen(self, client: Any, upstream: H2Upstream, request: Any) -> Any:
        sending = asyncio.ensure_future(client.send(request))
        stream, seen = await upstream.request()
        await stream.respond(200)
        await (await within(sending, "the response")).read()
        return seen

    async def test_no_field_is_invented(self, client, upstream):
        seen = await self.seen(client, upstream, request_for("GET", upstream.url + "/a%2Fb/../c?x=%zz"))
        assert (seen.method, seen.scheme, seen.target) == ("GET", "http", "/a%2Fb/../c?x=%zz")
        assert seen.authority == f"127.0.0.1:{upstream.port}"
        assert seen.headers == []

    async def test_host_is_the_authority(self, client, upstream):
        seen = await self.seen(
            client, upstream, request_for("GET", upstream.url, headers=[("Host", "other.example:81")])
        )
        assert seen.authority == "other.example:81"
        assert not seen.has("Host")

    async def test_fields_are_kept_in_lower_case(self, client, upstream):
        fields = [
            ("X-B", "2"),
            ("X-Empty", ""),
            ("Cookie", "a=b; c=D"),
            ("X-B", "3"),
            ("User-Agent", "Me"),
            ("Te", "trailers"),
        ]
        request = request_for("GET", upstream.url, headers=fields)
        seen = await self.seen(client, upstream, request)
        assert sorted(seen.headers) == sorted((name.lower(), value) for name, value in fields)

    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    async def test_no_body_is_no_body(self, client, upstream, method):
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url)))
        stream = await upstream.accept()
        # Said with the head.
        assert stream.ended
        assert stream.seen.headers == []
        await stream.respond(204)
        assert (await within(sending, "the response")).status == 204

    async def test_an_empty_body_whose_length_nobody_knew_is_none_either(self, client, upstream):
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        stream = await upstream.accept()
        assert not stream.ended
        pipe.close()
        assert await stream.read_body() == b""
        assert stream.seen.headers == []
        await stream.respond(204)
        assert (await within(sending, "the response")).status == 204

    async def test_trailers_stay_here(self, client, upstream):
        """libcurl could have them, as for HTTP/1.1, and does not ask. Once it does, its record is to be changed."""
        assert not client.capabilities.request_trailers
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        stream = await upstream.accept()
        pipe.write(b"hello")
        pipe.trailers = HTTPHeaders({"X-Checksum": "1"})
        pipe.close()
        assert await stream.read_body() == b"hello"
        assert (stream.ended, stream.trailers) == (True, [])
        await stream.respond(204)
        assert (await within(sending, "the response")).status == 204


class TestResponses(Suite):
    async def answered(self, client: Any, upstream: H2Upstream, *args: Any, **more: Any) -> Any:
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        await stream.respond(*args, **more)
        return await within(sending, "the response")

    async def test_trailers_are_there_with_the_end(self, client, upstream):
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        await stream.send_data(b"hello")
        assert await within(response.stream.read(), "the body") == b"hello"
        assert list(response.trailers.get_all()) == []
        stream.send_fields([("grpc-status", "0"), ("grpc-message", ""), ("content-type", "x")], end=True)
        assert await within(collected(response), "the end") == (b"", None)
        assert list(response.trailers.get_all()) == [("Grpc-Status", "0"), ("Grpc-Message", "")]
        assert "Grpc-Status" not in response.headers

    async def test_trailers_behind_no_body(self, client, upstream):
        response = await self.answered(client, upstream, trailers=[("grpc-status", "5")])
        assert await within(collected(response), "the end") == (b"", None)
        assert response.trailers["grpc-status"] == "5"

    async def test_an_answer_that_is_only_a_head_has_ended_with_it(self, client, upstream):
        """gRPC's Trailers-Only: whoever passes it on can say so with the head."""
        response = await self.answered(client, upstream, 200, [("grpc-status", "5")])
        assert response.headers["grpc-status"] == "5"
        assert response.stream.exhausted

    async def test_white_space_around_a_value_is_no_part_of_it(self, client, upstream):
        response = await self.answered(client, upstream, 200, [("x-a", " a "), ("x-b", "b")])
        assert (response.headers["X-A"], response.headers["X-B"]) == ("a", "b")

    async def test_the_version_is_told(self, client, upstream):
        assert (await self.answered(client, upstream)).version == "HTTP/2"


class TestDuplex(Suite):
    """Both bodies at a time, as gRPC's bidirectional streams need them."""

    async def test_each_message_passes_at_once(self, client, upstream):
        pipe = BodyPipe(64 * 1024)
        stream, response = await begun(client, upstream, request_for("POST", upstream.url, pipe))
        for number in range(100):
            message = b"message %d" % number
            pipe.write(message)
            # One frame each, and none waits for another.
            assert await stream.read_piece() == message
            await stream.send_data(message)
            assert await within(response.stream.read(), "the echo") == message
        pipe.close()
        assert await stream.read_piece() == b""
        stream.end()
        assert await within(collected(response), "the end") == (b"", None)

    async def test_an_answer_that_has_ended_ends_the_upload(self, client, upstream):
        """RFC 9113 section 8.1: with RST_STREAM(NO_ERROR) behind it, as gRPC's, Go's and nginx's servers send it."""
        pipe = BodyPipe(1024)
        stream, response = await begun(client, upstream, request_for("POST", upstream.url, pipe))
        await stream.send_data(b"enough")
        stream.send_fields([("grpc-status", "0")], end=True)
        stream.connection.write(frame(3, 0, stream.number, b"\0\0\0\0"))
        assert await within(collected(response), "the end") == (b"enough", None)
        assert response.trailers["grpc-status"] == "0"

    async def test_one_that_has_ended_without_that_ends_with_the_upload(self, client, upstream):
        """libcurl does not say before that the answer is complete."""
        pipe = BodyPipe(1024)
        stream, response = await begun(client, upstream, request_for("POST", upstream.url, pipe))
        await stream.send_data(b"enough", end=True)
        assert await within(response.stream.read(), "the body") == b"enough"
        pipe.write(b"more")
        assert await stream.read_body(4) == b"more"
        assert not response.stream.ended
        pipe.close()
        assert await within(collected(response), "the end") == (b"", None)

    async def test_an_error_that_has_ended_ends_the_upload(self, client, upstream):
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        stream = await upstream.accept()
        await stream.respond(413, [], b"too large")
        response = await within(sending, "the response")
        assert await within(collected(response), "the end") == (b"too large", None)
        assert await within(stream.closed(), "the reset") == "reset"

    async def test_a_window_that_opens_late(self, client):
        """More than the window is waiting; what came while it was shut goes on when it opens, and then the end."""
        async with H2Upstream(window=0) as upstream:
            # By now the client knows the window.
            await warm(client, upstream)
            pipe = BodyPipe(64 * 1024)
            stream, response = await begun(client, upstream, request_for("POST", upstream.url, pipe))
            pipe.write(b"x" * 1000)
            pipe.close()
            await stream.send_data(b"first")
            assert await within(response.stream.read(), "the body") == b"first"
            assert stream.pieces == []
            stream.connection.h2.increment_flow_control_window(600, stream.number)
            stream.connection.flush()
            assert len(await stream.read_body(600)) == 600
            stream.connection.h2.increment_flow_control_window(600, stream.number)
            stream.connection.flush()
            assert len(await stream.read_body()) == 400
            stream.end()
            assert await within(collected(response), "the end") == (b"", None)


class TestMultiplexing(Suite):
    async def test_requests_at_a_time_share_a_connection(self, client, upstream):
        """Also the first ones, for which there is none yet."""
        gate = asyncio.Event()

        async def answer(stream: H2Stream, _: Any) -> None:
            if upstream.accepted == 100:
                gate.set()
            await gate.wait()
            await stream.respond(200, [], b"hello")

        upstream.serve(answer)

        async def one(number: int) -> bytes:
            return await (await client.send(request_for("GET", f"{upstream.url}/{number}"))).read()

        assert await within(asyncio.gather(*map(one, range(100))), "100 responses") == [b"hello"] * 100
        assert len(upstream.connections) == 1

    async def test_as_many_as_the_upstream_takes(self, client):
        async with H2Upstream(max_streams=10) as upstream:
            await warm(client, upstream)
            held = [await begun(client, upstream, request_for("GET", upstream.url)) for _ in range(10)]
            assert len(upstream.connections) == 1
            held.append(await begun(client, upstream, request_for("GET", upstream.url)))
            assert len(upstream.connections) == 2
            for stream, response in held:
                stream.end()
                assert await within(collected(response), "the end") == (b"", None)

    async def test_without_it_each_has_a_connection(self, make_client, upstream):
        client = make_client(multiplex=False)
        sending = [asyncio.ensure_future(client.send(request_for("GET", upstream.url))) for _ in range(5)]
        for stream in [await upstream.accept() for _ in sending]:
            await stream.respond(200)
        for response in await within(asyncio.gather(*sending), "the responses"):
            await response.read()
        assert len(upstream.connections) == 5
        # Kept, and used again.
        await warm(client, upstream)
        assert len(upstream.connections) == 5

    async def test_without_it_a_stalled_reader_costs_no_memory(self, make_client, upstream):
        """While nobody reads, nothing is read: what is on its way stays in the kernel, as with HTTP/1.1."""
        client = make_client(multiplex=False)
        _, busy = await begun(client, upstream, request_for("GET", upstream.url))
        before = psutil.Process().memory_info().rss
        stalled = []
        for _ in range(5):
            stream, response = await begun(client, upstream, request_for("GET", upstream.url, buffer_size=64 * 1024))
            stalled.append(response)

            async def step(stream: H2Stream = stream) -> int:
                await stream.send_data(PIECE)
                return len(PIECE)

            await until_it_waits(step)
            await warm(client, upstream)
        # With a shared connection, it would be 100 MB.
        assert psutil.Process().memory_info().rss - before < 16 * 1024 * 1024
        for response in [busy, *stalled]:
            response.abort()

    async def test_a_stalled_reader_holds_up_no_other(self, client, upstream):
        stream, stalled = await begun(client, upstream, request_for("GET", upstream.url, buffer_size=64 * 1024))

        async def step() -> int:
            await stream.send_data(PIECE)
            return len(PIECE)

        assert await until_it_waits(step) < MORE_THAN_HELD
        for _ in range(3):
            await warm(client, upstream)
        assert len(upstream.connections) == 1
        assert stalled.stream.size <= 2 * 64 * 1024
        stalled.abort()
        await within(stream.closed(), "the reset", 1.0)

    async def test_an_upload_that_nobody_takes_holds_up_no_other(self, client, upstream):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        stream = await upstream.accept()
        held = await until_it_waits(filling(pipe))
        # The stream's window, what libcurl holds, and ours.
        assert held <= 4 * 64 * 1024
        other = BodyPipe(64 * 1024)
        passing = asyncio.ensure_future(client.send(request_for("POST", upstream.url, other)))
        taking = await upstream.accept()
        taken = asyncio.ensure_future(taking.read_body())
        for _ in range(16):
            if (room := other.write(PIECE)) is not None:
                await within(room, "room")
        other.close()
        assert await within(taken, "the body") == 16 * PIECE
        await taking.respond(200)
        assert (await within(passing, "the response")).status == 200
        assert len(upstream.connections) == 1
        pipe.close()
        assert len(await stream.read_body()) >= held
        await stream.respond(200)
        assert (await within(sending, "the response")).status == 200

    async def test_a_connection_that_was_closed_while_idle_is_not_used(self, client, upstream):
        await warm(client, upstream)
        upstream.connections[0].writer.close()
        await within(upstream.connections[0].lost.wait(), "closing")
        error = await failure_of(client, request_for("POST", upstream.url))
        # Not a byte has left; the forwarder asks again for a new one.
        assert (type(error), error.retry) == (UpstreamClosed, "always")
        assert upstream.accepted == 1
        # And nobody meets the old one again.
        await warm(client, upstream)
        await warm(client, upstream)
        assert len(upstream.connections) == 2

    async def test_a_fresh_one_where_asked_for(self, client, upstream):
        await warm(client, upstream)
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url, fresh_connection=True)))
        stream, _ = await upstream.request()
        await stream.respond(200)
        await (await within(sending, "the response")).read()
        assert len(upstream.connections) == 2

    async def test_pings_are_answered(self, client, upstream):
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        stream.connection.h2.ping(b"12345678")
        stream.connection.flush()
        await within(stream.connection.pong.wait(), "the answer to a ping")
        response.abort()


class TestOverTLS(Suite):
    @pytest.fixture
    async def upstream(self, certificates):
        async with H2Upstream(tls=server_context(certificates)) as upstream:
            yield upstream

    @pytest.fixture
    async def client(self, make_client, certificates):
        return make_client(http_version="2", ca_certs=str(certificates.root))

    async def test_http_2_is_agreed_on(self, client, upstream):
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        assert (response.version, stream.seen.scheme) == ("HTTP/2", "https")
        await stream.send_data(b"hello", end=True)
        assert await within(collected(response), "the end") == (b"hello", None)

    async def test_or_http_1_1(self, client, certificates):
        """Where the upstream does not know HTTP/2. TE is then for this connection only, and says so."""
        context = server_context(certificates)
        context.set_alpn_protocols(["http/1.1"])
        heads = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        response = await within(client.send(request_for("GET", url, headers=[("Te", "trailers")])), "the response")
        assert (response.version, await response.read()) == ("HTTP/1.1", b"hello")
        assert sorted(heads[0].split(b"\r\n")[2:]) == [b"", b"", b"Connection: TE", b"Te: trailers"]
        server.close()

    async def test_a_plain_url_is_http_1_1(self, client):
        async with ScriptedUpstream() as upstream:
            sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
            conn, request = await upstream.request()
            assert request.version == "HTTP/1.1"
            assert not request.has("Upgrade")
            await conn.respond(200)
            assert (await within(sending, "the response")).version == "HTTP/1.1"
