"""A request is never sent twice where that could act twice, and an answer goes to its own request only."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import Counter

import pytest

from tests.proxy.test_methods_and_bodies import BufferingHandler
from tests.support.downstream import Downstream
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import LAST_CHUNK, chunk
from tornado_proxy import ProxyHandler

CHUNKED = [("Transfer-Encoding", "chunked")]
DIE = pytest.mark.parametrize("die", ["close", "reset"])
# Requests of the mixed run: TORNADO_PROXY_MIXED=10000 for the whole of FA-11.
MIXED = int(os.environ.get("TORNADO_PROXY_MIXED", "2000"))

# What must reach the upstream once: name -> method, headers, body as sent, whether Tornado reads it first.
ONCE = {
    "POST": ("POST", (), b"act once", False),
    "POST chunked": ("POST", CHUNKED, chunk(b"act once") + LAST_CHUNK, False),
    "POST already read": ("POST", (), b"act once", True),
    "POST of length 0": ("POST", (), b"", False),
    "POST without a length": ("POST", (), None, False),
    "PATCH": ("PATCH", (), b"act once", False),
    "PATCH already read": ("PATCH", (), b"act once", True),
    "PUT": ("PUT", (), b"act once", False),
    # Idempotent by RFC 9110 section 9.2.2, yet the upstream would act twice, and between the two others may have acted.
    "PUT already read": ("PUT", (), b"act once", True),
    "DELETE": ("DELETE", (), None, False),
}
ONCE_CASES = [pytest.param(*case, id=name) for name, case in ONCE.items()]


async def warmed(running, upstream, die_on="/x", die="close") -> Downstream:
    """Return a downstream after one exchange; the kept upstream connection dies once it has read `die_on`.

    A new connection would answer it: whoever repeats the request gets a 200.
    """

    async def serve(conn, request):
        if request.target == die_on and len(conn.requests) > 1:
            getattr(conn, die)()
        else:
            await conn.respond(200, body=b"served")

    upstream.serve(serve)
    downstream = await running.connect()
    assert (await downstream.exchange("GET", "/warm")).body == b"served"
    return downstream


class TestAWarmConnectionThatDies:
    """FA-05, FA-06, FA-07: the upstream has read the request on a kept-alive connection, and closes."""

    @DIE
    @pytest.mark.parametrize(("method", "headers", "body", "read_first"), ONCE_CASES)
    async def test_what_may_act_twice_is_sent_once(
        self, proxy, upstream, expect_log, method, headers, body, read_first, die
    ):
        expect_log("upstream", required=False)
        running = await proxy(upstream.url, BufferingHandler if read_first else ProxyHandler)
        downstream = await warmed(running, upstream, die=die)
        response = await downstream.exchange(method, "/x", headers, body)
        assert [request.target for request in upstream.requests] == ["/warm", "/x"]
        assert (response.status, response.complete) == (502, True)
        # The downstream's connection has not suffered.
        assert (await downstream.exchange("GET", "/next")).body == b"served"

    @DIE
    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    async def test_what_changes_nothing_is_repeated_once(self, proxy, upstream, method, die):
        running = await proxy(upstream.url)
        downstream = await warmed(running, upstream, die=die)
        assert (await downstream.exchange(method, "/x")).status == 200
        assert [request.target for request in upstream.requests] == ["/warm", "/x", "/x"]

    @DIE
    async def test_no_more_than_once(self, proxy, upstream, expect_log, die):
        expect_log("upstream")
        running = await proxy(upstream.url)

        async def serve(conn, request):
            getattr(conn, die)()

        upstream.serve(serve)
        assert (await running.get("/x")).status == 502
        assert len(upstream.requests) == 2

    @DIE
    async def test_a_get_whose_answer_has_begun_is_not_repeated(self, proxy, upstream, expect_log, die):
        """FA-08."""
        expect_log("upstream")
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("GET", "/warm")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"warm")
        assert (await downstream.read_response()).body == b"warm"
        await downstream.request("GET", "/x")
        await conn.read_request()
        await conn.send_head(200, CHUNKED)
        await conn.send_chunk(b"o")
        assert (await downstream.read_head()).status == 200
        assert await downstream.read_body(1) == b"o"
        getattr(conn, die)()
        await downstream.closed()
        await running.next_outcome()
        assert (await running.next_outcome()).attempts == 1
        assert upstream.accepted == 1

    @pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "PUT", "DELETE"])
    @DIE
    async def test_one_that_died_while_it_was_idle_costs_nothing(self, proxy, upstream, method, die):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("GET", "/warm")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"warm")
        assert (await downstream.read_response()).body == b"warm"
        getattr(conn, die)()
        await downstream.request(method, "/x", body=b"once" if method in ("POST", "PATCH", "PUT") else None)
        conn, request = await upstream.request()
        assert request.target == "/x"
        await conn.respond(200, body=b"fresh")
        assert (await downstream.read_response()).body == b"fresh"
        assert upstream.accepted == 2


EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"
# What an upstream may send unasked, behind an answer that is complete.
UNASKED = {
    "a response": EVIL,
    "half a response": EVIL[:30],
    "an interim response": b"HTTP/1.1 100 Continue\r\n\r\n",
    "one byte": b"x",
    "an empty line": b"\r\n",
}


class TestAnUnaskedResponse:
    """FA-09, FA-10: what comes on an idle connection answers nobody; the connection is not used again."""

    async def test_is_not_delivered_however_long_the_connection_was_idle(self, proxy):
        async def one(idle: float) -> None:
            async with ScriptedUpstream() as upstream:
                running = await proxy(upstream.url)
                downstream = await running.connect()
                await downstream.request("GET", "/first")
                conn, _ = await upstream.request()
                await conn.respond(200, body=b"first")
                assert (await downstream.read_response()).body == b"first"
                # Here time is the subject: libcurl looks at a connection again only after a second.
                await asyncio.sleep(idle)
                await conn.send(EVIL)
                await asyncio.sleep(0.2)
                await self.check_next(downstream, upstream, idle)

        await asyncio.gather(*(one(idle) for idle in (0.01, 0.1, 0.3, 0.5, 1.1, 2.0)))

    async def check_next(self, downstream, upstream, case) -> None:
        await downstream.request("GET", "/second")
        conn, request = await upstream.request()
        assert request.target == "/second"
        await conn.respond(200, body=b"second")
        assert (await downstream.read_response()).body == b"second", case

    @pytest.mark.parametrize("unasked", UNASKED.values(), ids=UNASKED)
    @pytest.mark.parametrize("split", [False, True], ids=["apart", "in one segment"])
    async def test_whatever_it_is(self, proxy, upstream, expect_log, unasked, split):
        # libcurl notices what comes with the end of an answer by itself.
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("GET", "/first")
        conn, _ = await upstream.request()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"
        await conn.send(answer + unasked if split else answer)
        assert (await downstream.read_response()).body == b"first"
        if not split:
            await conn.send(unasked)
        await self.check_next(downstream, upstream, unasked)

    @pytest.mark.parametrize("status", [204, 304])
    async def test_behind_an_answer_without_a_body(self, proxy, upstream, status):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("GET", "/first")
        conn, _ = await upstream.request()
        await conn.respond(status)
        assert (await downstream.read_response()).status == status
        await conn.send(EVIL)
        await self.check_next(downstream, upstream, status)

    async def test_behind_an_answer_to_head(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("HEAD", "/first")
        conn, _ = await upstream.request()
        # A body that must not be there.
        await conn.send(EVIL + EVIL)
        assert (await downstream.read_response()).status == 200
        await self.check_next(downstream, upstream, "HEAD")

    async def test_with_two_downstreams_in_turn(self, proxy, upstream):
        running = await proxy(upstream.url)

        async def serve(conn, request):
            token = request.header("X-Token").encode()
            await conn.respond(200, body=token)
            # Read together with the answer, just behind it, or while idle.
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(token) + token)

        upstream.serve(serve)
        pair = [await running.connect() for _ in range(2)]
        for number in range(100):
            response = await pair[number % 2].exchange("GET", "/x", [("X-Token", f"{number:04}")])
            assert response.body == b"%04d" % number
            await asyncio.sleep(random.choice((0, 0, 0.001)))
        assert len(upstream.requests) == 100

    async def test_a_post_is_not_lost_to_it(self, proxy, upstream):
        running = await proxy(upstream.url)
        downstream = await running.connect()
        await downstream.request("GET", "/first")
        conn, _ = await upstream.request()
        await conn.respond(200, body=b"first")
        assert (await downstream.read_response()).body == b"first"
        await conn.send(EVIL)
        await downstream.request("POST", "/second", body=b"once")
        fresh, request = await upstream.request()
        assert (request.method, request.body) == ("POST", b"once")
        await fresh.respond(200, body=b"second")
        assert (await downstream.read_response()).body == b"second"
        # The poisoned connection saw nothing of it.
        assert await conn.read_until_closed() == b""


async def arrived(sock: socket.socket, seconds: float) -> bool:
    """Wait that long for something to read, without reading it; as in any server, it counts more than the time."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sock, event.set)
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
    finally:
        loop.remove_reader(sock)
    return True


class TestConnectionsThatCloseAtRandom:
    """FA-11: an upstream that closes idle connections whenever it likes costs no wrong answer and no repeated POST."""

    async def test_a_mixed_run(self, proxy, upstream, expect_log):
        expect_log("upstream", required=False)
        running = await proxy(upstream.url)
        chance = random.Random(11)
        seen: Counter[str] = Counter()

        async def serve(conn, request):
            token = request.header("X-Token")
            seen[token] += 1
            if request.method == "POST":
                assert request.body == token.encode() * 3
            await conn.respond(200, [("X-Token", token)], token.encode() * 2)
            if not await arrived(conn.sock, chance.uniform(0, 0.2)):
                conn.close()

        upstream.serve(serve)
        failed: Counter[str] = Counter()
        sent: Counter[str] = Counter()

        async def ask(client: int, count: int) -> None:
            async with await Downstream.connect(running.port) as downstream:
                for number in range(count):
                    token = f"{client}-{number}"
                    method = chance.choice(("GET", "POST"))
                    body = token.encode() * 3 if method == "POST" else None
                    sent[method] += 1
                    response = await downstream.exchange(method, f"/{token}", [("X-Token", token)], body)
                    assert response.complete
                    if response.status == 200:
                        assert (response.header("X-Token"), response.body) == (token, token.encode() * 2)
                    else:
                        assert response.status == 502
                        failed[method] += 1
                    if method == "POST":
                        assert seen[token] <= 1
                    assert seen[token] <= 2
                    await asyncio.sleep(chance.choice((0, 0, 0, chance.uniform(0, 0.1))))

        await asyncio.gather(*(ask(client, MIXED // 20) for client in range(20)))
        print(f"sent {dict(sent)}, failed {dict(failed)}, upstream connections {upstream.accepted}")
        assert upstream.accepted > MIXED // 100
        assert not failed["GET"]
        # A connection that closes as the request is sent is a race that nobody wins each time. Three are no rate yet.
        assert failed["POST"] <= max(3, sent["POST"] / 1000)
