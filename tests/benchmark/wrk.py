"""Many requests for small things, made by wrk on 32 connections."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.benchmark.candidate import Finder
from tests.benchmark.figures import Figures
from tests.benchmark.running import Running, Unfit, check

SCRIPT = str(Path(__file__).with_name("load.lua"))
CONNECTIONS = 32
WARM_UP = 1


def requests(
    running: Running, seconds: int, path: str, length: int, *, method: str = "GET", sent: int = 0, close: bool = False
) -> Figures:
    """Ask for ``path`` (answered with ``length`` bytes), sending ``sent`` bytes; with ``close``, a connection each."""
    check(running.port, method, path, sent, length)

    def wrk(seconds: int) -> dict[str, float]:
        done = subprocess.run(
            [Finder().program("wrk"), "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", SCRIPT]
            + (["-H", "Connection: close"] if close else [])
            + [running.url + path, "--", method, str(sent)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Unfit(f"wrk: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if figures["refused"] or not figures["requests"]:
            raise Unfit(f"{method} {path}: {figures['refused']} of {figures['requests']} answers were errors")
        return figures

    wrk(WARM_UP)
    with running.metered() as cost:
        said = wrk(seconds)
    return {
        "rate": said["requests"] / said["seconds"],
        "p50": said["p50"],
        "p99": said["p99"],
        "errors": said["cut"],
        **cost.figures(said["requests"] / 1e6),
    }
