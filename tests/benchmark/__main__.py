"""``python -m tests.benchmark``: requests a second of our proxy and of others, on one core each. See README.md."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import pstats
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from tests.real.nginx import NGINX, Nginx
from tests.support.process import CHECKOUT, free_port

PROXY_CORE, LOAD_CORE = 0, 1

UPSTREAM = f"keepalive_timeout 600; location / {{ default_type text/plain; return 200 '{'x' * 1024}'; }}"

STANDALONE = ["tornado_proxy", "--to", "{upstream}", "--listen", "127.0.0.1:{port}", "--access-log", "off"]
CANDIDATES = "tests.benchmark.candidates"
BASELINE = "plain handler, buffers"
MOUNTED = "ours, mounted"


@dataclass(slots=True)
class Figures:
    """What one run of wrk said: latencies in milliseconds, ``cpu`` in microseconds of the proxy for each request."""

    rate: float
    cpu: float
    p50: float
    p99: float
    errors: int  # of connections: refused, cut, timed out


def commands() -> dict[str, list[str]]:
    """Return what is compared: a name and the arguments after ``python -m``."""
    found = {"ours, standalone, asyncio": [*STANDALONE, "--loop", "asyncio"]}
    if importlib.util.find_spec("uvloop"):
        found["ours, standalone, uvloop"] = [*STANDALONE, "--loop", "uvloop"]
    found[MOUNTED] = [f"{CANDIDATES}.mounted", "{upstream}", "{port}"]
    found["ours, mounted, our server"] = [f"{CANDIDATES}.mounted_on_our_server", "{upstream}", "{port}"]
    found[BASELINE] = [f"{CANDIDATES}.buffering", "{upstream}", "{port}"]
    if importlib.util.find_spec("aiohttp"):
        found["aiohttp handler, streams"] = [f"{CANDIDATES}.aiohttp_streaming", "{upstream}", "{port}"]
    return found


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
def running(arguments: list[str], upstream: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a candidate and yield its URL and its process."""
    port = free_port()
    command = [sys.executable, "-m", *(argument.format(upstream=upstream, port=port) for argument in arguments)]
    with pinned(PROXY_CORE):
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if "listening" not in process.stdout.readline():
            sys.exit(f"{' '.join(command)} did not start")
        yield f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def load(wrk: str, url: str, process: psutil.Process, seconds: int) -> Figures:
    """Ask ``process`` for ``url`` from 32 connections."""
    before = process.cpu_times()
    with pinned(LOAD_CORE):
        done = subprocess.run(
            [wrk, "-t1", "-c32", f"-d{seconds}s", "--latency", url], capture_output=True, text=True, check=True
        )
    refused = re.search(r"Non-2xx.*", done.stdout)
    if refused:
        sys.exit(f"the figures mean nothing: {refused[0]}")
    after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    count = re.search(r"(\d+) requests in", done.stdout)
    errors = re.search(r"Socket errors: (.*)", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert rate, done.stdout
    assert count, done.stdout
    cut = sum(map(int, re.findall(r"\d+", errors[1]))) if errors else 0
    cpu = 1e6 * spent / int(count[1])
    return Figures(float(rate[1]), cpu, percentile(done.stdout, 50), percentile(done.stdout, 99), cut)


def percentile(text: str, which: int) -> float:
    found = re.search(rf"^\s+{which}%\s+([\d.]+)(us|ms|s)$", text, re.MULTILINE)
    assert found, text
    return float(found[1]) * {"us": 0.001, "ms": 1, "s": 1000}[found[2]]


def compare(wrk: str, upstream: str, rounds: int, seconds: int) -> None:
    candidates = commands()
    figures: dict[str, list[Figures]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, arguments in candidates.items():
            with running(arguments, upstream) as (url, process):
                load(wrk, url, process, 1)
                figures[name].append(load(wrk, url, process, seconds))
            print(f"round {number + 1}: {name}: {figures[name][-1].rate:.0f}/s", file=sys.stderr)
    medians = {name: statistics.median(each.rate for each in runs) for name, runs in figures.items()}
    print(f"{'':28}{'requests/s':>12}{'ratio':>8}{'cpu us':>9}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}   rounds")
    for name, runs in figures.items():
        p50 = statistics.median(each.p50 for each in runs)
        p99 = statistics.median(each.p99 for each in runs)
        errors = sum(each.errors for each in runs)
        ratio = medians[name] / medians[BASELINE]
        each = " ".join(f"{run.rate:.0f}" for run in runs)
        cpu = statistics.median(each.cpu for each in runs)
        print(f"{name:28}{medians[name]:12.0f}{ratio:8.2f}{cpu:9.0f}{p50:9.2f}{p99:9.2f}{errors:8}   {each}")


def profile(wrk: str, upstream: str, seconds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "profile")
        with running([*commands()[MOUNTED], path], upstream) as (url, process):
            figures = load(wrk, url, process, seconds)
        print(f"{MOUNTED}, under cProfile: {figures.rate:.0f} requests/s, about {figures.rate * seconds:.0f} requests")
        stats = pstats.Stats(path).strip_dirs()
        for order in ("cumulative", "tottime"):
            stats.sort_stats(order).print_stats(40)


def versions() -> str:
    names = ["tornado", "pycurl", "uvloop", "aiohttp"]
    said = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            said.append(f"{name} {version(name)}")
    assert NGINX is not None
    nginx = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=True).stderr
    said.append(nginx.strip().removeprefix("nginx version: "))
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate, in turn (3)")
    parser.add_argument("--seconds", type=int, default=5, help="length of each run (5)")
    parser.add_argument("--profile", action="store_true", help="instead: profile ours, mounted, and print the top 40")
    args = parser.parse_args()
    wrk = shutil.which("wrk")
    if wrk is None:
        sys.exit("skipped: wrk makes the load and is not installed (Debian: apt-get install wrk)")
    if NGINX is None:
        sys.exit("skipped: nginx is the upstream and is not installed (Debian: apt-get install nginx-light)")
    if not {PROXY_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        sys.exit("skipped: cores 0 and 1 are not both ours; one is for the proxy, one for load and upstream")
    print(versions(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        with pinned(LOAD_CORE):
            nginx = Nginx(Path(directory), UPSTREAM).__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(nginx)
            if args.profile:
                profile(wrk, nginx.url, args.seconds)
            else:
                compare(wrk, nginx.url, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
