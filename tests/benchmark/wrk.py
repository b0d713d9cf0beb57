"""Many requests for small things, made by wrk on 32 connections."""

from __future__ import annotations

import http.client
import json
import subprocess
from pathlib import Path

from tests.benchmark.candidate import Finder
from tests.benchmark.figures import Figures
from tests.benchmark.running import Running, Unfit

SCRIPT = str(Path(__file__).with_name("load.lua"))
CONNECTIONS = 32
WARM_UP = 1


def check(running: Running, method: str, path: str, sent: int, length: int) -> None:
    """Raise :class:`Unfit` unless one request is answered with 200 and a body of this length."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    try:
        connection.request(method, path, b"x" * sent if sent else None)
        answer = connection.getresponse()
        got = len(answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise Unfit(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()
    if (answer.status, got) != (200, length):
        raise Unfit(f"{method} {path}: {answer.status} with {got} bytes in place of {length}")


def requests(
    running: Running, seconds: int, path: str, length: int, *, method: str = "GET", sent: int = 0, close: bool = False
) -> Figures:
    """Ask for ``path`` (answered with ``length`` bytes), sending ``sent`` bytes; with ``close``, a connection each."""
    check(running, method, path, sent, length)

    def wrk(seconds: int) -> dict[str, float]:
        said = subprocess.run(
            [Finder().program("wrk"), "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", SCRIPT]
            + (["-H", "Connection: close"] if close else [])
            + [running.url + path, "--", method, str(sent)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        figures: dict[str, float] = json.loads(said.splitlines()[-1])
        if figures["refused"] or not figures["requests"]:
            raise Unfit(f"{method} {path}: {figures['refused']} of {figures['requests']} answers were errors")
        return figures

    wrk(WARM_UP)
    before = running.cpu()
    said = wrk(seconds)
    spent = running.cpu() - before
    figures = {
        "rate": said["requests"] / said["seconds"],
        "p50": said["p50"],
        "p99": said["p99"],
        "errors": said["cut"],
    }
    if running.process:
        figures["cpu"] = 1e6 * spent / said["requests"]
    return figures
