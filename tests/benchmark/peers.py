"""Proxies that we did not write, run as is best beside one process of Python: one worker, streaming, no access log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmark.candidate import Absent, Candidate, Command, Finder, Place, said_version
from tests.benchmark.servers import caddy, envoy, haproxy, nginx, traefik

NODE = "node http-proxy"
PROGRAMS = Path(__file__).with_name("candidates")


def node_http_proxy(find: Finder, package: str = "http-proxy") -> Candidate:
    node = find.program("node")
    directory, version = find.node_package(package)

    def command(place: Place) -> Command:
        program = str(PROGRAMS / "node_proxy.cjs")
        return Command([node, program, place.upstream_url, str(place.port)], {"NODE_PACKAGE": directory})

    name = f"node {package}"
    return Candidate(name, command, f"{package} {version} on node {said_version(node, '--version')}", name == NODE)


def node_http_proxy_3(find: Finder) -> Candidate:
    return node_http_proxy(find, "http-proxy-3")


def configurable_http_proxy(find: Finder) -> Candidate:
    node = find.program("node")
    directory, version = find.node_package("configurable-http-proxy")

    def command(place: Place) -> Command:
        arguments = ["--ip", "127.0.0.1", "--port", str(place.port), "--default-target", place.upstream_url]
        arguments += ["--api-socket", str(place.directory / "api"), "--log-level", "error"]
        program = str(Path(directory, "bin", "configurable-http-proxy"))
        return Command([node, program, *arguments], {"CONFIGPROXY_AUTH_TOKEN": "any"})

    return Candidate("configurable-http-proxy", command, f"configurable-http-proxy {version}")


def proxy_py(find: Finder) -> Candidate:
    program = find.program("proxy")

    def command(place: Place) -> Command:
        arguments = ["--hostname", "127.0.0.1", "--port", str(place.port), "--data-dir", str(place.directory)]
        arguments += ["--enable-reverse-proxy", "--plugins", "proxy_py_plugin.Everything", "--log-level", "e"]
        # Without threads it ends when the first client leaves, at least 2.4.10 does.
        arguments += ["--threaded", "--num-acceptors", "1", "--num-workers", "1", "--timeout", "3600"]
        return Command([program, *arguments], {"PYTHONPATH": str(PROGRAMS), "UPSTREAM": place.upstream_url})

    return Candidate("proxy.py", command, f"proxy.py {said_version(program, '--version')}")


def mitmproxy(find: Finder) -> Candidate:
    program = find.program("mitmdump")

    def command(place: Place) -> Command:
        mode = f"reverse:{place.upstream_url}@127.0.0.1:{place.port}"
        # Bodies of more than a byte are streamed.
        settings = [f"confdir={place.directory}", "stream_large_bodies=1", "keep_host_header=true"]
        options = [option for setting in settings for option in ("--set", setting)]
        return Command([program, "--quiet", "--mode", mode, *options])

    return Candidate("mitmproxy", command, f"mitmproxy {said_version(program, '--version')}")


def jupyter_server_proxy(find: Finder) -> Candidate:
    program = find.program("jupyter-standaloneproxy")
    # It does not say which version it is, but the Python beside it knows.
    asking = "import importlib.metadata as m; print(m.version('jupyter-server-proxy'))"
    version = said_version(str(Path(program).with_name(Path(sys.executable).name)), "-c", asking)

    def command(place: Place) -> Command:
        arguments = ["--no-authentication", "--address=127.0.0.1", f"--port={place.port}", "--base-url=/"]
        arguments += [f"--server-port={place.upstream}", "--activity-interval=0", "--log-level=ERROR"]
        # It wants to start the server itself; this one runs already.
        return Command([program, *arguments, "--", "sleep", "infinity"], {"HOME": str(place.directory)} | HUB)

    return Candidate("jupyter-server-proxy", command, f"jupyter-server-proxy {version}")


# What a hub would tell it.
HUB = {"JUPYTERHUB_SERVICE_PREFIX": "/", "JUPYTERHUB_API_TOKEN": "any", "JUPYTERHUB_HOST": ""}

PEERS: tuple[Callable[[Finder], Candidate], ...] = (
    nginx,
    haproxy,
    envoy,
    caddy,
    traefik,
    node_http_proxy,
    node_http_proxy_3,
    configurable_http_proxy,
    proxy_py,
    mitmproxy,
    jupyter_server_proxy,
)


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
