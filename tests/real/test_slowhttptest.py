"""slowhttptest against the standalone proxy: its attacks do not stop a good client."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from time import monotonic

import pytest

from tests.real.nginx import NGINX, Nginx
from tests.support.downstream import Downstream
from tests.support.process import StandaloneProxy

SLOWHTTPTEST = shutil.which("slowhttptest")

pytestmark = [
    pytest.mark.skipif(SLOWHTTPTEST is None, reason="slowhttptest is not installed"),
    # Whatever answers hundreds of slow readers must not be what makes a good client wait.
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

SECONDS = 3
CONNECTIONS = 500
ATTACKS = {
    "slow heads": ["-H", "-i", "1"],
    # nginx takes the body of a request that it passes on, so these wait for as long as they like.
    "slow bodies": ["-B", "-i", "1", "-s", "100000"],
    "slow reads": ["-X", "-w", "1", "-y", "1", "-n", "1", "-z", "1", "-k", "1"],
}
SERVER = """
    root {directory};
    location = /good {{ return 200 "good"; }}
    location = /form {{ proxy_pass http://127.0.0.1:1; }}
"""


class TestAttacks:
    """TO-01, TO-02, TO-03: 500 connections at once, and one client that means it."""

    @pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
    async def test_do_not_stop_a_good_client(self, tmp_path: Path, attack: list[str]) -> None:
        assert SLOWHTTPTEST is not None
        (tmp_path / "attacked").write_bytes(bytes(10_000_000))
        with Nginx(tmp_path, SERVER.format(directory=tmp_path)) as nginx:
            starting = StandaloneProxy("--to", nginx.url)
            proxy = await asyncio.to_thread(starting.__enter__)
            rss = proxy.rss()
            attacker = await asyncio.create_subprocess_exec(
                *(SLOWHTTPTEST, *attack, "-c", str(CONNECTIONS), "-r", str(CONNECTIONS), "-l", str(SECONDS), "-p", "2"),
                *("-u", f"http://127.0.0.1:{proxy.port}/{'form' if '-B' in attack else 'attacked'}"),
                cwd=tmp_path,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                slowest, served = 0.0, 0
                while attacker.returncode is None:
                    started = monotonic()
                    async with await Downstream.connect(proxy.port) as good:
                        response = await good.exchange("GET", "/good")
                    assert (response.status, response.body) == (200, b"good")
                    slowest = max(slowest, monotonic() - started)
                    served += 1
                    await asyncio.sleep(0.02)
                more = (proxy.rss() - rss) / 2**20
                print(f"{served} served, slowest {slowest * 1000:.0f} ms, {more:.0f} MB more")
                assert served > SECONDS
                assert slowest < 4
                # What libcurl reads at a time (512 KiB) may wait in the pipe, and once more in what is written.
                # How much of that comes to be depends on how far the upstream gets ahead.
                assert more < CONNECTIONS * 2 * 0.5 + 50
            finally:
                if attacker.returncode is None:
                    attacker.kill()
                await attacker.wait()
                await asyncio.to_thread(proxy.signal, 9)
                await asyncio.to_thread(proxy.stop)
