"""A candidate as running processes: on its own core, ready when it answers, and what it costs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmark.candidate import Candidate, Command, Place
from tests.support.process import CHECKOUT, free_port

PROXY_CORE, LOAD_CORE = 0, 1
START_TIMEOUT = 20.0
STOP_TIMEOUT = 5.0


class Unfit(Exception):
    """A candidate does not do what a scenario needs; the message says what came instead. Its figures mean nothing."""


@dataclass(slots=True)
class Running:
    """Where to send the load. ``upstream`` is the port behind it; ``process`` is ``None`` where there is no proxy."""

    port: int
    upstream: int
    process: psutil.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []

    def cpu(self) -> float:
        """Return the processor seconds used so far, user and system, of all processes."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def memory(self) -> int:
        """Return the bytes that would be free if it ended (USS): what the processes share with nobody."""
        return sum(process.memory_full_info().uss for process in self.processes())


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """What is started inside runs on this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def running(
    candidate: Candidate, upstream: int, *, core: int = PROXY_CORE, profile: str | None = None
) -> Iterator[Running]:
    """Run a candidate in front of the upstream on this port; a ``profile`` is written to that path when it ends."""
    if candidate.command is None:
        yield Running(upstream, upstream)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        place = Place(free_port(), upstream, directory)
        command = candidate.command(place)
        log = directory / "output"
        with log.open("wb") as output, pinned(core):
            process = subprocess.Popen(
                arguments(candidate, command, profile),
                cwd=CHECKOUT,
                env={**os.environ, **command.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until_it_listens(process, place.port, log)
            yield Running(place.port, upstream, psutil.Process(process.pid))
        finally:
            stop(process)


def arguments(candidate: Candidate, command: Command, profile: str | None) -> list[str]:
    if not candidate.python:
        return command.arguments
    profiler = ["-m", "cProfile", "-o", profile] if profile else []
    return [sys.executable, *profiler, *command.arguments]


def wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once connections to ``port`` succeed. Programs say this in as many ways as there are, or not at all."""
    until = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise Unfit(f"did not start: {said[-1] if said else 'it said nothing'}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started; what does not end by itself is killed."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=0.5)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
