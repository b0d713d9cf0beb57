"""The order of the modules: each imports only from those above it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tornado_proxy"
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")

# Top to bottom; modules in one row know nothing of each other.
LAYERS = [
    ["_version", "errors", "decoding", "kernel"],
    ["headers"],
    ["fieldlines", "forwarding"],
    ["urls", "framing", "trailers"],
    ["references"],
    ["server.parser", "server.detach", "server.turns"],
    ["server.link"],
    ["server.request", "server.application"],
    ["server.http2", "server.http2.limits", "server.http2.frames", "server.http2.heads"],
    ["server.http2.engine", "server.http2.outbox"],
    ["server.http2.receiving"],
    ["server.http2.stream"],
    ["server.http2.sending"],
    ["server.http2.ending"],
    ["server.http2.connection"],
    ["server.http2.choice"],
    ["server.ending"],
    ["server.connection"],
    ["server.http1"],
    ["server"],
    ["flow"],
    ["decoded"],
    ["messages"],
    ["responses"],
    ["clients.base", "clients.dial"],
    ["clients.settings"],
    ["clients.curl.options", "clients.curl.sockets", "clients.curl.errors"],
    ["clients.curl.transfer"],
    ["clients.curl.request"],
    ["clients.curl.driver"],
    ["clients.curl.multiplexed"],
    ["clients.curl"],
    ["clients.transfers"],
    ["clients.simple", "clients.httpx", "clients.aiohttp", "clients.fake"],
    ["clients"],
    ["options"],
    ["connections", "timeouts", "tunnel"],
    ["downstream"],
    ["handshake"],
    ["inbound"],
    ["heads"],
    ["draining", "upload"],
    ["attempts"],
    ["forwarder"],
    ["downstream.handler"],
    ["mixin"],
    ["downstream.direct"],
    ["handlers"],
    ["routing"],
    ["__init__"],
    ["serving", "accesslog", "demo.upstream"],
    ["demo"],
    ["demo.__main__", "standalone"],
    ["__main__"],
]
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield (name if name == "__init__" else name.removesuffix(".__init__")), path


def imports(path):
    """Yield the modules of the package that ``path`` imports, by their names below the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            below = f"{node.module}.{{}}".format
            names = [
                below(alias.name) if (below(alias.name).removeprefix("tornado_proxy.")) in RANK else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == "tornado_proxy":
                yield "__init__"
            elif name.startswith("tornado_proxy."):
                yield name.removeprefix("tornado_proxy.")


MODULES = dict(modules())


class TestLayers:
    def test_the_readme_says_what_is_where(self):
        rows = re.findall(r"^\| (`.*?) \|", README.partition("## Developing")[2], re.MULTILINE)
        named = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
        modules = {path.name for path in PACKAGE.glob("[!_]*.py")}
        packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
        assert sorted(named) == sorted(modules | packages)

    def test_every_module_has_its_place(self):
        assert set(MODULES) == set(RANK)

    @pytest.mark.parametrize("name", MODULES)
    def test_a_module_imports_only_from_those_above(self, name):
        below = [other for other in imports(MODULES[name]) if RANK[other] >= RANK[name]]
        assert below == []

    @pytest.mark.parametrize(
        ("library", "users"),
        [
            ("pycurl", [f"clients.curl.{name}" for name in ("driver", "errors", "multiplexed", "sockets", "transfer")]),
            ("httpx", ["clients.httpx"]),
            ("aiohttp", ["clients.aiohttp"]),
            ("yarl", ["clients.aiohttp"]),
            ("h2", ["server.http2.connection", "server.http2.engine", "server.http2.sending"]),
            ("hpack", ["server.http2.engine", "server.http2.heads"]),
        ],
    )
    def test_a_library_is_imported_by_its_client_only(self, library, users):
        imported = re.compile(rf"^\s*(?:import|from) {library}\b", re.MULTILINE)
        assert [name for name, path in MODULES.items() if imported.search(path.read_text(encoding="utf-8"))] == users

    def test_the_forwarder_knows_no_handler(self):
        assert "tornado.web" not in MODULES["forwarder"].read_text(encoding="utf-8")
