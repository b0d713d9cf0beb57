"""Where the time of a candidate goes: by cProfile, which counts every call, or by py-spy, which distorts less."""

from __future__ import annotations

import contextlib
import io
import pstats
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.benchmark.candidate import Candidate, Finder
from tests.benchmark.figures import Figures
from tests.benchmark.running import Unfit, running
from tests.benchmark.scenarios import Scenario

LINES = 40
SAMPLES_A_SECOND = 400


def profile(candidate: Candidate, scenario: Scenario, upstream: int, seconds: int) -> str:
    """Run a scenario under cProfile and return the functions that took longest, cumulated and by themselves."""
    text = io.StringIO()
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "profile")
        with running(candidate, upstream, profile=path) as proxy:
            figures = scenario.measure(proxy, seconds)
        stats = pstats.Stats(path, stream=text).strip_dirs()
    for order in ("cumulative", "tottime"):
        stats.sort_stats(order).print_stats(LINES)
    return f"{heading(candidate, scenario, figures)}, under cProfile\n{text.getvalue()}"


def sample(candidate: Candidate, scenario: Scenario, upstream: int, seconds: int, find: Finder) -> str:
    """Run a scenario while py-spy looks on and return the functions that were seen most."""
    with tempfile.TemporaryDirectory() as directory, running(candidate, upstream) as proxy:
        assert proxy.process
        path = Path(directory) / "stacks"
        with watched(find.program("py-spy"), proxy.process.pid, path):
            figures = scenario.measure(proxy, seconds)
        stacks = path.read_text(encoding="utf-8")
    return f"{heading(candidate, scenario, figures)}, sampled\n\n{by_function(stacks)}"


def heading(candidate: Candidate, scenario: Scenario, figures: Figures) -> str:
    said = ", ".join(f"{column.title} {column.text(figures.get(column.key))}" for column in scenario.columns)
    return f"{candidate.name}, {scenario.name}: {said}"


@contextlib.contextmanager
def watched(py_spy: str, pid: int, path: Path) -> Iterator[None]:
    """Sample a process; the stacks are in ``path`` at the end."""
    command = [py_spy, "record", "--pid", str(pid), "--function", "--rate", str(SAMPLES_A_SECOND)]
    command += ["--format", "raw", "--output", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spy:
        try:
            yield
        finally:
            # It writes what it has.
            spy.send_signal(signal.SIGINT)
            said, _ = spy.communicate(timeout=30)
    if not path.exists():
        raise Unfit(f"py-spy wrote nothing: {said.strip()}")


def by_function(stacks: str) -> str:
    """Return a table from py-spy's raw format: in which share of the samples a function ran, or was above one."""
    itself: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        itself[frames[-1]] += int(count)
        # Once for each stack, however often it calls itself.
        for frame in set(frames):
            within[frame] += int(count)
    files: Counter[str] = Counter()
    for name, times in itself.items():
        files[name.rpartition("(")[2].rstrip(")")] += times
    total = sum(itself.values())
    lines = [f"{total} samples at {SAMPLES_A_SECOND} a second", ""]
    for title, counted in (("by itself", itself), ("with what it calls", within)):
        lines.append(f"{'self %':>7} {'cumulated %':>12}   function, {title}")
        for name, _ in counted.most_common(LINES):
            lines.append(f"{100 * itself[name] / total:7.1f} {100 * within[name] / total:12.1f}   {name}")
        lines.append("")
    lines.append(f"{'self %':>7}   file")
    lines += [f"{100 * times / total:7.1f}   {name}" for name, times in files.most_common(LINES)]
    return "\n".join(lines)
