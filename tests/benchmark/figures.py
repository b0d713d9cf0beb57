"""What a run says: names of figures, and how each is written."""

from __future__ import annotations

from dataclasses import dataclass

# One run of one candidate: the name of a column -> what was measured. A figure that does not apply is left out.
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    title: str
    digits: int = 0
    # Over the rounds: the median, or for what must not happen the sum.
    summed: bool = False

    def text(self, value: float | None) -> str:
        return "" if value is None else f"{value:.{self.digits}f}"


RATE = Column("rate", "requests/s")
CPU = Column("cpu", "cpu us")
# How much of its core the proxy took. Less than nearly all: something else was the limit, or had the core.
CORE = Column("core", "core %")
# How much of a core was taken by what is no part of this. Then the rest means little.
OTHERS = Column("others", "others %")
QUIET = 10
P50 = Column("p50", "p50 ms", 2)
P99 = Column("p99", "p99 ms", 2)
ERRORS = Column("errors", "errors", summed=True)


def percentile(values: list[float], which: int) -> float:
    """Return the value that this many per cent are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * which // 100) - 1)]
