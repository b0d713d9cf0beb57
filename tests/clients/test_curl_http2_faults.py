"""CurlClient with HTTP/2 upstreams that refuse, break off, or talk nonsense."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.clients.support import collected, request_for
from tests.clients.wire_contract import failure_of
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import within
from tornado_proxy.errors import InvalidResponse, UpstreamClosed, UpstreamError

pytest.importorskip("h2", reason="h2, which plays the upstream, is not installed")

from h2.errors import ErrorCodes

from tests.clients.http2_support import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    OK,
    PING,
    PUSH_PROMISE,
    SETTINGS,
    WINDOW_UPDATE,
    Suite,
    begun,
    encoded,
    frame,
    hang_up,
    reset_connection,
    warm,
)

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

    @pytest.mark.parametrize("closes", [False, True])
    async def test_an_upstream_that_speaks_only_http_1_1(self, client, closes):
        async with ScriptedUpstream() as upstream:
            sending = asyncio.ensure_future(failure_of(client, request_for("GET", upstream.url)))
            conn = await upstream.accept()
            assert (await conn.read_some()).startswith(b"PRI * HTTP/2.0")
            await conn.respond(400)
            if closes:
                conn.close()
            error = await within(sending, "the failure", 1.0)
            assert type(error) is InvalidResponse
            assert "does not support HTTP/2" in str(error)

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
