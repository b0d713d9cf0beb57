"""All that was measured, and what is read from it: medians over the rounds, medians of the ratios in each round."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from tests.benchmark.figures import Column, Figures


@dataclass(slots=True)
class Results:
    """``runs``: scenario -> candidate -> figures of each round. ``notes``: why a candidate has none, or no more."""

    runs: dict[str, defaultdict[str, list[Figures]]] = field(default_factory=dict)
    notes: dict[tuple[str, str], str] = field(default_factory=dict)

    def values(self, scenario: str, candidate: str, key: str) -> list[float]:
        """Return a figure of each round; nothing where it was not measured, or not to the end."""
        if (scenario, candidate) in self.notes or scenario not in self.runs:
            return []
        return [figures[key] for figures in self.runs[scenario].get(candidate, ()) if key in figures]

    def figure(self, scenario: str, candidate: str, column: Column) -> float | None:
        values = self.values(scenario, candidate, column.key)
        if not values:
            return None
        return sum(values) if column.summed else statistics.median(values)

    def ratio(self, scenario: str, of: str, to: str, key: str) -> float | None:
        """Return the median of the ratios that the rounds gave, each between runs that came soon after each other."""
        pairs = zip(self.values(scenario, of, key), self.values(scenario, to, key), strict=False)
        ratios = [one / other for one, other in pairs if other]
        return statistics.median(ratios) if ratios else None
