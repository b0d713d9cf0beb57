"""The report: Markdown that can also be read as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.benchmark.figures import Column
from tests.benchmark.ours import AIOHTTP, on
from tests.benchmark.peers import NODE
from tests.benchmark.results import Results
from tests.benchmark.scenarios import SCENARIOS, Scenario
from tests.benchmark.targets import targets

BEGIN, END = "<!-- figures: python -m tests.benchmark --write -->", "<!-- end of figures -->"

# What every table gives ratios to.
BASELINES = {"to aiohttp": on(AIOHTTP, "asyncio"), "to node": NODE}


def put(path: Path, text: str) -> None:
    """Write the report to a file; where the file has the two marks, only what stands between them is replaced."""
    if path.exists():
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if begin and end:
            text = f"{before}{BEGIN}\n\n{text}\n{END}{after}"
    path.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up; all but the first are figures, to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {first[0]:{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in rest) + " |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "|".join(f"{'-' * (width + 1)}:" for width in widths[1:]) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def write(results: Results, about: Sequence[str]) -> str:
    """Return the whole report; ``about`` are lines on the machine and the run."""
    parts = ["\n".join(f"- {line}" for line in about), "### Targets", targets_table(results)]
    for name in results.runs:
        scenario = SCENARIOS[name]
        parts += [f"### {name}: {scenario.about}", scenario_table(results, scenario), *notes(results, scenario)]
    return "\n\n".join(parts) + "\n"


def targets_table(results: Results) -> str:
    rows = []
    for target in targets():
        figure = target.figure(results)
        if figure is not None:
            cost = ratio(target.cost(results))
            rows.append([target.text, target.wanted, f"{figure:.2f}", target.verdict(results), cost])
    return table(["target", "wanted", "seen", "met", "by cpu"], rows) if rows else "None of them was measured."


def scenario_table(results: Results, scenario: Scenario) -> str:
    first, *others = scenario.columns
    measured = results.runs[scenario.name]
    ratios = {title: name for title, name in BASELINES.items() if results.values(scenario.name, name, first.key)}
    if not ratios:
        # There is no figure without a ratio.
        ratios = dict(zip(["to the first"], measured, strict=False))
    rows = []
    for name in measured:
        values = results.values(scenario.name, name, first.key)
        if not values:
            continue
        rows.append(
            [name, cell(results, scenario, name, first)]
            + [ratio(results.ratio(scenario.name, name, baseline, first.key)) for baseline in ratios.values()]
            + [cell(results, scenario, name, column) for column in others]
            + [" ".join(first.text(value) for value in values)]
        )
    head = ["", first.title, *ratios, *(column.title for column in others), "rounds"]
    return table(head, rows) if rows else "Nothing could be measured."


def cell(results: Results, scenario: Scenario, name: str, column: Column) -> str:
    return column.text(results.figure(scenario.name, name, column))


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def notes(results: Results, scenario: Scenario) -> list[str]:
    said = [f"- {name}: {note}" for (where, name), note in results.notes.items() if where == scenario.name]
    return ["\n".join(["Not measured:", "", *said])] if said else []
