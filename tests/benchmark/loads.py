"""Load that must leave the standalone proxy as it was: LD-01, LD-02, LD-05 and LD-09 of the scenarios.

    python -m tests.benchmark.loads [SECONDS]

Prints a line for each, and exits 1 if one does not hold. A minute each by default. Needs nginx, wrk and h2load.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

from tests.real.nginx import NGINX, Nginx
from tests.support.process import StandaloneProxy, free_port

MIB = 1 << 20
PAGE = f"location / {{ default_type text/plain; return 200 '{'x' * 1024}'; }}"
STATUS = "location /status { stub_status; }"


@contextlib.contextmanager
def upstream(server: str) -> Iterator[Nginx]:
    with tempfile.TemporaryDirectory() as directory, Nginx(Path(directory), server) as nginx:
        yield nginx


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wrk(url: str, seconds: int, *more: str) -> tuple[int, str]:
    """Return how many requests were answered, and what wrk said."""
    said = run("wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", *more, url)
    found = re.search(r"(\d+) requests in", said)
    assert found, said
    return int(found[1]), said


def failures(said: str) -> str:
    return " ".join(line.strip() for line in said.splitlines() if "Non-2xx" in line or "Socket errors" in line)


def small_requests(seconds: int) -> tuple[bool, str]:
    """LD-01: every answer is good, and memory is what it was."""
    with upstream(PAGE) as nginx, StandaloneProxy("--to", nginx.url) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/"
        wrk(url, 3)
        before = proxy.rss()
        count, said = wrk(url, seconds)
        grown = (proxy.rss() - before) / MIB
    p99 = re.search(r"99%\s+(\S+)", said)
    bad = failures(said)
    return not bad and grown < 5, f"{count} requests, p99 {p99[1] if p99 else '?'}, RSS {grown:+.1f} MiB {bad}"


def many_connections(seconds: int) -> tuple[bool, str]:
    """LD-02: an independent client sees none of 100,000 fail."""
    total = min(100_000, 2000 * seconds)
    with upstream(PAGE) as nginx, StandaloneProxy("--to", nginx.url) as proxy:
        said = run("h2load", "--h1", "-c", "200", "-n", str(total), f"http://127.0.0.1:{proxy.port}/")
    line = next(line for line in said.splitlines() if line.startswith("requests:"))
    return f"{total} succeeded, 0 failed, 0 errored, 0 timeout" in line, line


def churn(seconds: int) -> tuple[bool, str]:
    """LD-05: downstreams come and go with each request, upstream connections stay."""
    with upstream(PAGE + STATUS) as nginx, StandaloneProxy("--to", nginx.url) as proxy:
        count, said = wrk(f"http://127.0.0.1:{proxy.port}/", seconds, "-H", "Connection: close")
        with urlopen(f"{nginx.url}/status") as answer:
            accepted = int(answer.read().split()[7])
    reused = 1 - accepted / count
    bad = failures(said)
    return (
        not bad and reused > 0.95,
        f"{count / seconds:.0f} connections/s, {100 * reused:.1f} % of requests reused {bad}",
    )


def nothing_but_errors(seconds: int) -> tuple[bool, str]:
    """LD-09: an upstream that is not there costs little and says little."""
    with StandaloneProxy("--to", f"http://127.0.0.1:{free_port()}") as proxy:
        url = f"http://127.0.0.1:{proxy.port}/"
        wrk(url, 2)
        before, logged = proxy.rss(), len(proxy.output)
        count, said = wrk(url, seconds)
        grown, bytes_each = (proxy.rss() - before) / MIB, (len(proxy.output) - logged) / count
    all_bad = f"Non-2xx or 3xx responses: {count}" in said and "Socket errors" not in said
    good = all_bad and grown < 5 and bytes_each < 300
    return (
        good,
        f"{count / seconds:.0f} answers of 502 a second, {bytes_each:.0f} bytes of log each, RSS {grown:+.1f} MiB",
    )


SCENARIOS: dict[str, Callable[[int], tuple[bool, str]]] = {
    "LD-01": small_requests,
    "LD-02": many_connections,
    "LD-05": churn,
    "LD-09": nothing_but_errors,
}


def main() -> None:
    missing = [name for name in ("wrk", "h2load") if shutil.which(name) is None] + ([] if NGINX else ["nginx"])
    if missing:
        sys.exit(f"skipped: {', '.join(missing)} not installed")
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    failed = False
    for name, scenario in SCENARIOS.items():
        good, figures = scenario(seconds)
        failed |= not good
        print(f"{name} {'ok    ' if good else 'FAILED'} {figures}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
