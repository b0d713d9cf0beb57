"""``python -m tests.benchmark``: our proxy beside others, on one core each. See README.md."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.benchmark import machine, report
from tests.benchmark.candidate import Absent, Candidate, Finder
from tests.benchmark.ours import ours
from tests.benchmark.peers import peers
from tests.benchmark.results import Results
from tests.benchmark.running import LOAD_CORE, PROXY_CORE, Unfit, running
from tests.benchmark.scenarios import SCENARIOS, Scenario
from tests.benchmark.upstreams import Upstreams, upstreams
from tests.real.nginx import NGINX

DIRECTLY = Candidate("directly, no proxy", None, everywhere=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    add = parser.add_argument
    add("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(SCENARIOS)}; all by default")
    add("--rounds", type=int, default=3, help="runs of each candidate, in turn (3)")
    add("--seconds", type=int, default=2, help="length of each run (2)")
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
    add("--write", metavar="FILE", type=Path, help="write the report to this file too")
    add("--list", action="store_true", help="list scenarios and candidates, and what is skipped")
    return parser


def chosen(candidates: Sequence[Candidate], scenario: Scenario, args: argparse.Namespace) -> list[Candidate]:
    """Return who takes part in a scenario."""
    able = [each for each in candidates if scenario.for_all or not each.constant]
    if args.only:
        return [each for each in able if any(text in each.name for text in args.only)]
    return [each for each in able if args.all or scenario.for_all or each.everywhere]


def compare(candidates: Sequence[Candidate], behind: Upstreams, args: argparse.Namespace) -> Results:
    """Measure; the candidates take turns, so that what else the machine does meets them all."""
    results = Results()
    for name in args.scenarios:
        scenario = SCENARIOS[name]
        results.runs[name] = defaultdict(list)
        for number in range(args.rounds):
            for candidate in chosen(candidates, scenario, args):
                if (name, candidate.name) in results.notes:
                    continue
                said = f"{name}, round {number + 1}: {candidate.name}: "
                try:
                    with running(candidate, getattr(behind, scenario.upstream)) as proxy:
                        figures = scenario.measure(proxy, args.seconds)
                except Unfit as unfit:
                    results.notes[name, candidate.name] = str(unfit)
                    print(f"{said}{unfit}", file=sys.stderr)
                    continue
                results.runs[name][candidate.name].append(figures)
                shown = (f"{column.title} {column.text(figures.get(column.key))}" for column in scenario.columns)
                print(said + ", ".join(shown), file=sys.stderr)
    return results


def main() -> None:
    args = parser().parse_args()
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser().error(f"no such scenario: {', '.join(sorted(unknown))} (there are {', '.join(SCENARIOS)})")
    args.scenarios = args.scenarios or list(SCENARIOS)
    find = Finder(tuple(args.bin), args.node_modules)
    try:
        find.program("wrk")
    except Absent:
        sys.exit("wrk makes the load and is not installed (Debian: apt-get install wrk)")
    if NGINX is None:
        sys.exit("nginx is the upstream and is not installed (Debian: apt-get install nginx-light)")
    if not {PROXY_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        sys.exit("cores 0 and 1 are not both ours; one is for the proxy, one for load and upstream")

    own, skipped = ours(find)
    others, absent = peers(find)
    candidates = [*own, *others, DIRECTLY]
    skipped += absent
    if args.list:
        print("\n".join([f"{scenario.name:12} {scenario.about}" for scenario in SCENARIOS.values()]), end="\n\n")
        print("\n".join(each.name for each in candidates))
        print("\n".join(f"skipped: {each}" for each in skipped))
        return
    about = [machine.machine(), machine.versions(candidates), machine.load()]
    started = time.monotonic()
    # The load is made here or in children of this process.
    os.sched_setaffinity(0, {LOAD_CORE})
    with upstreams() as behind:
        results = compare(candidates, behind, args)
    about.append(
        f"rounds: {args.rounds}, each run {args.seconds} s; {(time.monotonic() - started) / 60:.0f} minutes in all"
    )
    if skipped:
        about.append(f"skipped: {'; '.join(skipped)}")
    text = report.write(results, about)
    print(text, end="")
    if args.write:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
