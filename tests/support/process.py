"""The standalone proxy as a subprocess, and what it costs: memory, file descriptors, processor time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]


class StandaloneProxy:
    """``python -m tornado_proxy``, started on entry, terminated on exit.

    ::

        with StandaloneProxy("--to", upstream.url) as proxy:
            ... proxy.port, proxy.pid, proxy.rss(), proxy.fds(), proxy.cpu()

    ``under`` are the words of a command that becomes the program that follows it, such as nice or unshare.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        under: Sequence[str] = (),
        start_timeout: float = 15.0,
    ) -> None:
        self._under = under
        self._arguments = [argument if isinstance(argument, str) else str(argument) for argument in arguments]
        self._env = env or {}
        self._start_timeout = start_timeout
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False

    def __enter__(self) -> Self:
        arguments = list(self._arguments)
        if "--listen" not in arguments:
            arguments += ["--listen", f"127.0.0.1:{free_port()}"]
        if "--access-log" not in arguments:
            arguments += ["--access-log", "off"]
        self.process = subprocess.Popen(
            [*self._under, sys.executable, "-m", "tornado_proxy", *arguments],
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()
        try:
            line = self.wait_for_line(r"listening on ", self._start_timeout)
        except BaseException:
            self.stop()
            raise
        found = re.search(r"listening on https?://\S*:(\d+)", line)
        self.port = int(found[1]) if found else 0  # 0: it listens on a unix socket
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What it said

    @property
    def output(self) -> str:
        """Everything that it has written so far, stdout and stderr."""
        with self._more:
            return "".join(self._lines)

    def wait_for_line(self, pattern: str, timeout: float = 5.0) -> str:
        """Return the first line of output that `pattern` is found in, waiting for it."""

        def found() -> str | None:
            return next((line for line in self._lines if re.search(pattern, line)), None)

        with self._more:
            self._more.wait_for(lambda: found() or self._ended, timeout)
            line = found()
        assert line, f"the standalone proxy did not write {pattern!r} (exit code {self.process.poll()}):\n{self.output}"
        return line

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                with self._more:
                    self._lines.append(line)
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    # What it costs, worker processes included

    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(self._sum(lambda process: process.memory_info().rss))

    def fds(self) -> int:
        """Open file descriptors."""
        return int(self._sum(lambda process: process.num_fds()))

    def cpu(self) -> float:
        """Processor seconds used so far, user and system."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def _sum(self, measure: Callable[[psutil.Process], float]) -> float:
        process = psutil.Process(self.pid)
        return sum(measure(each) for each in [process, *process.children(recursive=True)])

    # The end

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Return the exit code, waiting for the end."""
        return self.process.wait(timeout)

    def stop(self, timeout: float = 10.0) -> int:
        """Terminate, kill what does not end within `timeout`, and return the exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(timeout)
        return self.process.returncode


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
