"""``python -m tornado_proxy`` as a user runs it: its arguments, its output, how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.downstream import Downstream
from tests.support.process import CHECKOUT, StandaloneProxy, free_port
from tests.support.upstream import EchoUpstream, ScriptedUpstream


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program with arguments on which it ends by itself."""
    command = [sys.executable, "-m", "tornado_proxy", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30, check=False)


async def ended(proxy: StandaloneProxy) -> int:
    """Return the exit code, while the event loop goes on."""
    return await asyncio.to_thread(proxy.wait)


async def refused(port: int) -> None:
    """Return once nobody accepts connections."""
    async with asyncio.timeout(5):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            writer.close()


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "say where to forward"),
            (["--to", "localhost:9000"], "http://localhost:9000"),
            (["--nonsense"], "--nonsense"),
            (["--to", "http://a", "--listen", "here:there"], "'here:there' is not [HOST:]PORT"),
            (["--to", "http://a", "--listen", "::1:80"], "'::1:80' is not [HOST:]PORT"),
            (["--mount", "api=http://a"], "'api=http://a' is not PREFIX=URL"),
            (["--to", "http://a", "--idle-timeout", "soon"], "'soon' cannot be read as seconds"),
            (["--to", "http://a", "--idle-timeout", "-1"], "idle_timeout -1.0"),
            (["--to", "http://a", "--response-mode", "fast"], "response_mode 'fast'"),
            (["--to", "http://a", "--drain-timeout", "nan"], "'nan' is not a number of seconds"),
            (["--to", "http://a", "--tls-key", "k.pem"], "--tls-key needs --tls-cert"),
            (["--to", "http://a", "--tls-cert", "/nowhere.pem"], "/nowhere.pem"),
            (["--to", "unix:/a", "--to", "http://a"], "cannot take turns"),
            (["--demo", "--to", "http://a"], "leave out --to"),
            (["--demo", "--processes", "2"], "leave out --processes"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_status_2(self, arguments: list[str], said: str) -> None:
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert said in done.stderr
        assert done.stderr.count("\n") == 1

    def test_version(self) -> None:
        assert run("--version").stdout == "tornado_proxy 0.1.0\n"

    def test_help_lists_each_option_that_a_string_can_say(self) -> None:
        text = run("--help").stdout
        for flag in ("--to", "--mount", "--preserve-host-header", "--no-websocket", "--trusted-proxies", "--client"):
            assert flag in text

    async def test_an_address_in_use_is_one_line_and_status_1(self, echo: EchoUpstream) -> None:
        with StandaloneProxy("--to", echo.url) as proxy:
            done = await asyncio.to_thread(run, "--to", echo.url, "--listen", str(proxy.port))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"cannot listen on http://127.0.0.1:{proxy.port}" in done.stderr

    async def test_so_is_a_unix_socket_in_use(self, echo: EchoUpstream, tmp_path: Path) -> None:
        listen = f"unix:{tmp_path}/down"
        with StandaloneProxy("--to", echo.url, "--listen", listen):
            done = await asyncio.to_thread(run, "--to", echo.url, "--listen", listen)
            # The path is still its own.
            _, writer = await asyncio.open_unix_connection(f"{tmp_path}/down")
            writer.close()
            await writer.wait_closed()
        assert done.returncode == 1
        assert f"cannot listen on {listen}: [Errno 98] Address already in use" in done.stderr

    async def test_one_that_was_left_behind_is_not(self, echo: EchoUpstream, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{tmp_path}/down")
        with StandaloneProxy("--to", echo.url, "--listen", f"unix:{tmp_path}/down"):
            _, writer = await asyncio.open_unix_connection(f"{tmp_path}/down")
            writer.close()
            await writer.wait_closed()


class TestMounts:
    async def test_the_longest_prefix_wins(self, upstream: ScriptedUpstream, echo: EchoUpstream) -> None:
        with StandaloneProxy("--to", upstream.url, "--mount", f"/a={upstream.url}", "--mount", f"/a/b={echo.url}") as p:
            async with await Downstream.connect(p.port) as downstream:
                assert (await downstream.exchange("GET", "/a/b/c")).status == 200
        assert echo.requests[-1].target == "/c"
        assert upstream.accepted == 0

    async def test_several_upstreams_take_turns(self, echo: EchoUpstream) -> None:
        async with EchoUpstream() as other:
            with StandaloneProxy("--to", echo.url, "--to", other.url) as proxy:
                async with await Downstream.connect(proxy.port) as downstream:
                    for _ in range(4):
                        assert (await downstream.exchange("GET", "/")).status == 200
            assert (len(echo.requests), len(other.requests)) == (2, 2)

    async def test_unix_sockets_on_both_sides(self, tmp_path: Path) -> None:
        async with ScriptedUpstream(unix_socket=tmp_path / "up") as upstream:
            with StandaloneProxy("--to", f"unix:{tmp_path}/up", "--listen", f"unix:{tmp_path}/down"):
                reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/down")
                writer.write(b"GET /x HTTP/1.1\r\nHost: here\r\n\r\n")
                conn, request = await upstream.request()
                assert request.target == "/x"
                await conn.respond(204)
                assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 204 No Content\r\n"
                writer.close()
                await writer.wait_closed()


class TestStopping:
    """FA-19: what runs is finished, nothing new is taken, and the end is a good one."""

    @pytest.fixture(params=["1", "2"], ids=lambda count: f"{count}-processes")
    def processes(self, request: pytest.FixtureRequest) -> list[str]:
        return ["--processes", request.param]

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
    async def test_finishes_what_runs_and_takes_nothing_new(
        self, upstream: ScriptedUpstream, processes: list[str], signum: int
    ) -> None:
        with StandaloneProxy("--to", upstream.url, *processes) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                await downstream.request("GET", "/")
                conn, _ = await upstream.request()
                proxy.signal(signum)
                await refused(proxy.port)
                await conn.respond(200, body=b"to the end")
                response = await downstream.read_response()
                assert (response.body, response.header("Connection")) == (b"to the end", "close")
                await downstream.closed()
            assert await ended(proxy) == 0

    async def test_closes_idle_connections(self, echo: EchoUpstream, processes: list[str]) -> None:
        with StandaloneProxy("--to", echo.url, *processes) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("GET", "/")).status == 200
                proxy.signal()
                assert await downstream.closed() == "end"
            assert await ended(proxy) == 0

    async def test_cuts_off_what_takes_longer_than_the_drain_timeout(
        self, upstream: ScriptedUpstream, processes: list[str]
    ) -> None:
        with StandaloneProxy("--to", upstream.url, "--drain-timeout", "0.2", *processes) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                await downstream.request("GET", "/")
                await upstream.request()
                proxy.signal()
                assert await ended(proxy) == 0
                await downstream.closed()
            assert "1 exchanges are cut off" in proxy.output

    async def test_a_second_signal_ends_at_once(self, upstream: ScriptedUpstream, processes: list[str]) -> None:
        with StandaloneProxy("--to", upstream.url, *processes) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                await downstream.request("GET", "/")
                await upstream.request()
                proxy.signal()
                await refused(proxy.port)
                proxy.signal()
                assert await ended(proxy) == -signal.SIGTERM
                await downstream.closed()


class TestProcesses:
    """FA-18: who dies is replaced, and nobody is left behind."""

    async def test_one_that_dies_is_replaced(self, echo: EchoUpstream) -> None:
        with StandaloneProxy("--to", echo.url, "--processes", "2") as proxy:
            first, *_ = await children(proxy.pid, 2)
            first.kill()
            await asyncio.to_thread(proxy.wait_for_line, "restarting")
            assert first.pid not in {child.pid for child in await children(proxy.pid, 2)}
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("GET", "/")).status == 200

    async def test_all_end_when_the_first_process_is_killed(self, echo: EchoUpstream) -> None:
        with StandaloneProxy("--to", echo.url, "--processes", "2") as proxy:
            workers = await children(proxy.pid, 2)
            proxy.process.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 5)
            assert alive == []


async def children(pid: int, count: int) -> list[psutil.Process]:
    """Return the processes that ``pid`` has forked, once there are ``count``."""
    async with asyncio.timeout(5):
        while True:
            found = [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
            if len(found) == count:
                return found
            await asyncio.sleep(0)


class TestQueries:
    async def test_of_many_fields_pass(self, echo: EchoUpstream) -> None:
        """Tornado's limit is 1000."""
        target = "/x?" + "&".join(["a=1"] * 2000)
        with StandaloneProxy("--to", echo.url) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("GET", target)).status == 200
        assert echo.requests[-1].target == target


class TestAccessLog:
    """What it says, and FA-23: nobody who is served has to wait for it."""

    async def test_text_has_a_line_for_each_exchange_without_the_query(self, echo: EchoUpstream) -> None:
        with StandaloneProxy("--to", echo.url, "--access-log", "text") as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                response = await downstream.exchange("POST", "/a%20b?token=secret", body=b"12345")
            line = await asyncio.to_thread(proxy.wait_for_line, "POST")
        assert f" 127.0.0.1 POST /a%20b 200 5/{len(response.body)} {echo.url} " in line
        assert line.endswith("s ok\n")
        assert "secret" not in proxy.output

    async def test_json_says_whose_fault_it_was(self) -> None:
        port = free_port()
        with StandaloneProxy("--to", f"http://127.0.0.1:{port}", "--access-log", "json") as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("GET", "/")).status == 502
            line = json.loads(await asyncio.to_thread(proxy.wait_for_line, "^{"))
        assert (line["status"], line["side"], line["phase"]) == (502, "upstream", "connect")
        assert line["upstream"] == f"http://127.0.0.1:{port}"

    @pytest.mark.parametrize("kind", ["text", "json"])
    async def test_a_line_is_short_whatever_the_client_sends(self, echo: EchoUpstream, kind: str) -> None:
        with StandaloneProxy("--to", echo.url, "--access-log", kind) as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("M" * 20_000, "/" + "p" * 20_000)).status == 501
            line = await asyncio.to_thread(proxy.wait_for_line, "M")
        assert "/ppp" in line
        # PIPE_BUF: what several processes write at a time does not mix.
        assert len(line) < 4096

    async def test_has_a_line_for_what_no_mount_takes(self, echo: EchoUpstream) -> None:
        with StandaloneProxy("--mount", f"/api={echo.url}", "--access-log", "text") as proxy:
            async with await Downstream.connect(proxy.port) as downstream:
                assert (await downstream.exchange("GET", "/elsewhere")).status == 404
            assert " GET /elsewhere 404 0/0 - " in await asyncio.to_thread(proxy.wait_for_line, "GET")

    async def test_has_a_line_for_what_was_cut_off_at_the_end(self, upstream: ScriptedUpstream) -> None:
        with StandaloneProxy("--to", upstream.url, "--drain-timeout", "0.2", "--access-log", "json") as proxy:
            async with (
                await Downstream.connect(proxy.port) as waiting,
                await Downstream.connect(proxy.port) as reading,
                await Downstream.connect(proxy.port) as sending,
            ):
                await waiting.request("GET", "/waiting")
                await upstream.request()
                await reading.request("GET", "/reading")
                conn, _ = await upstream.request()
                await conn.send_head(200, [("Content-Length", "10")])
                await reading.read_head()
                await sending.send(b"POST /sending HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n12345")
                conn = await upstream.accept()
                await conn.read_head()
                proxy.signal()
                assert await ended(proxy) == 0
            lines = [json.loads(line) for line in proxy.output.splitlines() if line.startswith("{")]
        assert {(line["path"], line["side"], line["status"]) for line in lines} == {
            ("/waiting", "proxy", 503),
            ("/reading", "proxy", 200),
            ("/sending", "proxy", 503),
        }

    async def test_a_full_disk_hurts_nobody(self, echo: EchoUpstream) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        port = free_port()
        command = [sys.executable, "-m", "tornado_proxy", "--to", echo.url, "--listen", str(port)]
        with Path("/dev/full").open("wb") as full:
            process = subprocess.Popen(command, cwd=CHECKOUT, stdout=full, stderr=subprocess.PIPE, env=os.environ)
        try:
            async with await connected(port) as downstream:
                for _ in range(3):
                    assert (await downstream.exchange("GET", "/")).status == 200
            process.terminate()
            assert await asyncio.to_thread(process.wait, 10) == 0
        finally:
            process.kill()
            _, said = process.communicate()
        assert said == b""

    @pytest.mark.parametrize("stuck", [False, True], ids=["left", "stuck"])
    async def test_a_reader_that_left_or_is_stuck_hurts_nobody(self, echo: EchoUpstream, stuck: bool) -> None:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tornado_proxy", "--to", echo.url, "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=writing, stderr=subprocess.PIPE)
        try:
            said = await asyncio.to_thread(os.read, reading, 4096)
            port = int(said.rpartition(b":")[2])
            if stuck:
                fill(writing)
            else:
                os.close(reading)
            async with await Downstream.connect(port) as downstream:
                for _ in range(3):
                    assert (await downstream.exchange("GET", "/")).status == 200
            process.terminate()
            assert await asyncio.to_thread(process.wait, 10) == 0
        finally:
            process.kill()
            process.communicate()
            os.close(writing)
            if stuck:
                os.close(reading)


def fill(pipe: int) -> None:
    """Write until the pipe takes no more. The proxy's descriptor shares our flags, so they are put back."""
    os.set_blocking(pipe, False)
    try:
        while True:
            os.write(pipe, b".")
    except BlockingIOError:
        pass
    finally:
        os.set_blocking(pipe, True)


async def connected(port: int) -> Downstream:
    """Return a connection to a program that is about to listen and cannot say when it does."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await Downstream.connect(port)
            except OSError:
                await asyncio.sleep(0.01)
