"""What is compared: a name, what it needs to be there, and the command that starts it. Nothing here runs anything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

UNKNOWN = "of unknown version"


class Absent(Exception):
    """A candidate cannot run here; the message says what is not installed."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a candidate is told: where to listen, where its upstream is, and a directory of its own to write into."""

    port: int
    upstream: int
    directory: Path

    @property
    def upstream_url(self) -> str:
        return f"http://127.0.0.1:{self.upstream}"

    def write(self, name: str, text: str) -> str:
        """Write a file, such as a configuration, and return its path."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return str(path)


@dataclass(frozen=True, slots=True)
class Command:
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One proxy. ``command`` is ``None`` for none at all: the load goes directly to the upstream."""

    name: str
    command: Callable[[Place], Command] | None
    # Program and version, for the report; empty where the list of Python packages says it.
    version: str = ""
    # Takes part in every scenario. The others only meet in the first one, to keep the whole run short.
    everywhere: bool = False
    # Written in Python and started by ``python -m``, so that it can be profiled.
    python: bool = False
    # Answers by itself, so that only small requests make sense.
    constant: bool = False
    # The scenario that it is there for, and takes part in alone; the others meet in all the rest.
    scenario: str | None = None
    # Has to answer HTTP/2 with prior knowledge, and is loaded with it.
    http2: bool = False


@dataclass(frozen=True, slots=True)
class Finder:
    """Looks for what candidates need, in ``directories`` before the PATH."""

    directories: tuple[str, ...] = ()
    node_modules: str | None = None

    def program(self, name: str) -> str:
        """Return the path of an executable."""
        # Debian puts servers where users without privileges do not look.
        near = [*self.directories, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"]
        found = shutil.which(name, path=os.pathsep.join(near))
        if found is None:
            raise Absent(f"no {name} on the PATH")
        return found

    def package(self, name: str) -> str:
        """Return the version of a package of this Python."""
        if importlib.util.find_spec(name) is None:
            raise Absent(f"no Python package {name}")
        return version(name)

    def node_package(self, name: str) -> tuple[str, str]:
        """Return the directory of a package of node, and its version."""
        if self.node_modules is None:
            raise Absent(f"no npm package {name}: --node-modules not given")
        directory = Path(self.node_modules, name).resolve()
        if not directory.is_dir():
            raise Absent(f"no npm package {name} in {self.node_modules}")
        about = json.loads((directory / "package.json").read_text(encoding="utf-8"))
        return str(directory), about["version"]


def said_version(*command: str) -> str:
    """Return the first thing that looks like a version in what a program says of itself."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
    return found[0] if found else UNKNOWN
