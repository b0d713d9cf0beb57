"""Many requests for small things over HTTP/2, made by h2load: 4 connections with 32 streams each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark.candidate import Finder
from tests.benchmark.figures import Figures, percentile
from tests.benchmark.running import SMALL, Running, Unfit

CONNECTIONS, STREAMS = 4, 32
WARM_UP = 1
# Enough to see how fast a candidate is, and so how many requests take a second.
FIRST = 512
STALLED = 60


@dataclass(frozen=True, slots=True)
class Said:
    """What h2load wrote: requests a second, and milliseconds to the end of each answer."""

    rate: float
    took: list[float]


def requests(running: Running, seconds: int) -> Figures:
    """Ask for ``/``, with as many requests under way over HTTP/1.1 where the candidate is there for comparison."""
    rate = h2load(running, FIRST).rate
    rate = h2load(running, int(rate * WARM_UP)).rate
    with running.metered() as cost:
        said = h2load(running, int(rate * seconds))
    return {
        "rate": said.rate,
        "p50": percentile(said.took, 50),
        "p99": percentile(said.took, 99),
        "errors": 0,
        **cost.figures(len(said.took) / 1e6),
    }


def h2load(running: Running, count: int) -> Said:
    """Make so many requests, but at least one for each that may be under way.

    Not for so many seconds (``-D``): h2load 1.52 was seen to hang at the end of such a run when connections closed.
    """
    # Of fewer requests than connections it makes none.
    count = max(count, CONNECTIONS * STREAMS)
    if running.http2:
        under_way = ["-c", str(CONNECTIONS), "-m", str(STREAMS)]
    else:
        under_way = ["--h1", "-c", str(CONNECTIONS * STREAMS)]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = [Finder().program("h2load"), *under_way, "-n", str(count), f"--log-file={log}", f"{running.url}/"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STALLED)
        except subprocess.TimeoutExpired as error:
            raise Unfit(f"h2load: {count} requests were not answered in {STALLED} s") from error
        if done.returncode:
            raise Unfit(f"h2load: {' '.join((done.stdout + done.stderr).split())[-200:]}")
        return read(done.stdout, log.read_text(encoding="ascii"), "h2c" if running.http2 else "http/1.1", count)


def read(said: str, log: str, protocol: str, count: int) -> Said:
    """Return the figures; raise :class:`Unfit` unless this many were answered with 2xx, whole, in this protocol."""
    for wanted in (
        f"Application protocol: {protocol}\n",
        f" {count} succeeded, 0 failed, 0 errored, 0 timeout\n",
        f"status codes: {count} 2xx, ",
        f" ({count * SMALL}) data\n",
    ):
        if wanted not in said:
            seen = re.findall(r"^(?:Application protocol|requests|status codes|traffic):.*$", said, re.MULTILINE)
            raise Unfit(f"h2load did not say {wanted.strip()!r} but {'; '.join(seen)!r}")
    rate = re.search(r"^finished in .*, ([\d.]+) req/s", said, re.MULTILINE)
    if rate is None:
        raise Unfit("h2load did not say how fast it was")
    # Of each request: when it began, its status, and the microseconds to its end.
    return Said(float(rate[1]), [int(line.split("\t")[2]) / 1e3 for line in log.splitlines()])
