"""Proxies that we did not write, run as is best beside one process of Python: one worker, streaming, no access log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.benchmark.candidate import Absent, Candidate, Command, Finder, Place, said_version

NODE = "node http-proxy"
PROGRAMS = Path(__file__).with_name("candidates")


def node_http_proxy(find: Finder, package: str = "http-proxy") -> Candidate:
    node = find.program("node")
    directory, version = find.node_package(package)

    def command(place: Place) -> Command:
        program = str(PROGRAMS / "node_proxy.cjs")
        return Command([node, program, place.upstream_url, str(place.port)], {"NODE_PACKAGE": directory})

    name = f"node {package}"
    return Candidate(name, command, f"node {said_version(node, '--version')}, {package} {version}", name == NODE)


def node_http_proxy_3(find: Finder) -> Candidate:
    return node_http_proxy(find, "http-proxy-3")


PEERS: tuple[Callable[[Finder], Candidate], ...] = (node_http_proxy, node_http_proxy_3)


def peers(find: Finder) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that are installed, and what is skipped and why."""
    candidates: list[Candidate] = []
    skipped: list[str] = []
    for make in PEERS:
        try:
            candidates.append(make(find))
        except Absent as absent:
            skipped.append(f"{make.__name__} ({absent})")
    return candidates, skipped
