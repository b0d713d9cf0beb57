"""Frames of any kind in any order: the server stays up, and each request that began is told how it ended, once.

Hypothesis writes them, always the same ones: TORNADO_PROXY_FUZZ=5000 looks at that many new ones.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import Counter

from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders, ResponseStartLine

from tests.server.conftest import respond
from tests.support.downstream import Downstream
from tests.support.http2 import END_HEADERS, END_STREAM, PREFACE, Http2, Type, frame, request_fields
from tests.support.http2 import settings as settings_frame
from tests.support.wire import WireClosed, within

FUZZ = int(os.environ.get("TORNADO_PROXY_FUZZ", "0"))
fuzz = settings(
    max_examples=FUZZ or 300,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    # The fixtures are one server for all examples, which is as in life.
    suppress_health_check=list(HealthCheck),
)


def block(method="GET", path="/", **fields):
    """Return a field block that leaves the table as it is."""
    pairs = request_fields(method, path, [(name.replace("_", "-"), value) for name, value in fields.items()])
    return Encoder().encode([(name, value, True) for name, value in pairs])


STREAMS = st.sampled_from([1, 1, 1, 3, 3, 5, 0, 2, 2**31 - 1])
BLOCKS = st.one_of(
    st.sampled_from(
        [block(path=path) for path in ("/", "/early", "/abort", "/large", "/never", "/flushed")]
        + [
            block("POST", path, **fields)
            for path in ("/", "/early", "/never")
            for fields in ({}, {"content_length": "3"})
        ]
        + [block("HEAD"), block("CONNECT"), block(connection="x"), block(X="y"), block(x="v" * 5000), b"", b"\x80"]
    ),
    st.binary(max_size=20),
)
NUMBERS = st.sampled_from([0, 1, 5, 1000, 65_535, 2**31 - 1, 2**32 - 1])
FLAGS = st.sampled_from([0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM, 0x8, 0x20, 0x2D, 0xFF])
ONES = st.sampled_from([END_HEADERS, END_HEADERS | END_STREAM])
REQUESTS = st.builds(
    lambda stream, payload, flags: frame(Type.HEADERS, payload, stream=stream, flags=flags), STREAMS, BLOCKS, ONES
)
CONTENT = st.builds(
    lambda stream, payload, flags: frame(Type.DATA, payload, stream=stream, flags=flags),
    STREAMS,
    st.sampled_from([b"", b"a", b"abc", b"abcd", b"x" * 16_384, b"\x02xyy"]),
    FLAGS,
)
WORDS = st.builds(
    lambda type_, stream, number: frame(type_, struct.pack(">L", number), stream=stream),
    st.sampled_from([Type.RST_STREAM, Type.WINDOW_UPDATE]),
    STREAMS,
    NUMBERS,
)
SETTINGS = st.builds(
    lambda pairs: settings_frame(dict(pairs)),
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9, 0x4242]), NUMBERS), max_size=3),
)
ANY = st.builds(
    lambda type_, payload, stream, flags: frame(type_, payload, stream=stream, flags=flags),
    st.integers(0, 12),
    st.one_of(st.binary(max_size=20), BLOCKS),
    STREAMS,
    FLAGS,
)
FRAMES = st.lists(st.one_of(REQUESTS, REQUESTS, CONTENT, WORDS, SETTINGS, ANY), max_size=25)


def answer(connection):
    path = connection._head.target
    if path == "/abort":
        connection.write_headers(ResponseStartLine("", 200, ""), HTTPHeaders(), b"begun")
        connection.abort()
    elif path == "/large":
        respond(connection, b"x" * 200_000)
    elif path == "/flushed":
        connection.write_headers(ResponseStartLine("", 200, ""), HTTPHeaders())
        connection.write(b"x")
        connection.set_trailers(HTTPHeaders({"X": "y"}))
        connection.finish()
    elif path != "/never":
        respond(connection, b"" if connection._head.method == "HEAD" else b"ok")


class TestNonsense:
    @fuzz
    @given(frames=FRAMES, cut=st.integers(0, 60), patient=st.booleans())
    async def test_frames_of_any_kind_in_any_order(self, serve, recorder, frames, cut, patient):
        recorder.__init__()
        recorder.on_finish = answer
        recorder.on_head = lambda connection: respond(connection) if connection._head.target == "/early" else None
        running = serve(recorder, http2=True, max_resets=20, linger_time=0.5)
        client = await Downstream.connect(running.port)
        sent = PREFACE + settings_frame() + b"".join(frames)
        with contextlib.suppress(ConnectionError, WireClosed):
            if patient:
                await client.send(sent + frame(Type.PING, b"the end."))
                await client.read_until(b"the end.")
            else:
                await client.send(sent[: max(0, len(sent) - cut)])
            client.half_close()
        await client.closed()
        client.close()
        await within(running.server._empty.wait(), "the end of the connection")
        # Each request that began has ended, once: all of it came, or it did not.
        seen = Counter(event[0] for event in recorder.events)
        assert seen["head"] == seen["finish"] + seen["close"]
        assert all(connection.is_closed() for connection in recorder.connections)
        other = await Http2.connect(running.port)
        assert (await other.exchange("GET", "/")).body == b"ok"
        other.close()
        await running.stop()
