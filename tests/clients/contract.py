"""The contract of an HTTPClient: what the forwarder relies on, whatever the client. Each client's file runs it.

Here is what holds without a network too, so that ``FakeClient`` passes it; the rest is in `wire_contract`. Where a
client declares that it cannot do something (``Capabilities``), the contract asserts what happens instead: a record that
says less than the truth fails, and so does one that says more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.clients.support import (
    MORE_THAN_HELD,
    PIECE,
    STILL,
    collected,
    filling,
    request_for,
    until_it_waits,
)
from tests.support.wire import within
from tornado_proxy.clients.base import Capabilities, HTTPClient
from tornado_proxy.errors import DownstreamClosed, ProxyError, UpstreamClosed, UpstreamError
from tornado_proxy.flow import BodyPipe

CHUNKED = [("Transfer-Encoding", "chunked")]
SECOND = 1.0


class Suite:
    """What every part of the contract is run with."""

    client_class: type[HTTPClient]
    # The client's name in NAMES, where it has one.
    name: str | None = None
    # What is only in HTTP/1.1: chunks, and reason phrases.
    http1: bool = True

    @classmethod
    def make(cls, **options: Any) -> HTTPClient:
        return cls.client_class(**options)

    async def dispose(self) -> None:
        """Close what `make` made beside clients."""

    @pytest.fixture
    async def make_client(self) -> AsyncIterator[Any]:
        """Make clients, which are closed at the end and must then have left nothing."""
        before = asyncio.all_tasks()
        made = []

        def make(**options: Any) -> HTTPClient:
            made.append(self.make(**options))
            return made[-1]

        yield make
        for client in made:
            client.close()
            client.close()
            await within(client.wait_closed(), "closing the client")
        await self.dispose()
        left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}
        if left:
            await asyncio.wait(left, timeout=1)
        assert [task for task in left if not task.done()] == []

    @pytest.fixture
    async def client(self, make_client: Any) -> HTTPClient:
        return make_client()

    @pytest.fixture
    async def can(self, client: HTTPClient) -> Capabilities:
        return client.capabilities


async def begun(client: HTTPClient, upstream: Any, request: Any, headers: Any = CHUNKED) -> tuple[Any, Any]:
    """Return the upstream's connection and the response, whose head is there and whose body is not."""
    sending = asyncio.ensure_future(client.send(request))
    conn = await upstream.accept()
    await conn.read_head()
    await conn.send_head(200, headers)
    return conn, await within(sending, "the response")


class Heads(Suite):
    async def test_a_response_is_there_before_its_body(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url + "/x"))
        assert (response.status, response.reason, response.upstream) == (200, "OK" if self.http1 else "", upstream.url)
        await conn.send_chunk(b"one")
        assert await within(response.stream.read(), "the first chunk") == b"one"
        await conn.send_chunk(b"two")
        assert await within(response.stream.read(), "the second chunk") == b"two"
        await conn.send_chunk(b"")
        assert await within(response.stream.read(), "the end") == b""
        assert response.timings["head"] <= response.timings["upstream"]

    async def test_it_says_when_it_begins_to_send_if_it_can(self, client, can, upstream):
        told = []
        for number in (1, 2):
            request = request_for("GET", upstream.url + "/x", on_sending=lambda: told.append("sending"))
            _, response = await begun(client, upstream, request)
            assert told == ["sending"] * (number if can.tells_sending else 0)
            response.abort()

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
    async def test_any_method_has_an_answer(self, client, upstream, method):
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url + "/x")))
        conn, request = await upstream.request()
        assert (request.method, request.body) == (method, b"")
        await conn.respond(201, [("X-A", "1")], b"hello", reason="Made")
        response = await within(sending, "the response")
        assert (response.status, response.reason) == (201, "Made" if self.http1 else "")
        assert response.headers["X-A"] == "1"
        assert await response.read() == b"hello"

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304), ("HEAD", 404)])
    async def test_some_answers_have_no_body(self, client, upstream, method, status):
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url + "/x")))
        conn, _ = await upstream.request()
        await conn.respond(status, [] if status == 204 else [("Content-Length", "5")])
        response = await within(sending, "the response")
        assert response.status == status
        if status != 204:
            assert response.headers["Content-Length"] == "5"
        assert await within(collected(response), "the end") == (b"", None)

    async def test_repeated_fields_stay_in_order(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        fields = [("Set-Cookie", "a=1, 2"), ("X-B", "b"), ("Set-Cookie", "b=2"), ("X-Empty", "")]
        await conn.respond(200, fields)
        response = await within(sending, "the response")
        assert response.headers.get_list("Set-Cookie") == ["a=1, 2", "b=2"]
        assert (response.headers["X-B"], response.headers["X-Empty"]) == ("b", "")
        await response.read()

    async def test_interim_responses_are_told_and_not_returned(self, client, can, upstream):
        told: list[Any] = []

        def on_interim(status, reason, headers):
            told.append((status, headers.get_list("Link")))

        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url, on_interim=on_interim)))
        conn, _ = await upstream.request()
        await conn.send_head(103, [("Link", "</a>"), ("Link", "</b>")])
        await conn.send_head(103, [("Link", "</c>")])
        await conn.respond(200, [], b"hello")
        response = await within(sending, "the response")
        assert (response.status, "Link" in response.headers) == (200, False)
        assert await response.read() == b"hello"
        assert told == ([(103, ["</a>", "</b>"]), (103, ["</c>"])] if can.interim else [])


class Bodies(Suite):
    """Both are pulled: who does not read makes the other end wait."""

    async def test_a_response_that_nobody_reads_stalls_the_upstream(self, client, upstream):
        request = request_for("GET", upstream.url, buffer_size=64 * 1024)
        conn, response = await begun(client, upstream, request)

        async def step() -> int:
            await conn.send_chunk(PIECE)
            return len(PIECE)

        held = await until_it_waits(step)
        assert held < MORE_THAN_HELD
        assert response.stream.size <= 4 * 64 * 1024
        # Room is used as soon as it is there.
        taken = 0
        while taken < held:
            taken += len(await within(response.stream.read(), "what was held"))
        response.abort()
        await within(conn.closed(), "closing", SECOND)

    async def test_an_upload_that_nobody_reads_stalls(self, client, upstream):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        held = await until_it_waits(filling(pipe))
        assert pipe.size <= 2 * 64 * 1024
        pipe.close()
        body = await within(conn.read_body(), "the upload")
        assert len(body) >= held
        await conn.respond(200)
        await (await within(sending, "the response")).read()

    async def test_pieces_of_an_upload_pass_as_they_come(self, client, upstream):
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        for piece in (b"one", b"two", b"three"):
            pipe.write(piece)
            assert await conn.read_body(len(piece)) == piece
        pipe.close()
        assert await conn.read_body() == b""
        await conn.respond(200)
        assert (await within(sending, "the response")).status == 200

    @pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
    @pytest.mark.parametrize("body", [b"", b"hello", "length", "chunked"])
    async def test_a_body_arrives_whole(self, client, upstream, method, body):
        sent: Any = body
        if isinstance(body, str):
            sent = BodyPipe(1024, 10 if body == "length" else None)
            sent.write(b"0123456789")
            sent.close()
        sending = asyncio.ensure_future(client.send(request_for(method, upstream.url, sent)))
        conn, request = await upstream.request()
        assert request.body == (b"0123456789" if isinstance(body, str) else body)
        lengths, codings = request.all("Content-Length"), request.all("Transfer-Encoding")
        if body == "chunked":
            assert (lengths, codings) == ([], ["chunked"] if self.http1 else [])
        else:
            assert (lengths, codings) == ([str(len(request.body))], [])
        await conn.respond(200, [], b"hello")
        assert await (await within(sending, "the response")).read() == b"hello"

    async def test_an_answer_may_come_before_the_upload_is_done(self, client, can, upstream):
        pipe = BodyPipe(1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        await conn.send_head(200, CHUNKED)
        if not can.early_response:
            await asyncio.wait([sending], timeout=STILL)
            assert not sending.done()
        else:
            response = await within(sending, "the early response")
            await conn.send_chunk(b"early")
            assert await within(response.stream.read(), "an early chunk") == b"early"
        pipe.write(b"late")
        assert await conn.read_body(4) == b"late"
        pipe.close()
        assert await conn.read_body() == b""
        await conn.send_chunk(b"end")
        await conn.send_chunk(b"")
        response = await within(sending, "the response")
        assert await within(collected(response), "the end") == (b"end", None)

    async def test_an_upload_that_breaks_off_is_not_made_whole(self, client, upstream):
        pipe = BodyPipe(1024, 10)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        pipe.write(b"half")
        assert await conn.read_body(4) == b"half"
        error = DownstreamClosed("gone")
        pipe.fail(error)
        await within(conn.closed(), "closing", SECOND)
        with pytest.raises(DownstreamClosed) as caught:
            await within(sending, "the failure")
        assert caught.value is error

    async def test_a_response_that_breaks_off_says_so(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))
        await conn.send_chunk(b"half")
        assert await within(response.stream.read(), "the first chunk") == b"half"
        conn.close()
        body, error = await within(collected(response), "the failure")
        assert body == b""
        assert isinstance(error, UpstreamClosed)
        assert (error.side, error.phase, error.upstream) == ("upstream", "body", upstream.url)


class Aborting(Suite):
    """Wherever a transfer is ended, the upstream sees it within a second."""

    async def test_before_the_head_by_cancelling(self, client, upstream):
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        conn, _ = await upstream.request()
        sending.cancel()
        await within(conn.closed(), "closing", SECOND)
        with pytest.raises(asyncio.CancelledError):
            await sending

    async def test_an_idle_response(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))
        await conn.send_chunk(b"one")
        await response.stream.read()
        response.abort()
        await within(conn.closed(), "closing", SECOND)
        response.abort()

    async def test_a_response_that_is_held_back(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url, buffer_size=1024))

        async def step() -> int:
            await conn.send_chunk(PIECE)
            return len(PIECE)

        await until_it_waits(step)
        response.abort()
        await within(conn.closed(), "closing", SECOND)

    @pytest.mark.parametrize("stalled", [False, True], ids=["waiting-for-more", "stalled"])
    async def test_in_the_middle_of_an_upload(self, client, upstream, stalled):
        pipe = BodyPipe(64 * 1024)
        sending = asyncio.ensure_future(client.send(request_for("POST", upstream.url, pipe)))
        conn = await upstream.accept()
        await conn.read_head()
        pipe.write(b"one")
        assert await conn.read_body(3) == b"one"
        if stalled:
            await until_it_waits(filling(pipe))
        sending.cancel()
        await within(conn.closed(), "closing", SECOND)
        with pytest.raises(asyncio.CancelledError):
            await sending

    async def test_a_response_whose_upload_still_runs(self, client, can, upstream):
        if not can.early_response:
            pytest.skip("declared: no early response")
        pipe = BodyPipe(1024)
        conn, response = await begun(client, upstream, request_for("POST", upstream.url, pipe))
        response.abort()
        await within(conn.closed(), "closing", SECOND)

    async def test_a_request_that_is_queued(self, make_client, upstream):
        try:
            client = make_client(max_clients=1)
        except TypeError:
            pytest.skip("this client has no queue")
        first = asyncio.ensure_future(client.send(request_for("GET", upstream.url + "/first")))
        conn, _ = await upstream.request()
        second = asyncio.ensure_future(client.send(request_for("GET", upstream.url + "/second")))
        third = asyncio.ensure_future(client.send(request_for("GET", upstream.url + "/third")))
        await asyncio.wait([second], timeout=0.05)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        # What was queued behind it has its turn.
        first.cancel()
        await within(conn.closed(), "closing", SECOND)
        conn, request = await upstream.request()
        assert request.target == "/third"
        await conn.respond(200)
        await (await within(third, "the third response")).read()
        assert upstream.accepted == 2

    async def test_by_closing_the_client(self, client, upstream):
        conn, response = await begun(client, upstream, request_for("GET", upstream.url))
        sending = asyncio.ensure_future(client.send(request_for("GET", upstream.url)))
        other, _ = await upstream.request()
        client.close()
        await within(conn.closed(), "closing", SECOND)
        await within(other.closed(), "closing", SECOND)
        with pytest.raises(UpstreamError):
            await within(sending, "the failure")
        _, error = await within(collected(response), "the failure")
        assert isinstance(error, ProxyError)
