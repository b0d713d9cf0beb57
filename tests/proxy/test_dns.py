"""The upstream's name comes to lead elsewhere while the proxy runs, or nobody says where it leads.

The standalone proxy runs in a mount namespace in which /etc/hosts, or /etc/resolv.conf, is a file of the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
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


def showing(ours: Path, theirs: str) -> list[str]:
    """Return the words of a command that shows ``ours`` in place of ``theirs`` to the program behind it, or skip."""
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    for options in ([], ["--map-root-user"]):
        command = ["unshare", "--mount", *options, "sh", "-c", script, str(ours), theirs]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "cat", theirs], capture_output=True, timeout=10).stdout == ours.read_bytes():
                return command
    pytest.skip(f"unshare and mount, for another {theirs}, are missing or not allowed here")


class Name:
    """A name that the test decides on, for programs run under ``command``."""

    def __init__(self, hosts: Path) -> None:
        hosts.write_text(f"{OLD} {NAME}\n")
        self._hosts = hosts
        self.command = showing(hosts, "/etc/hosts")

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
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Upstreams]:
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
async def started(*arguments: str, under: list[str]) -> AsyncIterator[StandaloneProxy]:
    proxy = await asyncio.to_thread(StandaloneProxy(*arguments, under=under).__enter__)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.stop)


def standalone(name: Name, pair: Upstreams, *options: str) -> contextlib.AbstractAsyncContextManager[Any]:
    flags = [*pair.flags, "--client-options", ",".join(options)] if options else pair.flags
    return started("--to", f"http://{NAME}:{pair.port}", *flags, under=name.command)


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
    """FA-15: they go to the new address as soon as the old answer may be kept no longer.

    /etc/hosts is read anew for each question. It knows no time to live, and the resolver would not tell libcurl if it
    did; ``dns_cache_seconds`` stands for it.
    """

    async def test_go_to_the_new_address_within_the_cache_time(self, name, pair):
        pair.closing = True
        options = [] if "simple" in pair.flags else ["dns_cache_seconds=1"]
        async with (
            standalone(name, pair, *options) as proxy,
            await Downstream.connect(proxy.port) as downstream,
        ):
            asking = Asking(downstream)
            assert (await asking.once()).startswith(OLD)
            name.change()
            await asking.until(NEW, (1 if options else 0) + GRACE)
            # And never again to the old one.
            for _ in range(20):
                assert (await asking.once()).startswith(NEW)


class TestKeptConnections:
    """FA-15: they are left at the age that ``max_connection_seconds`` says, however busy they are."""

    # More than the old answer is kept for: else a new connection might still go where the old one went.
    AGE = 2

    @pytest.fixture
    async def proxy(self, name, pair):
        options = [] if "simple" in pair.flags else ["dns_cache_seconds=1"]
        async with standalone(name, pair, *options, f"max_connection_seconds={self.AGE}") as proxy:
            yield proxy

    async def test_a_busy_one_to_the_old_address_is_used_no_longer_than_that(self, name, pair, proxy):
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

    async def test_what_is_under_way_on_it_is_not_cut(self, name, pair, proxy):
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
            pair.gate.set()
            assert await slow.read_body() == b"half"
            # Its connection is too old now.
            assert (await Asking(slow).once()).startswith(NEW)

    async def test_without_a_change_it_is_only_made_anew(self, name, pair, proxy):
        async with await Downstream.connect(proxy.port) as downstream:
            asking = Asking(downstream)
            deadline = monotonic() + self.AGE + GRACE + SLACK
            said = {await asking.once()}
            while len(said) < 2:
                said.add(await asking.once())
                assert monotonic() < deadline, "the connection was not made anew"
            assert said == {f"{OLD} 1", f"{OLD} 2"}


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[list[str]]:
    """Yield the command whose program has a name server that hears every question and answers none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        # Others on this machine may do the same.
        address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        try:
            server.bind((address, 53))
        except OSError as error:
            pytest.skip(f"port 53, for a name server of our own: {error}")
        resolver = tmp_path / "resolv.conf"
        resolver.write_text(f"nameserver {address}\noptions timeout:1 attempts:2\n")
        yield showing(resolver, "/etc/resolv.conf")


class TestANameServerThatSaysNothing:
    """FA-16: it costs who asks for its names a 504 at connect_timeout, and nobody else anything."""

    # Far more than the threads that look names up.
    MANY = 40

    @pytest.mark.parametrize("upgrade", [False, True], ids=["request", "handshake"])
    @pytest.mark.parametrize(
        "flags",
        [["--loop", "asyncio"], ["--loop", "uvloop"], ["--loop", "asyncio", "--client", "simple"]],
        ids=["curl", "curl, uvloop", "simple"],
    )
    async def test_costs_nobody_else_anything(self, silent, echo, flags, upgrade):
        if "uvloop" in flags:
            pytest.importorskip("uvloop")
        mounts = ["--to", "http://nobody.test", "--mount", f"/good={echo.url}"]
        fields = [("Connection", "upgrade"), ("Upgrade", "websocket")] if upgrade else []
        fields += (
            [("Sec-WebSocket-Key", "eHh4eHh4eHh4eHh4eHh4eA=="), ("Sec-WebSocket-Version", "13")] if upgrade else []
        )
        async with started(*mounts, "--connect-timeout", "1", *flags, under=silent) as proxy:
            asked = monotonic()
            lost = [await Downstream.connect(proxy.port) for _ in range(self.MANY)]
            for downstream in lost:
                await downstream.request("GET", "/x", fields)
            took = []
            while monotonic() - asked < 0.9:
                async with await Downstream.connect(proxy.port) as good:
                    started_at = monotonic()
                    assert (await good.exchange("GET", "/good/x")).status == 200
                    took.append(monotonic() - started_at)
            assert sorted(took)[len(took) // 2] < 0.05
            assert max(took) < 0.5
            for downstream in lost:
                assert (await downstream.read_response()).status == 504
                downstream.close()
            assert 1 <= monotonic() - asked < 1 + GRACE
            # Whoever still looks for an answer does not keep the program from ending.
            proxy.signal()
            assert await asyncio.to_thread(proxy.wait, 5) == 0
            # What is wrong is said of each request, and of nothing else.
            lines = proxy.output.splitlines()[1:]
            assert len(lines) == self.MANY
            assert all("WARNING tornado_proxy" in line for line in lines)
