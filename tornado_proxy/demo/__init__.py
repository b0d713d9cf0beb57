"""The embedded upstream of ``python -m tornado_proxy --demo``, and what the demo mounts in front of it.

Nothing here knows the proxy: the standalone passes each of :meth:`Demo.mounts` to the same ``mount()`` that users call.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from tornado.httpserver import HTTPServer

from tornado_proxy.demo.upstream import serve


@dataclass(frozen=True, slots=True)
class Demo:
    """A running embedded upstream. Its sockets live as long as this object; ``stop`` gives them back."""

    url: str
    server: HTTPServer
    # Bound and never listening: connections to it are refused, and no other program can take the port meanwhile.
    refusing: socket.socket

    def mounts(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return ``(prefix, upstream, options)`` for each mount, the most specific first."""
        refusing_port = self.refusing.getsockname()[1]
        return [
            ("/refused", f"http://127.0.0.1:{refusing_port}", {}),
            ("/slow-head", f"{self.url}/hang", {"response_timeout": 1.0}),
            ("/", self.url, {}),
        ]

    async def stop(self) -> None:
        """Close the upstream and every connection to it."""
        self.server.stop()
        await self.server.close_all_connections()
        self.refusing.close()


async def start() -> Demo:
    """Start the embedded upstream on the running loop, on a free port of 127.0.0.1."""
    server, port = serve(proxy_pid=os.getpid())
    refusing = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    refusing.bind(("127.0.0.1", 0))
    return Demo(f"http://127.0.0.1:{port}", server, refusing)
