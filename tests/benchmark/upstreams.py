"""The upstreams, on the core of the load: nginx for what it can do, and ``live_upstream.py`` for the rest."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark.candidate import Candidate, Command, Place
from tests.benchmark.running import LOAD_CORE, SMALL, pinned, running
from tests.real.nginx import Nginx

MEDIUM = 64 * 1024
LARGE = 100_000_000

SERVER = f"""
keepalive_timeout 600;
client_max_body_size 0;
sendfile on;
tcp_nopush on;
location / {{ default_type text/plain; return 200 '{"x" * SMALL}'; }}
location /files/ {{ alias {{files}}/; default_type application/octet-stream; }}
"""


@dataclass(frozen=True, slots=True)
class Upstreams:
    """The ports that they listen on."""

    nginx: int
    live: int


@contextlib.contextmanager
def upstreams() -> Iterator[Upstreams]:
    """Start them; they serve every candidate in turn."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = directory / "files"
        files.mkdir()
        (files / "medium").write_bytes(b"m" * MEDIUM)
        (files / "large").write_bytes(b"l" * LARGE)
        with pinned(LOAD_CORE):
            nginx = stack.enter_context(Nginx(directory, SERVER.replace("{files}", str(files))))
            live = Candidate("live upstream", live_upstream, python=True)
            yield Upstreams(nginx.port, stack.enter_context(running(live, 0, core=LOAD_CORE)).port)


def live_upstream(place: Place) -> Command:
    return Command(["-m", "tests.benchmark.live_upstream", str(place.port)])
