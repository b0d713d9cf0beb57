"""What is measured: for each scenario the load, the upstream that it needs, and the columns of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tests.benchmark import h2load, messages, streams, transfers, wrk
from tests.benchmark.figures import CORE, CPU, ERRORS, OTHERS, P50, P99, RATE, Column, Figures
from tests.benchmark.running import SMALL, Running
from tests.benchmark.upstreams import LARGE, MEDIUM

HTTP = (RATE, CPU, CORE, OTHERS, P50, P99, ERRORS)
TRANSFER = (
    Column("rate", "MB/s"),
    Column("seconds", "seconds", 3),
    Column("slowest", "slowest s", 3),
    Column("cpu", "cpu s", 3),
    CORE,
    OTHERS,
)

EVENTS = (
    Column("core", "cpu %", 2),
    Column("each", "kB for each", 1),
    Column("idle", "MB when idle", 1),
    OTHERS,
    ERRORS,
)
DELAY = (
    Column("added", "added ms", 3),
    Column("added p99", "added p99 ms", 3),
    Column("direct", "directly ms", 3),
    Column("direct p99", "directly p99 ms", 3),
    OTHERS,
)


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
    # A run is long and an average in itself.
    once: bool = False
    # What is asked for makes no sense without a proxy.
    proxied: bool = False
    # Only the candidates that are there for it take part.
    own: bool = False


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
        Scenario(
            "post",
            f"POST of {SMALL} bytes, answered with as many, {wrk.CONNECTIONS} connections kept alive",
            partial(wrk.requests, path="/", length=SMALL, method="POST", sent=SMALL),
            HTTP,
        ),
        Scenario(
            "churn",
            f"GET of {SMALL} bytes, each on a new connection, {wrk.CONNECTIONS} at a time",
            partial(wrk.requests, path="/", length=SMALL, close=True),
            HTTP,
        ),
        Scenario(
            "http2",
            f"GET of {SMALL} bytes over HTTP/2, {h2load.CONNECTIONS} connections with {h2load.STREAMS} streams each",
            h2load.requests,
            HTTP,
            for_all=True,
            own=True,
        ),
        Scenario(
            "websocket",
            f"messages of {messages.SIZE} bytes and back, {messages.CONNECTIONS} websockets, one at a time on each",
            messages.echo,
            (Column("rate", "messages/s"), CPU, CORE, OTHERS, P50, P99),
            upstream="live",
        ),
        Scenario(
            "events",
            f"{streams.STREAMS} server-sent event streams, an event a second on each (less is better)",
            streams.events,
            EVENTS,
            upstream="live",
            once=True,
            proxied=True,
        ),
        Scenario(
            "delay",
            "how much later a chunk arrives than without the proxy, one stream, 200 chunks a second (less is better)",
            streams.delay,
            DELAY,
            upstream="live",
            proxied=True,
        ),
    )
}
