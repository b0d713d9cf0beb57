"""``--processes 2`` under load: everything is answered, a process that dies is replaced, a stop finishes what runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import psutil
import pytest

from tests.proxy.test_standalone import children, ended, refused
from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream
from tests.support.wire import WireClosed, until, within

CONNECTIONS = 16
REQUESTS = 2000
# So many connections, opened one after the other, are never all accepted by one of two processes that both wait.
ENOUGH = 400


class Served:
    """A proxy of two processes, an upstream that answers each request with its target, and clients."""

    def __init__(self, proxy: StandaloneProxy, upstream: ScriptedUpstream) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.open: list[Downstream] = []
        upstream.serve(self._answer)
        # Closed: answers wait. See `hold`.
        self.gate = asyncio.Event()
        self.gate.set()

    async def _answer(self, conn, request) -> None:
        await self.gate.wait()
        await conn.respond(200, [("Content-Type", "text/plain")], request.target.encode() * 20)

    async def workers(self) -> list[psutil.Process]:
        return await children(self.proxy.pid, 2)

    async def get(self, downstream: Downstream, target: str) -> None:
        response = await downstream.exchange("GET", target)
        assert (response.status, response.body) == (200, target.encode() * 20)

    async def connect_to_both(self, count: int) -> dict[int, list[Downstream]]:
        """Return at least `count` kept-alive connections by the process that holds them; each holds some."""
        workers = await self.workers()
        held: dict[int, list[Downstream]] = {worker.pid: [] for worker in workers}
        while not all(held.values()) or sum(map(len, held.values())) < count:
            assert len(self.open) < ENOUGH, f"one process accepts all: {held}"
            downstream = await Downstream.connect(self.proxy.port)
            self.open.append(downstream)
            # Answered, so accepted.
            await self.get(downstream, "/connect")
            local = downstream.sock.getsockname()[1]
            (owner,) = [worker.pid for worker in workers if local in peers(worker, self.proxy.port)]
            held[owner].append(downstream)
        return held


def peers(worker: psutil.Process, port: int) -> set[int]:
    """Return the clients' ports of the connections to `port` that a process has."""
    return {
        found.raddr.port
        for found in worker.net_connections("tcp4")
        if found.raddr and found.laddr and found.laddr.port == port
    }


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with ScriptedUpstream() as upstream:
        starting = StandaloneProxy("--to", upstream.url, "--processes", "2")
        proxy = await asyncio.to_thread(starting.__enter__)
        running = Served(proxy, upstream)
        try:
            yield running
            assert "Traceback" not in proxy.output, proxy.output
        finally:
            for downstream in running.open:
                downstream.close()
            running.gate.set()
            await asyncio.to_thread(proxy.stop)


class TestLoad:
    async def test_two_thousand_requests_on_sixteen_connections_are_all_answered_by_both(self, served):
        held = await served.connect_to_both(CONNECTIONS)
        # One of each first: how many more each has is the kernel's to decide.
        of_each = [some[0] for some in held.values()]
        connections = [*of_each, *(each for some in held.values() for each in some[1:])][:CONNECTIONS]
        before = len(served.upstream.requests)

        async def client(number: int, downstream: Downstream) -> None:
            for turn in range(REQUESTS // CONNECTIONS):
                await served.get(downstream, f"/{number}/{turn}")

        await asyncio.gather(*(client(number, each) for number, each in enumerate(connections)))
        assert len(served.upstream.requests) - before == REQUESTS
        assert len({request.target for request in served.upstream.requests[before:]}) == REQUESTS


class TestDeath:
    async def test_only_the_connections_of_the_killed_process_are_lost_and_it_is_replaced(self, served):
        """FA-18: the others go on without a failure; a new process takes part."""
        held = await served.connect_to_both(CONNECTIONS)
        (doomed, lost), (_, kept) = held.items()
        killed = asyncio.Event()
        failures = []

        async def client(downstream: Downstream, turns: int) -> None:
            for turn in range(turns):
                try:
                    await served.get(downstream, f"/{turn}")
                except (WireClosed, ConnectionError):
                    failures.append(downstream)
                    return
                if len(served.upstream.requests) > 300:
                    killed.set()

        clients = [asyncio.ensure_future(client(each, 200)) for each in kept]
        clients += [asyncio.ensure_future(client(each, 10**9)) for each in lost]
        await within(killed.wait(), "some load")
        psutil.Process(doomed).kill()
        await asyncio.gather(*clients)
        assert set(failures) == set(lost)
        assert len(failures) == len(lost)
        await asyncio.to_thread(served.proxy.wait_for_line, "restarting")
        assert doomed not in {worker.pid for worker in await served.workers()}
        # The new one serves as well.
        assert all((await served.connect_to_both(2)).values())


class TestStop:
    """FA-19: SIGTERM under load fails no request that had been taken, and ends with 0."""

    async def test_what_waits_for_its_upstream_is_answered(self, served):
        held = await served.connect_to_both(CONNECTIONS)
        connections = [each for some in held.values() for each in some]
        served.gate.clear()
        for number, downstream in enumerate(connections):
            await downstream.request("GET", f"/last/{number}")
        seen = served.upstream.requests
        await until(
            lambda: sum(request.target.startswith("/last/") for request in seen) == len(connections),
            "every request reached the upstream",
        )
        served.proxy.signal(signal.SIGTERM)
        await refused(served.proxy.port)
        served.gate.set()
        for number, downstream in enumerate(connections):
            response = await downstream.read_response()
            assert (response.status, response.body) == (200, f"/last/{number}".encode() * 20)
            assert response.header("Connection") == "close"
            assert await downstream.closed() == "end"
        assert await ended(served.proxy) == 0

    async def test_a_busy_proxy_answers_what_it_took(self, served):
        held = await served.connect_to_both(CONNECTIONS)
        connections = [each for some in held.values() for each in some]
        before = len(served.upstream.requests)
        answered: list[str] = []

        async def client(number: int, downstream: Downstream) -> None:
            """Ask again and again, until told to stop or hung up on between two requests."""
            for turn in range(10**9):
                target = f"/{number}/{turn}"
                try:
                    await downstream.request("GET", target)
                    response = await downstream.read_response()
                except (WireClosed, ConnectionError):
                    return
                assert (response.status, response.body) == (200, target.encode() * 20)
                answered.append(target)
                if response.header("Connection") == "close":
                    assert await downstream.closed() == "end"
                    return

        clients = [asyncio.ensure_future(client(number, each)) for number, each in enumerate(connections)]
        await until(lambda: len(answered) > 300, "some load")
        served.proxy.signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        assert await ended(served.proxy) == 0
        taken = [request.target for request in served.upstream.requests[before:]]
        assert sorted(taken) == sorted(answered)
