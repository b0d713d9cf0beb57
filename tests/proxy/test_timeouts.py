"""Each time limit cuts what it is for, names the side that was slow, and leaves everything else alone."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from tests.proxy.test_cancel import CHUNKED, PIECE, piece, send_until_stalled, upload_head
from tests.support.unreachable import full_backlog
from tests.support.wire import LAST_CHUNK, TIMEOUT, chunk, until
from tornado_proxy import draining
from tornado_proxy.errors import UpstreamTimeout
from tornado_proxy.messages import Outcome
from tornado_proxy.options import ProxyOptions
from tornado_proxy.timeouts import Watchdog

LIMIT = 0.3
# Seconds that the loop may be late.
LATE = 2.0


class Elapsed:
    """That the block took at least the limit, and not much more."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.started = monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            # A timer may be early by the clock's resolution.
            assert self.limit - 0.02 <= monotonic() - self.started < self.limit + LATE


def is_timeout(outcome: Outcome, side: str, phase: str, kind: str | None = None) -> None:
    assert (outcome.side, outcome.phase) == (side, phase)
    assert type(outcome.error).__name__ == kind or (kind is None and "Timeout" in type(outcome.error).__name__)
    assert draining.active_exchanges() == 0


class TestConnectTimeout:
    """TO-07: an upstream that does not accept connections is given up after connect_timeout."""

    async def test_a_full_backlog_is_given_up(self, proxy, expect_log):
        expect_log("upstream")
        async with full_backlog() as url:
            running = await proxy(url, connect_timeout=LIMIT, retries=0)
            with Elapsed():
                response = await running.get("/x")
        assert response.status == 504
        is_timeout(await running.next_outcome(), "upstream", "connect", "ConnectTimeout")

    async def test_a_request_that_waits_for_a_free_client_is_given_up(self, proxy, upstream, expect_log):
        expect_log("busy")
        running = await proxy(upstream.url, connect_timeout=LIMIT, client_options={"max_clients": 1}, retries=0)
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        with Elapsed():
            response = await running.get("/second")
        assert response.status == 503
        assert response.has("Retry-After")
        await conn.respond(200, body=b"first")
        assert (await first.read_response()).body == b"first"
        assert upstream.accepted == 1


class TestResponseTimeout:
    """TO-05: an upstream that accepts and does not answer costs a 504, and its connection."""

    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    @pytest.mark.parametrize("body", [None, b"hello"])
    async def test_no_answer_is_a_504(self, proxy, upstream, expect_log, mode, body):
        expect_log("no answer within 0.3 s")
        running = await proxy(upstream.url, response_timeout=LIMIT, response_mode=mode)
        with Elapsed():
            downstream = await running.ask("POST" if body else "GET", "/x", body=body)
            conn, _ = await upstream.request()
            response = await downstream.read_response()
        assert (response.status, response.complete) == (504, True)
        await conn.closed()
        is_timeout(await running.next_outcome(), "upstream", "head", "UpstreamTimeout")
        assert upstream.accepted == 1
        # The downstream's connection is fine.
        await downstream.request("GET", "/next")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"next")
        assert (await downstream.read_response()).body == b"next"

    async def test_half_a_head_is_no_answer(self, proxy, upstream, expect_log):
        expect_log("no answer within")
        running = await proxy(upstream.url, response_timeout=LIMIT)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send(b"HTTP/1.1 200 OK\r\nX-One: 1\r\n")
        assert (await downstream.read_response()).status == 504
        await conn.closed()

    async def test_the_wait_for_a_free_client_does_not_count(self, proxy, upstream):
        running = await proxy(upstream.url, response_timeout=LIMIT, client_options={"max_clients": 1})
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "3")])
        await first.read_head()
        second = await running.ask("GET", "/second")
        # Here time is the subject.
        await asyncio.sleep(2 * LIMIT)
        await conn.send(b"one")
        assert await first.read_body() == b"one"
        assert (await conn.read_request()).target == "/second"
        await conn.respond(200, body=b"two")
        assert (await second.read_response()).body == b"two"

    async def test_it_counts_after_a_wait_for_a_free_client(self, proxy, upstream, expect_log):
        expect_log("no answer within")
        running = await proxy(upstream.url, response_timeout=LIMIT, client_options={"max_clients": 1})
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "3")])
        await first.read_head()
        second = await running.ask("GET", "/second")
        await asyncio.sleep(2 * LIMIT)
        await conn.send(b"one")
        await conn.read_request()
        with Elapsed():
            assert (await second.read_response()).status == 504
        await conn.closed()

    async def test_a_client_that_leaves_while_its_request_waits_is_noticed(self, proxy, upstream):
        running = await proxy(upstream.url, client_options={"max_clients": 1})
        first = await running.ask("GET", "/first")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "3")])
        await first.read_head()
        second = await running.connect()
        await second.send(upload_head("chunked"))
        await until(send_until_stalled(second.sock, chunk(PIECE)), "nobody reads the upload")
        # What was sent last waits in its own kernel, and so would the end of a connection that is closed.
        second.reset()
        outcome = await running.next_outcome()
        assert (outcome.status, str(outcome.side)) == (499, "downstream")
        await conn.send(b"one")
        assert await first.read_body() == b"one"

    async def test_a_slow_upload_does_not_count(self, proxy, upstream):
        running = await proxy(upstream.url, response_timeout=LIMIT)
        downstream = await running.connect()
        await downstream.send(upload_head("chunked"))
        conn = await upstream.accept()
        await conn.read_head()
        started = monotonic()
        while monotonic() - started < 2 * LIMIT:
            await downstream.send(chunk(b"x"))
            assert await conn.read_body(1) == b"x"
            await asyncio.sleep(LIMIT / 5)
        await downstream.send(LAST_CHUNK)
        assert await conn.read_body() == b""
        await conn.respond(200, body=b"ok")
        assert (await downstream.read_response()).body == b"ok"

    async def test_a_slow_body_does_not_count(self, proxy, upstream):
        running = await proxy(upstream.url, response_timeout=LIMIT)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, [("Content-Length", "3")])
        await downstream.read_head()
        await asyncio.sleep(2 * LIMIT)
        await conn.send(b"one")
        assert await downstream.read_body() == b"one"

    async def test_does_not_count_between_two_attempts(self, proxy, upstream):
        """A hook may wait for as long as it likes until the next."""

        async def should_retry(handler, error):
            await asyncio.sleep(2 * LIMIT)
            return True

        running = await proxy(upstream.url, response_timeout=LIMIT, should_retry=should_retry, retries=1)
        downstream = await running.ask("GET")
        conn, _ = await upstream.request()
        conn.close()
        conn, _ = await upstream.request()
        await conn.respond(200)
        assert (await downstream.read_response()).status == 200
        assert (await running.next_outcome()).attempts == 2


class TestIdleTimeout:
    """TO-06, TO-08, TO-02: silence is cut; neither a trickle nor our own pause is silence."""

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_a_silent_upstream_is_cut_in_the_body(self, proxy, upstream, expect_log, framing):
        expect_log("no byte either way")
        running = await proxy(upstream.url, idle_timeout=LIMIT)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        with Elapsed():
            await conn.send_head(200, CHUNKED if framing == "chunked" else [("Content-Length", "9")])
            await conn.send(piece(framing, b"one"))
            response = await downstream.read_response()
        assert (response.status, response.body, response.complete) == (200, b"one", False)
        await conn.closed()
        is_timeout(await running.next_outcome(), "upstream", "body", "UpstreamTimeout")

    async def test_a_buffered_body_that_stops_is_a_504(self, proxy, upstream, expect_log):
        expect_log("no byte either way")
        running = await proxy(upstream.url, idle_timeout=LIMIT, response_mode="buffer")
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"one")
        assert (await downstream.read_response()).status == 504
        await conn.closed()

    async def test_a_trickle_is_not_cut(self, proxy, upstream):
        running = await proxy(upstream.url, idle_timeout=LIMIT)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await downstream.read_head()
        started = monotonic()
        while monotonic() - started < 4 * LIMIT:
            await conn.send_chunk(b"x")
            assert await downstream.read_body(1) == b"x"
            await asyncio.sleep(LIMIT / 5)
        await conn.send_chunk(b"")
        assert await downstream.read_body() == b""

    async def test_our_own_pause_does_not_count(self, proxy, upstream):
        running = await proxy(upstream.url, idle_timeout=LIMIT)
        downstream = await running.connect(receive_buffer=4096)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        size = 16_000_000
        sending = asyncio.ensure_future(conn.respond(200, body=b"x" * size))
        await downstream.read_head()
        # The downstream reads nothing; the upstream cannot send, which is not its fault.
        await asyncio.sleep(3 * LIMIT)
        assert not sending.done()
        assert len(await downstream.read_body()) == size
        await sending
        assert (await running.next_outcome()).error is None

    @pytest.mark.parametrize("framing", ["chunked", "length"])
    async def test_an_upload_that_stops_is_cut(self, proxy, upstream, framing):
        running = await proxy(upstream.url, idle_timeout=LIMIT)
        downstream = await running.connect()
        with Elapsed():
            await downstream.send(upload_head(framing) + piece(framing, b"one"))
            conn = await upstream.accept()
            await conn.read_head()
            assert await conn.read_body(3) == b"one"
            response = await downstream.read_response()
        assert response.status == 408
        await conn.closed()
        is_timeout(await running.next_outcome(), "downstream", "send", "DownstreamTimeout")

    # All that came may be with the client, which waits to be rid of it.
    @pytest.mark.parametrize("options", [{}, {"client": "simple"}, {"client": "simple", "buffer_size": 1}])
    async def test_an_upstream_that_stops_reading_the_upload_is_cut(self, proxy, upstream, expect_log, options):
        expect_log("took no byte")
        running = await proxy(upstream.url, idle_timeout=LIMIT, **options)
        downstream = await running.connect()
        await downstream.send(upload_head("length"))
        conn = await upstream.accept()
        await conn.read_head()
        stalled = send_until_stalled(downstream.sock, PIECE)
        await until(lambda: stalled() or running.outcomes, "the upload stalled")
        is_timeout(await running.next_outcome(), "upstream", "send", "UpstreamTimeout")
        await conn.closed()


class TestWriteTimeout:
    """TO-03: a downstream that stops reading is cut, and the upstream let go."""

    async def test_a_stalled_reader_is_cut(self, proxy, upstream):
        running = await proxy(upstream.url, write_timeout=LIMIT)
        downstream = await running.connect(receive_buffer=4096)
        with Elapsed():
            await downstream.request("GET", "/x")
            conn, _ = await upstream.request()
            await conn.send_head(200, [("Content-Length", str(10**9))])
            stalled = send_until_stalled(conn.sock, PIECE)

            def cut() -> bool:
                try:
                    stalled()
                except ConnectionError:
                    return True
                return False

            await until(cut, "the upstream was let go")
        is_timeout(await running.next_outcome(), "downstream", "body", "DownstreamTimeout")

    async def test_a_slow_reader_is_not_cut(self, proxy, upstream):
        running = await proxy(upstream.url, write_timeout=LIMIT, buffer_size=65_536)
        downstream = await running.connect(receive_buffer=65_536)
        await downstream.request("GET", "/x")
        conn, _ = await upstream.request()
        size = 8_000_000
        sending = asyncio.ensure_future(conn.respond(200, body=b"x" * size))
        await downstream.read_head()
        started = monotonic()
        left = size
        while monotonic() - started < 4 * LIMIT:
            left -= len(await downstream.read_body(100_000))
            await asyncio.sleep(LIMIT / 10)
        assert len(await downstream.read_body()) == left
        await sending
        assert (await running.next_outcome()).error is None


class TestTotalTimeout:
    """TO-09: the whole exchange is cut at its deadline, whatever its progress."""

    async def test_before_the_head_it_is_a_504(self, proxy, upstream, expect_log):
        expect_log("more than 0.3 s")
        running = await proxy(upstream.url, total_timeout=LIMIT)
        with Elapsed():
            downstream = await running.ask("GET", "/x")
            conn, _ = await upstream.request()
            assert (await downstream.read_response()).status == 504
        await conn.closed()

    async def test_a_body_that_goes_on_is_cut(self, proxy, upstream, expect_log):
        expect_log("more than 0.3 s")
        running = await proxy(upstream.url, total_timeout=LIMIT)
        with Elapsed():
            downstream = await running.ask("GET", "/x")
            conn, _ = await upstream.request()
            await conn.send_head(200, CHUNKED)
            deadline = monotonic() + TIMEOUT
            while not downstream.is_closed_by_other():
                assert monotonic() < deadline
                if not conn.is_closed_by_other():
                    await conn.send_chunk(b"x")
                await asyncio.sleep(0.02)
        response = await downstream.read_response()
        assert (response.status, response.complete) == (200, False)
        is_timeout(await running.next_outcome(), "upstream", "body", "UpstreamTimeout")

    async def test_one_that_ends_in_time_is_left_alone(self, proxy, echo):
        running = await proxy(echo.url, total_timeout=LIMIT)
        downstream = await running.connect()
        for _ in range(3):
            assert (await downstream.exchange("GET", "/x")).status == 200
            await asyncio.sleep(LIMIT / 2)
        # Idle between requests is not of any exchange.
        assert (await downstream.exchange("GET", "/x")).status == 200

    async def test_a_hook_that_never_returns_is_cut_too(self, proxy, upstream, expect_log):
        expect_log("more than 0.3 s")
        never = asyncio.Event()

        async def choose(handler):
            await never.wait()

        running = await proxy(choose, total_timeout=LIMIT)
        with Elapsed():
            assert (await running.get("/x")).status == 500
        is_timeout(await running.next_outcome(), "proxy", None, "HookError")
        assert upstream.accepted == 0


class TestWithoutAWriteTimeout:
    async def test_an_upstream_that_stops_later_is_cut_nevertheless(self, proxy, upstream, expect_log):
        """While a write is blocked nothing is timed; once it is through, idle_timeout is again."""
        expect_log("no byte either way for 0.3 s")
        running = await proxy(upstream.url, write_timeout=None, idle_timeout=LIMIT)
        downstream = await running.ask("GET", "/x")
        conn, _ = await upstream.request()
        await conn.send_head(200, CHUNKED)
        await downstream.read_head()
        await until(send_until_stalled(conn.sock, chunk(PIECE)), "the upstream was held back")
        # Here time is the subject: the limit passes, and the timer with it.
        await asyncio.sleep(2 * LIMIT)
        assert not running.outcomes
        await downstream.read_until_closed()
        is_timeout(await running.next_outcome(), "upstream", "body", "UpstreamTimeout")
        await conn.closed()


class TestUvloop:
    def test_a_limit_that_has_passed_can_still_be_moved(self):
        """Its timers for times that have come already are handles without a when()."""
        uvloop = pytest.importorskip("uvloop")
        errors = []

        async def late() -> None:
            options = ProxyOptions(upstream="http://h", response_timeout=0.001)
            watchdog = Watchdog(options, errors.append, lambda: 0, lambda: False, asyncio.get_running_loop())
            try:
                watchdog.request_started(None, "http://h")
                await asyncio.sleep(0.01)
                # It has its own timer now; the limit seems to have passed, and is given another turn.
                watchdog._shared._look()
                watchdog.upload_ended()
                watchdog._look()
                watchdog.upload_ended()
            finally:
                watchdog.stop()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(late())
        assert not errors


class ClockOfItsOwn(asyncio.SelectorEventLoop):
    """Its time begins with it: which clock a loop keeps is not said anywhere."""

    def __init__(self) -> None:
        self.began = monotonic()
        super().__init__()

    def time(self) -> float:
        return super().time() - self.began


class TestALoopWithAClockOfItsOwn:
    def test_keeps_the_limits_too(self):
        errors = []

        async def wait() -> None:
            loop = asyncio.get_running_loop()
            over = loop.create_future()
            options = ProxyOptions(upstream="http://h", response_timeout=0.15)
            watchdog = Watchdog(
                options, lambda error: (errors.append(error), over.set_result(None)), lambda: 0, lambda: False, loop
            )
            watchdog.request_started(None, "http://h")
            await asyncio.wait_for(over, 5)
            watchdog.stop()

        with asyncio.Runner(loop_factory=ClockOfItsOwn) as runner:
            runner.run(wait())
        assert [type(error) for error in errors] == [UpstreamTimeout]
