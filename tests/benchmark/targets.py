"""What we want to be, in ratios that one run on one machine gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmark.figures import OTHERS, QUIET, Column
from tests.benchmark.ours import AIOHTTP, CONSTANT, LOOPS, MOUNTED, STANDALONE, on
from tests.benchmark.peers import NODE
from tests.benchmark.results import Results


@dataclass(frozen=True, slots=True)
class Target:
    """``figure`` is what was seen, ``None`` where it was not measured; ``of`` are the candidates that it is about.

    ``cost`` is the same ratio in processor time for each request, which suffers less where others have the core too.
    """

    text: str
    scenario: str
    of: tuple[str, ...]
    figure: Callable[[Results], float | None]
    bound: float
    at_least: bool = True
    cost: Callable[[Results], float | None] = lambda results: None

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    def verdict(self, results: Results) -> str:
        """Return yes or no, or that nobody can tell, because the machine was not ours."""
        figure = self.figure(results)
        if figure is None:
            return "not measured"
        met = figure >= self.bound if self.at_least else figure <= self.bound
        # Others can turn a ratio either way, but make no figure of one candidate better.
        doubtful = len(self.of) > 1 or not met
        if doubtful and any((results.figure(self.scenario, name, OTHERS) or 0) > QUIET for name in self.of):
            return "unclear"
        return "yes" if met else "no"


def faster(scenario: str, of: str, to: str, bound: float) -> Target:
    return Target(
        f"{scenario}: {of} / {to}",
        scenario,
        (of, to),
        lambda results: results.ratio(scenario, of, to, "rate"),
        bound,
        cost=lambda results: results.ratio(scenario, to, of, "cpu"),
    )


def sooner(scenario: str, of: str, to: str, bound: float) -> Target:
    def figure(results: Results) -> float | None:
        return results.ratio(scenario, of, to, "p99")

    return Target(f"{scenario}: p99 of {of} / {to}", scenario, (of, to), figure, bound, at_least=False)


def below(text: str, scenario: str, of: str, key: str, bound: float) -> Target:
    def figure(results: Results) -> float | None:
        return results.figure(scenario, of, Column(key, text))

    return Target(f"{scenario}: {text}, {of}", scenario, (of,), figure, bound, at_least=False)


def targets() -> list[Target]:
    """Return them all; each of Python's against what runs on the same event loop."""
    found: list[Target] = []
    for loop in LOOPS:
        standalone, mounted, aiohttp = on(STANDALONE, loop), on(MOUNTED, loop), on(AIOHTTP, loop)
        found += [
            faster("small", standalone, aiohttp, 1.6),
            faster("small", standalone, NODE, 1.0),
            faster("small", mounted, aiohttp, 1.0),
            faster("small", mounted, on(CONSTANT, loop), 0.6),
        ]
        for ours in (standalone, mounted):
            found += [
                sooner("small", ours, NODE, 1.0),
                faster("64k", ours, NODE, 1.0),
                faster("download", ours, aiohttp, 0.9),
                faster("upload", ours, aiohttp, 0.9),
                below("% of a core", "events", ours, "core", 5),
                below("kB for each stream", "events", ours, "each", 60),
                below("ms added to a chunk", "delay", ours, "added", 1),
            ]
    return found
