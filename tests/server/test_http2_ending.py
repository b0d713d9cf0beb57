"""How streams and connections end: by the client, the application, an error, or the server's own end."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError

from tests.server.conftest import OK, respond
from tests.support.http2 import PADDED, Code, Type, frame, request_fields, rst_stream
from tests.support.wire import within

GOAWAY_NO_ERROR = frame(Type.GOAWAY, b"\0" * 8)


async def gets_its_answer(client, stream):
    """End the request, and read the answer, for which the client has had no window until now."""
    await client.data(stream, end=True)
    await client.grant(2, stream)
    response = await client.response(stream)
    assert (response.body, response.reset) == (b"ok", None)


class Closing:
    """Notes in the recorder that the client has left."""

    def __init__(self, recorder):
        self.recorder = recorder

    def __call__(self, connection):
        connection.set_close_callback(lambda: self.recorder.note("left"))
        self.recorder.note("ready")


class TestClientsThatLeave:
    @pytest.mark.parametrize("leave", ["cut", "close", "half_close", "reset"])
    async def test_the_application_is_told_while_it_works(self, serve, recorder, leave):
        recorder.on_finish = Closing(recorder)
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("GET", "/")
        await recorder.seen("ready")
        if leave == "cut":
            await client.send(rst_stream(stream))
        else:
            getattr(client, leave)()
        await recorder.seen("left")

    @pytest.mark.parametrize("leave", ["cut", "close", "reset"])
    async def test_and_while_it_waits_for_a_body(self, serve, recorder, leave):
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/", body=b"x", end=False)
        await recorder.seen("data", b"x")
        if leave == "cut":
            await client.send(rst_stream(stream))
        else:
            getattr(client, leave)()
        await recorder.seen("close")
        assert ("finish",) not in recorder.events

    async def test_only_the_stream_that_was_cut_is_lost(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.set_close_callback(
            lambda: recorder.note("left", connection._head.target)
        )
        client = await serve(recorder, http2=True).connect2()
        streams = [await client.request("GET", f"/{number}") for number in range(3)]
        await recorder.seen("finish", count=3)
        await client.send(rst_stream(streams[1]))
        await recorder.seen("left", "/1")
        for number in (0, 2):
            respond(recorder.connections[number])
            assert (await client.response(streams[number])).body == b"ok"
        assert [event for event in recorder.events if event[0] == "left"] == [("left", "/1")]

    async def test_who_waits_for_room_waits_no_longer(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2(own={4: 0})
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        connection.write_headers(OK, HTTPHeaders())
        written = connection.write(b"x")
        await client.send(rst_stream(stream))
        with pytest.raises(StreamClosedError):
            await within(written, "the write")

    async def test_a_callback_that_raises_hurts_nobody(self, serve, recorder, expect_log):
        def fail():
            raise ZeroDivisionError

        expect_log("ZeroDivisionError")
        recorder.on_finish = lambda connection: connection.set_close_callback(fail)
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        await client.send(rst_stream(stream))
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).status == 200

    async def test_a_client_that_will_ask_no_more_gets_what_it_has_asked(self, serve, recorder):
        """GOAWAY from a client: h2 alone would answer nothing after it."""
        running = serve(recorder, http2=True, linger_time=0.1)
        client = await running.connect2()
        first, second = await client.request("GET", "/1"), await client.request("POST", "/2", body=b"a", end=False)
        await recorder.seen("data", b"a")
        await client.send(GOAWAY_NO_ERROR)
        await client.data(second, b"b", end=True)
        await recorder.seen("finish", count=2)
        for connection in recorder.connections:
            respond(connection)
        assert (await client.response(first)).body == b"ok"
        assert (await client.response(second)).body == b"ok"
        # And then nobody needs the connection.
        await client.goaway()
        assert await client.closed() == "end"


class TestAborting:
    async def test_what_was_written_goes_out_and_no_end_is_seen(self, serve, recorder):
        def send(connection):
            connection.write_headers(OK, HTTPHeaders(), b"begun")
            connection.abort()
            connection.abort()
            assert connection.write(b"x").exception() is not None

        recorder.on_finish = send
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.status, response.body) == (200, b"begun")
        assert (response.complete, response.reset) == (False, Code.INTERNAL)
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).body == b"ok"

    async def test_before_the_head(self, serve, recorder):
        recorder.on_finish = lambda connection: connection.abort()
        client = await serve(recorder, http2=True).connect2()
        response = await client.exchange("GET", "/")
        assert (response.status, response.reset) == (0, Code.INTERNAL)

    async def test_in_the_middle_of_a_body(self, serve, recorder):
        recorder.on_head = lambda connection: connection.abort()
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/", body=b"x", end=False)
        assert (await client.response(stream)).reset == Code.INTERNAL
        await recorder.seen("close")

    async def test_what_the_window_holds_up_is_lost(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2(own={4: 3})
        client.keep_windows = True
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        connection.write_headers(OK, HTTPHeaders(), b"abcdef")
        connection.abort()
        response = await client.response(stream)
        assert (response.body, response.reset) == (b"abc", Code.INTERNAL)
        assert connection.outbox.size == 0

    async def test_the_stream_below_does_the_same(self, serve, recorder):
        """Some handlers close ``request.connection.stream``."""
        recorder.on_finish = lambda connection: connection.stream.close()
        client = await serve(recorder, http2=True).connect2()
        assert (await client.exchange("GET", "/")).reset == Code.INTERNAL
        assert not recorder.connections[0].stream.closed()
        assert recorder.connections[0].stream.fileno() > 0


class TestEarlyAnswers:
    @pytest.mark.parametrize("fields", [[], [("content-length", "100000")]])
    async def test_the_rest_of_the_body_is_not_wanted(self, serve, recorder, fields):
        recorder.on_head = respond
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/", fields, b"x" * 1000, end=False)
        response = await client.response(stream)
        assert (response.body, response.complete) == (b"ok", True)
        # Behind the end, so that nobody could take it for a failure (RFC 9113 section 8.1).
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        await recorder.seen("close")
        await client.data(stream, b"x" * 50_000)
        await client.send(frame(Type.HEADERS, client.block([("x-t", "1")]), stream=stream, flags=0x5))
        recorder.on_head = None
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/", [("x-t", "1")])).body == b"ok"
        assert recorder.body == b""

    async def test_a_body_that_is_there_already_is_no_reason(self, serve, recorder):
        recorder.on_head = respond
        client = await serve(recorder, http2=True).connect2()
        sent = client.head(request_fields("POST"), end=False) + frame(Type.DATA, b"x", stream=1, flags=1)
        await client.send(sent)
        assert (await client.response(1)).complete
        await client.ping()
        resets = [seen.code for seen in client.frames if seen.type == Type.RST_STREAM]
        assert resets in ([], [Code.NO_ERROR])
        await recorder.seen("close")

    async def test_whoever_waits_for_the_rest_is_told_that_it_will_not_come(self, serve, recorder):
        """The head was the end, and the application has not said that it is done."""
        recorder.on_head = lambda connection: connection.write_headers(OK, HTTPHeaders())
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("HEAD", "/", body=b"x", end=False)
        assert (await client.response(stream)).complete
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        await recorder.seen("close")
        recorder.connections[0].finish()
        recorder.on_head = None
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).body == b"ok"

    async def test_who_sends_all_before_it_reads_comes_to_an_end(self, serve, recorder):
        """The answer waits for the client's window, and the client would wait for ours."""
        recorder.on_head = respond
        client = await serve(recorder, http2=True, initial_window_size=1000).connect2(own={4: 0})
        stream = await client.request("POST", "/", end=False)
        await recorder.seen("close")
        for _ in range(20):
            await client.data(stream, b"x" * 1000)
            await client.read_until(lambda seen: (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream))
        await gets_its_answer(client, stream)
        assert recorder.body == b""

    @pytest.mark.parametrize("held", ["by the application", "for the application"])
    async def test_it_does_too_with_what_the_application_has_not_taken(self, serve, recorder, held):
        futures = recorder.data_futures if held == "by the application" else recorder.head_futures
        futures.append(asyncio.get_running_loop().create_future())
        client = await serve(recorder, http2=True, initial_window_size=1000).connect2(own={4: 0})
        stream = await client.request("POST", "/", end=False)
        await recorder.seen("head", "POST", "/")
        await client.data(stream, b"x" * 1000)
        await client.ping()
        respond(recorder.connections[0])
        for _ in range(20):
            await client.read_until(lambda seen: (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream))
            await client.data(stream, b"x" * 1000)
        await gets_its_answer(client, stream)

    async def test_it_does_too_with_padding(self, serve, recorder):
        recorder.on_head = respond
        client = await serve(recorder, http2=True, initial_window_size=1000).connect2(own={4: 0})
        stream = await client.request("POST", "/", end=False)
        await recorder.seen("close")
        for _ in range(20):
            await client.send(frame(Type.DATA, b"\xf0x" + b"\0" * 0xF0, stream=stream, flags=PADDED) * 3)
            await client.read_until(lambda seen: (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream))
        await gets_its_answer(client, stream)

    async def test_one_that_is_still_going_out_does_not_end_the_upload(self, serve, recorder):
        """Full duplex: the response may end before the request only if it has ended."""
        client = await serve(recorder, http2=True).connect2()
        stream = await client.request("POST", "/", body=b"1", end=False)
        await recorder.seen("data", b"1")
        (connection,) = recorder.connections
        connection.write_headers(OK, HTTPHeaders(), b"a")
        assert await client.body(stream, 1) == b"a"
        await client.data(stream, b"2")
        await recorder.seen("data", b"2")
        connection.write(b"b")
        assert await client.body(stream, 2) == b"ab"
        await client.data(stream, b"3", end=True)
        await recorder.seen("finish")
        connection.finish()
        assert (await client.response(stream)).reset is None


class TestDraining:
    async def test_it_says_so_first_and_then_which_request_was_the_last(self, serve, recorder):
        running = serve(recorder, http2=True)
        client = await running.connect2()
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        draining = asyncio.ensure_future(running.server.drain())
        seen = await client.goaway()
        assert (seen.code, seen.last_stream) == (Code.NO_ERROR, 2**31 - 1)
        # This one was on its way.
        late = await client.request("GET", "/late")
        await recorder.seen("finish", count=2)
        seen = await client.goaway()
        assert (seen.code, seen.last_stream) == (Code.NO_ERROR, late)
        # And this one has not heard.
        refused = await client.request("GET", "/refused")
        assert (await client.response(refused)).reset == Code.REFUSED
        assert not draining.done()
        for connection in recorder.connections:
            respond(connection)
        assert (await client.response(stream)).body == b"ok"
        assert (await client.response(late)).body == b"ok"
        assert await client.closed() == "end"
        client.close()
        await within(draining, "the end of the drain")
        assert len(recorder.heads) == 2

    async def test_idle_connections_are_closed(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.exchange("GET", "/")
        untouched = await running.connect2()
        draining = asyncio.ensure_future(running.server.drain())
        for each, last in ((client, 1), (untouched, 0)):
            assert (await each.goaway()).last_stream == 2**31 - 1
            assert (await each.goaway()).last_stream == last
            assert await each.closed() == "end"
            each.close()
        await within(draining, "the end of the drain")

    async def test_bodies_both_ways_are_finished(self, serve, recorder):
        running = serve(recorder, http2=True)
        client = await running.connect2()
        stream = await client.request("POST", "/", body=b"a", end=False)
        await recorder.seen("data", b"a")
        draining = asyncio.ensure_future(running.server.drain())
        await client.goaway()
        await client.goaway()
        await client.data(stream, b"b" * 100_000, end=True)
        await recorder.seen("finish")
        respond(recorder.connections[0], b"x" * 300_000)
        assert (await client.response(stream)).body == b"x" * 300_000
        assert len(recorder.body) == 100_001
        await client.closed()
        client.close()
        await within(draining, "the end of the drain")

    async def test_a_client_that_does_not_close_is_not_waited_for(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder, http2=True, linger_time=0.1)
        client = await running.connect2()
        await client.exchange("GET", "/")
        await within(running.server.drain(), "the end of the drain")

    async def test_nor_is_one_that_has_not_said_what_it_speaks(self, serve, recorder):
        running = serve(recorder, http2=True)
        downstream = await running.ask(b"PRI * HT")
        await asyncio.sleep(0.01)
        draining = asyncio.ensure_future(running.server.drain())
        assert await downstream.closed() == "end"
        await within(draining, "the end of the drain")

    async def test_all_connections_can_be_closed_at_once(self, serve, recorder):
        recorder.on_finish = Closing(recorder)
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.request("GET", "/")
        await recorder.seen("ready")
        await within(running.server.close_all_connections(), "the end of all connections")
        await recorder.seen("left")
        await client.closed()


class TestErrors:
    async def test_whoever_runs_is_told(self, serve, recorder):
        recorder.on_finish = Closing(recorder)
        client = await serve(recorder, http2=True).connect2()
        await client.request("GET", "/")
        await recorder.seen("ready")
        await client.send(frame(Type.DATA, b"x"))
        seen = await client.goaway()
        assert (seen.code, seen.last_stream) == (Code.PROTOCOL, 1)
        await recorder.seen("left")

    async def test_what_the_client_still_sends_does_not_destroy_the_reason(self, serve, recorder):
        """RFC 9112 section 9.6 for TCP: a close would be a reset."""
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        await client.send(frame(Type.DATA, b"x") + b"y" * 2_000_000)
        assert (await client.goaway()).code == Code.PROTOCOL
        assert await client.closed() == "end"

    async def test_but_not_for_ever(self, serve, recorder):
        client = await serve(recorder, http2=True, linger_bytes=100_000).connect2()
        await client.send(frame(Type.DATA, b"x"))
        with pytest.raises(ConnectionError):
            await client.send(b"y" * 50_000_000)

    async def test_nothing_is_left_behind(self, serve, recorder):
        """Neither a connection nor its streams, and none of them needs the garbage collector."""
        recorder.on_finish = respond
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.exchange("POST", "/", body=b"x")
        stream = await client.request("POST", "/", body=b"x", end=False)
        await client.ping()
        (connection,) = running.server._connections
        left = [weakref.ref(connection), *map(weakref.ref, recorder.connections)]
        assert len(left) == 3
        await client.send(rst_stream(stream))
        await recorder.seen("close")
        del connection
        recorder.connections.clear()
        client.close()
        gc.disable()
        try:
            await running.server._empty.wait()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert [ref() for ref in left] == [None] * 3
        finally:
            gc.enable()
