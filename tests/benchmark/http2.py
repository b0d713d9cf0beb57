"""Who takes part in ``http2``: what serves HTTP/2 without TLS, to who begins with it; and over HTTP/1.1 ours again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.benchmark.candidate import Absent, Candidate, Command, Finder, Place, said_version
from tests.benchmark.ours import OUR_SERVER, STANDALONE, loops_there, on, python, standalone
from tests.benchmark.servers import caddy, envoy

SCENARIO = "http2"


def nghttpx(find: Finder) -> Candidate:
    program = find.program("nghttpx")

    def command(place: Place) -> Command:
        arguments = [f"--frontend=127.0.0.1,{place.port};no-tls", f"--backend=127.0.0.1,{place.upstream}"]
        arguments += ["--conf=/dev/null", "--workers=1", "--log-level=ERROR"]
        # No access log is its default. Else requests would wait for one of eight connections to the upstream.
        return Command([program, *arguments, "--backend-connections-per-host=512"])

    return Candidate("nghttpx", command, f"nghttpx {said_version(program, '--version')}")


def h2c_caddy(find: Finder) -> Candidate:
    # It serves HTTP/2 without TLS only where it is told to.
    return caddy(find, "servers {\n protocols h1 h2c\n }")


def ours_over_http2(loop: str) -> list[Candidate]:
    return [
        replace(standalone(loop, "--http2"), name=on(f"{STANDALONE}, HTTP/2", loop), http2=True),
        replace(python(f"{OUR_SERVER}, HTTP/2", loop, "mounted", "--our-server", "--http2"), http2=True),
    ]


def ours_over_http1(loop: str) -> list[Candidate]:
    return [replace(standalone(loop), name=on(f"{STANDALONE}, HTTP/1.1", loop))]


OTHERS: tuple[Callable[[Finder], Candidate], ...] = (nghttpx, h2c_caddy, envoy)


def http2_candidates(find: Finder) -> tuple[list[Candidate], list[str]]:
    """Return the candidates, and what is skipped and why."""
    try:
        find.program("h2load")
    except Absent as absent:
        return [], [f"{SCENARIO} ({absent})"]
    candidates: list[Candidate] = []
    loops, skipped = loops_there(find, f"{SCENARIO}: ours")
    try:
        find.package("h2")
        candidates += [candidate for loop in loops for candidate in ours_over_http2(loop)]
    except Absent as absent:
        skipped.append(f"{SCENARIO}: ours over HTTP/2 ({absent})")
    for make in OTHERS:
        try:
            candidates.append(replace(make(find), http2=True))
        except Absent as absent:
            skipped.append(f"{SCENARIO}: {make.__name__} ({absent})")
    candidates += [candidate for loop in loops for candidate in ours_over_http1(loop)]
    candidates.append(Candidate("directly, no proxy, HTTP/1.1", None))
    return [replace(candidate, scenario=SCENARIO) for candidate in candidates], skipped
