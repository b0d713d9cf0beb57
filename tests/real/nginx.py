"""nginx as an upstream: its own prefix and configuration, our own user, one worker."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Self

# Debian puts it where users without privileges do not look.
NGINX = shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")

CONFIGURATION = """
daemon off;
worker_processes 1;
{user}
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{port}{protocol};
        {server}
    }}
}}
"""


class Nginx:
    """nginx, started on entry, ended on exit; ``server`` is what stands in its one ``server`` block.

    It speaks HTTP/1.1, or with ``protocol="http2"`` only HTTP/2.

    The socket is ours, listens before nginx runs, and is handed over as nginx hands it to its own next binary; so there
    is neither a race for the port nor a wait until it answers.
    """

    def __init__(self, directory: Path, server: str, protocol: str = "") -> None:
        self._directory = directory
        self._server = server
        self._protocol = f" {protocol}" if protocol else ""

    def __enter__(self) -> Self:
        assert NGINX is not None
        with socket.create_server(("127.0.0.1", 0), backlog=511) as sock:
            self.port: int = sock.getsockname()[1]
            # Under root the worker would be nobody, who may not read a temporary directory.
            user = "" if os.geteuid() else "user root;"
            text = CONFIGURATION.format(port=self.port, server=self._server, protocol=self._protocol, user=user)
            configuration = self._directory / "nginx.conf"
            configuration.write_text(text, encoding="utf-8")
            with (self._directory / "nginx.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [NGINX, "-e", "stderr", "-p", str(self._directory), "-c", str(configuration)],
                    env={**os.environ, "NGINX": f"{sock.fileno()};"},
                    pass_fds=[sock.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self._directory / "nginx.log").read_text(encoding="utf-8", errors="replace")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
