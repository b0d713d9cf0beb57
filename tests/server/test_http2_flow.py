"""Windows as back-pressure, both ways, and whose turn it is to send (RFC 9113 section 5.2)."""

from __future__ import annotations

import asyncio
import struct

import pytest
from tornado.httputil import HTTPHeaders

from tests.server.conftest import OK, respond
from tests.support.http2 import END_STREAM, PADDED, Code, Http2, Type, frame, settings
from tests.support.wire import within

# SETTINGS_INITIAL_WINDOW_SIZE
WINDOW = 4


class Slow(Http2):
    """Opens no window by itself."""

    keep_windows = True


@pytest.fixture
async def slow(serve):
    async def connect(running, **options):
        client = await Slow.connect(running.port, **options)
        running._downstreams.append(client)
        return client

    return connect


def begin(connection):
    connection.write_headers(OK, HTTPHeaders())


class TestSending:
    async def test_what_the_window_allows_and_no_more(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 100_000)
        client = await slow(serve(recorder, http2=True))
        stream = await client.request("GET", "/")
        assert len(await client.body(stream, 65535)) == 65535
        await client.ping()
        assert len(client.responses[stream].body) == 65535
        # The connection's is closed too, so one alone does not help.
        await client.grant(10_000, stream)
        await client.ping()
        assert len(client.responses[stream].body) == 65535
        await client.grant(4)
        assert len(await client.body(stream, 65539)) == 65539
        await client.grant(100_000)
        assert len(await client.body(stream, 75_535)) == 75_535
        await client.grant(100_000, stream)
        assert (await client.response(stream)).body == b"x" * 100_000

    async def test_a_window_of_one(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"abc")
        client = await slow(serve(recorder, http2=True), own={WINDOW: 0})
        stream = await client.request("GET", "/")
        assert (await client.response_head(stream)).status == 200
        for sent in (b"a", b"ab", b"abc"):
            await client.ping()
            assert client.responses[stream].body == sent[:-1]
            await client.grant(1, stream)
            assert await client.body(stream, len(sent)) == sent
        assert (await client.response(stream)).complete

    async def test_an_end_needs_no_window(self, serve, recorder, slow):
        client = await slow(serve(recorder, http2=True), own={WINDOW: 3})
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        begin(recorder.connections[0])
        recorder.connections[0].write(b"abc")
        assert await client.body(stream, 3) == b"abc"
        recorder.connections[0].finish()
        assert (await client.response(stream)).complete

    async def test_settings_change_the_windows_of_streams_that_are_open(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 10)
        client = await slow(serve(recorder, http2=True), own={WINDOW: 0})
        stream = await client.request("GET", "/")
        assert (await client.response_head(stream)).body == b""
        client._checker.increment_flow_control_window(10, stream)
        await client.send(settings({WINDOW: 10}))
        assert (await client.response(stream)).body == b"x" * 10

    async def test_a_window_may_become_negative(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 30)
        client = await slow(serve(recorder, http2=True), own={WINDOW: 10})
        stream = await client.request("GET", "/")
        await client.body(stream, 10)
        # 10 have been sent: the window is -10 now, and these make it 5.
        await client.send(settings({WINDOW: 0}))
        await client.grant(15, stream)
        assert len(await client.body(stream, 15)) == 15
        await client.ping()
        assert len(client.responses[stream].body) == 15
        await client.grant(15, stream)
        assert (await client.response(stream)).complete

    async def test_a_write_waits_until_all_of_it_is_out(self, serve, recorder, slow):
        client = await slow(serve(recorder, http2=True), own={WINDOW: 10})
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        begin(connection)
        assert connection.write(b"x" * 10).done()
        await client.body(stream, 10)
        written = connection.write(b"x" * 5)
        assert not written.done()
        assert connection.unsent() == 5
        await client.grant(4, stream)
        await client.body(stream, 14)
        assert not written.done()
        assert connection.unsent() == 1
        await client.grant(1, stream)
        await within(written, "the write")
        assert connection.unsent() == 0

    async def test_a_stalled_stream_does_not_look_busy_because_of_others(self, serve, recorder, slow):
        """What is unsent is what write_timeout looks at: another stream's progress is none."""
        client = await slow(serve(recorder, http2=True), own={WINDOW: 0})
        await client.request("GET", "/stalled")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        begin(connection)
        connection.write(b"x" * 100)
        seen = set()
        recorder.on_finish = lambda other: respond(other, b"y" * 10)
        for _ in range(10):
            stream = await client.request("GET", "/busy")
            await client.grant(10, stream)
            await client.response(stream)
            seen.add(connection.unsent())
        assert seen == {100}

    async def test_a_stalled_stream_does_not_stall_others(self, serve, recorder, slow):
        def answer(connection):
            respond(connection, b"x" * (1_000_000 if connection._head.target == "/large" else 10))

        recorder.on_finish = answer
        client = await slow(serve(recorder, http2=True), own={WINDOW: 1000})
        await client.grant(10_000_000)
        large = await client.request("GET", "/large")
        await client.body(large, 1000)
        for _ in range(20):
            assert (await client.exchange("GET", "/small")).body == b"x" * 10
        assert len(client.responses[large].body) == 1000

    async def test_nor_does_a_connection_window_that_is_closed_hold_up_heads(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 70_000)
        client = await slow(serve(recorder, http2=True))
        first = await client.request("GET", "/")
        await client.body(first, 65535)
        second = await client.request("GET", "/")
        assert (await client.response_head(second)).status == 200
        await client.ping()
        assert client.responses[second].body == b""

    async def test_streams_take_turns_frame_by_frame(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(connection, b"x" * 200_000)
        client = await slow(serve(recorder, http2=True), own={WINDOW: 2**31 - 1})
        await client.ready()
        heads = b"".join(client.head([*HEAD]) for _ in range(4))
        await client.grant(10_000_000)
        await client.send(heads)
        for stream in (1, 3, 5, 7):
            await client.response(stream)
        turns = [seen.stream for seen in client.frames if seen.type == Type.DATA]
        # Nobody gets a second frame before everyone has had one, until the first is done.
        assert turns[:40] == [1, 3, 5, 7] * 10

    async def test_a_small_response_overtakes_a_large_one(self, serve, recorder, slow):
        recorder.on_finish = lambda connection: respond(
            connection, b"x" * (2_000_000 if connection._head.target == "/large" else 10)
        )
        client = await slow(serve(recorder, http2=True), own={WINDOW: 2**31 - 1}, receive_buffer=4096)
        await client.ready()
        await client.grant(2**30)
        large = await client.request("GET", "/large")
        await client.body(large, 16384)
        small = await client.request("GET", "/small")
        assert (await client.response(small)).complete
        assert not client.responses[large].complete
        assert len((await client.response(large)).body) == 2_000_000

    async def test_a_window_may_be_larger_than_what_we_hold(self, serve, recorder, slow):
        """Else whoever writes without a pause would fill the memory within one turn of the loop."""
        client = await slow(serve(recorder, http2=True), own={WINDOW: 2**31 - 1})
        await client.grant(2**30)
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        begin(connection)
        sent = 0
        while (written := connection.write(b"x" * 10_000)).done():
            sent += 10_000
        assert sent <= 65_536
        await within(written, "the write")
        connection.finish()
        assert len((await client.response(stream)).body) == sent + 10_000

    async def test_a_client_that_does_not_read_at_all(self, serve, recorder, slow):
        """The kernel's buffers fill; then the writer waits, and memory does not grow."""
        running = serve(recorder, http2=True)
        client = await slow(running, own={WINDOW: 2**31 - 1}, receive_buffer=4096)
        await client.ready()
        await client.grant(2**30)
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = recorder.connections
        begin(connection)
        written = connection.write(b"")
        sent = 0
        while written.done() and sent < 50_000_000:
            written = connection.write(b"x" * 65536)
            sent += 65536
            # The end of this turn: it is sent, or the kernel has had enough.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert sent < 50_000_000
        assert connection.unsent() > 65536
        assert connection.outbox.size <= 65536
        connection.finish()
        assert len((await client.response(stream)).body) == sent
        await within(written, "the write")


HEAD = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")]


def increments(client, stream):
    return sum(
        struct.unpack(">L", seen.payload)[0]
        for seen in client.frames
        if seen.type == Type.WINDOW_UPDATE and seen.stream == stream
    )


class TestReceiving:
    async def test_the_window_opens_when_the_application_has_taken_the_bytes(self, serve, recorder):
        running = serve(recorder, http2=True, initial_window_size=40_000)
        client = await running.connect2()
        taken = [asyncio.Future(), asyncio.Future()]
        recorder.data_futures = list(taken)
        stream = await client.request("POST", "/", end=False)
        await client.data(stream, b"x" * 10_000)
        await recorder.seen("data", b"x" * 10_000)
        await client.data(stream, b"y" * 30_000)
        await client.ping()
        # 40,000 are on their way or held, and not one more may come.
        assert increments(client, stream) == 0
        assert recorder.body == b"x" * 10_000
        taken[0].set_result(None)
        await recorder.seen("data", b"y" * 30_000)
        await client.ping()
        assert increments(client, stream) == 0
        taken[1].set_result(None)
        await client.read_until(lambda seen: (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream))
        assert increments(client, stream) == 40_000

    async def test_whoever_sends_more_is_cut_off(self, serve, recorder):
        running = serve(recorder, http2=True, initial_window_size=1000)
        client = await running.connect2()
        recorder.data_futures = [asyncio.Future()]
        stream = await client.request("POST", "/", end=False)
        await client.data(stream, b"x" * 1000)
        await client.data(stream, b"y")
        assert (await client.goaway()).code == Code.FLOW_CONTROL
        await recorder.seen("close")
        assert recorder.body == b"x" * 1000

    async def test_stalled_uploads_stall_nobody(self, serve, recorder):
        """As many as there may be, each with all that its window allows: what one holds is nobody else's."""
        running = serve(recorder, http2=True, max_concurrent_streams=20, initial_window_size=100_000)
        client = await running.connect2()
        recorder.data_futures = [asyncio.Future() for _ in range(19)]
        for _ in range(19):
            stream = await client.request("POST", "/stalled", end=False)
            await client.data(stream, b"x" * 100_000)
        recorder.on_finish = respond
        stream = await client.request("POST", "/", end=False)
        for _ in range(50):
            await client.data(stream, b"y" * 16_384)
            await client.ping()
        await client.data(stream, end=True)
        assert (await client.response(stream)).status == 200
        assert increments(client, stream) >= 50 * 16_384 - 100_000
        # One of the heads, and what came behind it: the rest is held.
        assert sum(len(connection._pending) for connection in recorder.connections) == 19 * (100_000 - 16_384)

    async def test_tiny_frames_hold_no_more_than_their_bytes(self, serve, recorder):
        running = serve(recorder, http2=True)
        client = await running.connect2()
        recorder.data_futures = [asyncio.Future()]
        stream = await client.request("POST", "/", end=False)
        await client.send(frame(Type.DATA, b"x", stream=stream) * 10_000)
        await client.ping()
        (connection,) = recorder.connections
        assert isinstance(connection._pending, bytearray)
        assert len(connection._pending) == 9_999

    async def test_padding_is_given_back_at_once(self, serve, recorder):
        running = serve(recorder, http2=True, initial_window_size=1000)
        client = await running.connect2()
        stream = await client.request("POST", "/", end=False)
        for _ in range(100):
            await client.send(frame(Type.DATA, b"\xf0x" + b"\0" * 0xF0, stream=stream, flags=PADDED))
            await client.ping()
        assert increments(client, stream) > 100 * 242 - 1000
        assert recorder.body == b"x" * 100

    async def test_what_is_dropped_is_given_back_to_the_connection(self, serve, recorder):
        """Bodies of requests that were answered early, and of such as were cut, do not use it up."""
        recorder.on_head = respond
        client = await serve(recorder, http2=True).connect2()
        for number in range(30):
            stream = await client.request("POST", "/", end=False)
            response = await client.response(stream)
            assert (response.status, response.complete) == (200, True), number
            await client.rst_stream(stream)
            await client.data(stream, b"x" * 200_000)
            await client.ping()
        assert increments(client, 0) >= 30 * 200_000 - 1024 * 1024

    async def test_a_body_of_many_windows(self, serve, recorder):
        recorder.on_finish = lambda connection: respond(connection, b"%d" % len(recorder.body))
        running = serve(recorder, http2=True, initial_window_size=65_535)
        client = await running.connect2()
        stream = await client.request("POST", "/", end=False)
        sent = 0
        while sent < 3_000_000:
            while sent + 16_384 > increments(client, stream) + 65_535:
                await client.read_frame()
            await client.data(stream, b"x" * 16_384)
            sent += 16_384
        await client.send(frame(Type.DATA, stream=stream, flags=END_STREAM))
        assert (await client.response(stream)).body == b"%d" % sent
        # Half a window at a time.
        assert len([seen for seen in client.frames if (seen.type, seen.stream) == (Type.WINDOW_UPDATE, stream)]) < 100
