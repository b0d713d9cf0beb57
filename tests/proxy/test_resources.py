"""When descriptors run out, thousands idle or heads are monstrous, the proxy slows for nobody and comes back.

Against the standalone program: its descriptors, memory and processor time can be told from the test's own.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
from time import monotonic, thread_time

import psutil
import pytest

from tests.support.downstream import Downstream
from tests.support.proxy import SERVER
from tests.support.upstream import echo
from tests.support.wire import WireClosed, until

# Idle connections: TORNADO_PROXY_IDLE=10000 for the whole of LD-04.
IDLE = int(os.environ.get("TORNADO_PROXY_IDLE", "1000"))
KIB = 1024


async def is_served(proxy) -> float:
    """Make one whole exchange on a new connection and return the seconds it took."""
    started = monotonic()
    async with await Downstream.connect(proxy.port) as downstream:
        assert (await downstream.exchange("GET", "/good")).status == 200
    return monotonic() - started


class TestNoDescriptorsLeft:
    """FA-17: accepting backs off without a busy loop, and goes on when clients leave."""

    async def test_it_neither_spins_nor_stays_deaf(self, served):
        upstream, proxy = served
        upstream.serve(echo)
        await is_served(proxy)
        psutil.Process(proxy.pid).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
        clients = [await Downstream.connect(proxy.port) for _ in range(200)]
        try:
            await until(lambda: proxy.fds() >= 60, "the descriptors ran out")
            used, started, said = proxy.cpu(), monotonic(), len(proxy.output)
            await asyncio.sleep(1.0)
            share = (proxy.cpu() - used) / (monotonic() - started)
            said = len(proxy.output) - said
            print(f"out of descriptors: {share:.0%} of a processor, {said} bytes of log a second")
        finally:
            for client in clients:
                client.close()
        assert await is_served(proxy) < 5
        assert share < 0.2
        assert said < 20_000

    async def test_it_comes_back(self, served):
        upstream, proxy = served
        upstream.serve(echo)
        await is_served(proxy)
        psutil.Process(proxy.pid).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
        clients = [await Downstream.connect(proxy.port) for _ in range(200)]
        await until(lambda: proxy.fds() >= 60, "the descriptors ran out")
        for client in clients:
            client.close()
        for _ in range(10):
            assert await is_served(proxy) < 5

    async def test_exchanges_without_a_descriptor_for_upstream_get_502_or_wait(self, served):
        """The downstreams are connected, then asks all at once: some find no descriptor for their upstream."""
        upstream, proxy = served
        upstream.serve(echo)
        await is_served(proxy)
        fds = proxy.fds()
        clients = [await Downstream.connect(proxy.port) for _ in range(40)]
        try:
            # One less, because the connection of the line before may not have been closed when it counted.
            await until(lambda: proxy.fds() >= fds + 39, "all are accepted")
            limit = proxy.fds() + 5
            psutil.Process(proxy.pid).rlimit(psutil.RLIMIT_NOFILE, (limit, limit))
            for client in clients:
                await client.request("GET", "/x")
            statuses = [(await client.read_response()).status for client in clients]
            assert set(statuses) <= {200, 502, 503}
            assert 200 in statuses
        finally:
            for client in clients:
                client.close()
        assert await is_served(proxy) < 5


class TestIdleConnections:
    """LD-04: thousands of kept-alive clients cost little memory, and new ones do not wait for them."""

    async def test_cost_little(self, served):
        upstream, proxy = served
        upstream.serve(echo)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        count = min(IDLE, soft - 200)
        await is_served(proxy)
        clients = []
        try:
            # The first hundred fill what is allocated once.
            for number in range(count + 100):
                if number == 100:
                    rss = proxy.rss()
                client = await Downstream.connect(proxy.port)
                clients.append(client)
                assert (await client.exchange("GET", "/x")).status == 200
            each = (proxy.rss() - rss) / count
            took = sorted([await is_served(proxy) for _ in range(20)])
            used = proxy.cpu()
            await asyncio.sleep(0.5)
            idle_cpu = (proxy.cpu() - used) / 0.5
            print(f"{count} idle: {each / KIB:.1f} KiB each, others {took[10] * 1000:.1f} ms, cpu {idle_cpu:.1%}")
            assert each <= 30 * KIB
            assert took[-1] < 0.5
            # Most of them; the machine may have something else to do.
            assert took[10] < 0.05
            assert idle_cpu < 0.2
            # They still work.
            for client in clients[:: count // 10]:
                assert (await client.exchange("GET", "/x")).status == 200
        finally:
            for client in clients:
                client.close()


MONSTERS = {
    "64 KB of cookies": b"GET /x HTTP/1.1\r\nHost: h\r\nCookie: " + b"a=b; " * 12_000 + b"\r\n\r\n",
    "64 KB of semicolons in a cookie": b"GET /x HTTP/1.1\r\nHost: h\r\nCookie: " + b";" * 64_000 + b"\r\n\r\n",
    "64 KB of semicolons in the query": b"GET /x?" + b";" * 64_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "64 KB of slashes": b"GET " + b"/" * 64_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "64 KB of dot segments": b"GET " + b"/.." * 21_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "64 KB of percent signs": b"GET /x?" + b"%25" * 21_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "5,000 lines": b"GET /x HTTP/1.1\r\nHost: h\r\n" + b"X-A: b\r\n" * 5_000 + b"\r\n",
    "5,000 names": b"GET /x HTTP/1.1\r\nHost: h\r\n" + b"".join(b"X%d: b\r\n" % n for n in range(5_000)) + b"\r\n",
    "5,000 forwarded lines": b"GET /x HTTP/1.1\r\nHost: h\r\n" + b"Via: 1.1 a\r\n" * 5_000 + b"\r\n",
    "5,000 nominations": b"GET /x HTTP/1.1\r\nHost: h\r\nConnection: "
    + b", ".join(b"x%d" % n for n in range(5_000))
    + b"\r\n\r\n",
    "5,000 Connection lines": b"GET /x HTTP/1.1\r\nHost: h\r\n" + b"Connection: x\r\n" * 4_000 + b"\r\n",
    "1,000 query fields": b"GET /x?" + b"&".join(b"a=%d" % n for n in range(1_000)) + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "10,000 query fields": b"GET /x?" + b"a=&" * 10_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "a list of 10,000 lengths": b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"1," * 10_000 + b"1\r\n\r\nx",
    "a long chunked list": b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: " + b"chunked," * 7_000 + b"x\r\n\r\n",
    "64 KB of spaces": b"GET /x HTTP/1.1\r\nHost: h\r\nX-A: a" + b" " * 60_000 + b"b\r\n\r\n",
}


class TestMonstrousHeads:
    """LD-08: the worst of heads stops the loop for a few milliseconds at most."""

    @pytest.mark.parametrize("trusted", [(), ("127.0.0.1",)], ids=["untrusted", "trusted"])
    @pytest.mark.parametrize("head", MONSTERS.values(), ids=MONSTERS)
    async def test_stop_the_loop_for_a_moment_only(self, proxy, echo, expect_log, head, trusted):
        expect_log("", required=False)
        running = await proxy(
            echo.url, trusted_proxies=trusted, forwarded="both", server_options={"max_header_size": 128 * KIB}
        )
        loop = asyncio.get_running_loop()
        # The longest single callback, in the processor's time: what else the machine does is not ours. The test's own
        # upstream takes its part too, but in callbacks of its own.
        durations: list[tuple[float, str]] = []
        original = asyncio.events.Handle._run

        def timed(handle):
            started = thread_time()
            original(handle)
            durations.append((thread_time() - started, repr(handle)))

        downstream = await running.connect()
        echo.serve(answer_shortly)
        await downstream.send(head)
        # What other tests have left to collect is not the head's.
        gc.collect()
        asyncio.events.Handle._run = timed  # type: ignore[method-assign]
        try:
            response = await downstream.read_response()
        finally:
            asyncio.events.Handle._run = original  # type: ignore[method-assign]
        assert loop.is_running()
        worst, which = max(((d, h) for d, h in durations if "tests/" not in h), default=(0.0, ""))
        print(f"{response.status}: {worst * 1000:.1f} ms in {which[:100]}")
        # Twenty milliseconds are what is aimed at, by a machine that does nothing else.
        assert worst < 0.1
        await running.get("/good")

    @pytest.mark.parametrize(("count", "status"), [(1900, 200), (5000, 431)])
    async def test_lines_without_number_are_refused(self, proxy, echo, count, status):
        running = await proxy(echo.url, server_options={"max_header_size": 128 * KIB})
        downstream = await running.connect()
        lines = b"".join(b"X-%d: a\r\n" % number for number in range(count))
        await downstream.send(b"GET /x HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n")
        assert (await downstream.read_response()).status == status


async def answer_shortly(conn, request) -> None:
    await conn.respond(200)


OVERSIZE = pytest.mark.skipif(
    SERVER == "tornado", reason="Tornado's server closes without an answer when a head exceeds max_header_size"
)


class TestOversizeHeads:
    """What is too large is refused with the status that says so."""

    async def refused(self, proxy, echo, data: bytes) -> int:
        running = await proxy(echo.url, server_options={"max_header_size": 64 * KIB})
        downstream = await running.connect()
        try:
            await downstream.send(data)
            return (await downstream.read_response()).status
        except (ConnectionError, WireClosed):
            return 0

    @OVERSIZE
    @pytest.mark.parametrize(
        "fields",
        [b"X-A: " + b"a" * 100_000 + b"\r\n", b"X-A: b\r\n" * 15_000, b"Cookie: " + b"a=b; " * 20_000 + b"\r\n"],
        ids=["one line", "many lines", "cookies"],
    )
    async def test_of_fields_is_a_431(self, proxy, echo, expect_log, fields):
        expect_log("", required=False)
        assert await self.refused(proxy, echo, b"GET /x HTTP/1.1\r\nHost: h\r\n" + fields + b"\r\n") == 431

    @OVERSIZE
    async def test_of_the_target_is_a_414(self, proxy, echo, expect_log):
        expect_log("", required=False)
        assert await self.refused(proxy, echo, b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n") == 414

    @pytest.mark.parametrize("size", [8_000, 32_000, 60_000])
    async def test_below_the_limit_it_passes(self, proxy, echo, size):
        running = await proxy(echo.url, server_options={"max_header_size": 64 * KIB})
        response = await running.get("/x", [("X-A", "a" * size)])
        assert response.status == 200
        assert ["X-A", "a" * size] in [list(pair) for pair in echo.requests[-1].headers]

    @pytest.mark.parametrize("size", [8_000, 32_000, 60_000])
    async def test_a_long_target_below_the_limit_passes(self, proxy, echo, size):
        running = await proxy(echo.url, server_options={"max_header_size": 64 * KIB})
        response = await running.get("/" + "x" * size)
        assert response.status == 200
        assert echo.requests[-1].target == "/" + "x" * size
