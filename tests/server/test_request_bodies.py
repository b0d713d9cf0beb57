"""How a body reaches the application: bounded, at its pace, and not at all once it has answered."""

from __future__ import annotations

import asyncio

import pytest
from tornado.httputil import (
    HTTPHeaders,
    HTTPInputError,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    ResponseStartLine,
)

from tests.server.conftest import OK, respond

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def post(length, *fields, version="1.1"):
    lines = [f"POST / HTTP/{version}", "Host: a", f"Content-Length: {length}", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
EXPECT = "Expect: 100-continue"


def future():
    return asyncio.get_running_loop().create_future()


class TestPace:
    async def test_the_body_waits_for_headers_received(self, serve, recorder):
        ready = future()
        recorder.head_futures.append(ready)
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(post(5) + b"hello")
        await recorder.seen("head", "POST", "/")
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(recorder.events) == 1
        ready.set_result(None)
        assert (await downstream.read_response()).status == 200
        assert recorder.events[1:] == [("data", b"hello"), ("finish",)]

    async def test_the_end_waits_for_headers_received_where_there_is_no_body(self, serve, recorder):
        ready = future()
        recorder.head_futures.append(ready)
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(GET)
        await recorder.seen("head", "GET", "/")
        assert len(recorder.events) == 1
        ready.set_result(None)
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    async def test_reading_stops_while_the_application_is_not_ready(self, serve, recorder, framing):
        ready = future()
        recorder.data_futures.append(ready)
        recorder.on_finish = respond
        downstream = await serve(recorder).connect()
        size = 50_000_000
        if framing == "length":
            data = post(size) + b"x" * size
        else:
            data = CHUNKED + b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n"
        sending = asyncio.ensure_future(downstream.send(data))
        await recorder.until(lambda: recorder.body, "the first piece")
        connection = recorder.connections[0]._owner
        while not connection.reading_paused:
            await asyncio.sleep(0)
        assert len(connection._pending) <= 2 * 65536
        assert len(recorder.events) == 2
        assert not sending.done()
        ready.set_result(None)
        assert (await downstream.read_response()).status == 200
        assert len(recorder.body) == size
        assert max(len(event[1]) for event in recorder.events if event[0] == "data") <= 4 * 65536

    async def test_a_coroutine_may_answer_for_the_delegate(self, serve, recorder):
        async def slow():
            await asyncio.sleep(0)

        recorder.head_futures.append(slow())
        recorder.data_futures.append(slow())
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(post(5) + b"hello")
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize("where", ["head_futures", "data_futures"])
    async def test_a_failure_of_the_application_is_answered_with_500(self, serve, recorder, expect_log, where):
        failing = future()
        getattr(recorder, where).append(failing)
        downstream = await serve(recorder).ask(post(5) + b"hello")
        await recorder.until(lambda: not getattr(recorder, where), "the call")
        expect_log("Uncaught exception.*ZeroDivisionError")
        failing.set_exception(ZeroDivisionError())
        assert (await downstream.read_until_closed()).startswith(b"HTTP/1.1 500 ")
        await recorder.seen("close")

    async def test_an_input_error_of_the_application_is_answered_with_400(self, serve, recorder):
        failing = future()
        failing.set_exception(HTTPInputError("no"))
        recorder.head_futures.append(failing)
        assert (await serve(recorder).talk(post(5) + b"hello")).startswith(b"HTTP/1.1 400 ")


class TestALargeBody:
    """It does not come by the server's buffer, once that was full, but in bytes that the transport makes."""

    @pytest.fixture
    async def begun(self, serve, recorder):
        """Ask, and return how much of 1 MB is left to send, and who sends it, when the buffer was full once."""
        running = serve(recorder)
        running.server.buffer = running.server.buffer_ahead
        downstream = await running.ask(post(1_000_000))
        await recorder.seen("head", "POST", "/")
        connection = recorder.connections[0]._owner
        sent = 0
        # As much as is there at once may be less than what was sent.
        while not connection._bulk:
            await downstream.send(b"x" * 100_000)
            sent += 100_000
            await recorder.until(lambda size=sent: len(recorder.body) == size, "what was sent")
        assert connection.transport.get_protocol() is not connection
        return 1_000_000 - sent, downstream, connection

    async def test_what_comes_behind_it_is_the_next_request(self, recorder, begun):
        left, downstream, connection = begun
        recorder.on_finish = respond
        await downstream.send(b"x" * left + GET)
        for _ in range(2):
            assert (await downstream.read_response()).status == 200
        assert recorder.body == b"x" * 1_000_000
        assert [event[:2] for event in recorder.events if event[0] == "head"] == [("head", "POST"), ("head", "GET")]
        assert connection.transport.get_protocol() is connection

    async def test_it_waits_for_the_application(self, recorder, begun):
        left, downstream, connection = begun
        recorder.data_futures.append(ready := future())
        recorder.on_finish = respond
        sending = asyncio.ensure_future(downstream.send(b"x" * left))
        await recorder.until(lambda: not recorder.data_futures, "the next piece")
        assert connection.transport.get_protocol() is connection
        ready.set_result(None)
        assert (await downstream.read_response()).status == 200
        await sending
        assert recorder.body == b"x" * 1_000_000

    async def test_who_leaves_in_the_middle_is_noticed(self, recorder, begun):
        _, downstream, _ = begun
        downstream.close()
        await recorder.seen("close")

    async def test_a_refusal_is_read_by_who_still_sends(self, recorder, begun):
        left, downstream, _ = begun
        respond(recorder.connections[0], status=413)
        await downstream.send(b"x" * left)
        assert (await downstream.read_response()).status == 413
        await downstream.send(GET)
        recorder.on_finish = respond
        assert (await downstream.read_response()).status == 200

    @pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
    async def test_who_takes_the_connection_in_the_middle_has_it(self, serve, certificate, trusting, tls):
        """Also where the server was told to wait, which it need not any more."""
        lines = asyncio.Queue()

        class Takes(HTTPMessageDelegate):
            def __init__(self, connection):
                self.connection = connection
                self.stream = None

            def data_received(self, chunk):
                if self.stream is None and self.connection._owner._bulk:
                    self.connection.write_headers(
                        ResponseStartLine("", 101, "Lines"), HTTPHeaders({"Upgrade": "lines"})
                    )
                    self.connection.finish()
                    self.stream = self.connection.detach()
                    self.stream.read_until(b"\n").add_done_callback(lines.put_nowait)
                    return future()
                return None

        class Taken(HTTPServerConnectionDelegate):
            def start_request(self, server_conn, request_conn):
                return Takes(request_conn)

        options = {"ssl_options": {"certfile": certificate[0], "keyfile": certificate[1]}} if tls else {}
        running = serve(Taken(), **options)
        running.server.buffer = running.server.buffer_ahead
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=trusting if tls else None)
        writer.write(post(10_000_000) + b"x" * 1_000_000)
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            writer.write(b"line\n")
            assert (await lines.get()).result().endswith(b"xline\n")
        writer.close()


class TestLimits:
    async def test_a_declared_length_beyond_the_limit_gets_413(self, serve, recorder):
        answer = await serve(recorder, max_body_size=10).talk(post(11) + b"x" * 11)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert recorder.events == [("head", "POST", "/"), ("close",)]

    async def test_chunks_beyond_the_limit_get_413(self, serve, recorder):
        data = CHUNKED + b"6\r\nxxxxxx\r\n"
        downstream = await serve(recorder, max_body_size=10).ask(data)
        await recorder.seen("data", b"x" * 6)
        await downstream.send(b"6\r\nxxxxxx\r\n")
        assert (await downstream.read_until_closed()).startswith(b"HTTP/1.1 413 ")
        assert recorder.events[2:] == [("close",)]

    async def test_the_application_may_set_the_limit(self, serve, recorder):
        recorder.on_head = lambda connection: connection.set_max_body_size(20)
        recorder.on_finish = respond
        downstream = await serve(recorder, max_body_size=10).ask(post(20) + b"x" * 20)
        assert (await downstream.read_response()).status == 200


class TestContinue:
    @pytest.mark.parametrize("expectation", ["100-continue", "100-Continue"])
    async def test_100_is_sent_when_the_application_is_ready(self, serve, recorder, expectation):
        ready = future()
        recorder.head_futures.append(ready)
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(post(5, f"Expect: {expectation}"))
        await recorder.seen("head", "POST", "/")
        ready.set_result(None)
        assert (await downstream.read_head()).raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        await downstream.send(b"hello")
        response = await downstream.read_response()
        assert (response.status, response.header("Connection")) == (200, None)

    @pytest.mark.parametrize(
        "data",
        [
            post(5, EXPECT) + b"hello",
            post(5, EXPECT, version="1.0") + b"hello",
            post(0, EXPECT),
            b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
            post(5, "Expect: something") + b"hello",
        ],
        ids=["body there", "1.0", "length 0", "no body", "other"],
    )
    async def test_100_is_not_sent_where_nobody_waits_for_it(self, serve, recorder, data):
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(data)
        response = await downstream.read_response()
        assert (response.status, response.interim) == (200, [])
        assert "Expect" in recorder.heads[0][1]

    async def test_the_application_may_hold_it_back_and_send_it_itself(self, serve, recorder):
        recorder.on_head = lambda connection: connection.begin_body(True)
        recorder.on_finish = respond
        downstream = await serve(recorder).ask(post(5, EXPECT))
        await recorder.seen("head", "POST", "/")
        for _ in range(5):
            await asyncio.sleep(0)
        recorder.connections[0].send_interim(100, "Continue", HTTPHeaders())
        assert (await downstream.read_head()).raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        await downstream.send(b"hello" + GET)
        assert (await downstream.read_response()).status == 200
        assert (await downstream.read_response()).status == 200

    async def test_a_final_answer_instead_closes_because_the_body_may_come_or_not(self, serve, recorder):
        recorder.on_head = respond
        answer = await serve(recorder).talk(post(5, EXPECT))
        assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
        await recorder.seen("close")


class TestEarlyAnswers:
    async def test_the_answer_goes_out_at_once_and_the_connection_lives_when_the_body_ends(self, serve, recorder):
        recorder.on_head = respond
        downstream = await serve(recorder).ask(post(200_000))
        assert (await downstream.read_response()).body == b"ok"
        await downstream.send(b"x" * 200_000 + GET)
        assert (await downstream.read_response()).body == b"ok"
        # Tornado's delegates are told in this way that their request ended early.
        assert recorder.events == [("head", "POST", "/"), ("close",), ("head", "GET", "/"), ("close",)]

    async def test_the_same_with_chunks(self, serve, recorder):
        recorder.on_head = respond
        downstream = await serve(recorder).ask(CHUNKED)
        assert (await downstream.read_response()).body == b"ok"
        await downstream.send(b"4\r\nabcd\r\n0\r\n\r\n" + GET)
        assert (await downstream.read_response()).body == b"ok"

    async def test_an_answer_in_the_middle_of_the_body_releases_the_piece_that_waits(self, serve, recorder):
        recorder.data_futures.append(future())
        downstream = await serve(recorder).ask(post(10) + b"hello")
        await recorder.seen("data", b"hello")
        respond(recorder.connections[0])
        assert (await downstream.read_response()).body == b"ok"
        recorder.on_finish = respond
        await downstream.send(b"world" + GET)
        assert (await downstream.read_response()).body == b"ok"

    async def test_a_client_that_goes_on_sending_reads_the_whole_answer(self, serve, recorder):
        big = b"y" * 300_000
        recorder.on_head = lambda connection: respond(connection, big, 413, Connection="close")
        downstream = await serve(recorder).ask(post(20_000_000))
        await downstream.send(b"x" * 20_000_000)
        response = await downstream.read_response()
        assert (response.status, response.body) == (413, big)
        assert await downstream.closed() == "end"

    async def test_a_body_that_does_not_end_is_cut_off_after_a_time(self, serve, recorder):
        recorder.on_head = respond
        running = serve(recorder, linger_time=0.05)
        downstream = await running.ask(post(10) + b"x")
        assert (await downstream.read_response()).body == b"ok"
        assert await downstream.closed() == "end"
        await recorder.seen("close")

    async def test_a_body_that_does_not_end_is_cut_off_after_some_bytes(self, serve, recorder):
        recorder.on_head = respond
        running = serve(recorder, linger_bytes=100_000, linger_time=60)
        downstream = await running.ask(post(1_000_000_000) + b"x" * 200_000)
        assert (await downstream.read_response()).body == b"ok"
        assert await downstream.closed() == "end"

    async def test_a_bad_chunk_after_the_answer_ends_the_connection(self, serve, recorder):
        recorder.on_head = respond
        downstream = await serve(recorder).ask(CHUNKED + b"zzz\r\n")
        assert (await downstream.read_response()).body == b"ok"
        assert await downstream.closed() == "end"


class TestBadBodies:
    @pytest.mark.parametrize("fields", [{}, {"Content-Length": "10"}])
    async def test_a_bad_chunk_cuts_a_response_that_has_begun(self, serve, recorder, fields):
        headers = HTTPHeaders(fields)
        recorder.on_head = lambda connection: connection.write_headers(OK, headers, b"begun")
        downstream = await serve(recorder).ask(CHUNKED)
        await downstream.read_head()
        assert await downstream.read_body(5) == b"begun"
        await downstream.send(b"zzz\r\n")
        assert await downstream.read_until_closed() == b""
        await recorder.seen("close")

    async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_end_of_it(self, serve, recorder):
        downstream = await serve(recorder).ask(post(10) + b"hello")
        await recorder.seen("data", b"hello")
        downstream.half_close()
        await recorder.seen("close")
        assert ("finish",) not in recorder.events
        assert await downstream.read_until_closed() == b""

    async def test_a_body_timeout_of_the_application_is_kept(self, serve, recorder):
        recorder.on_head = lambda connection: connection.set_body_timeout(0.05)
        downstream = await serve(recorder, linger_time=0.1).ask(post(10) + b"hello")
        assert (await downstream.read_until_closed()).startswith(b"HTTP/1.1 408 ")
        await recorder.seen("close")
