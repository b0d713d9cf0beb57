"""CurlClient with HTTP/2 upstream: the contract, and what only HTTP/2 can do or do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

from tests.clients.contract import Aborting, Bodies, Heads
from tests.clients.support import MORE_THAN_HELD, PIECE, collected, filling, request_for, until_it_waits
from tests.clients.wire_contract import failure_of
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import within
from tornado_proxy.clients.base import HTTPClient
from tornado_proxy.clients.curl import CurlClient
from tornado_proxy.errors import InvalidResponse, UpstreamClosed, UpstreamError
from tornado_proxy.flow import BodyPipe

pytest.importorskip("h2", reason="h2, which plays the upstream, is not installed")

import hpack
from h2.errors import ErrorCodes

from tests.support.h2_upstream import H2Stream, H2Upstream, server_context

OK = [(":status", "200")]
DATA, HEADERS, PING, SETTINGS, PUSH_PROMISE, WINDOW_UPDATE, CONTINUATION = 0, 1, 6, 4, 5, 8, 9
END_STREAM, END_HEADERS = 1, 4


class OverHTTP2:
    client_class = CurlClient
    http1 = False

    @classmethod
    def make(cls, **options: Any) -> HTTPClient:
        return CurlClient(**{"http_version": "2-prior-knowledge", **options})

    @pytest.fixture
    async def upstream(self) -> AsyncIterator[H2Upstream]:
        async with H2Upstream() as upstream:
            yield upstream


class TestContract(OverHTTP2, Heads, Bodies, Aborting):
    """A stream is to it what a connection is in HTTP/1.1."""


class Suite(OverHTTP2):
    @pytest.fixture
    async def make_client(self) -> AsyncIterator[Any]:
        with contextlib.ExitStack() as stack:

            def make(**options: Any) -> HTTPClient:
                client = self.make(**options)
                stack.callback(client.close)
                return client

            yield make

    @pytest.fixture
    async def client(self, make_client: Any) -> HTTPClient:
        return make_client()


async def warm(client: HTTPClient, upstream: H2Upstream) -> None:
    """Have the client make its connection."""
    sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url + "/warm")))
    stream, _ = await upstream.request()
    await stream.respond(200, [], b"warm")
    assert await (await within(sending, "the response")).read() == b"warm"


async def begun(client: HTTPClient, upstream: H2Upstream, request: Any) -> tuple[H2Stream, Any]:
    """Return the stream and the response, whose head is there and whose body is not."""
    sending = asyncio.ensure_future(client.send(request))
    stream = await upstream.accept()
    await stream.send_head(200)
    return stream, await within(sending, "the response")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def encoded(*fields: tuple[str, str]) -> bytes:
    return hpack.Encoder().encode(fields)


async def hang_up(stream: H2Stream) -> None:
    stream.connection.writer.close()


async def reset_connection(stream: H2Stream) -> None:
    sock = stream.connection.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.connection.writer.transport.abort()


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


REFUSALS = {
    "refused": lambda stream: stream.reset(ErrorCodes.REFUSED_STREAM),
    "goaway": lambda stream: stream.connection.send_goaway(stream.number - 2 if stream.number > 1 else 0),
}


class TestARefusedStream(Suite):
    """RFC 9113 section 8.7: not looked at, so safe to send again. That is the forwarder's choice, and not libcurl's."""

    @pytest.mark.parametrize("reused", [False, True], ids=["new", "reused"])
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    @pytest.mark.parametrize("body", [None, b"hello"], ids=["", "body"])
    @pytest.mark.parametrize("how", REFUSALS)
    async def test_may_always_be_sent_again(self, client, upstream, reused, method, body, how):
        if reused:
            await warm(client, upstream)
        sending = asyncio.ensure_future(failure_of(client, request_for(method, upstream.url, body)))
        stream, _ = await upstream.request()
        REFUSALS[how](stream)
        error = await sending
        assert type(error) is UpstreamClosed
        assert (error.retry, error.phase, error.status_code, error.upstream) == ("always", "head", 502, upstream.url)
        assert upstream.accepted == 1 + reused

    async def test_also_where_the_connection_ends_with_it(self, client, upstream):
        await warm(client, upstream)
        sending = asyncio.ensure_future(failure_of(client, request_for("POST", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.send_goaway(1)
        await hang_up(stream)
        assert (await sending).retry == "always"

    async def test_those_before_it_go_on(self, client, upstream):
        first, response = await begun(client, upstream, request_for("GET", upstream.url))
        second = asyncio.ensure_future(failure_of(client, request_for("POST", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.send_goaway(first.number)
        assert (await second).retry == "always"
        await first.send_data(b"hello", end=True)
        assert await within(collected(response), "the end") == (b"hello", None)
        # The next one has a connection of its own.
        await warm(client, upstream)
        assert len(upstream.connections) > 1

    async def test_behind_a_head_it_is_a_cut(self, client, upstream):
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        stream.reset(ErrorCodes.REFUSED_STREAM)
        _, error = await within(collected(response), "the failure")
        assert type(error) is UpstreamClosed
        assert (error.phase, error.retry) == ("body", "if-idempotent")


class TestABrokenStream(Suite):
    @pytest.mark.parametrize("reused", [False, True], ids=["new", "reused"])
    @pytest.mark.parametrize("body", [None, b"hello"], ids=["", "body"])
    @pytest.mark.parametrize(
        "code",
        [
            ErrorCodes.NO_ERROR,
            ErrorCodes.PROTOCOL_ERROR,
            ErrorCodes.INTERNAL_ERROR,
            ErrorCodes.CANCEL,
            ErrorCodes.ENHANCE_YOUR_CALM,
            # libcurl would send it again, whatever it is.
            ErrorCodes.HTTP_1_1_REQUIRED,
        ],
    )
    async def test_no_answer(self, client, upstream, reused, body, code):
        if reused:
            await warm(client, upstream)
        sending = asyncio.ensure_future(failure_of(client, request_for("POST", upstream.url, body)))
        stream, _ = await upstream.request()
        stream.reset(code)
        error = await sending
        assert type(error) is UpstreamClosed
        assert (error.retry, error.phase, error.upstream) == ("if-idempotent", "head", upstream.url)
        assert code is ErrorCodes.NO_ERROR or code.name in str(error)
        assert upstream.accepted == 1 + reused

    @pytest.mark.parametrize("reused", [False, True], ids=["new", "reused"])
    @pytest.mark.parametrize("body", [None, b"hello"], ids=["", "body"])
    @pytest.mark.parametrize("break_off", [hang_up, reset_connection])
    async def test_no_connection(self, client, upstream, reused, body, break_off):
        if reused:
            await warm(client, upstream)
        sending = asyncio.ensure_future(failure_of(client, request_for("POST", upstream.url, body)))
        stream, _ = await upstream.request()
        await break_off(stream)
        error = await sending
        assert type(error) is UpstreamClosed
        assert error.retry == "if-idempotent"
        assert upstream.accepted == 1 + reused

    @pytest.mark.parametrize("length", [[], [("content-length", "10")]], ids=["", "length"])
    @pytest.mark.parametrize(
        "code", [ErrorCodes.INTERNAL_ERROR, ErrorCodes.CANCEL, ErrorCodes.HTTP_1_1_REQUIRED, hang_up, reset_connection]
    )
    async def test_half_a_body(self, client, upstream, length, code):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        await stream.send_head(200, length)
        await stream.send_data(b"half")
        response = await within(sending, "the response")
        assert await within(response.stream.read(), "the half") == b"half"
        if callable(code):
            await code(stream)
        else:
            stream.reset(code)
        _, error = await within(collected(response), "the failure")
        assert type(error) is UpstreamClosed
        assert error.phase == "body"
        assert upstream.accepted == 1

    async def test_it_breaks_no_other(self, client, upstream):
        staying, response = await begun(client, upstream, request_for("GET", upstream.url))
        stream, breaking = await begun(client, upstream, request_for("GET", upstream.url))
        stream.reset(ErrorCodes.INTERNAL_ERROR)
        _, error = await within(collected(breaking), "the failure")
        assert isinstance(error, UpstreamClosed)
        await staying.send_data(b"hello", end=True)
        assert await within(collected(response), "the end") == (b"hello", None)
        assert len(upstream.connections) == 1

    async def test_aborting_one_resets_only_that(self, client, upstream):
        staying, response = await begun(client, upstream, request_for("GET", upstream.url))
        leaving, aborted = await begun(client, upstream, request_for("GET", upstream.url))
        aborted.abort()
        assert await within(leaving.closed(), "the reset", 1.0) == "reset"
        await staying.send_data(b"hello", end=True)
        assert await within(collected(response), "the end") == (b"hello", None)


def fields_of(*fields: tuple[str, str], flags: int = END_HEADERS | END_STREAM) -> Any:
    return lambda number: frame(HEADERS, flags, number, encoded(*fields))


BROKEN_HEADS = {
    "no status": fields_of(("x-a", "1")),
    "status 101": fields_of((":status", "101")),
    "status 20": fields_of((":status", "20")),
    "status 999": fields_of((":status", "999")),
    "two statuses": fields_of(*OK, *OK),
    "upper case": fields_of(*OK, ("Upper", "1")),
    "connection": fields_of(*OK, ("connection", "close")),
    "transfer-encoding": fields_of(*OK, ("transfer-encoding", "chunked")),
    "a request's field": fields_of(*OK, ("te", "gzip")),
    "two lengths": fields_of(*OK, ("content-length", "5"), ("content-length", "6")),
    "data before the head": lambda number: frame(DATA, 0, number, b"hello"),
    "half a block": lambda number: frame(HEADERS, END_HEADERS, number, b"\xff\xff\xff\xff\xff\xff"),
    "a push": lambda number: frame(PUSH_PROMISE, END_HEADERS, number, b"\0\0\0\2" + encoded((":method", "GET"))),
    "HTTP/1.1": lambda number: b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 3,
    "too large a frame": lambda number: frame(DATA, 0, number, b"x" * 20_000),
    "a window beyond all": lambda number: frame(WINDOW_UPDATE, 0, number, b"\x7f\xff\xff\xff") * 2,
    "a small block that is large": lambda number: frame(
        HEADERS, END_HEADERS, number, encoded(*OK, ("x-b", "v" * 4000)) + b"\xbe" * 12_000
    ),
}


class TestNonsense(Suite):
    """What is malformed is never taken for what it is not (RFC 9113 section 8.1.1)."""

    @pytest.mark.parametrize("what", BROKEN_HEADS)
    async def test_no_head(self, client, upstream, what):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(BROKEN_HEADS[what](stream.number))
        error = await sending
        assert type(error) is InvalidResponse
        assert (error.phase, error.retry, error.status_code) == ("head", "never", 502)

    async def test_what_may_be_a_secret_is_not_repeated(self, client, upstream):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(fields_of(*OK, ("Set-Cookie", "secret"))(stream.number))
        message = str(await sending)
        assert "Set-Cookie" in message
        assert "secret" not in message

    @pytest.mark.parametrize("value", ["a\r\nset-cookie: b=1", "a\0b", "a\nb"])
    async def test_a_field_that_would_be_two_is_left_out(self, client, upstream, value):
        """nghttp2 leaves out what is no field."""
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(fields_of(*OK, ("x-a", value), ("x-b", "1"))(stream.number))
        response = await within(sending, "the response")
        assert list(response.headers.get_all()) == [("X-B", "1")]

    @pytest.mark.parametrize(("length", "body"), [(3, b"hello"), (30, b"hello"), (3, b"")])
    async def test_a_length_that_lies(self, client, upstream, length, body):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        await stream.respond(200, [("content-length", str(length))], body, trailers=[] if body else [("x-a", "1")])
        try:
            response = await within(sending, "the response")
        except InvalidResponse:
            return
        had, error = await within(collected(response), "the failure")
        assert body.startswith(had)
        assert type(error) is InvalidResponse

    @pytest.mark.parametrize("fields", [OK, [("connection", "close")], [("Upper", "1")]])
    async def test_trailers_that_are_none(self, client, upstream, fields):
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        await stream.send_data(b"hello")
        assert await within(response.stream.read(), "the body") == b"hello"
        stream.connection.write(fields_of(*fields)(stream.number))
        _, error = await within(collected(response), "the failure")
        assert type(error) is InvalidResponse

    async def test_too_many_interim_responses(self, client, upstream):
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(fields_of((":status", "103"), flags=END_HEADERS)(stream.number) * 30)
        assert type(await sending) is InvalidResponse

    @pytest.mark.parametrize("fragment", [b"", encoded(("x-a", "v" * 1000))], ids=["empty", "full"])
    async def test_a_head_that_never_ends(self, client, upstream, fragment):
        """CERT VU#421644."""
        _, response = await begun(client, upstream, request_for("GET", upstream.url))
        sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(fields_of(*OK, flags=0)(stream.number))
        stream.connection.write(frame(CONTINUATION, 0, stream.number, fragment) * 400)
        assert type(await sending) is InvalidResponse
        # Those that share the connection are told, and it is not used again.
        _, error = await within(collected(response), "the failure")
        assert isinstance(error, InvalidResponse)
        assert (await failure_of(client, request_for("POST", upstream.url))).retry == "always"
        await warm(client, upstream)
        assert (upstream.accepted, len(upstream.connections)) == (3, 2)

    @pytest.mark.parametrize(
        "what", ["data before the head", "half a block", "HTTP/1.1", "too large a frame", "a push"]
    )
    async def test_whoever_shares_the_connection_is_told(self, client, upstream, what):
        """libcurl leaves them waiting."""
        _, response = await begun(client, upstream, request_for("GET", upstream.url))
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        stream, _ = await upstream.request()
        stream.connection.write(BROKEN_HEADS[what](stream.number))
        with pytest.raises(UpstreamError):
            await within(sending, "the failure")
        _, error = await within(collected(response), "the failure")
        assert isinstance(error, UpstreamError)
        await warm(client, upstream)

    @pytest.mark.parametrize("flood", [frame(PING, 0, 0, b"12345678"), frame(SETTINGS, 0, 0)], ids=["ping", "settings"])
    async def test_a_flood_of_what_asks_for_answers_ends_the_connection(self, client, upstream, flood):
        """CVE-2019-9512 and CVE-2019-9515: no more than a thousand answers wait to be sent."""
        stream, response = await begun(client, upstream, request_for("GET", upstream.url))
        stream.connection.write(flood * 500)
        await stream.send_data(b"hello")
        assert await within(response.stream.read(), "the body") == b"hello"
        stream.connection.write(flood * 20_000)
        _, error = await within(collected(response), "the failure")
        assert isinstance(error, InvalidResponse)


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
        for _ in range(16):
            if (room := other.write(PIECE)) is not None:
                assert await taking.read_body(len(PIECE)) == PIECE
                await within(room, "room")
        other.close()
        await taking.read_body()
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
