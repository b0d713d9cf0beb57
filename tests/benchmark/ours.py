"""Ours, in each way that it is run, and what one would write by hand in Python instead."""

from __future__ import annotations

from tests.benchmark.candidate import Absent, Candidate, Command, Finder, Place

PROGRAMS = "tests.benchmark.candidates"

STANDALONE = "ours, standalone"
MOUNTED = "ours, mounted"
OUR_SERVER = "ours, mounted, our server"
AIOHTTP = "aiohttp, hand-written"
CONSTANT = "Tornado, constant answer"
PLAIN = "Tornado, hand-written"
LOOPS = ("asyncio", "uvloop")


def on(name: str, loop: str) -> str:
    """Return what a candidate is called that runs on this event loop."""
    return f"{name}, {loop}"


def python(
    name: str, loop: str, program: str, *arguments: str, everywhere: bool = False, constant: bool = False
) -> Candidate:
    """Return a candidate that is one of the programs in ``candidates/``."""

    def command(place: Place) -> Command:
        return Command(["-m", f"{PROGRAMS}.{program}", place.upstream_url, str(place.port), loop, *arguments])

    return Candidate(on(name, loop), command, everywhere=everywhere, python=True, constant=constant)


def standalone(loop: str) -> Candidate:
    def command(place: Place) -> Command:
        listen = f"127.0.0.1:{place.port}"
        options = ["--to", place.upstream_url, "--listen", listen, "--access-log", "off", "--loop", loop]
        return Command(["-m", "tornado_proxy", *options])

    return Candidate(on(STANDALONE, loop), command, everywhere=True, python=True)


def ours(find: Finder) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, and what is skipped and why."""
    candidates: list[Candidate] = []
    skipped: list[str] = []
    for loop in LOOPS:
        try:
            if loop != "asyncio":
                find.package(loop)
        except Absent as absent:
            skipped.append(f"everything of Python on {loop} ({absent})")
            continue
        default = loop == "asyncio"
        candidates += [
            standalone(loop),
            python(OUR_SERVER, loop, "mounted", "--our-server", everywhere=default),
            python(MOUNTED, loop, "mounted", everywhere=default),
            python(CONSTANT, loop, "constant", constant=True),
        ]
        try:
            find.package("aiohttp")
            candidates.append(python(AIOHTTP, loop, "aiohttp_streaming", everywhere=True))
        except Absent as absent:
            skipped.append(f"{on(AIOHTTP, loop)} ({absent})")
    candidates += [
        python(f"{PLAIN}, {client} client", "asyncio", "buffering", "--client", client) for client in ("curl", "simple")
    ]
    return candidates, skipped
