"""A candidate as running processes: on its own core, ready when it answers, and what it costs."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pycurl

from tests.benchmark.candidate import Candidate, Command, Place
from tests.benchmark.company import taken_by_others, used
from tests.benchmark.figures import Figures
from tests.support.process import CHECKOUT, free_port

PROXY_CORE, LOAD_CORE = 0, 1
# What each upstream answers to GET /.
SMALL = 1024
START_TIMEOUT = 20.0
STOP_TIMEOUT = 5.0


class Unfit(Exception):
    """A candidate does not do what a scenario needs; the message says what came instead. Its figures mean nothing."""


@dataclass(slots=True)
class Cost:
    """Seconds: of the clock, of the proxy's processor time, and of that which strangers took of the two cores."""

    seconds: float = 0.0
    cpu: float | None = None  # where there is a proxy
    others: float = 0.0

    def figures(self, count: float) -> Figures:
        """Return what one of ``count`` cost, and in per cent of a core what the proxy and what others took."""
        figures = {"others": max(0.0, 100 * self.others / self.seconds)}
        if self.cpu is not None:
            figures |= {"cpu": self.cpu / count, "core": 100 * self.cpu / self.seconds}
        return figures


@dataclass(slots=True)
class Running:
    """Where to send the load. ``upstream`` is the port behind it; ``process`` is ``None`` where there is no proxy."""

    port: int
    upstream: int
    process: psutil.Process | None = None
    http2: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []

    def cpu(self) -> float:
        """Return the processor seconds used so far, user and system, of all processes."""
        return used(self.processes())

    @contextlib.contextmanager
    def metered(self) -> Iterator[Cost]:
        """What is done inside is put down in the cost that is yielded, which is known at the end."""
        cost = Cost()
        others, before, started = taken_by_others((PROXY_CORE, LOAD_CORE)), self.cpu(), time.monotonic()
        yield cost
        cost.seconds = time.monotonic() - started
        cost.cpu = self.cpu() - before if self.process else None
        cost.others = taken_by_others((PROXY_CORE, LOAD_CORE)) - others

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
            wait_until_it_answers(process, place.port, log, candidate.http2)
            yield Running(place.port, upstream, psutil.Process(process.pid), candidate.http2)
        except psutil.NoSuchProcess as error:
            raise Unfit(f"it ended by itself: {last_words(log)}") from error
        finally:
            stop(process)


def arguments(candidate: Candidate, command: Command, profile: str | None) -> list[str]:
    if not candidate.python:
        return command.arguments
    profiler = ["-m", "tests.benchmark.profiled", profile] if profile else []
    return [sys.executable, *profiler, *command.arguments]


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path, http2: bool) -> None:
    """Return once a request is answered as the upstream would. Some listen before they know where to forward."""
    until = time.monotonic() + START_TIMEOUT
    wrong = ""
    while process.poll() is None and time.monotonic() < until:
        try:
            if http2:
                check_http2(port, "/", SMALL)
            else:
                check(port, "GET", "/", 0, SMALL)
        except Unfit as unfit:
            wrong = str(unfit)
            time.sleep(0.02)
        else:
            return
    raise Unfit(f"did not start: {last_words(log) or wrong}")


def last_words(log: Path) -> str:
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1] if said else ""


def check(port: int, method: str, path: str, sent: int, length: int) -> None:
    """Raise :class:`Unfit` unless one request is answered with 200 and a body of this length."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, b"x" * sent if sent else None)
        answer = connection.getresponse()
        got = len(answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise Unfit(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()
    if (answer.status, got) != (200, length):
        raise Unfit(f"{method} {path}: {answer.status} with {got} bytes in place of {length}")


def check_http2(port: int, path: str, length: int) -> None:
    """Raise :class:`Unfit` unless a GET over HTTP/2, with prior knowledge, is answered with 200 and this length."""
    body = io.BytesIO()
    curl = pycurl.Curl()
    try:
        curl.setopt(pycurl.URL, f"http://127.0.0.1:{port}{path}")
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE)
        curl.setopt(pycurl.PROXY, "")
        curl.setopt(pycurl.TIMEOUT, 10)
        curl.setopt(pycurl.WRITEDATA, body)
        curl.perform()
        status, spoken = curl.getinfo(pycurl.RESPONSE_CODE), curl.getinfo(pycurl.INFO_HTTP_VERSION)
    except pycurl.error as error:
        raise Unfit(f"GET {path} over HTTP/2: {error}") from error
    finally:
        curl.close()
    got = len(body.getvalue())
    if (spoken, status, got) != (pycurl.CURL_HTTP_VERSION_2_0, 200, length):
        raise Unfit(f"GET {path} over HTTP/2: {status} with {got} bytes in place of {length}")


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
