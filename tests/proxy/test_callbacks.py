"""Status callbacks, error callbacks, and what is answered without them."""

import asyncio

import pytest
from tornado.web import Finish, HTTPError

from tests.support.unreachable import full_backlog, nothing_listens
from tests.support.wire import chunk
from tornado_proxy import ProxyHandler
from tornado_proxy.errors import (
    BodyTooLarge,
    ConnectError,
    ConnectTimeout,
    InvalidResponse,
    UpstreamClosed,
    UpstreamTimeout,
)

MODES = pytest.mark.parametrize("mode", ["stream", "buffer"])
CHUNKED = [("Transfer-Encoding", "chunked")]


@pytest.fixture
def refusing():
    """The URL of an upstream where nothing listens."""
    with nothing_listens() as url:
        yield url


@pytest.fixture
async def unreachable():
    """The URL of an upstream that lets connections wait."""
    async with full_backlog() as url:
        yield url


class TestErrorInTheBody:
    """Behaviour 32: a body that breaks off reaches the error callback; once the head is sent, it can only be cut."""

    async def test_streamed(self, proxy, upstream, expect_log):
        expect_log("upstream")
        errors = []

        def answer(error, handler):
            errors.append(error)
            handler.set_status(503)
            handler.finish(b"too late")

        running = await proxy(upstream.url, error_callback=answer)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        conn.close()
        response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (200, b"one", False)
        assert [type(error) for error in errors] == [UpstreamClosed]
        assert errors[0].phase == "body"
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.phase, outcome.status, outcome.error) == ("upstream", "body", 200, errors[0])

    async def test_short_of_content_length(self, proxy, upstream, expect_log):
        expect_log("upstream")
        errors = []
        running = await proxy(upstream.url, error_callback=errors.append)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        conn.close()
        response = await downstream.read_response()
        assert (response.header("Content-Length"), response.body, response.complete) == ("10", b"hello", False)
        assert [type(error) for error in errors] == [UpstreamClosed]

    async def test_buffered_it_can_still_be_answered(self, proxy, upstream, expect_log):
        expect_log("upstream", required=False)

        def answer(error, handler):
            handler.set_status(503)
            handler.finish(str(error.phase))

        running = await proxy(upstream.url, response_mode="buffer", error_callback=answer)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        conn.close()
        response = await downstream.read_response()
        assert (response.status, response.body) == (503, b"body")


class TestStatusCallbacks:
    """Behaviour 33: the most specific callback is called as the head arrives; it may read, answer, or let pass."""

    async def status(self, proxy, upstream, mode, status_callbacks, status, body=b"theirs"):
        running = await proxy(upstream.url, response_mode=mode, status_callbacks=status_callbacks)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.respond(status, body=body)
        return await downstream.read_response()

    @MODES
    @pytest.mark.parametrize(
        ("status", "called"),
        [
            (404, "404"),
            (400, "range"),
            (403, "range"),
            (405, "4xx"),
            (499, "4xx"),
            (500, "*"),
            (200, "*"),
            (503, "503"),
        ],
    )
    async def test_the_most_specific_wins(self, proxy, upstream, mode, status, called):
        def named(name):
            def callback(handler, response):
                handler.set_status(response.status)
                handler.finish(name)

            return callback

        callbacks = {
            "*": named("*"),
            "4xx": named("4xx"),
            range(400, 405): named("range"),
            404: named("404"),
            503: named("503"),
        }
        response = await self.status(proxy, upstream, mode, callbacks, status)
        assert (response.status, response.body) == (status, called.encode())

    @MODES
    async def test_none_is_called_for_another_status(self, proxy, upstream, mode):
        calls = []
        callbacks = {404: lambda *args: calls.append(args), "5xx": lambda *args: calls.append(args)}
        response = await self.status(proxy, upstream, mode, callbacks, 200)
        assert (response.status, response.body, calls) == (200, b"theirs", [])

    @MODES
    async def test_it_may_return_without_answering(self, proxy, upstream, mode):
        statuses = []
        callbacks = {404: lambda handler, response: statuses.append(response.status)}
        response = await self.status(proxy, upstream, mode, callbacks, 404)
        assert (response.status, response.body, statuses) == (404, b"theirs", [404])

    @MODES
    async def test_it_may_change_what_passes(self, proxy, upstream, mode):
        async def soften(handler, response):
            response.status = 200
            response.reason = "Fine"
            response.headers["X-Was"] = "500"
            response.body = b"all is well"

        response = await self.status(proxy, upstream, mode, {"5xx": soften}, 500)
        assert (response.status, response.reason, response.body) == (200, "Fine", b"all is well")
        assert response.header("X-Was") == "500"
        assert response.all("Content-Length") == ["11"]

    @MODES
    async def test_it_may_read_the_response_and_answer(self, proxy, upstream, mode):
        async def shout(handler, response):
            handler.set_status(200)
            handler.finish((await response.read()).upper())

        response = await self.status(proxy, upstream, mode, {404: shout}, 404)
        assert (response.status, response.body) == (200, b"THEIRS")

    async def test_it_may_stream_the_response(self, proxy, upstream):
        async def shout(handler, response):
            async for part in response:
                handler.write(part.upper())
                await handler.flush()
            handler.finish()

        running = await proxy(upstream.url, status_callbacks={404: shout})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(404, CHUNKED)
        for part in (b"one", b"two"):
            await conn.send_chunk(part)
            if part == b"one":
                await downstream.read_head()
            assert await downstream.read_body(3) == part.upper()
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    @MODES
    async def test_it_is_called_when_the_head_arrives(self, proxy, upstream, mode):
        called = asyncio.Event()

        async def note(handler, response):
            called.set()

        running = await proxy(upstream.url, response_mode=mode, status_callbacks={404: note})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(404, [("Content-Length", "4")])
        # The upstream holds the body until the callback was called.
        await asyncio.wait_for(called.wait(), 5)
        await conn.send(b"body")
        assert (await downstream.read_response()).body == b"body"

    @MODES
    async def test_an_answer_ends_the_upstream_transfer(self, proxy, upstream, mode):
        def answer(handler, response):
            handler.set_status(410)
            handler.finish(b"gone")

        running = await proxy(upstream.url, response_mode=mode, status_callbacks={404: answer})
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(404, CHUNKED)
        await conn.send_chunk(b"endless")
        response = await downstream.read_response()
        assert (response.status, response.body) == (410, b"gone")
        await conn.closed()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side) == (410, None)

    @MODES
    async def test_one_that_raises_is_our_fault(self, proxy, upstream, mode, expect_log):
        def broken(handler, response):
            raise KeyError("oops")

        expect_log("oops")
        response = await self.status(proxy, upstream, mode, {404: broken}, 404)
        assert response.status == 500


class TestDefaultAnswers:
    """Behaviour 34: without a callback a timeout gets 504, other errors 502; unlike the seed with a page."""

    @staticmethod
    async def check(running, status, error):
        response = await running.get("/x")
        assert (response.status, response.complete) == (status, True)
        outcome = await running.next_outcome()
        assert (outcome.side, outcome.status, type(outcome.error)) == ("upstream", status, error)
        return outcome

    @MODES
    async def test_refused(self, proxy, refusing, mode, expect_log):
        expect_log("upstream")
        running = await proxy(refusing, response_mode=mode)
        outcome = await self.check(running, 502, ConnectError)
        assert outcome.phase == "connect"
        assert outcome.error.upstream == outcome.upstream == refusing

    @MODES
    async def test_connect_timeout(self, proxy, unreachable, mode, expect_log):
        expect_log("upstream")
        running = await proxy(unreachable, response_mode=mode, connect_timeout=0.1, retries=0)
        outcome = await self.check(running, 504, ConnectTimeout)
        assert outcome.phase == "connect"

    @MODES
    async def test_response_timeout(self, proxy, upstream, mode, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url, response_mode=mode, response_timeout=0.1)
        outcome = await self.check(running, 504, UpstreamTimeout)
        assert outcome.phase == "head"
        conn, _ = await upstream.request()
        await conn.closed()

    @MODES
    async def test_total_timeout(self, proxy, upstream, mode, expect_log):
        expect_log("upstream")
        running = await proxy(upstream.url, response_mode=mode, total_timeout=0.1)
        await self.check(running, 504, UpstreamTimeout)

    @MODES
    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_closed_without_an_answer(self, proxy, upstream, mode, method, expect_log):
        async def hang_up(conn, request):
            conn.close()

        expect_log("upstream")
        upstream.serve(hang_up)
        running = await proxy(upstream.url, response_mode=mode)
        assert (await running.request(method, "/x")).status == 502
        assert (await running.next_outcome()).side == "upstream"

    @MODES
    @pytest.mark.parametrize(
        "garbage",
        [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"],
    )
    async def test_no_http(self, proxy, upstream, mode, garbage, expect_log):
        async def answer(conn, request):
            await conn.send(garbage)
            conn.close()

        expect_log("upstream")
        upstream.serve(answer)
        running = await proxy(upstream.url, response_mode=mode)
        assert (await running.get("/x")).status == 502
        assert isinstance((await running.next_outcome()).error, InvalidResponse)

    @MODES
    async def test_the_body_is_in_the_style_of_write_error(self, proxy, refusing, mode, expect_log):
        expect_log("upstream")

        class Styled(ProxyHandler):
            def write_error(self, status_code, **kwargs):
                self.finish(f"{status_code} in our style")

        running = await proxy(refusing, Styled, response_mode=mode)
        assert (await running.get("/x")).body == b"502 in our style"

    async def test_the_outcome_has_the_status_that_write_error_chose(self, proxy, refusing, expect_log):
        expect_log("upstream")

        class Styled(ProxyHandler):
            def write_error(self, status_code, **kwargs):
                self.set_status(503)
                self.finish("come back later")

        running = await proxy(refusing, Styled)
        assert (await running.get("/x")).status == 503
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.error.status_code) == (503, 502)

    @MODES
    async def test_the_connection_is_usable_afterwards(self, proxy, refusing, mode, expect_log):
        expect_log("upstream")
        running = await proxy(refusing, response_mode=mode)
        async with await running.connect() as downstream:
            assert (await downstream.exchange("GET", "/1")).status == 502
            assert (await downstream.exchange("POST", "/2", body=b"hello")).status == 502


class TestErrorCallback:
    """Behaviour 35: f(error) observes and the default answer follows; f(error, handler) may answer by itself."""

    @MODES
    async def test_one_argument(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)
        errors = []
        running = await proxy(refusing, response_mode=mode, error_callback=errors.append)
        assert (await running.get("/x")).status == 502
        assert [type(error) for error in errors] == [ConnectError]
        assert (errors[0].status_code, errors[0].side, errors[0].phase) == (502, "upstream", "connect")
        assert errors[0].upstream == refusing

    @MODES
    async def test_two_arguments(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)

        def answer(error, handler):
            handler.set_status(200)
            handler.finish(f"sorry, {error.status_code} for {handler.request.path}")

        running = await proxy(refusing, response_mode=mode, error_callback=answer)
        response = await running.get("/x")
        assert (response.status, response.body) == (200, b"sorry, 502 for /x")
        assert (await running.next_outcome()).status == 200

    @MODES
    async def test_two_arguments_without_answering(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)
        calls = []
        running = await proxy(
            refusing, response_mode=mode, error_callback=lambda error, handler: calls.append((error, handler))
        )
        assert (await running.get("/x")).status == 502
        assert len(calls) == 1

    @MODES
    async def test_async(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)

        async def answer(error, handler):
            await asyncio.sleep(0)
            handler.set_status(503)
            await handler.finish(b"later")

        running = await proxy(refusing, response_mode=mode, error_callback=answer)
        response = await running.get("/x")
        assert (response.status, response.body) == (503, b"later")

    @MODES
    async def test_it_is_not_called_when_all_goes_well(self, proxy, echo, mode):
        errors = []
        running = await proxy(echo.url, response_mode=mode, error_callback=errors.append)
        assert (await running.get("/x")).status == 200
        assert errors == []

    @MODES
    async def test_it_is_called_once_for_an_exchange_not_for_an_attempt(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)
        errors = []
        running = await proxy(refusing, response_mode=mode, error_callback=errors.append, retries=3)
        assert (await running.get("/x")).status == 502
        assert len(errors) == 1

    @MODES
    async def test_one_that_raises_does_not_hide_the_answer(self, proxy, refusing, mode, expect_log):
        expect_log("upstream|oops", required=False)

        def broken(error):
            raise KeyError("oops")

        running = await proxy(refusing, response_mode=mode, error_callback=broken)
        assert (await running.get("/x")).status in (500, 502)
        assert (await running.next_outcome()).error is not None


class TestErrorCallbackWithArguments:
    """Behaviour 36: ``(f, args)`` calls ``f(*args, error, handler)`` if it takes so many, else ``f(*args, error)``."""

    @MODES
    async def test_observing(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)
        calls = []

        def observe(first, second, error):
            calls.append((first, second, type(error)))

        running = await proxy(refusing, response_mode=mode, error_callback=(observe, ["a", "b"]))
        assert (await running.get("/x")).status == 502
        assert calls == [("a", "b", ConnectError)]

    @MODES
    async def test_answering(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)

        async def answer(text, error, handler):
            handler.set_status(503)
            handler.finish(text)

        running = await proxy(refusing, response_mode=mode, error_callback=(answer, ("sorry",)))
        response = await running.get("/x")
        assert (response.status, response.body) == (503, b"sorry")

    @MODES
    async def test_the_higher_arity_wins(self, proxy, refusing, mode, expect_log):
        expect_log("upstream", required=False)
        calls = []

        def either(tag, error, handler=None):
            calls.append((tag, handler is not None))

        running = await proxy(refusing, response_mode=mode, error_callback=(either, ["tag"]))
        await running.get("/x")
        assert calls == [("tag", True)]


class TestBothModesAlike:
    """Behaviour 37: the answers to errors are the same in both modes: every test above runs twice, and to the byte."""

    async def test_byte_for_byte(self, proxy, refusing, expect_log):
        expect_log("upstream")
        heads = []
        for mode in ("stream", "buffer"):
            running = await proxy(refusing, response_mode=mode)
            response = await running.get("/x")
            heads.append([response.start_line, [pair for pair in response.headers if pair[0] != "Date"], response.body])
        assert heads[0] == heads[1]

    @MODES
    async def test_nothing_about_the_upstream_leaks(self, proxy, refusing, mode, expect_log):
        expect_log("upstream")
        running = await proxy(refusing, response_mode=mode)
        response = await running.get("/x")
        port = refusing.rpartition(":")[2].encode()
        assert port not in response.raw
        assert b"refused" not in response.raw

    async def test_a_cut_chunk_gets_502_only_where_nothing_was_sent(self, proxy, upstream, expect_log):
        expect_log("upstream")

        async def cut(conn, request):
            await conn.send_head(200, CHUNKED)
            await conn.send(chunk(b"one")[:-2])
            conn.close()

        upstream.serve(cut)
        assert (await (await proxy(upstream.url, response_mode="buffer")).get("/x")).status == 502
        assert not (await (await proxy(upstream.url, response_mode="stream")).get("/x")).complete


class Ended(Finish):
    """A user's own Finish."""


class Refused(Finish):
    """One that has a status_code, for which Tornado does not ask."""

    status_code = 444


class Forbidden(HTTPError):
    """A user's own HTTPError."""

    def __init__(self):
        super().__init__(403)


class TestWhatAHookMayDo:
    """A hook stops the proxying by answering or by raising what Tornado answers; the outcome says what was sent."""

    @MODES
    @pytest.mark.parametrize("form", ["finish and raise", "raise with a body", "finish and fail"])
    @pytest.mark.parametrize("kind", [Finish, Ended, Refused])
    async def test_finish_is_an_answer_with_the_status_that_was_set(self, proxy, echo, expect_log, mode, form, kind):
        def refuse(handler, response):
            handler.set_status(403)
            if form == "raise with a body":
                raise kind(b"no")
            handler.finish(b"no")
            if form == "finish and fail":
                raise RuntimeError("its own fault")
            raise kind

        if form == "finish and fail":
            expect_log("its own fault|after its head")
        running = await proxy(echo.url, rewrite_response=refuse, response_mode=mode)
        response = await running.get("/x")
        outcome = await running.next_outcome()
        assert (response.status, response.body, response.complete) == (403, b"no", True)
        assert (outcome.status, outcome.side) == (403, "proxy" if form == "finish and fail" else None)

    @MODES
    @pytest.mark.parametrize("answered", [False, True])
    async def test_a_subclass_of_httperror_is_an_answer(self, proxy, echo, mode, answered):
        def refuse(handler, response):
            if answered:
                handler.set_status(403)
                handler.finish(b"no")
            raise Forbidden

        running = await proxy(echo.url, rewrite_response=refuse, response_mode=mode)
        response = await running.get("/x")
        outcome = await running.next_outcome()
        assert (response.status, response.complete) == (403, True)
        assert (outcome.status, outcome.side) == (403, None)

    async def test_what_only_has_a_status_code_is_a_failure(self, proxy, echo, expect_log):
        """Many libraries have such exceptions; Tornado answers 500."""
        expect_log("not an answer")

        class Foreign(Exception):
            status_code = 403

        def fail(handler, response):
            raise Foreign("not an answer")

        running = await proxy(echo.url, rewrite_response=fail)
        assert (await running.get("/x")).status == 500
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side) == (500, "proxy")

    async def test_an_answer_that_was_only_flushed_is_ended(self, proxy, echo):
        async def answer(handler, response):
            handler.write(b"mine")
            await handler.flush()

        running = await proxy(echo.url, status_callbacks={200: answer})
        downstream = await running.connect()
        for _ in range(2):
            response = await downstream.exchange("GET", "/x")
            assert (response.status, response.body, response.complete) == (200, b"mine", True)

    @pytest.mark.parametrize("form", ["raise", "raise Finish", "finish"])
    async def test_filter_request_body_answers_as_the_others_do(self, proxy, upstream, form):
        def refuse(handler, data):
            if form == "raise":
                raise HTTPError(415)
            handler.set_status(415)
            if form == "raise Finish":
                raise Refused
            handler.finish()

        running = await proxy(upstream.url, filter_request_body=refuse)
        downstream = await running.ask("POST", "/x", body=b"some body")
        assert (await downstream.read_response()).status == 415
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.bytes_up) == (415, None, 0)

    async def test_filter_request_body_may_raise_an_error_of_ours(self, proxy, upstream):
        def refuse(handler, data):
            raise BodyTooLarge("more than this user may send")

        running = await proxy(upstream.url, filter_request_body=refuse)
        downstream = await running.ask("POST", "/x", body=b"some body")
        assert (await downstream.read_response()).status == 413
        assert [(outcome.status, outcome.side) for outcome in running.outcomes] == [(413, "downstream")]

    @MODES
    async def test_filter_response_body_may_answer_before_the_head(self, proxy, echo, mode):
        def refuse(handler, data):
            handler.set_status(403)
            handler.finish(b"no")
            return data

        running = await proxy(echo.url, filter_response_body=refuse, response_mode=mode)
        response = await running.get("/x")
        assert (response.status, response.body) == (403, b"no")
        assert (await running.next_outcome()).status == 403

    async def test_filter_response_body_may_end_the_response(self, proxy, upstream):
        def cut(handler, data):
            if data == b"two":
                handler.finish(b"the end")
            return data

        running = await proxy(upstream.url, filter_response_body=cut)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        await downstream.read_head()
        assert await downstream.read_body(3) == b"one"
        await conn.send_chunk(b"two")
        assert await downstream.read_body() == b"the end"
        assert (await running.next_outcome()).side is None
        await conn.closed()
        # Not a byte stands behind it.
        await downstream.request("GET", "/next")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    @MODES
    async def test_an_answer_that_becomes_a_204_has_no_length(self, proxy, echo, mode):
        def empty(handler, response):
            response.status, response.reason = 204, "No Content"

        running = await proxy(echo.url, rewrite_response=empty, response_mode=mode)
        downstream = await running.connect()
        for _ in range(2):
            response = await downstream.exchange("GET", "/x")
            assert (response.status, response.header("Content-Length"), response.complete) == (204, None, True)
            assert (await running.next_outcome()).side is None
