"""Where a run was made: the machine, the kernel, and the version of everything that took part."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import pycurl

from tests.benchmark.candidate import Absent, Candidate, Finder, said_version
from tests.real.nginx import NGINX

PACKAGES = ("tornado", "pycurl", "uvloop", "aiohttp", "h2")


def processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; {platform.system()} {platform.release()}"


def load() -> str:
    """Return how busy the machine was before the run; more than nothing makes every figure doubtful."""
    return f"load average before the run: {os.getloadavg()[0]:.2f}"


def versions(candidates: Iterable[Candidate]) -> str:
    said = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            said.append(f"{name} {version(name)}")
    libcurl = re.search(r"libcurl/\S+", pycurl.version)
    said.append(libcurl[0].replace("/", " ") if libcurl else pycurl.version)
    assert NGINX is not None
    said += [f"nginx {said_version(NGINX, '-v')} (upstream)", f"wrk {said_version(Finder().program('wrk'), '-v')}"]
    with contextlib.suppress(Absent):
        said.append(f"h2load {said_version(Finder().program('h2load'), '--version')}")
    # Several may be of one program.
    said += dict.fromkeys(candidate.version for candidate in candidates if candidate.version)
    return ", ".join(said)
