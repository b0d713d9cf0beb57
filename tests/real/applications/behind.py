"""What stands behind the browser: a proxy with one mount, and a program of its own behind that."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.real.chromium import CHROMIUM, Chromium
from tests.support.process import free_port
from tests.support.proxy import ProxyFactory, RunningProxy
from tests.support.wire import within
from tornado_proxy import Outcome, ProxyHandler

# Such a program loads much before it listens.
START_TIMEOUT = 90.0
# A name that browsers resolve to this machine, and that no application takes for its own: as a public one would be.
HOST = "apps.localhost"


def needs(command: str) -> list[pytest.MarkDecorator]:
    """Return the marks of tests of the application that ``command`` starts."""
    return [
        pytest.mark.slow,
        pytest.mark.skipif(not os.environ.get("TORNADO_PROXY_APPS"), reason="slow: runs with TORNADO_PROXY_APPS=1"),
        pytest.mark.skipif(shutil.which(command) is None, reason=f"{command} is not installed"),
        pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    ]


class Behind:
    """One application behind one proxy.

    ::

        upstream = await behind.start("streamlit", "run", "page.py", "--server.port={port}")
        url = await behind.mount("/app", f"{upstream}/app")
        await behind.page.open(f"{url}/")
    """

    page: Chromium

    def __init__(self, directory: Path, proxy: ProxyFactory) -> None:
        self.directory = directory / "application"
        self.directory.mkdir()
        self._proxy = proxy
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: RunningProxy | None = None
        # Whether the application uses any.
        self.websockets = True
        # Of each tunnel that has ended: its path, and how.
        self.tunnels: list[tuple[str, Outcome]] = []

    async def start(self, command: str, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Run a program in :attr:`directory` and return its URL, once it listens. ``{port}`` stands for its port."""
        program = shutil.which(command)
        assert program is not None
        port = free_port()
        settings = {name: value.replace("{port}", str(port)) for name, value in (env or {}).items()}
        log = self.directory.parent / f"{command}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, *(argument.replace("{port}", str(port)) for argument in arguments)],
                cwd=self.directory,
                # Its settings are nobody's but its own.
                env={**os.environ, "HOME": str(self.directory.parent), **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        await within(self._listens(process, port, log), f"{command}'s start", START_TIMEOUT)
        return f"http://127.0.0.1:{port}"

    async def _listens(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        while True:
            assert process.poll() is None, f"it ended: {log.read_text(errors='replace')}"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return

    async def mount(self, prefix: str, upstream: str, **options: Any) -> str:
        """Start the proxy and return the URL of ``prefix``, as a browser sees it."""
        self._running = await self._proxy(upstream, prefix=prefix, on_done=self._record, **options)
        return f"http://{HOST}:{self._running.port}{prefix}"

    def _record(self, handler: ProxyHandler, outcome: Outcome) -> None:
        if outcome.status == 101:
            self.tunnels.append((handler.request.path, outcome))

    async def check_tunnels(self) -> None:
        """Fail unless bytes passed both ways through a tunnel, where one is used, and the upstream broke none."""
        assert self._running is not None
        await self._running.stop()
        used = any(outcome.bytes_up and outcome.bytes_down for _, outcome in self.tunnels)
        assert used == self.websockets, self.tunnels
        assert [(path, outcome.error) for path, outcome in self.tunnels if outcome.side == "upstream"] == []

    async def stop(self) -> None:
        """End the program, and what it has started and left."""
        for process in self._processes:
            if process.poll() is not None:
                continue
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
            _, left = await asyncio.to_thread(psutil.wait_procs, children, 5)
            for child in left:
                child.kill()
