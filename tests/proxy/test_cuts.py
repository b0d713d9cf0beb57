"""An upstream that breaks off anywhere: a 502 or a visibly short answer, never one that looks whole, never a wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from time import monotonic

import pytest

from tests.support.process import free_port
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk, until

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

    async def test_under_load(self, proxy, expect_log):
        """Whatever was under way is a 502 or visibly cut, and within a second of its return nothing fails any more."""
        expect_log("upstream")
        up_again = 0.0
        late: list[int] = []
        seen: Counter[int] = Counter()
        running = await proxy(f"http://127.0.0.1:{(port := free_port())}")
        ended = False

        async def client(number: int) -> None:
            downstream = await running.connect()
            while not ended:
                method = "POST" if number % 2 else "GET"
                asked = monotonic()
                response = await downstream.exchange(method, "/x", body=b"x" * 10 if number % 2 else None)
                assert response.status in (200, 502)
                seen[response.status if response.complete else 0] += 1
                if up_again and asked > up_again + 1 and (response.status != 200 or not response.complete):
                    late.append(response.status)
                if not response.complete:
                    downstream = await running.connect()
                # Some 200 requests a second, all clients together.
                await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as group:
            async with ScriptedUpstream(port=port) as first:
                first.serve(served_slowly)
                clients = [group.create_task(client(number)) for number in range(10)]
                await until(lambda: seen[200] > 30, "some load")
            assert not seen[502]
            await until(lambda: seen[502] > 30, "some load while it was down")
            async with ScriptedUpstream(port=port) as second:
                second.serve(served_slowly)
                up_again = monotonic()
                served_before = seen[200]
                await until(lambda: seen[200] > served_before + 30, "some load after its return")
                assert monotonic() - up_again < 1
                await asyncio.sleep(max(0, up_again + 1.5 - monotonic()))
                ended = True
                # Not "nothing is under way": a request on its way to the proxy is not yet.
                await asyncio.wait(clients)
        assert not late


async def served(conn, request) -> None:
    await conn.respond(200, body=b"served")


async def served_slowly(conn, request) -> None:
    """Answer in two pieces, so that there is something to cut off."""
    await conn.send_head(200, [("Content-Length", "6")])
    await conn.send(b"ser")
    await asyncio.sleep(0.01)
    await conn.send(b"ved")
