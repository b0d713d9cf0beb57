"""What a server must make of each frame: RFC 9113 sections 3.4 to 8, RFC 7541. One row, one case.

A row says what is sent behind preface and settings, and what must come of it: ``Connection(code)`` is a GOAWAY with
that code and the end, ``Stream(code)`` an RST_STREAM on stream 1 of a connection that goes on, ``Answer(status)`` a
response to the last request, and ``Ignored`` nothing at all. Then the next request is answered.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from tests.server.conftest import respond
from tests.support.http2 import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PADDED,
    PREFACE,
    PRIORITY,
    Code,
    Http2,
    Type,
    frame,
    request_fields,
    rst_stream,
    settings,
    window_update,
)


class Connection(NamedTuple):
    code: int


class Stream(NamedTuple):
    code: int


class Answer(NamedTuple):
    status: int


Ignored = None

GET = request_fields()
POST = request_fields("POST")


class Case:
    """Sends what a row says. Streams 1, 3, 5 are those of the test; the one that shows that all is well is 101."""

    def __init__(self, client: Http2) -> None:
        self.client = client

    def head(self, fields=GET, stream=1, end=True):
        return self.client.head(fields, stream=stream, end=end)

    def headers(self, payload, stream=1, flags=END_HEADERS | END_STREAM, wire_stream=None):
        self.client._expect_response(stream)
        return frame(Type.HEADERS, payload, stream=wire_stream or stream, flags=flags)

    def block(self, fields=GET):
        return self.client.block(fields)

    def data(self, content=b"x", stream=1, end=True):
        return frame(Type.DATA, content, stream=stream, flags=END_STREAM if end else 0)


def continuation(payload, stream=1, flags=END_HEADERS):
    return frame(Type.CONTINUATION, payload, stream=stream, flags=flags)


def priority(stream, depends_on=0):
    return frame(Type.PRIORITY, struct.pack(">LB", depends_on, 15), stream=stream)


def after_the_answer(case, more):
    """Wait for the answer to stream 1, then send `more`."""

    async def send():
        await case.client.send(case.head())
        await case.client.response(1)
        await case.client.send(more())

    return send()


CASES = {
    # 4.1 Frame format
    "4.1 unknown type": (lambda c: frame(0xFE, b"x" * 8) + c.head(), Answer(200)),
    "4.1 unknown flags": (lambda c: frame(Type.PING, b"x" * 8, flags=0xFE) + c.head(), Answer(200)),
    "4.1 reserved bit": (lambda c: frame(Type.PING, b"x" * 8, stream=1 << 31) + c.head(), Answer(200)),
    "4.1 reserved bit of a stream": (
        lambda c: c.headers(c.block(), wire_stream=1 | 1 << 31) + c.head(stream=3),
        Answer(200),
    ),
    # 4.2 Frame size
    "4.2 DATA of 16384": (lambda c: c.head(POST, end=False) + c.data(b"x" * 16384), Answer(200)),
    "4.2 DATA of 16385": (lambda c: c.head(POST, end=False) + c.data(b"x" * 16385), Connection(Code.FRAME_SIZE)),
    "4.2 DATA of 2^24 - 1": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, stream=1, length=2**24 - 1),
        Connection(Code.FRAME_SIZE),
    ),
    "4.2 HEADERS of 16385": (lambda c: frame(Type.HEADERS, stream=1, length=16385), Connection(Code.FRAME_SIZE)),
    # 4.3 Field blocks
    "4.3 that cannot be decoded": (lambda c: c.headers(b"\x00\x00\xff\xff\xff\xff"), Connection(Code.COMPRESSION)),
    "4.3 DATA inside": (
        lambda c: c.headers(c.block(), flags=0) + c.data(stream=1),
        Connection(Code.PROTOCOL),
    ),
    "4.3 PRIORITY inside": (lambda c: c.headers(c.block(), flags=0) + priority(1), Connection(Code.PROTOCOL)),
    "4.3 HEADERS of another stream inside": (
        lambda c: c.headers(c.block(), flags=0) + c.headers(c.block(), stream=3),
        Connection(Code.PROTOCOL),
    ),
    "4.3 unknown type inside": (lambda c: c.headers(c.block(), flags=0) + frame(0xFE), Connection(Code.PROTOCOL)),
    # 5.1 Stream states: idle
    "5.1 idle: DATA": (lambda c: c.data(), Connection(Code.PROTOCOL)),
    "5.1 idle: RST_STREAM": (lambda c: rst_stream(1), Connection(Code.PROTOCOL)),
    "5.1 idle: WINDOW_UPDATE": (lambda c: window_update(1, 1), Connection(Code.PROTOCOL)),
    "5.1 idle: WINDOW_UPDATE by 0": (lambda c: window_update(0, 1), Connection(Code.PROTOCOL)),
    "5.1 idle: CONTINUATION": (lambda c: continuation(b""), Connection(Code.PROTOCOL)),
    "5.1 idle: PRIORITY": (lambda c: priority(3) + c.head(), Answer(200)),
    # 5.1 half-closed (remote): the answer to /later does not come
    "5.1 half-closed: DATA": (lambda c: c.head(request_fields(path="/later")) + c.data(), Stream(Code.STREAM_CLOSED)),
    "5.1 half-closed: HEADERS": (
        lambda c: c.head(request_fields(path="/later")) + c.headers(c.block()),
        Stream(Code.STREAM_CLOSED),
    ),
    "5.1 half-closed: CONTINUATION": (
        lambda c: c.head(request_fields(path="/later")) + continuation(b""),
        Connection(Code.PROTOCOL),
    ),
    "5.1 half-closed: WINDOW_UPDATE": (
        lambda c: c.head(request_fields(path="/later")) + window_update(1, 1) + c.head(stream=3),
        Ignored,
    ),
    # 5.1 closed
    "5.1 closed: HEADERS": (
        lambda c: after_the_answer(c, lambda: c.headers(c.block())),
        Connection(Code.STREAM_CLOSED),
    ),
    "5.1 closed: DATA": (lambda c: after_the_answer(c, lambda: c.data()), Stream(Code.STREAM_CLOSED)),
    "5.1 closed: CONTINUATION": (lambda c: after_the_answer(c, lambda: continuation(b"")), Connection(Code.PROTOCOL)),
    "5.1 closed: PRIORITY": (lambda c: after_the_answer(c, lambda: priority(1)), Ignored),
    "5.1 closed: WINDOW_UPDATE": (lambda c: after_the_answer(c, lambda: window_update(1, 1)), Ignored),
    "5.1 closed: RST_STREAM": (lambda c: after_the_answer(c, lambda: rst_stream(1)), Ignored),
    "5.1 cut by the client: DATA": (
        lambda c: c.head(POST, end=False) + rst_stream(1) + c.data(),
        Stream(Code.STREAM_CLOSED),
    ),
    "5.1 cut by the client: HEADERS": (
        lambda c: c.head(POST, end=False) + rst_stream(1) + c.headers(c.block([("x", "y")])),
        Stream(Code.STREAM_CLOSED),
    ),
    "5.1 cut by the client: RST_STREAM": (lambda c: c.head(POST, end=False) + rst_stream(1) * 2, Ignored),
    # 5.1.1 Stream identifiers
    "5.1.1 even": (lambda c: c.headers(c.block(), stream=2), Connection(Code.PROTOCOL)),
    "5.1.1 lower than another": (
        lambda c: c.head(stream=5) + c.headers(c.block(), stream=3),
        Connection(Code.PROTOCOL),
    ),
    # 5.3 Priority: deprecated, but still one or the other
    "5.3 HEADERS with priority": (
        lambda c: c.headers(struct.pack(">LB", 0x80000003, 255) + c.block(), flags=END_HEADERS | END_STREAM | PRIORITY),
        Answer(200),
    ),
    "5.3.1 HEADERS depends on itself": (
        lambda c: c.headers(struct.pack(">LB", 1, 255) + c.block(), flags=END_HEADERS | END_STREAM | PRIORITY),
        Connection(Code.PROTOCOL),
    ),
    "5.3.1 PRIORITY depends on itself": (lambda c: priority(1, depends_on=1), Connection(Code.PROTOCOL)),
    # 5.5 Extensions
    "5.5 PRIORITY_UPDATE": (lambda c: frame(0x10, struct.pack(">L", 1) + b"u=1") + c.head(), Answer(200)),
    "5.5 ALTSVC": (lambda c: frame(0xA, b"\x00\x00x") + c.head(), Answer(200)),
    # 6.1 DATA
    "6.1 on stream 0": (lambda c: frame(Type.DATA, b"x"), Connection(Code.PROTOCOL)),
    "6.1 padded": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, b"\x02xyy", stream=1, flags=PADDED | END_STREAM),
        Answer(200),
    ),
    "6.1 padding and nothing else": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, b"\x02yy", stream=1, flags=PADDED | END_STREAM),
        Answer(200),
    ),
    "6.1 more padding than payload": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, b"\x06xxxx", stream=1, flags=PADDED | END_STREAM),
        Connection(Code.PROTOCOL),
    ),
    "6.1 as much padding as payload": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, b"\x05xxxx", stream=1, flags=PADDED | END_STREAM),
        Connection(Code.PROTOCOL),
    ),
    "6.1 padded without a length": (
        lambda c: c.head(POST, end=False) + frame(Type.DATA, b"", stream=1, flags=PADDED | END_STREAM),
        Connection(Code.FRAME_SIZE),
    ),
    # 6.2 HEADERS
    "6.2 on stream 0": (lambda c: frame(Type.HEADERS, c.block(), flags=END_HEADERS), Connection(Code.PROTOCOL)),
    "6.2 padded": (
        lambda c: c.headers(b"\x03" + c.block() + b"\0\0\0", flags=END_HEADERS | END_STREAM | PADDED),
        Answer(200),
    ),
    "6.2 padded, with priority": (
        lambda c: c.headers(
            b"\x01" + struct.pack(">LB", 0, 255) + c.block() + b"\0",
            flags=END_HEADERS | END_STREAM | PADDED | PRIORITY,
        ),
        Answer(200),
    ),
    "6.2 more padding than payload": (
        lambda c: c.headers(b"\xff" + c.block(), flags=END_HEADERS | END_STREAM | PADDED),
        Connection(Code.PROTOCOL),
    ),
    # 6.3 PRIORITY
    "6.3 on stream 0": (lambda c: priority(0), Connection(Code.PROTOCOL)),
    "6.3 of 4 octets": (lambda c: frame(Type.PRIORITY, b"xxxx", stream=1), Connection(Code.FRAME_SIZE)),
    # 6.4 RST_STREAM
    "6.4 on stream 0": (lambda c: rst_stream(0), Connection(Code.PROTOCOL)),
    "6.4 on an even stream": (lambda c: c.head(stream=5) + rst_stream(2), Connection(Code.PROTOCOL)),
    "6.4 of 3 octets": (
        lambda c: c.head(POST, end=False) + frame(Type.RST_STREAM, b"xxx", stream=1),
        Connection(Code.FRAME_SIZE),
    ),
    # 6.5 SETTINGS
    "6.5 on a stream": (lambda c: frame(Type.SETTINGS, stream=1), Connection(Code.PROTOCOL)),
    "6.5 of 5 octets": (lambda c: frame(Type.SETTINGS, b"xxxxx"), Connection(Code.FRAME_SIZE)),
    "6.5 ACK with a payload": (lambda c: frame(Type.SETTINGS, b"\0" * 6, flags=ACK), Connection(Code.FRAME_SIZE)),
    "6.5 ACK of nothing": (lambda c: settings(ack=True) * 3 + c.head(), Answer(200)),
    "6.5.2 ENABLE_PUSH of 2": (lambda c: settings({2: 2}), Connection(Code.PROTOCOL)),
    "6.5.2 INITIAL_WINDOW_SIZE of 2^31": (lambda c: settings({4: 2**31}), Connection(Code.FLOW_CONTROL)),
    "6.5.2 MAX_FRAME_SIZE of 2^14 - 1": (lambda c: settings({5: 2**14 - 1}), Connection(Code.PROTOCOL)),
    "6.5.2 MAX_FRAME_SIZE of 2^24": (lambda c: settings({5: 2**24}), Connection(Code.PROTOCOL)),
    "6.5.2 unknown": (lambda c: settings({0xFF: 7, 0xFFFF: 2**32 - 1}) + c.head(), Answer(200)),
    # 6.6 PUSH_PROMISE
    "6.6 from a client": (
        lambda c: (
            c.head(POST, end=False)
            + frame(Type.PUSH_PROMISE, struct.pack(">L", 2) + c.block(), stream=1, flags=END_HEADERS)
        ),
        Connection(Code.PROTOCOL),
    ),
    # 6.7 PING
    "6.7 on a stream": (lambda c: frame(Type.PING, b"x" * 8, stream=1), Connection(Code.PROTOCOL)),
    "6.7 of 7 octets": (lambda c: frame(Type.PING, b"x" * 7), Connection(Code.FRAME_SIZE)),
    "6.7 ACK of nothing": (lambda c: frame(Type.PING, b"x" * 8, flags=ACK) + c.head(), Answer(200)),
    # 6.8 GOAWAY
    "6.8 on a stream": (lambda c: frame(Type.GOAWAY, b"\0" * 8, stream=1), Connection(Code.PROTOCOL)),
    "6.8 of 7 octets": (lambda c: frame(Type.GOAWAY, b"\0" * 7), Connection(Code.FRAME_SIZE)),
    "6.8 and what was asked is answered": (lambda c: c.head() + frame(Type.GOAWAY, b"\0" * 8 + b"bye"), Answer(200)),
    # 6.9 WINDOW_UPDATE
    "6.9 by 0": (lambda c: window_update(0), Connection(Code.PROTOCOL)),
    "6.9 by 0 on a stream": (lambda c: c.head(POST, end=False) + window_update(0, 1), Stream(Code.PROTOCOL)),
    "6.9 of 3 octets": (lambda c: frame(Type.WINDOW_UPDATE, b"xxx"), Connection(Code.FRAME_SIZE)),
    "6.9.1 beyond 2^31 - 1": (lambda c: window_update(2**31 - 1), Connection(Code.FLOW_CONTROL)),
    "6.9.1 beyond 2^31 - 1 on a stream": (
        lambda c: c.head(POST, end=False) + window_update(2**31 - 1, 1),
        Stream(Code.FLOW_CONTROL),
    ),
    "6.9.2 beyond by SETTINGS": (
        lambda c: c.head(POST, end=False) + window_update(1, 1) + settings({4: 2**31 - 1}),
        Connection(Code.FLOW_CONTROL),
    ),
    # 6.10 CONTINUATION
    "6.10 several": (
        lambda c: (
            (block := c.block()),
            c.headers(block[:3], flags=END_STREAM)
            + continuation(block[3:4], flags=0)
            + continuation(b"", flags=0)
            + continuation(block[4:]),
        )[1],
        Answer(200),
    ),
    "6.10 on stream 0": (
        lambda c: c.headers(c.block(), flags=0) + continuation(b"", stream=0),
        Connection(Code.PROTOCOL),
    ),
    "6.10 on another stream": (
        lambda c: c.headers(c.block(), flags=0) + continuation(b"", stream=3),
        Connection(Code.PROTOCOL),
    ),
    "6.10 behind the end": (lambda c: c.head(POST, end=False) + continuation(b""), Connection(Code.PROTOCOL)),
    "6.10 behind DATA": (lambda c: c.head(POST, end=False) + c.data() + continuation(b""), Connection(Code.PROTOCOL)),
    # 8.1 Message framing
    "8.1 trailers": (
        lambda c: c.head(POST, end=False) + c.data(end=False) + c.headers(c.block([("x", "y")])),
        Answer(200),
    ),
    "8.1 trailers without an end": (
        lambda c: c.head(POST, end=False) + c.data(end=False) + c.headers(c.block([("x", "y")]), flags=END_HEADERS),
        Stream(Code.PROTOCOL),
    ),
    "8.1 a pseudo-header field in trailers": (
        lambda c: c.head(POST, end=False) + c.headers(c.block([(":path", "/")])),
        Stream(Code.PROTOCOL),
    ),
    "8.1 upper case in trailers": (
        lambda c: c.head(POST, end=False) + c.headers(c.block([("X", "y")])),
        Stream(Code.PROTOCOL),
    ),
    # 8.1.1 Malformed messages
    "8.1.1 Content-Length": (
        lambda c: c.head(request_fields("POST", headers=[("content-length", "3")]), end=False) + c.data(b"abc"),
        Answer(200),
    ),
    "8.1.1 less than Content-Length": (
        lambda c: c.head(request_fields("POST", headers=[("content-length", "3")]), end=False) + c.data(b"ab"),
        Stream(Code.PROTOCOL),
    ),
    "8.1.1 more than Content-Length": (
        lambda c: (
            c.head(request_fields("POST", headers=[("content-length", "3")]), end=False) + c.data(b"abcd", end=False)
        ),
        Stream(Code.PROTOCOL),
    ),
    "8.1.1 Content-Length and trailers too soon": (
        lambda c: (
            c.head(request_fields("POST", headers=[("content-length", "3")]), end=False)
            + c.data(b"ab", end=False)
            + c.headers(c.block([("x", "y")]))
        ),
        Stream(Code.PROTOCOL),
    ),
    "8.1.1 Content-Length and nothing": (
        lambda c: c.head(request_fields("POST", headers=[("content-length", "3")])),
        Stream(Code.PROTOCOL),
    ),
    # RFC 7541
    "HPACK 2.3.3 an index that is not in the table": (lambda c: c.headers(b"\xff\x00"), Connection(Code.COMPRESSION)),
    "HPACK 4.2 a table larger than allowed": (
        lambda c: c.headers(b"\x3f\xe2\x1f" + c.block()),
        Connection(Code.COMPRESSION),
    ),
    "HPACK 4.2 a table size update behind a field": (
        lambda c: c.headers(c.block() + b"\x20"),
        Connection(Code.COMPRESSION),
    ),
    "HPACK 4.2 two table size updates": (lambda c: c.headers(b"\x20\x3f\xe1\x1f" + c.block()), Answer(200)),
    "HPACK 4.2 more": (lambda c: c.headers(b"\x20" * 3 + c.block()), Connection(Code.COMPRESSION)),
    "HPACK 5.1 an integer without an end": (lambda c: c.headers(b"\x7f" + b"\xff" * 20), Connection(Code.COMPRESSION)),
    "HPACK 5.2 Huffman with EOS": (
        lambda c: c.headers(b"\x00\x85\xff\xff\xff\xff\xff\x01x"),
        Connection(Code.COMPRESSION),
    ),
    "HPACK 5.2 Huffman padded by zeros": (lambda c: c.headers(b"\x00\x81\x18\x01x"), Connection(Code.COMPRESSION)),
    "HPACK 5.2 a string longer than the block": (lambda c: c.headers(b"\x00\x05ab"), Connection(Code.COMPRESSION)),
    "HPACK 6.1 index 0": (lambda c: c.headers(b"\x80"), Connection(Code.COMPRESSION)),
}


@pytest.fixture
def answering(recorder):
    """Answers everything but /later."""

    def answer(connection):
        if connection._head.target != "/later":
            respond(connection)

    recorder.on_finish = answer
    return recorder


class TestFrames:
    @pytest.mark.parametrize("name", CASES)
    async def test_what_comes_of_it(self, serve, answering, name):
        make, expected = CASES[name]
        running = serve(answering, http2=True)
        client = await running.connect2()
        await client.ready()
        sent = make(Case(client))
        await (client.send(sent) if isinstance(sent, bytes) else sent)
        if isinstance(expected, Connection):
            seen = await client.goaway()
            assert (seen.code, await client.closed()) == (expected.code, "end")
            # Whoever else is connected does not notice.
            client = await running.connect2()
        elif isinstance(expected, Stream):
            assert (await client.rst_stream(1)).code == expected.code
        elif isinstance(expected, Answer):
            assert (await client.response(client._checker.highest_outbound_stream_id)).status == expected.status
        await client.send(client.head(GET, stream=101))
        assert (await client.response(101)).body == b"ok"


class TestPreface:
    @pytest.mark.parametrize(
        "data",
        [
            PREFACE + frame(Type.PING, b"x" * 8),
            PREFACE + settings(ack=True),
            PREFACE + frame(Type.HEADERS, b"\x82\x84\x86", stream=1, flags=END_HEADERS | END_STREAM),
        ],
        ids=["PING first", "ACK first", "HEADERS first"],
    )
    async def test_settings_come_first(self, serve, answering, data):
        downstream = await serve(answering, http2=True).ask(data)
        client = Http2(downstream.sock, "client")
        assert (await client.goaway()).code == Code.PROTOCOL
        assert await client.closed() == "end"

    async def test_it_may_come_in_pieces_with_all_that_follows(self, serve, answering):
        downstream = await serve(answering, http2=True).connect()
        client = Http2(downstream.sock, "client")
        client._checker.initiate_connection()
        client._checker.data_to_send()
        for byte in PREFACE + settings() + client.head(GET):
            await client.send(bytes([byte]))
        assert (await client.response(1)).body == b"ok"

    async def test_the_servers_settings_come_before_anything_was_asked(self, serve, answering):
        client = await serve(answering, http2=True).connect2()
        seen = await client.read_frame()
        pairs = dict(struct.iter_unpack(">HL", seen.payload))
        assert pairs == {1: 4096, 2: 0, 3: 100, 4: 262144, 5: 16384, 6: 65536, 8: 0}
