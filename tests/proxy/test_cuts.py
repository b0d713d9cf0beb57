"""An upstream that breaks off anywhere: a 502 or a visibly short answer, never one that looks whole, never a wait."""

from __future__ import annotations

import pytest

from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk

CHUNKED = [("Transfer-Encoding", "chunked")]
HEAD = b"HTTP/1.1 200 OK\r\nX-A: 1\r\n"
# Framing -> a whole response, and its body.
RESPONSES = {
    "length": (HEAD + b"Content-Length: 9\r\n\r\nall of it", b"all of it"),
    "chunked": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"all ") + chunk(b"of it") + LAST_CHUNK,
        b"all of it",
    ),
    "trailers": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"all of it") + b"0\r\nX-Sum: 1\r\n\r\n",
        b"all of it",
    ),
    "until close": (HEAD + b"\r\nall of it", b"all of it"),
}
BREAK = pytest.mark.parametrize("how", ["close", "reset"])


class TestAResponseCutAtEachOffset:
    """FA-03: in the head it is a 502; later what came passes and the end is not a good one."""

    @BREAK
    @pytest.mark.parametrize("mode", ["stream", "buffer"])
    @pytest.mark.parametrize("framing", RESPONSES)
    async def test_never_looks_whole(self, proxy, upstream, expect_log, framing, mode, how):
        expect_log("upstream")
        whole, body = RESPONSES[framing]
        head_size = whole.index(b"\r\n\r\n") + 4
        running = await proxy(upstream.url, response_mode=mode)
        for offset in range(len(whole) + 1):
            downstream = await running.ask("POST", "/x", body=b"once")
            conn, _ = await upstream.request()
            await conn.send(whole[:offset])
            getattr(conn, how)()
            response = await downstream.read_response()
            where = f"{how} after {whole[:offset]!r}"
            # What makes the response whole: its length, its last chunk, or, if nothing else does, the end in order.
            is_whole = offset == len(whole) if framing != "until close" else offset >= head_size and how == "close"
            if response.status == 200:
                assert offset >= head_size, where
                assert body.startswith(response.body), where
                assert response.complete == is_whole, where
                if is_whole and framing != "until close":
                    assert response.body == body, where
            else:
                # A reset may destroy what was sent before it.
                assert response.status == 502, where
                assert response.complete, where
                assert not is_whole or how == "reset", where
                assert offset < head_size or mode == "buffer" or how == "reset", where
            downstream.close()
            outcome = await running.next_outcome()
            assert (outcome.error is None) == (response.status == 200 and response.complete), where

    @BREAK
    async def test_a_get_is_tried_twice_and_no_more(self, proxy, upstream, expect_log, how):
        expect_log("upstream")
        whole, _ = RESPONSES["length"]
        head_size = whole.index(b"\r\n\r\n") + 4
        running = await proxy(upstream.url)

        async def serve(conn, request):
            await conn.send(whole[: int(request.target[1:])])
            getattr(conn, how)()

        upstream.serve(serve)
        for offset in range(head_size):
            before = len(upstream.requests)
            response = await running.get(f"/{offset}")
            assert response.status == 502
            assert len(upstream.requests) - before <= 2


UPLOADS = {
    "length": ((), b"twenty bytes of body"),
    "chunked": (CHUNKED, chunk(b"twenty bytes ") + chunk(b"of body") + LAST_CHUNK),
    "none": ((), None),
}


class TestARequestReadOnlyToAnOffset:
    """FA-04: the upstream closes having read only a part; that is a 502, or its early answer."""

    @BREAK
    @pytest.mark.parametrize("framing", UPLOADS)
    @pytest.mark.parametrize("answer", [False, True], ids=["no answer", "early answer"])
    async def test_ends_at_once(self, proxy, upstream, expect_log, framing, how, answer):
        expect_log("upstream", required=not answer)
        headers, body = UPLOADS[framing]
        running = await proxy(upstream.url)
        # How long the whole request is upstream: its chunks may come joined there.
        downstream = await running.ask("POST", "/x", headers, body)
        conn = await upstream.accept()
        head = await conn.read_head()
        size = len(head.raw) + (0 if body is None else len(body) if framing == "length" else 31)
        conn.close()
        assert (await downstream.read_response()).status == 502
        for offset in [*range(0, size, 3), size]:
            downstream = await running.ask("POST", "/x", headers, body)
            conn = await upstream.accept()
            await conn.read_exactly(offset)
            if answer:
                await conn.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlarg")
            getattr(conn, how)()
            response = await downstream.read_response()
            # A close with unread bytes is a reset, which may destroy the answer before it is read.
            assert response.status in ((413, 502) if answer else (502,)), offset
            if response.status == 413:
                assert response.body == b"larg"[: len(response.body)]
            downstream.close()
            await running.next_outcome()
        assert upstream.accepted == len([*range(0, size, 3), size]) + 1


class TestAnUpstreamThatComesBack:
    """FA-12: while it is down each request gets its 502 at once; when it is up again, the next one is served."""

    async def test_after_a_restart(self, proxy, expect_log):
        expect_log("refused|connect")
        async with ScriptedUpstream() as first:
            first.serve(served)
            running = await proxy(first.url)
            port = first.port
            downstream = await running.connect()
            for _ in range(5):
                assert (await downstream.exchange("GET", "/x")).status == 200
        for method in ("GET", "POST") * 10:
            assert (await downstream.exchange(method, "/x")).status == 502
        async with ScriptedUpstream(port=port) as second:
            second.serve(served)
            assert (await downstream.exchange("GET", "/x")).status == 200
            assert (await downstream.exchange("POST", "/x", body=b"x")).status == 200


async def served(conn, request) -> None:
    await conn.respond(200, body=b"served")
