"""With many requests under way, a step is taken for all of them before the next one is."""

from __future__ import annotations

import asyncio

import pytest
from tornado.httputil import HTTPHeaders

from tests.server.conftest import OK, respond
from tests.support.wire import within
from tornado_proxy.server.turns import BUSY, Together

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
async def busy(serve, recorder):
    """A server with so many requests under way that steps are taken together, also when half of them are answered."""
    running = serve(recorder)
    clients = [await running.ask(GET) for _ in range(2 * BUSY)]
    await recorder.seen("finish", count=2 * BUSY)
    assert running.server.running == 2 * BUSY
    return running, clients


class TestTogether:
    async def test_steps_are_taken_at_the_end_of_the_turn_in_their_order(self):
        taken = []
        together = Together(asyncio.get_running_loop())
        together.add(lambda: taken.append(1))
        together.add(lambda: taken.append(2))
        assert taken == []
        await asyncio.sleep(0)
        assert taken == [1, 2]

    async def test_a_step_may_add_one_for_the_next_turn(self):
        taken = []
        together = Together(asyncio.get_running_loop())
        together.add(lambda: together.add(lambda: taken.append("later")))
        await asyncio.sleep(0)
        assert taken == []
        await asyncio.sleep(0)
        assert taken == ["later"]

    async def test_one_that_raises_is_logged_and_keeps_no_other_from_its_turn(self, expect_log):
        taken = []
        together = Together(asyncio.get_running_loop())
        together.add(lambda: 1 // 0)
        together.add(lambda: taken.append("other"))
        with expect_log("Uncaught exception.*ZeroDivisionError"):
            await asyncio.sleep(0)
        assert taken == ["other"]


class TestWhenItWrites:
    async def test_a_busy_server_writes_at_the_end_of_the_turn(self, busy, recorder):
        connection = recorder.connections[0]
        respond_short(connection)
        assert connection.unsent() > 0
        await asyncio.sleep(0)
        assert connection.unsent() == 0

    async def test_one_that_has_little_to_do_writes_at_once(self, serve, recorder):
        running = serve(recorder)
        clients = [await running.ask(GET) for _ in range(BUSY - 1)]
        await recorder.seen("finish", count=len(clients))
        respond_short(recorder.connections[0])
        assert recorder.connections[0].unsent() == 0


class TestABusyServer:
    async def test_answers_each_with_its_own(self, busy, recorder):
        _, clients = busy
        for number, connection in enumerate(recorder.connections):
            respond(connection, b"%d" % number)
        for number, client in enumerate(clients):
            assert (await client.read_response()).body == b"%d" % number

    async def test_takes_requests_that_come_in_pieces(self, busy, recorder):
        running, _ = busy
        client = await running.ask(GET[:20])
        await client.send(GET[20:])
        await recorder.seen("finish", count=2 * BUSY + 1)
        respond(recorder.connections[-1])
        assert (await client.read_response()).body == b"ok"

    async def test_sends_what_was_written_before_the_connection_is_cut(self, busy, recorder):
        _, clients = busy
        connection = recorder.connections[0]
        respond_short(connection)
        connection.abort()
        assert (await clients[0].read_until_closed()).endswith(b"\r\n\r\nshort")

    async def test_sends_a_large_body_behind_what_it_holds(self, busy, recorder):
        _, clients = busy
        connection = recorder.connections[0]
        respond_short(connection, rest=100_000)
        connection.write(b"x" * 100_000)
        connection.finish()
        assert (await clients[0].read_response()).body == b"short" + b"x" * 100_000

    async def test_lets_go_of_a_client_that_leaves_before_its_request_is_read(self, busy):
        running, _ = busy
        client = await running.ask(GET)
        client.reset()
        for other in busy[1]:
            other.close()
        await within(running.server.close_all_connections(), "the end of all connections")
        assert running.server.running == 0


def respond_short(connection, rest=1):
    """Begin an answer that is ``rest`` bytes longer than what is sent of it."""
    connection.write_headers(OK, HTTPHeaders({"Content-Length": str(5 + rest)}), b"short")
