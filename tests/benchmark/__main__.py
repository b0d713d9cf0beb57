"""``python -m tests.benchmark``: our proxy beside others, on one core each. See README.md."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.benchmark import machine, profiling, report
from tests.benchmark.candidate import Absent, Candidate, Finder
from tests.benchmark.figures import OTHERS, QUIET, Figures
from tests.benchmark.http2 import http2_candidates
from tests.benchmark.ours import MOUNTED, on, ours
from tests.benchmark.peers import peers
from tests.benchmark.results import Results
from tests.benchmark.running import LOAD_CORE, PROXY_CORE, Unfit, running
from tests.benchmark.scenarios import SCENARIOS, Scenario
from tests.benchmark.upstreams import Upstreams, upstreams
from tests.real.nginx import NGINX

PROFILED = on(MOUNTED, "asyncio")
DIRECTLY = Candidate("directly, no proxy", None, everywhere=True)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    add = parser.add_argument
    add("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(SCENARIOS)}; all by default")
    add("--rounds", type=positive, default=3, help="runs of each candidate, in turn (3)")
    add("--seconds", type=positive, default=2, help="length of each run (2)")
    add("--again", type=int, default=0, metavar="N", help="repeat up to N times a run that others disturbed (0)")
    add(
        "--only",
        action="append",
        metavar="TEXT",
        help="candidates with TEXT in their name, in each scenario (repeatable)",
    )
    add("--all", action="store_true", help="every candidate in each scenario, also those that take part in few")
    add("--bin", action="append", default=[], metavar="DIR", help="look for programs here before the PATH (repeatable)")
    add(
        "--node-modules",
        metavar="DIR",
        default=os.environ.get("NODE_MODULES"),
        help="where npm installed ($NODE_MODULES)",
    )
    add("--write", metavar="FILE", type=Path, help="write the report to this file too, or between its marks")
    add("--profile", action="store_true", help=f"instead: what {PROFILED} (or --only) does, by cProfile")
    add("--sample", action="store_true", help="the same by py-spy, which distorts less")
    add("--list", action="store_true", help="list scenarios and candidates, and what is skipped")
    return parser


def chosen(candidates: Sequence[Candidate], scenario: Scenario, args: argparse.Namespace) -> list[Candidate]:
    """Return who takes part in a scenario."""
    able = [
        each
        for each in candidates
        if each.scenario == (scenario.name if scenario.own else None)
        and (scenario.for_all or not each.constant)
        and (each.command is not None or not scenario.proxied)
    ]
    if args.only:
        return [each for each in able if any(text in each.name for text in args.only)]
    return [each for each in able if args.all or scenario.for_all or each.everywhere]


def compare(candidates: Sequence[Candidate], behind: Upstreams, args: argparse.Namespace) -> Results:
    """Measure; the candidates take turns, so that what else the machine does meets them all."""
    results = Results()
    for name in args.scenarios or SCENARIOS:
        scenario = SCENARIOS[name]
        results.runs[name] = defaultdict(list)
        for number in range(1 if scenario.once else args.rounds):
            for candidate in chosen(candidates, scenario, args):
                # What the load could reach needs no rounds.
                if (name, candidate.name) in results.notes or (number and candidate.command is None):
                    continue
                said = f"{name}, round {number + 1}: {candidate.name}: "
                try:
                    figures = measured(candidate, scenario, getattr(behind, scenario.upstream), args)
                except Unfit as unfit:
                    results.notes[name, candidate.name] = str(unfit)
                    print(f"{said}{unfit}", file=sys.stderr)
                    continue
                results.runs[name][candidate.name].append(figures)
                shown = (f"{column.title} {column.text(figures.get(column.key))}" for column in scenario.columns)
                print(said + ", ".join(shown), file=sys.stderr)
    return results


def measured(candidate: Candidate, scenario: Scenario, upstream: int, args: argparse.Namespace) -> Figures:
    """Measure once, or again where that was asked for and others were there; return what they disturbed least."""
    runs: list[Figures] = []
    while not runs or (runs[-1][OTHERS.key] > QUIET and len(runs) <= args.again):
        with running(candidate, upstream) as proxy:
            runs.append(scenario.measure(proxy, args.seconds))
    return min(runs, key=lambda figures: figures[OTHERS.key])


def look_inside(candidates: Sequence[Candidate], find: Finder, args: argparse.Namespace) -> None:
    """Print a profile of each candidate that was asked for, in each scenario."""
    args.only = args.only or [PROFILED]
    with upstreams() as behind:
        for scenario in (SCENARIOS[name] for name in args.scenarios or ["small"]):
            upstream = getattr(behind, scenario.upstream)
            for candidate in chosen(candidates, scenario, args):
                if not candidate.python:
                    print(f"{candidate.name} is not written in Python", file=sys.stderr)
                    continue
                if args.profile:
                    print(profiling.profile(candidate, scenario, upstream, args.seconds))
                if args.sample:
                    print(profiling.sample(candidate, scenario, upstream, args.seconds, find))


def prepare() -> None:
    """Exit if something is missing; else take the core of the load, as children will, and descriptors enough."""
    try:
        Finder().program("wrk")
    except Absent:
        sys.exit("wrk makes the load and is not installed (Debian: apt-get install wrk)")
    if NGINX is None:
        sys.exit("nginx is the upstream and is not installed (Debian: apt-get install nginx-light)")
    if not {PROXY_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        sys.exit("cores 0 and 1 are not both ours; one is for the proxy, one for load and upstream")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.sched_setaffinity(0, {LOAD_CORE})


def main() -> None:
    args = parser().parse_args()
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser().error(f"no such scenario: {', '.join(sorted(unknown))} (there are {', '.join(SCENARIOS)})")
    find = Finder(tuple(args.bin), args.node_modules)
    own, skipped = ours(find)
    others, absent = peers(find)
    http2, missing = http2_candidates(find)
    candidates = [*own, *others, DIRECTLY, *http2]
    skipped += absent + missing
    if args.list:
        print("\n".join([f"{scenario.name:12} {scenario.about}" for scenario in SCENARIOS.values()]), end="\n\n")
        print("\n".join(each.name for each in candidates))
        print("\n".join(f"skipped: {each}" for each in skipped))
        return
    prepare()
    if args.profile or args.sample:
        look_inside(candidates, find, args)
        return
    about = [time.strftime("%Y-%m-%d"), machine.machine(), machine.load()]
    started = time.monotonic()
    with upstreams() as behind:
        results = compare(candidates, behind, args)
    about.append(
        f"rounds: {args.rounds}, each run {args.seconds} s; {(time.monotonic() - started) / 60:.1f} minutes in all"
    )
    seen = {name for runs in results.runs.values() for name in runs}
    about.append(machine.versions(candidate for candidate in candidates if candidate.name in seen))
    if skipped:
        about.append(f"skipped: {'; '.join(skipped)}")
    text = report.write(results, about)
    print(text, end="")
    if args.write:
        report.put(args.write, text)


if __name__ == "__main__":
    main()
