"""FA-15: the upstream's name comes to lead elsewhere, while the proxy runs.

The standalone proxy runs in a mount namespace in which /etc/hosts is a file of the test's: the system's resolver reads
it anew for each question. It knows no time to live, and would not tell libcurl if it did; ``dns_cache_seconds`` stands
for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream

OLD, NEW = "127.0.0.1", "127.0.0.2"
NAME = "upstream.test"
# Seconds that libcurl may take beyond a limit: it counts whole ones.
GRACE = 1.0
# Seconds for a request and what the machine does meanwhile.
SLACK = 0.5

# The client that speaks to the upstream, and what that understands.
KINDS = {"curl": [], "curl, HTTP/2": ["--upstream-http-version", "2-prior-knowledge"], "simple": ["--client", "simple"]}


def in_a_namespace(hosts: Path) -> list[str] | None:
    """Return the command that shows another /etc/hosts to the program behind it, or None where it is not allowed."""
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    for options in ([], ["--map-root-user"]):
        command = ["unshare", "--mount", *options, "sh", "-c", script, str(hosts)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = subprocess.run([*command, "getent", "hosts", NAME], capture_output=True, timeout=10)
            if found.stdout.split()[:1] == [OLD.encode()]:
                return command
    return None


class Name:
    """A name that the test decides on, for programs run under ``command``."""

    def __init__(self, hosts: Path) -> None:
        hosts.write_text(f"{OLD} {NAME}\n")
        self._hosts = hosts
        command = in_a_namespace(hosts) if shutil.which("unshare") and shutil.which("getent") else None
        if command is None:
            pytest.skip("unshare and mount, for an /etc/hosts of our own, are missing or not allowed here")
        self.command = command

    def change(self) -> None:
        """Have the name lead to the new address."""
        descriptor = os.open(self._hosts, os.O_WRONLY)
        try:
            # In place, because the mount is of this file; in one write, so that there is no moment without an answer.
            os.pwrite(descriptor, NEW.encode(), 0)
        finally:
            os.close(descriptor)


@pytest.fixture
def name(tmp_path: Path) -> Iterator[Name]:
    return Name(tmp_path / "hosts")


class Upstreams:
    """One at each address, on the same port; each answers with its address and the number of its connections."""

    def __init__(self, kind: str, old: Any, new: Any) -> None:
        self.old, self.new = old, new
        self.port = old.port
        self.http2 = kind == "curl, HTTP/2"
        # Whether each connection is for one exchange.
        self.closing = False
        self._left: list[Any] = []
        # Held back until then: the second half of what answers /half.
        self.gate = asyncio.Event()
        for upstream in (old, new):
            upstream.serve(self._answer)

    async def _answer(self, conn: Any, request: Any) -> None:
        if self.http2 and conn.connection in self._left:
            # Sent before GOAWAY arrived; whoever sent it sends it again elsewhere.
            return
        upstream = self.old if conn in self._carriers(self.old) else self.new
        if request.target == "/half":
            await conn.send_head(200, [("content-length", "8")])
            send = conn.send_data if self.http2 else conn.send
            await send(b"half")
            await self.gate.wait()
            await send(b"half")
            if self.http2:
                conn.end()
            return
        body = f"{upstream.host} {len(upstream.connections)}".encode()
        close = [("connection", "close")] if self.closing and not self.http2 else []
        await conn.respond(200, close, body)
        if self.closing and self.http2:
            self._left.append(conn.connection)
            conn.connection.send_goaway(conn.number)
        elif self.closing:
            conn.close()

    def _carriers(self, upstream: Any) -> list[Any]:
        return list(upstream.streams if self.http2 else upstream.connections)


@pytest.fixture(params=KINDS)
async def upstreams(request: pytest.FixtureRequest) -> AsyncIterator[Upstreams]:
    kind = request.param
    make: Any = ScriptedUpstream
    if kind == "curl, HTTP/2":
        pytest.importorskip("h2", reason="h2, which plays the upstream, is not installed")
        from tests.support.h2_upstream import H2Upstream as make
    async with make(host=OLD) as old, make(host=NEW, port=old.port) as new:
        both = Upstreams(kind, old, new)
        both.flags = KINDS[kind]
        yield both


@contextlib.asynccontextmanager
async def standalone(name: Name, upstreams: Upstreams, *options: str) -> AsyncIterator[StandaloneProxy]:
    flags = [*upstreams.flags, "--client-options", ",".join(options)] if options else upstreams.flags
    starting = StandaloneProxy("--to", f"http://{NAME}:{upstreams.port}", *flags, under=name.command)
    proxy = await asyncio.to_thread(starting.__enter__)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.stop)


class Asking:
    """Asks one request after another and says who answered."""

    def __init__(self, downstream: Downstream) -> None:
        self._downstream = downstream

    async def once(self) -> str:
        response = await self._downstream.exchange("GET", "/")
        assert (response.status, response.complete) == (200, True)
        return response.body.decode()

    async def until(self, address: str, limit: float) -> list[str]:
        """Ask until ``address`` answers, for at most ``limit`` seconds, and return what the other said."""
        deadline = monotonic() + limit
        others: list[str] = []
        while not (said := await self.once()).startswith(address + " "):
            others.append(said)
            assert monotonic() < deadline, f"{address} did not answer within {limit} s"
        return others


class TestNewConnections:
    """They go to the new address as soon as the old answer may be kept no longer, and not before."""

    async def test_go_to_the_new_address_within_the_cache_time(self, name, upstreams):
        upstreams.closing = True
        options = [] if "simple" in upstreams.flags else ["dns_cache_seconds=1"]
        async with (
            standalone(name, upstreams, *options) as proxy,
            await Downstream.connect(proxy.port) as downstream,
        ):
            asking = Asking(downstream)
            assert (await asking.once()).startswith(OLD)
            name.change()
            await asking.until(NEW, (1 if options else 0) + GRACE)
            # And never again to the old one.
            for _ in range(20):
                assert (await asking.once()).startswith(NEW)

    async def test_go_to_the_old_one_while_the_answer_is_kept(self, name, upstreams):
        if "simple" in upstreams.flags:
            pytest.skip("this client asks for each connection")
        upstreams.closing = True
        async with standalone(name, upstreams) as proxy, await Downstream.connect(proxy.port) as downstream:
            asking = Asking(downstream)
            said = [await asking.once()]
            name.change()
            said += [await asking.once() for _ in range(20)]
            assert [address.partition(" ")[0] for address in said] == [OLD] * 21
            # Each of them on a connection of its own.
            assert len(set(said)) == 21


class TestKeptConnections:
    """They are left at the age that ``max_connection_seconds`` says, however busy they are."""

    AGE = 1

    @pytest.fixture
    async def proxy(self, name, upstreams):
        options = [] if "simple" in upstreams.flags else ["dns_cache_seconds=1"]
        async with standalone(name, upstreams, *options, f"max_connection_seconds={self.AGE}") as proxy:
            yield proxy

    async def test_a_busy_one_to_the_old_address_is_used_no_longer_than_that(self, name, upstreams, proxy):
        async with await Downstream.connect(proxy.port) as downstream:
            asking = Asking(downstream)
            assert await asking.once() == f"{OLD} 1"
            made = monotonic()
            name.change()
            others = await asking.until(NEW, self.AGE + GRACE)
            # It was used for as long as it might be, and it alone.
            assert set(others) == {f"{OLD} 1"}
            assert self.AGE - SLACK < monotonic() - made < self.AGE + GRACE + SLACK
            assert (await asking.once()) == f"{NEW} 1"

    async def test_what_is_under_way_on_it_is_not_cut(self, name, upstreams, proxy):
        """A response that began on the old connection ends there, whole, after others have left it."""
        async with await Downstream.connect(proxy.port) as slow, await Downstream.connect(proxy.port) as downstream:
            asking = Asking(downstream)
            await slow.request("GET", "/half")
            await slow.read_head()
            assert await slow.read_body(4) == b"half"
            begun = monotonic()
            name.change()
            await asking.until(NEW, self.AGE + GRACE)
            while monotonic() - begun < self.AGE + SLACK:
                assert (await asking.once()).startswith(NEW)
            upstreams.gate.set()
            assert await slow.read_body() == b"half"
            # Its connection is too old now.
            assert (await Asking(slow).once()).startswith(NEW)

    async def test_without_a_change_it_is_only_made_anew(self, name, upstreams, proxy):
        async with await Downstream.connect(proxy.port) as downstream:
            asking = Asking(downstream)
            deadline = monotonic() + self.AGE + GRACE + SLACK
            said = {await asking.once()}
            while len(said) < 2:
                said.add(await asking.once())
                assert monotonic() < deadline, "the connection was not made anew"
            assert said == {f"{OLD} 1", f"{OLD} 2"}
