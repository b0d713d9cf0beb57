"""Ours, in each way that it is run, and what one would write by hand in Python instead."""

from __future__ import annotations

from collections.abc import Callable

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


def standalone(loop: str, *more: str) -> Candidate:
    def command(place: Place) -> Command:
        listen = f"127.0.0.1:{place.port}"
        options = ["--to", place.upstream_url, "--listen", listen, "--access-log", "off", "--loop", loop]
        return Command(["-m", "tornado_proxy", *options, *more])

    return Candidate(on(STANDALONE, loop), command, everywhere=True, python=True)


def our_server(loop: str) -> Candidate:
    return python(OUR_SERVER, loop, "mounted", "--our-server", everywhere=loop == "asyncio")


def mounted(loop: str) -> Candidate:
    return python(MOUNTED, loop, "mounted", everywhere=loop == "asyncio")


def constant(loop: str) -> Candidate:
    return python(CONSTANT, loop, "constant", constant=True)


def aiohttp(loop: str) -> Candidate:
    return python(AIOHTTP, loop, "aiohttp_streaming", everywhere=True)


def loops_there(find: Finder, what: str) -> tuple[list[str], list[str]]:
    """Return the event loops that are there, and what is skipped: ``what`` runs on each."""
    loops: list[str] = []
    skipped: list[str] = []
    for loop in LOOPS:
        try:
            if loop != "asyncio":
                find.package(loop)
            loops.append(loop)
        except Absent as absent:
            skipped.append(f"{what} on {loop} ({absent})")
    return loops, skipped


def ours(find: Finder) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, and what is skipped and why."""
    loops, skipped = loops_there(find, "everything")
    kinds: list[Callable[[str], Candidate]] = [standalone, our_server, mounted, constant, aiohttp]
    try:
        find.package("aiohttp")
    except Absent as absent:
        skipped.append(f"{AIOHTTP} ({absent})")
        kinds.remove(aiohttp)
    candidates = [kind(loop) for kind in kinds for loop in loops]
    candidates += [
        python(f"{PLAIN}, {client} client", "asyncio", "buffering", "--client", client) for client in ("curl", "simple")
    ]
    return candidates, skipped
