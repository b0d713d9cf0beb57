"""The same bytes to the same mount, with a handler and without: whatever anybody sees of it is the same.

TORNADO_PROXY_FUZZ=5000 looks at that many new examples.
"""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.proxy.test_fuzz import BODY, FIELD, METHOD, ODD_FIELDS, PIECES, TARGET, VERSION, fuzz, responses, run
from tests.support import proxy as support
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import ProxyHandler

LAST = b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
DATE = re.compile(rb"\r\nDate: [^\r\n]*")
# Not asked of the upstream where the body has come unasked. Tornado's server gives it to a handler a turn of the loop
# later, when the upstream was asked already.
ASKED = b"\r\nExpect: 100-continue"


class Sub(ProxyHandler):
    """Overrides nothing, so that each request has a handler."""


@pytest.fixture(autouse=True, params=["own", "tornado"])
def server(monkeypatch, request):
    monkeypatch.setattr(support, "SERVER", request.param)


@st.composite
def requests(draw) -> bytes:
    """Return a request whose body is there, as far as its head tells the truth."""
    lines = [draw(METHOD) + b" " + draw(TARGET) + b" " + draw(VERSION), b"Host: h"]
    lines += draw(st.lists(FIELD, max_size=3)) + draw(st.lists(ODD_FIELDS, max_size=2))
    kind = draw(st.sampled_from(("none", "none", "length", "chunked", "trailers", "asked for")))
    body = b""
    if kind in ("length", "asked for"):
        body = draw(BODY)
        lines.append(b"Content-Length: %d" % len(body))
    elif kind != "none":
        body = b"".join(map(chunk, draw(PIECES))) + LAST_CHUNK
        lines.append(b"Transfer-Encoding: chunked")
    if kind == "asked for":
        lines.append(b"Expect: 100-continue")
    elif kind == "trailers":
        lines.append(b"Trailer: X-Behind")
        body = body.removesuffix(b"\r\n") + b"X-Behind: 1\r\n\r\n"
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class Side:
    """A proxy and its upstream, and what was seen of both in one example."""

    def __init__(self, running, upstream):
        self.running = running
        self.upstream = upstream

    async def see(self, sent: bytes, answer: bytes, pieces: int) -> dict[str, object]:
        running, upstream = self.running, self.upstream

        async def serve(conn, request):
            size = len(answer) // pieces + 1
            for start, end in pairwise([*range(0, len(answer), size), len(answer)]):
                await conn.send(answer[start:end])
                await asyncio.sleep(0)
            conn.close()

        upstream.serve(serve)
        upstream.requests.clear()
        running.access_log.clear()
        running.outcomes.clear()
        async with await running.connect() as downstream:
            await downstream.send(sent)
            received = await downstream.read_until_closed()
        return {
            "downstream": self.anonymous(DATE.sub(b"", received)),
            "upstream": [
                self.anonymous(request.raw.replace(ASKED, b"") + (request.body or b"")) for request in upstream.requests
            ],
            "log": running.access_log.copy(),
            "outcomes": [
                (outcome.status, outcome.side, outcome.phase, type(outcome.error), outcome.bytes_up, outcome.bytes_down)
                for outcome in running.outcomes
            ],
        }

    def anonymous(self, data: bytes) -> bytes:
        return data.replace(b"127.0.0.1:%d" % self.upstream.port, b"upstream")


@fuzz
@given(
    st.lists(requests(), min_size=1, max_size=2), responses(), st.integers(1, 3), st.sampled_from(("stream", "buffer"))
)
async def check(sides, expect_log, sent, response, pieces, mode):
    expect_log("", required=False)
    # No connection is used again: which of them can be is a matter of luck.
    answer = response[0].replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with_handler, without = [await side.see(b"".join(sent) + LAST, answer, pieces) for side in sides[mode]]
    assert without == with_handler, (sent, answer)


async def test_whatever_comes(proxy, expect_log):
    async with ScriptedUpstream() as one, ScriptedUpstream() as other:
        sides = {
            mode: [
                Side(await proxy(one.url, Sub, response_mode=mode), one),
                Side(await proxy(other.url, ProxyHandler, response_mode=mode), other),
            ]
            for mode in ("stream", "buffer")
        }
        await run(check, sides, expect_log)
