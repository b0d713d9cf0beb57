"""Bytes pass both ways through a tunnel until both sides have ended, and then nothing of it is left.

The scenarios that a tunnel must survive are named by their ids; see ``tests/README.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from time import monotonic

import pytest

from tests.support.downstream import Downstream
from tests.support.flooding import HELD, KERNEL, MIB, PIECE, Sender
from tests.support.process import StandaloneProxy
from tests.support.upstream import ScriptedUpstream
from tests.support.websocket import ASK, ASKING, GRANT, GRANTING, opened, opened_through
from tests.support.wire import until
from tornado_proxy import draining, tunnel

# Seconds until the other side must have seen the end.
AT_ONCE = 1.0
DIRECTIONS = pytest.mark.parametrize("direction", ["up", "down"])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Most tests leave one end open, which nobody has to wait for."""
    monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.3)


@pytest.fixture
def patient(soon, monkeypatch):
    monkeypatch.setattr(tunnel, "HALF_CLOSED", 30.0)


class TestTheEnd:
    async def test_what_the_upstream_sent_last_arrives_and_then_its_end(self, proxy, upstream, patient):
        """UP-03: a close frame and FIN."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        await conn.send(b"\x88\x02\x03\xe8")
        conn.close()
        assert await downstream.read_exactly(4) == b"\x88\x02\x03\xe8"
        assert await downstream.closed() == "end"
        downstream.close()

    @pytest.mark.parametrize("stalled", [False, True], ids=["idle", "stalled"])
    async def test_a_reset_downstream_reaches_the_upstream_at_once(self, proxy, upstream, stalled):
        """UP-04, also while the upstream takes nothing and so nobody reads from the downstream."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        if stalled:
            sender = Sender(downstream.sock, "raw")
            await until(sender.stalled, "the client was held back")
            await sender.stop()
        started = monotonic()
        downstream.reset()
        outcome = await running.next_outcome()
        await conn.closed()
        assert monotonic() - started < AT_ONCE
        assert (outcome.status, outcome.side, outcome.phase) == (101, "downstream", "upgrade")

    @pytest.mark.parametrize("end", ["close", "half_close"])
    async def test_a_downstream_that_leaves_is_passed_on_at_once(self, proxy, upstream, end):
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        started = monotonic()
        getattr(downstream, end)()
        assert await conn.closed() == "end"
        assert monotonic() - started < AT_ONCE

    async def test_last_words_to_a_downstream_that_has_left_are_no_fault_of_ours(self, proxy, upstream, patient):
        """A page that is closed: its server answers with a close frame, which nobody takes, and closes too."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        downstream.close()
        assert await conn.closed() == "end"
        await conn.send(b"\x88\x02\x03\xe8")
        conn.close()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "downstream", "upgrade")

    async def test_last_words_to_an_upstream_that_has_left_are_no_fault_of_ours(
        self, proxy, upstream, patient, expect_log
    ):
        expect_log("reset the tunnel")
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        conn.close()
        assert await downstream.closed() == "end"
        await downstream.send(b"\x88\x02\x03\xe8")
        downstream.close()
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "upstream", "upgrade")

    async def test_a_reset_upstream_is_passed_on_at_once(self, proxy, upstream, expect_log):
        expect_log("reset the tunnel")
        errors = []
        running = await proxy(upstream.url, error_callback=errors.append)
        downstream, conn = await opened(running, upstream)
        await conn.send(b"last")
        assert await downstream.read_exactly(4) == b"last"
        started = monotonic()
        conn.reset()
        await downstream.closed()
        assert monotonic() - started < AT_ONCE
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "upstream", "upgrade")
        assert errors == [outcome.error]

    async def test_a_downstream_that_resets_as_it_is_told_of_the_101(self, proxy, upstream):
        running = await proxy(upstream.url, rewrite_response=lambda handler, response: downstream.reset())
        downstream = await running.ask("GET", "/ws", ASK)
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        await conn.closed()
        assert (await running.next_outcome()).side == "downstream"

    async def test_a_half_closed_downstream_still_gets_what_the_upstream_sends(self, proxy, upstream, patient):
        """UP-05."""
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        downstream.half_close()
        assert await conn.closed() == "end"
        for piece in (b"one", b"two"):
            await conn.send(piece)
            assert await downstream.read_exactly(3) == piece
        conn.close()
        assert await downstream.closed() == "end"
        assert (await running.next_outcome()).error is None

    async def test_a_half_closed_upstream_still_gets_what_the_downstream_sends(self, proxy, upstream, patient):
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        conn.half_close()
        assert await downstream.closed() == "end"
        await downstream.send(b"more")
        assert await conn.read_exactly(4) == b"more"
        downstream.close()
        assert await conn.closed() == "end"

    async def test_the_other_half_is_open_for_a_bounded_time(self, proxy, upstream, monkeypatch):
        """UP-05."""
        monkeypatch.setattr(tunnel, "HALF_CLOSED", 0.1)
        running = await proxy(upstream.url)
        downstream, conn = await opened(running, upstream)
        downstream.half_close()
        assert await downstream.closed() == "end"
        await conn.closed()

    async def test_silence_beyond_tunnel_idle_timeout_ends_it(self, proxy, upstream):
        running = await proxy(upstream.url, tunnel_idle_timeout=0.3)
        downstream, conn = await opened(running, upstream)
        started = monotonic()
        for _ in range(4):
            await asyncio.sleep(0.1)
            await downstream.send(b"x")
            await conn.read_exactly(1)
        assert await conn.closed() == "end"
        assert await downstream.closed() == "end"
        assert 0.6 < monotonic() - started < 1.5
        outcome = await running.next_outcome()
        assert (outcome.status, outcome.side, outcome.phase) == (101, "proxy", "upgrade")

    async def test_the_time_limits_of_responses_do_not_end_it(self, proxy, upstream):
        running = await proxy(upstream.url, idle_timeout=0.1, response_timeout=0.1, write_timeout=0.1)
        downstream, conn = await opened(running, upstream)
        await asyncio.sleep(0.4)
        await conn.send(b"late")
        assert await downstream.read_exactly(4) == b"late"

    async def test_total_timeout_does(self, proxy, upstream, expect_log):
        expect_log("exchange took more than")
        running = await proxy(upstream.url, total_timeout=0.3)
        downstream, conn = await opened(running, upstream)
        await downstream.closed()
        await conn.closed()


class TestWithoutADescriptor:
    async def test_to_take_the_connection_over_bytes_pass_all_the_same(self, proxy, upstream, monkeypatch):
        def refuse(sock):
            raise OSError("too many open files")

        running = await proxy(upstream.url)
        downstream = await running.connect()
        downstream.expect("GET")
        await downstream.send(ASKING + b"early")
        conn, _ = await upstream.request()
        monkeypatch.setattr(socket.socket, "dup", refuse)
        await conn.send_head(101, GRANT)
        assert (await downstream.read_head()).status == 101
        assert await conn.read_exactly(5) == b"early"
        await conn.send(b"last")
        conn.close()
        assert await downstream.read_exactly(4) == b"last"
        assert await downstream.closed() == "end"


class TestBackPressure:
    """Against the standalone program, so that its memory can be told from the test's own."""

    @DIRECTIONS
    async def test_a_side_that_does_not_read_makes_the_other_wait(self, served, direction):
        """UP-02: 64 MB each way with one side that stalls; memory stays and every byte arrives."""
        upstream, proxy = served
        downstream, conn = await opened_through(proxy.port, upstream)
        async with downstream:
            source, sink = (downstream, conn) if direction == "up" else (conn, downstream)
            before = proxy.rss()
            sender = Sender(source.sock, "raw")
            await until(sender.stalled, "the sender was held back")
            assert sender.sent < HELD + KERNEL
            assert proxy.rss() - before < 2 * MIB
            # The other direction is free meanwhile.
            await sink.send(b"still here")
            assert await source.read_exactly(10) == b"still here"
            received = 0
            while received < 64 * MIB:
                data = await sink.read_exactly(len(PIECE))
                assert data == PIECE
                received += len(data)
            await sender.stop()
            assert proxy.rss() - before < 8 * MIB


class TestManyIdleTunnels:
    COUNT = int(os.environ.get("TORNADO_PROXY_TUNNELS", "2000"))
    # Seconds that they are idle.
    IDLE = float(os.environ.get("TORNADO_PROXY_TUNNELS_IDLE", "1"))
    # Bytes of the proxy's memory for each.
    EACH = 60_000

    @pytest.mark.slow
    async def test_cost_little_and_answer_afterwards(self, monkeypatch):
        """UP-09; by default with fewer tunnels and for a second."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * self.COUNT + 500
        if hard != resource.RLIM_INFINITY and hard < needed:
            pytest.skip(f"needs {needed} descriptors, the limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
        async with ScriptedUpstream() as upstream, contextlib.AsyncExitStack() as stack:
            starting = StandaloneProxy("--to", upstream.url)
            proxy = await asyncio.to_thread(starting.__enter__)
            stack.callback(proxy.stop)
            stack.callback(proxy.signal, 9)

            # The first ones pay for what is loaded only once.
            for _ in range(50):
                stack.callback((await opened_through(proxy.port, upstream))[0].close)
            before, cpu = proxy.rss(), proxy.cpu()
            tunnels = []
            for _ in range(self.COUNT):
                tunnels.append(await opened_through(proxy.port, upstream))
                stack.callback(tunnels[-1][0].close)
            each = (proxy.rss() - before) / self.COUNT
            opening = proxy.cpu() - cpu
            cpu = proxy.cpu()
            await asyncio.sleep(self.IDLE)
            idle = (proxy.cpu() - cpu) / self.IDLE
            print(f"{each / 1000:.1f} kB a tunnel, {1000 * opening / self.COUNT:.2f} ms to open one, idle {idle:.1%}")
            assert each < self.EACH
            assert idle < 0.05
            for downstream, _ in tunnels:
                await downstream.send(b"ping")
            for _, conn in tunnels:
                await conn.read_exactly(4)
                await conn.send(b"pong")
            for downstream, _ in tunnels:
                assert await downstream.read_exactly(4) == b"pong"


class TestNothingIsLeft:
    async def test_of_tunnels_however_they_ended(self, upstream):
        starting = StandaloneProxy("--to", upstream.url)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            # The first one also opens what stays open; two descriptors are its own.
            sides = await opened_through(proxy.port, upstream)
            before = proxy.fds() - 2
            for side in sides:
                side.close()
            for _ in range(30):
                for first, how in ((0, "close"), (1, "close"), (0, "reset"), (1, "reset")):
                    sides = await opened_through(proxy.port, upstream)
                    getattr(sides[first], how)()
                    await sides[1 - first].closed()
                    sides[1 - first].close()
            await until(lambda: proxy.fds() <= before, "every descriptor was given back")
        finally:
            await asyncio.to_thread(proxy.stop)


class TestDrain:
    async def test_refuses_new_tunnels_with_503(self, proxy, upstream, monkeypatch):
        """UP-10: on a connection that was there before."""
        running = await proxy(upstream.url)
        old, old_conn = await opened(running, upstream)
        monkeypatch.setattr(draining, "_draining", True)
        response = await running.request("GET", "/ws", ASK)
        assert (response.status, response.header("Retry-After")) == (503, "1")
        assert upstream.accepted == 1
        await old.send(b"x")
        assert await old_conn.read_exactly(1) == b"x"

    async def test_waits_for_tunnels_until_its_timeout_then_closes_them(self, upstream):
        """UP-10: 100 tunnels and SIGTERM; each has its line in the access log."""
        starting = StandaloneProxy("--to", upstream.url, "--drain-timeout", "1", "--access-log", "json")
        proxy = await asyncio.to_thread(starting.__enter__)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, proxy.stop)
            tunnels = []
            for _ in range(100):
                downstream, conn = await opened_through(proxy.port, upstream)
                stack.callback(downstream.close)
                tunnels.append((downstream, conn))
            proxy.signal(signal.SIGTERM)
            await asyncio.to_thread(proxy.wait_for_line, "waiting for 100 exchanges")
            with pytest.raises(OSError, match=r"."):  # noqa: PT012
                while True:
                    (await Downstream.connect(proxy.port)).close()
            for downstream, conn in tunnels:
                await downstream.send(b"alive")
                assert await conn.read_exactly(5) == b"alive"
            for downstream, conn in tunnels:
                assert await downstream.closed() == "end"
                assert await conn.closed() == "end"
            assert await asyncio.to_thread(proxy.wait) == 0
            await asyncio.to_thread(proxy.stop)
            lines = [json.loads(line) for line in proxy.output.splitlines() if line.startswith("{")]
            assert len(lines) == 100
            assert {(line["status"], line["phase"], line["bytes_up"], line["path"]) for line in lines} == {
                (101, "upgrade", 5, "/ws")
            }

    async def test_ends_as_soon_as_the_last_tunnel_does(self, upstream):
        starting = StandaloneProxy("--to", upstream.url)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            downstream, conn = await opened_through(proxy.port, upstream)
            proxy.signal(signal.SIGTERM)
            await asyncio.to_thread(proxy.wait_for_line, "waiting for 1 exchanges")
            downstream.close()
            await conn.closed()
            conn.close()
            assert await asyncio.to_thread(proxy.wait) == 0
        finally:
            await asyncio.to_thread(proxy.stop)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def server_tls(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


class TLSUpstream:
    """Grants every handshake over TLS and echoes. ``names`` are the server names asked for."""

    def __init__(self, certificate) -> None:
        self.context = server_tls(certificate)
        self.names: list[str | None] = []
        self.context.sni_callback = lambda sock, name, context: self.names.append(name)
        self.ended = asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "localhost", 0, ssl=self.context, family=socket.AF_INET)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(GRANTING)
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended.set()
            writer.close()


class TestTLS:
    async def test_in_front(self, proxy, upstream, certificate):
        """Tornado's own TLS stream: both directions pass and its end ends the tunnel."""
        running = await proxy(upstream.url, server_options={"ssl_options": server_tls(certificate)})
        context = ssl.create_default_context(cafile=certificate[0])
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.port, ssl=context, server_hostname="localhost"
        )
        writer.write(ASKING + b"early")
        conn, request = await upstream.request()
        assert request.header("X-Forwarded-Proto") == "https"
        await conn.send_head(101, GRANT)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        assert await conn.read_exactly(5) == b"early"
        big = bytes(range(256)) * 8192
        sending = asyncio.ensure_future(conn.send(big))
        assert await reader.readexactly(len(big)) == big
        await sending
        writer.write(big)
        assert await conn.read_exactly(len(big)) == big
        started = monotonic()
        writer.close()
        await conn.closed()
        assert monotonic() - started < AT_ONCE
        outcome = await running.next_outcome()
        assert (outcome.error, outcome.bytes_up, outcome.bytes_down) == (None, len(big) + 5, len(big))

    async def test_in_front_the_upstreams_last_bytes_come_before_the_end(self, proxy, upstream, certificate):
        """UP-03 under TLS."""
        running = await proxy(upstream.url, server_options={"ssl_options": server_tls(certificate)})
        context = ssl.create_default_context(cafile=certificate[0])
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", running.port, ssl=context, server_hostname="localhost"
        )
        writer.write(ASKING)
        conn, _ = await upstream.request()
        await conn.send_head(101, GRANT)
        await reader.readuntil(b"\r\n\r\n")
        await conn.send(b"last")
        conn.close()
        assert await asyncio.wait_for(reader.read(), 5) == b"last"
        writer.close()

    @pytest.mark.parametrize("scheme", ["https", "wss"])
    async def test_upstream(self, proxy, certificate, scheme):
        async with TLSUpstream(certificate) as upstream:
            options = {"ca_certs": str(certificate[0])}
            running = await proxy(
                f"{scheme}://localhost:{upstream.port}", client_options=options, preserve_host_header=True
            )
            downstream = await running.ask("GET", "/ws", [("Host", "other.example"), *ASK])
            assert (await downstream.read_head()).status == 101
            big = bytes(range(256)) * 8192
            sending = asyncio.ensure_future(downstream.send(big))
            assert await downstream.read_exactly(len(big)) == big
            await sending
            assert upstream.names == ["localhost"]
            started = monotonic()
            downstream.close()
            await asyncio.wait_for(upstream.ended.wait(), 5)
            assert monotonic() - started < AT_ONCE
            assert (await running.next_outcome()).error is None

    async def test_upstream_is_verified(self, proxy, certificate, expect_log):
        expect_log("certificate verify failed")
        async with TLSUpstream(certificate) as upstream:
            running = await proxy(f"https://localhost:{upstream.port}", retries=0)
            assert (await running.request("GET", "/ws", ASK)).status == 502
            outcome = await running.next_outcome()
            assert (outcome.side, outcome.phase) == ("upstream", "tls")

    async def test_upstream_must_have_the_name_in_the_url(self, proxy, certificate, expect_log):
        expect_log("not valid for '127.0.0.1'|IP address mismatch")
        async with TLSUpstream(certificate) as upstream:
            options = {"ca_certs": str(certificate[0])}
            running = await proxy(f"https://127.0.0.1:{upstream.port}", client_options=options, retries=0)
            assert (await running.request("GET", "/ws", ASK)).status == 502

    async def test_upstream_without_verification_where_that_is_asked_for(self, proxy, certificate):
        async with TLSUpstream(certificate) as upstream:
            running = await proxy(f"https://127.0.0.1:{upstream.port}", client_options={"validate_cert": False})
            downstream = await running.ask("GET", "/ws", ASK)
            assert (await downstream.read_head()).status == 101


class TestOtherUpstreams:
    async def test_ws_is_http(self, proxy, upstream):
        running = await proxy(f"ws://127.0.0.1:{upstream.port}")
        await opened(running, upstream)

    async def test_a_unix_socket(self, proxy, upstreams, tmp_path):
        async with ScriptedUpstream(unix_socket=tmp_path / "up.sock") as upstream:
            upstreams.append(upstream)
            running = await proxy("http://app", client_options={"unix_socket": str(tmp_path / "up.sock")})
            downstream, conn = await opened(running, upstream)
            await downstream.send(b"x")
            assert await conn.read_exactly(1) == b"x"
            downstream.half_close()
            assert await conn.closed() == "end"
            await conn.send(b"y")
            assert await downstream.read_exactly(1) == b"y"
            # The fixture checks the upstream when the proxy has stopped, and by then this one is gone.
            conn.close()
            assert await downstream.closed() == "end"
            upstreams.remove(upstream)

    async def test_a_unix_socket_in_front(self, upstream, tmp_path):
        path = tmp_path / "front.sock"
        starting = StandaloneProxy("--to", upstream.url, "--listen", f"unix:{path}")
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(ASKING)
            conn, _ = await upstream.request()
            await conn.send_head(101, GRANT)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x")
            assert await conn.read_exactly(1) == b"x"
            writer.close()
            await conn.closed()
            conn.close()
        finally:
            await asyncio.to_thread(proxy.stop)
