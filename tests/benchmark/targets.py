"""What we want to be, in ratios that one run on one machine gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmark.ours import AIOHTTP, CONSTANT, LOOPS, MOUNTED, STANDALONE, on
from tests.benchmark.peers import NODE
from tests.benchmark.results import Results


@dataclass(frozen=True, slots=True)
class Target:
    """``figure`` is what was seen, ``None`` where it was not measured."""

    text: str
    figure: Callable[[Results], float | None]
    bound: float
    at_least: bool = True

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    def verdict(self, figure: float | None) -> str:
        if figure is None:
            return "not measured"
        return "yes" if (figure >= self.bound if self.at_least else figure <= self.bound) else "no"


def ratio(scenario: str, of: str, to: str, bound: float, *, key: str = "rate", at_least: bool = True) -> Target:
    what = "" if key == "rate" else f"{key} of "
    return Target(
        f"{scenario}: {what}{of} / {to}", lambda results: results.ratio(scenario, of, to, key), bound, at_least
    )


def targets() -> list[Target]:
    found: list[Target] = []
    for loop in LOOPS:
        # Each against what runs on the same event loop.
        standalone, mounted, aiohttp = on(STANDALONE, loop), on(MOUNTED, loop), on(AIOHTTP, loop)
        found += [
            ratio("small", standalone, aiohttp, 1.6),
            ratio("small", standalone, NODE, 1.0),
            ratio("small", standalone, NODE, 1.0, key="p99", at_least=False),
            ratio("small", mounted, aiohttp, 1.0),
            ratio("small", mounted, on(CONSTANT, loop), 0.6),
            ratio("64k", standalone, NODE, 1.0),
            ratio("download", standalone, aiohttp, 0.9),
            ratio("upload", standalone, aiohttp, 0.9),
        ]
    return found
