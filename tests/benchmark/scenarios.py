"""What is measured: for each scenario the load, the upstream that it needs, and the columns of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tests.benchmark import transfers, wrk
from tests.benchmark.figures import CPU, ERRORS, P50, P99, RATE, Column, Figures
from tests.benchmark.running import Running
from tests.benchmark.upstreams import LARGE, MEDIUM, SMALL

HTTP = (RATE, CPU, P50, P99, ERRORS)
TRANSFER = (Column("rate", "MB/s"), Column("seconds", "seconds", 3), Column("cpu", "cpu s", 3))


@dataclass(frozen=True, slots=True)
class Scenario:
    """``measure`` gets the candidate and how many seconds to spend. Ratios are of the first column."""

    name: str
    about: str
    measure: Callable[[Running, int], Figures]
    columns: tuple[Column, ...]
    upstream: Literal["nginx", "live"] = "nginx"
    # Every candidate takes part, not only those that do everywhere.
    for_all: bool = False


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "small",
            f"GET of {SMALL} bytes, {wrk.CONNECTIONS} connections kept alive",
            partial(wrk.requests, path="/", length=SMALL),
            HTTP,
            for_all=True,
        ),
        Scenario(
            "64k",
            f"GET of {MEDIUM} bytes, {wrk.CONNECTIONS} connections kept alive",
            partial(wrk.requests, path="/files/medium", length=MEDIUM),
            HTTP,
        ),
        Scenario("download", f"GET of {LARGE} bytes, one at a time", transfers.download, TRANSFER),
        Scenario("upload", f"PUT of {LARGE} bytes, one at a time", transfers.upload, TRANSFER, upstream="live"),
    )
}
