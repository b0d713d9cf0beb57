"""What one connection may cost: floods, bombs, and clients that keep us waiting (RFC 9113 section 10.5)."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import time

import pytest

from tests.server.conftest import respond
from tests.support.http2 import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PREFACE,
    Code,
    Type,
    frame,
    request_fields,
    rst_stream,
    settings,
    window_update,
)
from tornado_proxy.server import HTTPServer
from tornado_proxy.server.http2.limits import MAX_CONTROL_FRAMES, Budget
from tornado_proxy.server.link import Link

GET = request_fields()
POST = request_fields("POST")


async def calmed(client):
    """The connection was ended for what the client did to it."""
    assert (await client.goaway()).code == Code.ENHANCE_YOUR_CALM
    assert await client.closed() == "end"


class TestStreams:
    async def test_more_than_allowed_at_a_time_are_refused(self, serve, recorder):
        client = await serve(recorder, http2=True, max_concurrent_streams=10).connect2()
        await client.ready()
        await client.send(b"".join(client.head(GET) for _ in range(12)))
        for stream in (21, 23):
            assert (await client.response(stream)).reset == Code.REFUSED
        assert len(recorder.heads) == 10
        respond(recorder.connections[3])
        assert (await client.response(7)).body == b"ok"
        # Now there is room, and a refused one may be sent again.
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).body == b"ok"

    async def test_a_response_that_is_not_read_counts_until_it_is(self, serve, recorder):
        """Else whoever opens no window would have us hold any number of them."""
        recorder.on_finish = respond
        client = await serve(recorder, http2=True, max_concurrent_streams=2).connect2(own={4: 0})
        await client.ready()
        streams = [await client.request("GET", "/") for _ in range(3)]
        assert (await client.response(streams[2])).reset == Code.REFUSED
        await client.grant(2, streams[0])
        assert (await client.response(streams[0])).complete
        stream = await client.request("GET", "/")
        assert (await client.response_head(stream)).status == 200


class TestResets:
    async def test_rapid_reset(self, serve, recorder):
        """CVE-2023-44487: no more requests reach the application than may be cut."""
        client = await serve(recorder, http2=True, max_resets=50).connect2()
        await client.ready()
        await client.send(b"".join(client.head(GET) + rst_stream(2 * number + 1) for number in range(200)))
        await calmed(client)
        # A tenth of them each second on top.
        assert 51 <= len(recorder.heads) <= 56

    @pytest.mark.parametrize(
        "provocation",
        [
            lambda stream: window_update(0, stream),
            lambda stream: window_update(2**31 - 1, stream),
            lambda stream: frame(Type.DATA, b"abcdef", stream=stream),
            lambda stream: frame(Type.DATA, b"a", stream=stream, flags=END_STREAM),
            lambda stream: frame(Type.HEADERS, b"\x00\x01X\x01y", stream=stream, flags=END_HEADERS | END_STREAM),
        ],
        ids=["no increment", "too much of it", "too long a body", "too short a body", "malformed trailers"],
    )
    async def test_made_you_reset(self, serve, recorder, provocation):
        """CVE-2025-8671: streams that the client makes us cut cost as much as those that it cuts."""
        client = await serve(recorder, http2=True, max_resets=50).connect2()
        await client.ready()
        await client.send(
            b"".join(
                client.head(request_fields("POST", headers=[("content-length", "5")]), end=False)
                + provocation(2 * number + 1)
                for number in range(200)
            )
        )
        await calmed(client)
        assert 51 <= len(recorder.heads) <= 56

    @pytest.mark.parametrize(
        "fields", [request_fields(headers=[("connection", "close")]), request_fields()], ids=["malformed", "refused"]
    )
    async def test_requests_that_come_to_nothing(self, serve, recorder, fields):
        client = await serve(recorder, http2=True, max_resets=50, max_concurrent_streams=1).connect2()
        await client.ready()
        await client.send(b"".join(client.head(fields) for _ in range(200)))
        await calmed(client)
        assert len(recorder.heads) <= 1

    async def test_what_was_answered_may_be_cut(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True, max_resets=5).connect2()
        for _ in range(50):
            stream = await client.request("GET", "/")
            await client.response(stream)
            await client.send(rst_stream(stream, Code.NO_ERROR))
        assert (await client.exchange("GET", "/")).status == 200

    async def test_a_browser_that_leaves_a_page_is_no_attack(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        for _ in range(4):
            first = client._next_stream
            await client.send(b"".join(client.head(GET) for _ in range(100)))
            await client.send(b"".join(rst_stream(stream) for stream in range(first, first + 200, 2)))
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/")).status == 200


class TestControlFrames:
    @pytest.mark.parametrize(
        "flood",
        [
            frame(Type.PING, b"x" * 8),
            frame(Type.PING, b"x" * 8, flags=ACK),
            settings(),
            settings(ack=True),
            settings({1: 0}) + settings({1: 4096}),
            frame(Type.PRIORITY, b"\0\0\0\0\x0f", stream=1),
            window_update(1),
            window_update(1, 1),
            frame(Type.DATA, stream=1),
            frame(0xFE, b"x"),
            frame(0x10, b"\0\0\0\x01u=1"),
        ],
        ids=[
            "PING",
            "PING that is an answer",
            "SETTINGS",
            "SETTINGS that are an answer",
            "SETTINGS of HPACK",
            "PRIORITY",
            "WINDOW_UPDATE",
            "of a stream",
            "DATA",
            "?",
            "RFC 9218",
        ],
    )
    async def test_a_flood_of_them(self, serve, recorder, flood):
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        await client.send(client.head(POST, end=False) + flood * (MAX_CONTROL_FRAMES + 200))
        await calmed(client)
        await recorder.seen("close")

    @pytest.mark.parametrize("type_", [Type.DATA, Type.HEADERS], ids=["DATA", "HEADERS"])
    async def test_on_a_stream_that_was_cut(self, serve, recorder, type_):
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        late = frame(type_, b"" if type_ == Type.HEADERS else b"x", stream=1, flags=END_HEADERS | END_STREAM)
        await client.send(client.head(POST, end=False) + rst_stream(1) + late * (MAX_CONTROL_FRAMES + 200))
        await calmed(client)

    async def test_a_client_that_reads_a_lot_may_send_many(self, serve, recorder):
        """WINDOW_UPDATE for each frame, twice, and a PING: more than some libraries do."""
        recorder.on_finish = lambda connection: respond(connection, b"x" * 500_000)
        client = await serve(recorder, http2=True).connect2()
        for _ in range(20):
            assert len((await client.exchange("GET", "/")).body) == 500_000
            await client.ping()
        sent = sum(1 for seen in client.frames if seen.type == Type.DATA)
        assert 2 * sent > MAX_CONTROL_FRAMES / 2

    async def test_so_may_one_that_asks_a_lot(self, serve, recorder):
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        for _ in range(500):
            stream = await client.request("GET", "/")
            await client.send(frame(Type.PRIORITY, b"\0\0\0\0\x0f", stream=stream) * 4)
            assert (await client.response(stream)).status == 200

    async def test_a_client_that_does_not_read_the_answers_is_not_read_from(self, serve, recorder):
        """Refusals are free of charge, and would pile up here."""
        running = serve(recorder, http2=True)
        client = await running.connect2(receive_buffer=4096)
        await client.ready()
        (connection,) = running.server._connections
        # The kernel would hold megabytes for it.
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connect = [(":method", "CONNECT"), (":authority", "a:443")]
        client.encoder.header_table.maxsize = 0
        block = client.encoder.encode([(name, value, True) for name, value in connect], huffman=False)
        sending = asyncio.ensure_future(
            client.send(
                b"".join(
                    frame(Type.HEADERS, block, stream=stream, flags=END_HEADERS | END_STREAM)
                    for stream in range(1, 200_000, 2)
                )
            )
        )
        async with asyncio.timeout(5):
            while not connection.reading_paused:
                await asyncio.sleep(0)
        assert connection.transport.get_write_buffer_size() < 400_000
        # It reads again, and is read from again.
        received = len(await client.read_some())
        while connection.reading_paused:
            received += len(await client.read_some())
        assert received > 65_536
        client.reset()
        sending.cancel()
        await asyncio.wait_for(running.server._empty.wait(), 5)

    async def test_its_end_is_noticed_all_the_same(self, serve, recorder):
        running = serve(recorder, http2=True, linger_time=0.1)
        client = await running.connect2(receive_buffer=4096)
        await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = running.server._connections
        connection.pause_reading()
        await client.send(frame(Type.PING, b"x" * 8) * 100)
        client.close()
        await asyncio.wait_for(running.server._empty.wait(), 5)
        assert recorder.connections[0].is_closed()

    async def test_settings_that_nobody_knows_are_not_kept(self, serve, recorder):
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.ready()
        for number in range(10):
            await client.send(settings({0x1000 + 2000 * number + more: 1 for more in range(2000)}))
        await client.ping()
        (connection,) = running.server._connections
        assert len(connection.engine.remote_settings) < 10

    async def test_a_table_is_never_larger_than_ours(self, serve, recorder):
        recorder.on_finish = lambda connection: respond(connection, X_A=f"{len(recorder.heads)}" * 200)
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.send(settings({1: 2**32 - 1}))
        for _ in range(100):
            assert (await client.exchange("GET", "/")).status == 200
        (connection,) = running.server._connections
        assert connection.engine.encoder.header_table._current_size <= 4096

    @pytest.mark.parametrize("sizes", [[0], [0, 0], [100, 0, 4096], [0, 2**32 - 1]])
    async def test_the_clients_table_may_be_smaller(self, serve, recorder, sizes):
        recorder.on_finish = lambda connection: respond(connection, X_A="1", X_B="2")
        client = await serve(recorder, http2=True).connect2()
        await client.exchange("GET", "/")
        for size in sizes:
            await client.send(settings({1: size}))
        client._checker.decoder.max_allowed_table_size = min(sizes[-1], 4096)
        for _ in range(3):
            response = await client.exchange("GET", "/")
            assert (response.header("x-a"), response.header("x-b")) == ("1", "2")


class TestHeads:
    async def test_one_that_is_too_large_gets_431(self, serve, recorder):
        client = await serve(recorder, http2=True, max_header_size=4096).connect2()
        stream = await client.request("GET", "/", [("x-large", "v" * 5000)])
        response = await client.response(stream)
        assert (response.status, response.complete) == (431, True)
        stream = await client.request("POST", "/", [("x-large", "v" * 5000)], end=False)
        assert (await client.response(stream)).status == 431
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        assert not recorder.heads
        recorder.on_finish = respond
        assert (await client.exchange("GET", "/", [("x-large", "v" * 3000)])).status == 200

    async def test_one_that_is_much_too_large_ends_the_connection(self, serve, recorder):
        client = await serve(recorder, http2=True, max_header_size=4096).connect2()
        await client.send(client.head(request_fields(headers=[("x-large", "v" * 9000)])))
        await calmed(client)

    async def test_a_bomb(self, serve, recorder):
        """4 KB in the table, named by one octet ten thousand times."""
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.ready()
        bomb = client.block([*GET, ("x", "v" * 3900)])
        began = time.perf_counter()
        await client.send(frame(Type.HEADERS, bomb + b"\xbe" * 10_000, stream=1, flags=END_HEADERS | END_STREAM))
        await calmed(client)
        assert time.perf_counter() - began < 1
        assert not recorder.heads

    async def test_continuation_without_an_end(self, serve, recorder):
        """CERT VU#421644: what is held is bounded by its size."""
        running = serve(recorder, http2=True)
        client = await running.connect2()
        await client.ready()
        piece = frame(Type.CONTINUATION, b"\x00\x01x\x7f\x80\x3f" + b"v" * 16_000, stream=1)
        await client.send(frame(Type.HEADERS, client.block(GET), stream=1, flags=END_STREAM) + piece * 20)
        await calmed(client)

    async def test_empty_continuation_without_an_end(self, serve, recorder):
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        await client.send(frame(Type.HEADERS, client.block(GET), stream=1, flags=END_STREAM))
        await client.send(frame(Type.CONTINUATION, stream=1) * 1000)
        # h2's own limit.
        assert (await client.goaway()).code == Code.PROTOCOL
        assert await client.closed() == "end"

    @pytest.mark.parametrize("size", [1, 3, 40, 4000])
    async def test_the_worst_that_is_allowed_holds_up_nobody_for_long(self, serve, recorder, size):
        """As many fields as fit, as literals that are copied as they are read."""
        recorder.on_finish = respond
        client = await serve(recorder, http2=True).connect2()
        await client.ready()
        fields = [(b"x", b"v" * size)] * ((65536 - 200) // (33 + size))
        client.encoder.header_table.maxsize = 0
        block = client.encoder.encode([(name, value, True) for name, value in [*GET, *fields]], huffman=False)
        pieces = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
        client._expect_response(1)
        sent = frame(Type.HEADERS, pieces[0], stream=1, flags=END_STREAM | (END_HEADERS if len(pieces) == 1 else 0))
        for at, piece in enumerate(pieces[1:], 2):
            sent += frame(Type.CONTINUATION, piece, stream=1, flags=END_HEADERS if at == len(pieces) else 0)
        client.open_stream()
        began = time.perf_counter()
        await client.send(sent)
        assert (await client.response(1)).status == 200
        assert time.perf_counter() - began < 0.5


class TestBodies:
    @pytest.mark.parametrize("declared", [True, False])
    async def test_one_that_is_too_large_gets_413(self, serve, recorder, declared):
        client = await serve(recorder, http2=True, max_body_size=1000).connect2()
        fields = [("content-length", "1001")] if declared else []
        stream = await client.request("POST", "/", fields, b"x" * 1001, end=False)
        response = await client.response(stream)
        assert (response.status, response.complete) == (413, True)
        assert (await client.rst_stream(stream)).code == Code.NO_ERROR
        assert recorder.body == b""
        await recorder.seen("close")

    async def test_the_application_may_allow_more(self, serve, recorder):
        recorder.on_head = lambda connection: connection.set_max_body_size(2000)
        recorder.on_finish = respond
        client = await serve(recorder, http2=True, max_body_size=1000).connect2()
        assert (await client.exchange("POST", "/", body=b"x" * 2000)).status == 200

    async def test_one_that_does_not_come_gets_408(self, serve, recorder):
        recorder.on_head = lambda connection: connection.set_body_timeout(0.05)
        client = await serve(recorder, http2=True, linger_time=0.05).connect2()
        stream = await client.request("POST", "/", body=b"x", end=False)
        assert (await client.response(stream)).status == 408
        await recorder.seen("close")

    async def test_one_that_came_does_not(self, serve, recorder):
        recorder.on_head = lambda connection: connection.set_body_timeout(0.05)
        running = serve(recorder, http2=True, linger_time=0.05)
        client = await running.connect2()
        stream = await client.request("POST", "/", body=b"x")
        await recorder.seen("finish")
        assert recorder.connections[0]._body_deadline == math.inf
        respond(recorder.connections[0])
        assert (await client.response(stream)).status == 200


class TestWaiting:
    @pytest.mark.parametrize(
        "sent",
        [b"", b"PRI", PREFACE[:20]],
        ids=["nothing", "half a word", "half a preface"],
    )
    async def test_for_the_preface(self, serve, recorder, sent):
        running = serve(recorder, http2=True, header_timeout=0.1)
        downstream = await running.connect()
        await downstream.send(sent)
        assert await downstream.closed() == "end"
        assert await downstream.read_until_closed() == b""

    @pytest.mark.parametrize(
        "sent",
        [PREFACE, PREFACE + b"\0\0", PREFACE + settings() + b"\0\0\x04\x01\x05"],
        ids=["preface", "half a frame", "half a request"],
    )
    async def test_for_the_first_request(self, serve, recorder, sent):
        running = serve(recorder, http2=True, header_timeout=0.1, linger_time=0.1)
        downstream = await running.connect()
        await downstream.send(sent)
        assert await downstream.closed() == "end"
        # It is told why: nobody has acknowledged our settings.
        assert b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x04" in await downstream.read_until_closed()

    async def test_for_the_next_request(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder, http2=True, idle_timeout=0.1, header_timeout=60, linger_time=0.1)
        client = await running.connect2()
        for _ in range(3):
            assert (await client.exchange("GET", "/")).status == 200
        seen = await client.goaway()
        assert (seen.code, seen.last_stream) == (Code.NO_ERROR, 5)
        assert await client.closed() == "end"

    async def test_pings_do_not_make_an_idle_connection_a_busy_one(self, serve, recorder):
        recorder.on_finish = respond
        running = serve(recorder, http2=True, idle_timeout=0.2, linger_time=0.1)
        client = await running.connect2()
        await client.exchange("GET", "/")
        while not any(seen.type == Type.GOAWAY for seen in client.frames):
            await client.send(frame(Type.PING, b"x" * 8))
            await client.read_frame()

    async def test_for_the_end_of_a_field_block(self, serve, recorder):
        """Also where other streams are busy."""
        running = serve(recorder, http2=True, header_timeout=0.2, linger_time=0.1)
        client = await running.connect2()
        await client.ready()
        await client.send(client.head(POST, end=False))
        await recorder.seen("head", "POST", "/")
        block = client.block(GET)
        await client.send(frame(Type.HEADERS, block[:1], stream=3, flags=END_STREAM))
        dripping = asyncio.ensure_future(drip(client, block[1:]))
        seen = await client.goaway()
        # Stream 3 was not looked at, and may be sent again.
        assert (seen.code, seen.last_stream) == (Code.NO_ERROR, 1)
        dripping.cancel()
        await recorder.seen("close")

    async def test_a_busy_connection_is_not_idle(self, serve, recorder):
        running = serve(recorder, http2=True, idle_timeout=0.05, header_timeout=0.05, linger_time=0.05)
        client = await running.connect2()
        stream = await client.request("GET", "/")
        await recorder.seen("finish")
        (connection,) = running.server._connections
        assert connection.deadline == math.inf
        for _ in range(5):
            connection.sweep(running.server.loop.time() + 1000)
        respond(recorder.connections[0])
        assert (await client.response(stream)).status == 200

    async def test_a_response_that_nobody_takes_is_given_up(self, serve, recorder, monkeypatch):
        """Whose application is done: nobody else would. Where it is not, that is write_timeout's."""
        monkeypatch.setattr(Link, "write_stall", 0.1)
        recorder.on_finish = respond
        running = serve(recorder, http2=True, linger_time=0.1)
        client = await running.connect2(own={4: 0})
        stream = await client.request("GET", "/")
        assert (await client.response_head(stream)).status == 200
        assert (await client.response(stream)).reset == Code.CANCEL
        (connection,) = running.server._connections
        assert not connection.streams

    async def test_so_is_one_without_content(self, serve, recorder, monkeypatch):
        """It waits behind what the client does not read, and would for ever."""
        monkeypatch.setattr(Link, "write_stall", 0.1)
        recorder.on_finish = lambda connection: respond(
            connection, b"x" * 8_000_000 if connection._head.target == "/large" else b""
        )
        running = serve(recorder, http2=True, idle_timeout=0.1, linger_time=0.1)
        client, connection = await not_reading(running, recorder, "/large")
        async with asyncio.timeout(5):
            while not connection.write_paused:
                await asyncio.sleep(0)
        for _ in range(10):
            await client.request("GET", "/")
        await asyncio.wait_for(running.server._empty.wait(), 5)
        assert len(recorder.connections) == 11

    async def test_one_that_is_taken_slowly_is_not(self, serve, recorder, monkeypatch):
        monkeypatch.setattr(Link, "write_stall", 0.3)
        recorder.on_finish = lambda connection: respond(connection, b"x" * 20)
        running = serve(recorder, http2=True, linger_time=0.1)
        client = await running.connect2(own={4: 0})
        client.keep_windows = True
        stream = await client.request("GET", "/")
        for taken in range(1, 21):
            await client.grant(1, stream)
            assert len(await client.body(stream, taken)) == taken
            await asyncio.sleep(0.03)
        assert (await client.response(stream)).complete

    async def test_a_client_that_stops_reading_and_ends_nothing_is_cut(self, serve, recorder, monkeypatch):
        """Its last bytes wait in our memory, with nobody to send them to."""
        monkeypatch.setattr(Link, "write_stall", 0.1)
        recorder.on_finish = lambda connection: respond(connection, b"x" * 8_000_000)
        running = serve(recorder, http2=True, idle_timeout=0.1, linger_time=0.1)
        _, connection = await not_reading(running, recorder, "/")
        # As if all of it had found its way into the transport.
        connection.streams.clear()
        connection.stream_closed()
        await asyncio.wait_for(running.server._empty.wait(), 5)


async def not_reading(running, recorder, path):
    """Ask for ``path``, with windows for all of it, and read nothing; return the client and the server's connection."""
    client = await running.connect2(own={4: 2**31 - 1}, receive_buffer=4096)
    await client.ready()
    await client.grant(2**30)
    await client.request("GET", path)
    await recorder.seen("finish")
    (connection,) = running.server._connections
    return client, connection


async def drip(client, block):
    """Send an octet now and then: each by itself is in time."""
    for octet in block * 100:
        await client.send(frame(Type.CONTINUATION, bytes([octet]), stream=3))
        await asyncio.sleep(0.02)


class TestBudgets:
    def test_so_many_at_once_and_a_tenth_each_second(self):
        budget = Budget(10, now=0.0)
        assert [budget.spend(0.0) for _ in range(11)] == [True] * 10 + [False]
        budget = Budget(10, now=0.0)
        assert all(budget.spend(float(second)) for second in range(100))
        assert sum(budget.spend(100.0) for _ in range(20)) == 10

    def test_never_more_than_at_the_beginning(self):
        budget = Budget(10, now=0.0)
        budget.earn(100)
        budget.earn_bytes(10**9)
        assert sum(budget.spend(10_000.0) for _ in range(20)) == 10

    def test_content_buys_one_for_each_kib(self):
        budget = Budget(10, now=0.0)
        assert sum(budget.spend(0.0) for _ in range(10)) == 10
        for _ in range(3):
            budget.earn_bytes(700)
        assert sum(budget.spend(0.0) for _ in range(10)) <= 2


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("max_concurrent_streams", 0), ("initial_window_size", 0), ("initial_window_size", 2**31), ("max_resets", 0)],
    )
    def test_what_cannot_be_is_refused_at_once(self, recorder, name, value):
        with pytest.raises(ValueError, match=re.escape(name)):
            HTTPServer(recorder, http2=True, **{name: value})
