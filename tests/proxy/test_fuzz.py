"""Requests and responses that nobody would write: the upstream is asked only what was asked, and a cut is a cut.

Hypothesis writes them, always the same ones: TORNADO_PROXY_FUZZ=5000 looks at that many new ones of each kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from itertools import count

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.strict import StrictUpstream, read_strictly
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk

FUZZ = int(os.environ.get("TORNADO_PROXY_FUZZ", "0"))
fuzz = settings(
    max_examples=FUZZ or 150,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    # The fixtures are one proxy and one upstream for all examples, which is as in life.
    suppress_health_check=list(HealthCheck),
)
numbers = count()
SENT: deque[bytes] = deque(maxlen=50)

# -- messages

OWS = st.sampled_from([b"", b" ", b"  ", b"\t"])
TOKEN = st.text("abcXYZ019-_.!", min_size=1, max_size=12).map(str.encode)
VALUE = st.one_of(
    st.text("abc 019,;=\"'()/", max_size=20).map(lambda text: text.strip().encode()),
    st.binary(max_size=12).filter(lambda data: not set(data) & set(b"\r\n\0")),
)
FIELD = st.builds(lambda name, ows, value: name + b":" + ows + value, TOKEN, OWS, VALUE)
BODY = st.binary(max_size=300)
PIECES = st.lists(st.binary(min_size=1, max_size=60), max_size=5)

# What parsers have disagreed about.
ODD_FIELDS = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: 0",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: 0x5",
        b"Content-Length: 5 ",
        b"Content-Length : 5",
        b"Content-Length: -1",
        b"Content-Length:",
        b"Content_Length: 7",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: Chunked",
        b"Transfer-Encoding: chunked ",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding : chunked",
        b"Transfer_Encoding: chunked",
        b" folded",
        b"\tTransfer-Encoding: chunked",
        b"X-A: b\rX-Evil: 1",
        # RFC 9112 section 2.2 lets a line end with LF alone: two fields, and both were sent.
        b"X-A: b\nX-B: 1",
        b"X-A: b\0c",
        b": no name",
        b"no colon",
        b"Connection: close",
        b"Connection: X-Token, keep-alive",
        b"Connection: Content-Length",
        b"Connection: Transfer-Encoding",
        b"Connection: Host",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"TE: trailers",
        b"Trailer: X-Token",
        b"Host: other",
        b"X-Token: evil",
        b"Max-Forwards: 0",
        b"Via: 1.1 x",
        b"Keep-Alive: timeout=5",
    ]
)
TARGET = st.one_of(
    st.text("abc/%20?&=;.", max_size=30).map(lambda text: b"/" + text.encode()),
    st.sampled_from(
        [
            b"/",
            b"*",
            b"http://h/x",
            b"http://evil@h/x",
            b"//h/x",
            b"/../x",
            b"/a b",
            b"/\xff",
            b"@h/x",
            b"\\x",
            b"/#x",
            b"",
        ]
    ),
)
METHOD = st.sampled_from(
    [b"GET", b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH", b"TRACE", b"get", b"BREW"]
)
VERSION = st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b""])


@st.composite
def chunked_bodies(draw) -> bytes:
    body = b"".join(chunk(piece) for piece in draw(PIECES)) + LAST_CHUNK
    if draw(st.integers(0, 3)) == 0:
        broken = [
            (b"\r\n", b"\n"),
            (b"\r\n", b"\r"),
            (b"\r\n", b";ext\r\n"),
            (b"\r\n", b"\r\n\r\n"),
            (b"0\r\n", b"-0\r\n"),
            (b"0\r\n", b"0\r\nX-Trailer: 1\r\n"),
        ]
        old, new = draw(st.sampled_from(broken))
        body = body.replace(old, new, 1)
    return body


@st.composite
def mutated(draw, data: bytes) -> bytes:
    """Return `data`, sometimes with a few bytes lost, doubled or changed."""
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2)))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 4))
        how = draw(st.sampled_from(("lose", "double", "change", "insert")))
        piece = {
            "lose": b"",
            "double": data[at : at + size] * 2,
            "change": draw(st.binary(min_size=1, max_size=3)),
            "insert": data[at : at + size]
            + draw(st.sampled_from((b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b",", b"0"))),
        }[how]
        data = data[:at] + piece + data[at + size :]
    return data


@st.composite
def requests(draw) -> bytes:
    """Return one request whose token is ``@@``, valid or not."""
    lines = [draw(METHOD) + b" " + draw(TARGET) + b" " + draw(VERSION), b"Host: h", b"X-Token: @@"]
    lines += draw(st.lists(FIELD, max_size=3)) + draw(st.lists(ODD_FIELDS, max_size=2))
    kind = draw(st.sampled_from(("none", "length", "chunked", "stray")))
    body = b""
    if kind == "length":
        body = draw(BODY)
        lines.append(b"Content-Length: %d" % len(body))
    elif kind == "chunked":
        body = draw(chunked_bodies())
        lines.append(b"Transfer-Encoding: chunked")
    elif kind == "stray":
        body = draw(BODY)
    return draw(mutated(b"\r\n".join(lines) + b"\r\n\r\n" + body))


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\nX-Token: smuggled\r\n\r\n"


class TestRequests:
    """LD-07: whatever is sent, a strict upstream sees only requests that were sent, and can read each of them."""

    @fuzz
    @given(st.lists(requests(), min_size=1, max_size=3), st.booleans())
    async def check(self, running, upstream, expect_log, sent, smuggle):
        expect_log("", required=False)
        data = b""
        for request in sent:
            data += request.replace(b"@@", b"t%d." % next(numbers))
            if smuggle:
                # In a body it is a body. As a request of its own it is one that was sent, if it stands where one may.
                data += SMUGGLED
        # An exchange may outlive its client: what it sent before may still be on its way.
        SENT.append(data)
        before = len(upstream.requests)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        try:
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    # A request that is not complete gets no answer; how long to wait for none is a matter of taste.
                    while await asyncio.wait_for(reader.read(65536), 0.1):
                        pass
        finally:
            writer.close()
        assert not upstream.refused, f"{upstream.refused} after {data!r}"
        for seen in upstream.requests[before:]:
            tokens = [value for name, value in seen.headers if name == b"x-token"]
            assert any(
                seen.method in data and seen.target in data and all(token in data for token in tokens) for data in SENT
            ), (seen, data)
            assert b"x-evil" not in dict(seen.headers), (seen, data)

    @fuzz
    @given(METHOD.filter(lambda method: method != b"BREW"), PIECES, st.integers(0, 5), st.booleans())
    async def check_bodies(self, running, upstream, expect_log, method, pieces, at, chunked):
        number = next(numbers)
        inner = SMUGGLED.replace(b"X-Token: smuggled", b"X-Token: inner%d." % number)
        pieces = [*pieces[:at], inner, *pieces[at:]]
        body = b"".join(pieces)
        head = method + b" /outer HTTP/1.1\r\nHost: h\r\nX-Token: outer%d.\r\n" % number
        if chunked:
            data = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, pieces)) + LAST_CHUNK
        else:
            data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        try:
            writer.write(data + b"GET /next HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            await writer.drain()
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    while await reader.read(65536):
                        pass
        finally:
            writer.close()
        assert not upstream.refused
        assert not [seen for seen in upstream.requests if seen.token() == b"inner%d." % number], data
        arrived = [seen for seen in upstream.requests if seen.token() == b"outer%d." % number]
        assert [seen.body for seen in arrived] in ([], [body], [body, body]), data

    async def test_what_stands_in_a_body_is_no_request(self, proxy, expect_log):
        expect_log("", required=False)
        async with StrictUpstream() as upstream:
            running = await proxy(upstream.url, idle_timeout=2, response_timeout=2)
            await run(self.check_bodies, running, upstream, expect_log)
            assert len(upstream.requests) > 20

    async def test_only_what_was_sent_arrives(self, proxy, expect_log):
        async with StrictUpstream() as upstream:
            running = await proxy(upstream.url, idle_timeout=2, response_timeout=2)
            await run(self.check, running, upstream, expect_log)
            print(f"{next(numbers)} requests sent, {len(upstream.requests)} arrived")
            assert not upstream.refused
            # It was not refusal alone that kept it clean.
            assert len(upstream.requests) > 20


async def run(check, *arguments) -> None:
    """Run a check on this loop, example by example, while hypothesis drives it from a thread."""
    loop = asyncio.get_running_loop()
    original = check.hypothesis.inner_test

    def inner(*given_arguments, **given_keywords):
        asyncio.run_coroutine_threadsafe(original(*given_arguments, **given_keywords), loop).result(60)

    check.hypothesis.inner_test = inner
    try:
        await asyncio.to_thread(check, *arguments)
    finally:
        check.hypothesis.inner_test = original


STATUS_LINE = st.one_of(
    st.sampled_from(
        [b"HTTP/1.1 200 OK"] * 6 + [b"HTTP/1.1 404 Not Found", b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 Not Modified"]
    ),
    st.sampled_from(
        [
            b"HTTP/1.0 200 OK",
            b"HTTP/1.1 200",
            b"HTTP/1.1 999 X",
            b"HTTP/1.1 20 X",
            b"HTTP/2 200",
            b"HTTP/1.1 100 Continue",
            b"HTTP/1.1 101 Switching Protocols",
            b"HTTP/1.1 200 \xff",
            b"",
            b"200 OK",
            b"HTTP/1.1  200 OK",
        ]
    ),
)
RESPONSE_ODD = st.sampled_from(
    [
        b"Content-Length: 3",
        b"Content-Length: 3, 3",
        b"Content-Length: 3\r\nContent-Length: 4",
        b"Content-Length: -3",
        b"Content-Length: +3",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: gzip, chunked",
        b"Connection: close",
        b"Connection: Content-Length",
        b"X-A : b",
        b" folded",
        b"no colon",
        b"X-A: b\0",
        b"X-A: b\rX-Evil: 1",
        b"Trailer: X-B",
        b"Keep-Alive: timeout=1",
        b"Upgrade: h2c",
        b"Content-Encoding: gzip",
        b"Location: http://x/\xff",
        b"Set-Cookie: a=b; Path=/x; Domain=h\x01",
        b"Refresh: 0; url=",
        b"Date: never",
    ]
)


@st.composite
def responses(draw) -> tuple[bytes, bytes | None]:
    """Return a response and, where it is a plain good one, its body."""
    lines = [b"HTTP/1.1 200 OK"]
    kind = draw(st.sampled_from(("length", "chunked", "until close")))
    body = draw(BODY)
    framed = body
    if kind == "length":
        lines.append(b"Content-Length: %d" % len(body))
    elif kind == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        framed = (chunk(body) if body else b"") + LAST_CHUNK
    good = b"\r\n".join(lines) + b"\r\n\r\n" + framed
    if draw(st.booleans()):
        return good, body
    lines[0] = draw(STATUS_LINE)
    lines += draw(st.lists(FIELD, max_size=3)) + draw(st.lists(RESPONSE_ODD, max_size=2))
    if kind == "chunked":
        framed = draw(chunked_bodies())
    return draw(mutated(b"\r\n".join(lines) + b"\r\n\r\n" + framed)), None


class TestResponses:
    """What the upstream sends ends as a whole answer that h11 can read, as a 502, or as a visible cut: soon."""

    @fuzz
    @given(responses(), st.sampled_from(("GET", "GET", "POST", "HEAD")), st.integers(1, 4), st.booleans())
    async def check(self, running, upstream, expect_log, sent, method, pieces, reset):
        expect_log("", required=False)
        raw, body = sent
        before = upstream.accepted

        async def serve(conn, request):
            size = len(raw) // pieces + 1
            for start in range(0, len(raw), size):
                await conn.send(raw[start : start + size])
                await asyncio.sleep(0)
            (conn.reset if reset and body is None else conn.close)()

        upstream.serve(serve)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        try:
            length = b"Content-Length: 4\r\n\r\nonce" if method == "POST" else b"\r\n"
            writer.write(f"{method} /x HTTP/1.1\r\nHost: h\r\n".encode() + length)
            response = await read_strictly(reader, method.encode())
            where = f"{response} for {raw!r}"
            if body is not None:
                assert (response.status, response.complete) == (200, True), where
                assert response.body == (b"" if method == "HEAD" else body), where
            else:
                assert response.status, where
                assert response.complete or response.status != 502, where
                if response.status != 502:
                    assert response.body == b"" or response.body[:1] in raw, where
            assert b"x-evil" not in dict(response.headers), where
        finally:
            writer.close()
        assert upstream.accepted - before <= 2

    async def test_are_whole_refused_or_visibly_cut(self, proxy, expect_log):
        async with ScriptedUpstream() as upstream:
            running = await proxy(upstream.url, idle_timeout=2, response_timeout=2)
            await run(self.check, running, upstream, expect_log)
