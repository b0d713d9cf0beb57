"""Large bodies, one after the other on one connection, made by a client that only moves bytes."""

from __future__ import annotations

import http.client
import statistics
import time
from collections.abc import Callable

from tests.benchmark.figures import Figures
from tests.benchmark.running import Running, Unfit
from tests.benchmark.upstreams import LARGE

BLOCK = 1024 * 1024
AT_LEAST = 3
# Nothing moves for so long: it hangs.
STALLED = 30


def download(running: Running, seconds: int) -> Figures:
    buffer = memoryview(bytearray(BLOCK))

    def one(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", "/files/large")
        answer = connection.getresponse()
        got = 0
        while count := answer.readinto(buffer):
            got += count
        if (answer.status, got) != (200, LARGE):
            raise Unfit(f"{answer.status} with {got} bytes in place of {LARGE}")

    return in_turn(running, seconds, one)


def upload(running: Running, seconds: int) -> Figures:
    block = bytes(BLOCK)
    whole, rest = divmod(LARGE, BLOCK)
    blocks = [block] * whole + [block[:rest]]

    def one(connection: http.client.HTTPConnection) -> None:
        connection.request("PUT", "/swallow", iter(blocks), {"Content-Length": str(LARGE)})
        answer = connection.getresponse()
        said = answer.read()
        if (answer.status, said) != (200, b"%d" % LARGE):
            raise Unfit(f"{answer.status}, and the upstream got {said[:20]!r} bytes of {LARGE}")

    return in_turn(running, seconds, one)


def in_turn(running: Running, seconds: int, one: Callable[[http.client.HTTPConnection], None]) -> Figures:
    """Make transfers for about this long; the first one does not count."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=STALLED)
    took: list[float] = []
    try:
        one(connection)
        with running.metered() as cost:
            until = time.monotonic() + seconds
            while len(took) < AT_LEAST or time.monotonic() < until:
                started = time.perf_counter()
                one(connection)
                took.append(time.perf_counter() - started)
    except (OSError, http.client.HTTPException) as error:
        raise Unfit(repr(error)) from error
    finally:
        connection.close()
    middle = statistics.median(took)
    return {"rate": LARGE / 1e6 / middle, "seconds": middle, "slowest": max(took), **cost.figures(len(took))}
